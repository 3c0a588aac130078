"""Each request/response pair of docs/http-api.md is replayed: the answer has the page's fields, of the page's types."""

import json
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
PAIRS = re.findall(r"```http\n(GET|POST) (\S+)\n(.*?)```\n\n```json\n(.*?)```", PAGE, re.DOTALL)


def shape(value):
    """The skeleton of an answer: keys and types; of a list, its first element's."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def test_the_page_has_pairs():
    assert len(PAIRS) == PAGE.count("```http") >= 7


@pytest.mark.parametrize(("method", "path", "body", "answer"), PAIRS, ids=[f"{m} {p}" for m, p, _, _ in PAIRS])
def test_the_page_tells_the_truth(live, method, path, body, answer):
    response = live.client.request(method, path, json=json.loads(body) if body.strip() else None)
    expected = json.loads(answer)
    assert response.is_success == (not isinstance(expected, dict) or expected.get("error") is None), response.text
    assert "x-truffula-ignored" not in response.headers
    assert shape(response.json()) == shape(expected)
    if not response.is_success:
        assert response.json() == expected
