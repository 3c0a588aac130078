"""Strict about JSON: what JSON or a float64 cannot hold is refused while parsing."""

import pytest

from truffula.server.body import decode_object, safe_header
from truffula.server.errors import MalformedBody


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"prompt": "a", "\\u0070rompt": "a"}', "prompt"),
        (b'{"a": [{"b": {"model": 1, "x": 2, "model": null}}]}', "model"),
        (b'{"": 1, "": 1}', ""),
    ],
    ids=repr,
)
def test_a_key_written_twice_is_refused_by_name(raw, key):
    with pytest.raises(MalformedBody, match="appears twice") as caught:
        decode_object(raw)
    assert caught.value.param == key
    assert repr(key) in caught.value.message
    assert decode_object(b'{"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}') == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense",
        b"[1]",
        b'"text"',
        b"null",
        b"5",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": -1e400}',
        b'{"a": [1, {"b": 1e999}]}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": 1} trailing',
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": ' + b"9" * 100_000 + b"}",
        b'{"a": ' + b"[" * 200_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_not_json(raw):
    with pytest.raises(MalformedBody) as caught:
        decode_object(raw)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "x\\\\\\udc00 y"}', "surrogate"),
        (b'{"a": "\\ud83d\\ude00', "not valid JSON"),
        (b'{"a": "\\\\ud800', "not valid JSON"),
    ],
)
def test_half_a_pair_is_called_so(raw, words):
    with pytest.raises(MalformedBody, match=words):
        decode_object(raw)


def test_json():
    assert decode_object('{"a": "😀 \\ud83d\\ude00 \\u0000", "b": [1.5, true, null]}'.encode()) == {
        "a": "😀 😀 \0",
        "b": [1.5, True, None],
    }


@pytest.mark.parametrize("value", ["a\r\nset-cookie: x", "naïve", "😀" * 300, "\0", ""])
def test_a_clients_words_are_safe_in_a_header(value):
    made = safe_header(value)
    assert made.isascii()
    assert made.isprintable() or made == ""
    assert len(made) <= 256
