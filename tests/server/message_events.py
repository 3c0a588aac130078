"""The events of a streamed message, and the order that Anthropic's API promises of them."""

from __future__ import annotations

import json
from typing import Any


def raw_events(content: bytes) -> list[dict[str, Any]]:
    """Type and data of each event: one line ``event:``, one line ``data:``, one blank line."""
    found = []
    for one in content.decode().split("\n\n")[:-1]:
        name, data = one.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def check_order(events: list[dict[str, Any]]) -> None:
    """The order that the API promises: blocks by number, one open at a time, between the start and the end."""
    state, index = "new", -1
    kinds = {
        "text": {"text_delta"},
        "thinking": {"thinking_delta", "signature_delta"},
        "tool_use": {"input_json_delta"},
    }
    block = ""
    deltas: list[str] = []
    for event in events:
        kind = event["type"]
        if kind == "ping":
            continue
        if kind == "message_start":
            assert state == "new"
            assert event["message"]["content"] == [] and event["message"]["stop_reason"] is None
            state = "between"
        elif kind == "content_block_start":
            assert (state, event["index"]) == ("between", index + 1)
            state, index, block, deltas = "open", event["index"], event["content_block"]["type"], []
        elif kind == "content_block_delta":
            assert (state, event["index"]) == ("open", index)
            assert event["delta"]["type"] in kinds[block]
            deltas.append(event["delta"]["type"])
        elif kind == "content_block_stop":
            assert (state, event["index"]) == ("open", index)
            assert ("signature_delta" in deltas) == (block == "thinking")
            assert deltas.count("signature_delta") <= 1 and "signature_delta" not in deltas[:-1]
            state = "between"
        elif kind == "message_delta":
            assert state == "between"
            assert event["delta"]["stop_reason"]
            state = "ended"
        else:
            assert (kind, state) == ("message_stop", "ended")
            state = "over"
    assert state == "over"
