"""``is_plain``: whether a chat template is so simple that it cannot take long, whatever it is given.

A plain template is small, loops over the messages only, without a loop inside the loop, calls nothing but a few
functions that take time in proportion to their argument, and computes no variable from another. So its work is at most
its size times the number of messages times their length, and a server may render it on its event loop when the messages
are short. Most templates without tools are plain.
"""

from __future__ import annotations

from jinja2 import nodes

MAX_SOURCE_CHARS = 8192
MAX_NODES = 600
_FILTERS = frozenset("trim length count upper lower string default d first last tojson safe".split())  # noqa: SIM905
_TESTS = frozenset(
    "defined undefined none string mapping iterable sequence number boolean true false eq equalto ne in".split()  # noqa: SIM905
)
_METHODS = frozenset("strip lstrip rstrip startswith endswith upper lower get items keys split".split())  # noqa: SIM905
_FUNCTIONS = frozenset({"raise_exception", "namespace"})
_SIMPLE = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Name, nodes.NSRef, nodes.Const, nodes.Getattr,
    nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr,
    nodes.Add, nodes.Sub, nodes.Concat, nodes.Neg, nodes.Keyword, nodes.List, nodes.Tuple,
)  # fmt: skip


def is_plain(tree: nodes.Template) -> bool:
    """Whether the parsed template ``tree`` is plain. Its source has at most ``MAX_SOURCE_CHARS``."""
    everything = list(tree.find_all(nodes.Node))
    assigned = {
        target.name for node in everything if isinstance(node, nodes.Assign) and (target := _target(node)) is not None
    }
    lists = _names_of_messages(tree)
    loops = list(tree.find_all(nodes.For))
    return (
        len(everything) <= MAX_NODES
        and not any(loop.find(nodes.For) for loop in loops)
        and all(_is_simple(node, assigned, lists) for node in everything)
    )


def _is_simple(node: nodes.Node, assigned: set[str], lists: set[str]) -> bool:
    if isinstance(node, nodes.Const):
        return not isinstance(node.value, int | float) or abs(node.value) < 1_000_000
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS
    if isinstance(node, nodes.Test):
        return node.name in _TESTS
    if isinstance(node, nodes.Call):
        called = node.node
        if isinstance(called, nodes.Getattr):
            return called.attr in _METHODS
        return isinstance(called, nodes.Name) and called.name in _FUNCTIONS
    if isinstance(node, nodes.Mod):  # of a loop's counter: with text on its left it is a format
        left, right = node.left, node.right
        counts = isinstance(left, nodes.Getattr) and isinstance(left.node, nodes.Name) and left.node.name == "loop"
        return counts and isinstance(right, nodes.Const) and isinstance(right.value, int)
    if isinstance(node, nodes.For):
        return not node.recursive and _is_messages(node.iter, lists)
    if isinstance(node, nodes.Assign):
        target = _target(node)
        if target is None:
            return False
        return target.name in lists or not any(name.name in assigned for name in _names(node.node))
    return isinstance(node, _SIMPLE)


def _target(node: nodes.Assign) -> nodes.Name | nodes.NSRef | None:
    return node.target if isinstance(node.target, nodes.Name | nodes.NSRef) else None


def _names(node: nodes.Node) -> list[nodes.Name]:
    found = list(node.find_all(nodes.Name))
    return [node, *found] if isinstance(node, nodes.Name) else found


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """``messages``, and the variables that hold nothing but it or a slice of it."""
    values: dict[str, list[nodes.Node]] = {}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            values.setdefault(node.target.name, []).append(node.node)
    if "messages" in values:
        return set()
    return {"messages"} | {name for name, given in values.items() if all(_is_messages(v, {"messages"}) for v in given)}


def _is_messages(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node = node.node
    return isinstance(node, nodes.Name) and node.name in names
