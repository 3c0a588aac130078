"""Pieces joined are the full decode, for any ids; half a character is never out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, byte_level_json, metaspace, sentence_piece, sentence_piece_json, word_piece
from tokenizers import Tokenizer as Library

from examples import examples
from truffula.text.tokenizer import Tokenizer

KINDS = {
    "byte-level": byte_level,
    "sentence-piece": sentence_piece,
    "sentence-piece-without-strip": lambda: sentence_piece(False),
    "word-piece": word_piece,
    "metaspace": metaspace,
}
quick = settings(max_examples=examples(75, 150), deadline=None)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    machine = tokenizer.detokenizer()
    return [machine.push(token_id) for token_id in ids] + [machine.flush()]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_joined_pieces_are_the_full_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@quick
@given(data=st.data())
def test_byte_level_decode_is_the_librarys_for_any_ids(data: st.DataObject) -> None:
    tokenizer, library = byte_level(), Library.from_buffer(byte_level_json())
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("strip", [True, False])
@quick
@given(data=st.data())
def test_sentence_piece_decode_is_the_librarys_where_bytes_are_utf8(strip: bool, data: st.DataObject) -> None:
    tokenizer, library = sentence_piece(strip), Library.from_buffer(sentence_piece_json(strip))
    characters = st.characters(exclude_categories=["Cs"]).map(lambda c: [b + 3 for b in c.encode()])
    token = st.integers(259, tokenizer.vocab_size - 1).map(lambda i: [i]) | characters | st.sampled_from([[1], [2]])
    ids = [i for part in data.draw(st.lists(token, max_size=25)) for i in part]
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@quick
@given(data=st.lists(st.binary(max_size=8) | st.text(max_size=4).map(str.encode), max_size=6))
def test_ill_formed_byte_runs_keep_their_whole_characters(data: list[bytes]) -> None:
    raw = b"".join(data)
    tokenizer = sentence_piece(False)
    ids = [byte + 3 for byte in raw]
    assert tokenizer.decode(ids) == raw.decode(errors="replace")


@pytest.mark.parametrize("kind", ["byte-level", "sentence-piece", "sentence-piece-without-strip"])
@quick
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_survives_and_no_piece_is_half_a_character(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    for at in range(1, len(ids)):
        assert text.startswith("".join(pieces[:at]))


def test_the_whole_character_comes_with_its_last_token() -> None:
    tokenizer = sentence_piece(False)
    tree = [byte + 3 for byte in "🌲".encode()]
    machine = tokenizer.detokenizer()
    texts, pending = [], []
    for token_id in [*tree, *tree]:
        texts.append(machine.push(token_id))
        pending.append(machine.pending)
    assert texts == ["", "", "", "🌲"] * 2
    assert pending == [True, True, True, False] * 2


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("ok 🌲", add_special_tokens=False)[:-1]
    machine = tokenizer.detokenizer()
    assert "".join(map(machine.push, ids)) == "ok "
    assert machine.pending
    assert machine.flush() == "\ufffd"
    assert not machine.pending


def test_a_window_gives_up_on_ids_that_never_make_a_character() -> None:
    """Ids without text must not grow the window for ever."""
    tokenizer = word_piece()
    machine = tokenizer.detokenizer()
    word = tokenizer.encode("the", add_special_tokens=False)
    for _ in range(200):
        assert machine.push(10**6) == ""
    assert len(machine._ids) < 64
    assert "".join(map(machine.push, word)) == "the"
