"""The frames between the API process and the engine: cut anywhere they are the same; anything wrong is a WireError."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.config import EngineConfig
from truffula.engine import wire
from truffula.errors import ErrorInfo, InvalidRequest, TruffulaError, WireError
from truffula.frames import MAX_FRAME_BYTES, Disconnected, Frame, FrameReader, encode
from truffula.items import Grammar
from truffula.params import EngineParams, SamplingParams
from truffula.types import (
    AdapterCommand,
    AdapterRef,
    AdapterState,
    EngineAction,
    EngineRequest,
    EngineStats,
    TokenEvent,
    Vocabulary,
)


def engine_reader() -> FrameReader:
    return FrameReader(wire._TO_ENGINE.decode, wire.VERSION)


def client_reader() -> FrameReader:
    return FrameReader(wire._FROM_ENGINE.decode, wire.VERSION)


def written(frame: Frame) -> bytes:
    return encode(frame, wire.VERSION)


def submit(requests: list[EngineRequest]) -> wire.Submit:
    return wire.Submit([wire.encode_group(group) for group in wire.group_requests(requests)])


QUICK = settings(max_examples=80, deadline=None)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ids = st.lists(st.integers(0, 2**31), max_size=8)
floats = st.floats(width=32, allow_nan=False)
errors = st.builds(ErrorInfo, code=names, message=names, data=st.dictionaries(names, st.integers(-(2**63), 2**64 - 1)))
params = st.builds(
    EngineParams,
    temperature=st.floats(0, 2),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=2).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
)
refs = st.builds(AdapterRef, name=names, locator=names, revision=st.none() | names)
requests = st.builds(
    EngineRequest, request_id=names, prompt_ids=ids, params=params, adapter=st.none() | refs, resume_ids=ids,
    grammar=st.none() | st.builds(Grammar, key=names, source=names), deadline=st.none() | floats,
)  # fmt: skip
events = st.builds(
    TokenEvent, request_id=names, token_ids=ids, logprobs=st.lists(floats, max_size=3), error=st.none() | errors,
    top_logprobs=st.lists(st.lists(st.tuples(st.integers(0, 99), floats), max_size=2), max_size=2),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
)  # fmt: skip
downward = st.one_of(
    st.builds(submit, st.lists(requests, max_size=3)),
    st.builds(wire.Abort, st.lists(names, max_size=3)),
    st.builds(wire.Adapter, st.integers(0, 2**40), st.builds(AdapterCommand, action=st.just("load"), ref=refs)),
    st.just(wire.Start(EngineConfig(model="m", cache_dir=Path("/c"), memory_bytes=2**33))),
    st.builds(wire.Control, st.integers(0, 2**40), st.sampled_from(get_args(EngineAction))),
    st.builds(
        wire.SetVocabulary,
        st.builds(Vocabulary, tokens=st.lists(st.binary(max_size=4), max_size=4), special_ids=ids, end_ids=ids),
    ),
    st.just(wire.Stop()),
)
upward = st.one_of(
    st.builds(wire.Events, st.lists(events, max_size=4)),
    st.builds(wire.Stats, st.builds(EngineStats, monotonic=floats), st.none() | floats),
    st.builds(wire.AdapterReply, st.integers(0, 9), st.lists(st.builds(AdapterState, name=names), max_size=2)),
    st.builds(wire.Starting, names, st.integers(0, 2**60), st.none() | st.integers(0, 2**60)),
    st.builds(wire.Died, errors),
)
cuts = st.lists(st.integers(0, 2**16), max_size=12)


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@QUICK
@given(st.lists(downward, max_size=4), cuts)
def test_any_cut_downward_gives_the_same_frames(frames: list, places: list[int]):
    data = b"".join(map(written, frames))
    reader = engine_reader()
    assert [frame for piece in pieces(data, places) for frame in reader.feed(piece)] == frames
    reader.end()


@QUICK
@given(st.lists(upward, max_size=4), cuts)
def test_any_cut_upward_gives_the_same_frames(frames: list, places: list[int]):
    data = b"".join(map(written, frames))
    reader = client_reader()
    assert [frame for piece in pieces(data, places) for frame in reader.feed(piece)] == frames
    reader.end()


@QUICK
@given(st.lists(upward, min_size=1, max_size=3), st.integers(0, 2**16))
def test_a_truncated_stream_is_an_error_at_its_end(frames: list, place: int):
    whole = [written(frame) for frame in frames]
    data = b"".join(whole)
    cut = place % len(data)
    borders = {sum(map(len, whole[:n])) for n in range(len(whole) + 1)}
    reader = client_reader()
    reader.feed(data[:cut])
    if cut in borders:
        reader.end()
    else:
        with pytest.raises(WireError, match="ended within a frame"):
            reader.end()


@QUICK
@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error_or_an_unfinished_frame(data: bytes):
    reader = engine_reader()
    try:
        frames = reader.feed(struct.pack("<HI", wire.VERSION, max(1, len(data))) + data)
    except WireError:
        with pytest.raises(WireError):
            reader.feed(b"")
        return
    assert not data or frames, "a whole frame was neither decoded nor refused"


@QUICK
@given(upward, st.integers(0, 2**16), st.integers(1, 255))
def test_a_flipped_byte_never_escapes_as_another_error(frame: Frame, place: int, flip: int):
    data = bytearray(written(frame))
    data[place % len(data)] ^= flip
    reader = client_reader()
    try:
        reader.feed(bytes(data))
    except WireError:
        return


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1])
def test_a_frame_of_no_or_too_many_bytes_is_refused_from_its_length_alone(length: int):
    with pytest.raises(WireError, match=f"{length} bytes"):
        client_reader().feed(struct.pack("<HI", wire.VERSION, length))


def test_another_version_is_refused_before_anything_else_is_read():
    later = struct.pack("<HI", wire.VERSION + 1, 9) + b"\xff\xff\xff\xff whatever a later version says"
    with pytest.raises(WireError, match=rf"version {wire.VERSION + 1}, this process speaks {wire.VERSION}"):
        client_reader().feed(later)


def test_a_request_that_msgpack_cannot_hold_is_refused_before_it_is_sent():
    request_ = EngineRequest(request_id="a", prompt_ids=[10**30], params=EngineParams())
    with pytest.raises(InvalidRequest, match="invalid value"):
        wire.encode_group([request_])


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest(request_id="a", prompt_ids=["x"], params=EngineParams()),  # type: ignore[list-item]
        EngineRequest(request_id="a", prompt_ids=[1], params=SamplingParams(stop="x")),
    ],
    ids=["a word among the ids", "parameters of text"],
)
def test_a_request_that_is_none_is_refused_where_it_is_decoded_and_harms_no_other(request_: EngineRequest):
    good = EngineRequest(request_id="good", prompt_ids=[1], params=EngineParams())
    reader = engine_reader()
    (got,) = reader.feed(written(submit([request_, good])))
    bad, fine = got.groups
    with pytest.raises(InvalidRequest, match="invalid value"):
        wire.decode_group(bad)
    assert bad.request_ids == ["a"] and wire.decode_group(fine) == [good]


def test_the_choices_of_a_prompt_share_one_encoded_prompt():
    prompt, params = list(range(1000)), EngineParams(max_tokens=3)
    choices = [EngineRequest(request_id=f"a.{n}", prompt_ids=prompt, params=params, choice=n) for n in range(16)]
    other = EngineRequest(request_id="b", prompt_ids=list(prompt), params=params)
    resumed = EngineRequest(request_id="a.16", prompt_ids=prompt, params=params, choice=16, resume_ids=[7])
    sent = submit([*choices, resumed, other])
    assert [len(group.choices) for group in sent.groups] == [17, 1]
    assert len(written(sent)) < 2 * len(written(submit([choices[0]]))) + 400
    back = [wire.decode_group(group) for group in sent.groups]
    assert back == [[*choices, resumed], [other]]
    assert len({id(one.prompt_ids) for one in back[0]}) == 1, "the engine holds the prompt once"


def test_numbers_of_numpy_cross_as_numbers():
    asked = EngineRequest(request_id="a", prompt_ids=list(np.arange(3)), params=EngineParams())
    (got,) = wire.decode_group(wire.encode_group([asked]))
    assert got.prompt_ids == [0, 1, 2] and type(got.prompt_ids[0]) is int


def test_an_error_crosses_with_whatever_its_data_holds():
    error = InvalidRequest("no", param="p", path=Path("/x"), count=np.int64(3), odd=1j, ratio=np.float32(0.5))
    reader = client_reader()
    (died,) = reader.feed(written(wire.Died(error.info())))
    back = TruffulaError.from_info(died.error)
    assert type(back) is InvalidRequest and back.param == "p"
    assert back.data == {"path": "/x", "count": 3, "odd": "1j", "ratio": 0.5}


def test_posting_never_blocks_and_what_is_left_over_arrives():
    left, right = socket.socketpair()
    sender, receiver = wire.client_channel(left), wire.engine_channel(right)
    frames = [wire.Abort([f"{n}-" + "x" * 100_000]) for n in range(40)]
    left_over = [sender.post(frame) for frame in frames]
    assert any(left_over), "four megabytes can't fit into a socket's buffer"
    got: list = []
    while len(got) < len(frames):
        got += receiver.receive() or []
        if sender.unsent:
            sender.flush()
    assert got == frames
    sender.close()
    assert receiver.receive() is None
    receiver.close()


def test_threads_that_send_at_once_do_not_mix_their_frames():
    left, right = socket.socketpair()
    sender, receiver = wire.client_channel(left), wire.engine_channel(right)

    def speak(word: str) -> None:
        for n in range(30):
            sender.send(wire.Abort([word * 3000, str(n)]))

    threads = [threading.Thread(target=speak, args=(word,)) for word in "abc"]
    for thread in threads:
        thread.start()
    got: list = []
    while len(got) < 90:
        got += receiver.receive() or []
    for thread in threads:
        thread.join()
    for word in "abc":
        assert [f.request_ids[1] for f in got if f.request_ids[0] == word * 3000] == [str(n) for n in range(30)]
    sender.close()
    receiver.close()


def test_a_closed_peer_is_not_reported_as_a_bad_frame():
    left, right = socket.socketpair()
    sender = wire.client_channel(left)
    right.close()
    with pytest.raises(Disconnected):
        sender.send(wire.Stop())
    sender.close()
