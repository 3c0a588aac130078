"""No module imports itself through others, at module level or inside a function: each can be read by itself."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "truffula"


def module_files() -> dict[str, Path]:
    """Path by dotted name, of every module of the package."""
    found = {}
    for path in SRC.rglob("*.py"):
        parts = ("truffula", *path.relative_to(SRC).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module that run: all but what only a type checker reads."""
    yield node
    children = node.orelse if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else None
    for child in ast.iter_child_nodes(node) if children is None else children:
        yield from executed(child)


def imported(source: str, known: Mapping[str, object]) -> set[str]:
    """The modules among ``known`` that a source imports, lazily too."""
    found: set[str] = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known.keys()
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner} if inner in known else {node.module or ""} & known.keys()
    return found


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty when there is none."""
    graph = {name: imported(source, sources) - {name} for name, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_import_circles() -> None:
    found = circle({name: path.read_text() for name, path in module_files().items()})
    assert not found, f"{' imports '.join(found)}: move what both need to a third module, or pass it as an argument"


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ("import truffula.b", "from truffula import a", True),
        ("def f():\n    from truffula.b import x", "from truffula.a import y", True),
        ("if TYPE_CHECKING:\n    from truffula.b import x", "from truffula.a import y", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import truffula.b", "import truffula.a", True),
        ("from truffula.b import x", "import os", False),
    ],
)
def test_lazy_imports_count_and_those_for_type_checkers_do_not(one: str, other: str, found: bool) -> None:
    assert bool(circle({"truffula": "", "truffula.a": one, "truffula.b": other})) is found
