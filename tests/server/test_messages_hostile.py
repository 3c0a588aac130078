"""Whatever JSON stands in a body of /v1/messages, it is read or refused by name: no other exception."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from truffula.errors import InvalidRequest
from truffula.items import Message, Tool
from truffula.server.messages_items import read_conversation, read_tools

KINDS = ["text", "thinking", "tool_use", "tool_result", "image", "custom", "bash_20250124"]
WORDS = ["user", "assistant", "system", *KINDS]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.sampled_from([*WORDS, "", "a", "\ud800"])
)
NAMES = """role content type text thinking id name input tool_use_id is_error input_schema description strict
cache_control citations caller allowed_callers defer_loading other"""
KEYS = st.sampled_from(NAMES.split())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
BLOCKS = st.fixed_dictionaries({"type": st.sampled_from(WORDS) | VALUES}, optional={
    "text": VALUES, "thinking": VALUES, "id": st.sampled_from(["a", "b"]) | VALUES, "name": VALUES,
    "input": st.dictionaries(KEYS, VALUES, max_size=2) | VALUES, "tool_use_id": st.sampled_from(["a", "b"]) | VALUES,
    "content": VALUES, "is_error": VALUES, "other": VALUES,
})  # fmt: skip
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(WORDS[:3]) | VALUES, "content": st.lists(BLOCKS, max_size=3) | VALUES}
)
TOOLS = st.fixed_dictionaries({"name": VALUES, "input_schema": VALUES}, optional={"type": VALUES, "strict": VALUES})


@settings(max_examples=examples(80, 5000), deadline=None)
@given(st.none() | st.text(max_size=3) | st.lists(BLOCKS, max_size=2), st.lists(TURNS, max_size=4), st.lists(TOOLS))
def test_anything(system, turns, tools):
    try:
        found = read_conversation(system, turns)
        made = read_tools(tools, found.ignored)
    except InvalidRequest as error:
        assert error.param and error.param.split("[")[0].split(".")[0] in ("system", "messages", "tools")
        assert len(error.message) < 400
        return
    assert all(type(message) is Message for message in found.messages) and all(type(tool) is Tool for tool in made)
    roles = [message.role for message in found.messages]
    assert set(roles) - {"system"}
    assert "system" not in roles[1:]
    assert found.continues == (roles[-1] == "assistant")
    assert all(one != other or one == "tool" for one, other in pairwise(roles))


@pytest.mark.parametrize("count", [20_000])
def test_many_blocks_and_turns_are_read_in_linear_time(count):
    blocks = [{"type": "text", "text": "a"}] * count
    assert len(read_conversation(blocks, [{"role": "user", "content": blocks}] * 3).messages) == 2
    turns = [{"role": "user", "content": "a"}] * count
    assert len(read_conversation(None, turns).messages[0].items) == count
