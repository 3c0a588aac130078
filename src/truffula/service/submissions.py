"""``Submissions``: how many sequences the engine holds at a time, and which of them it gets next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from truffula.engine.client import EngineClient
from truffula.errors import Overloaded
from truffula.types import EngineRequest

SHARE = 4
"""One call holds at most a fourth of the engine's places, so that a large one leaves places for others."""


class _Call:
    """The sequences of one call that the engine has not got yet, and the ids of those that it has."""

    def __init__(self, requests: Sequence[EngineRequest]) -> None:
        self.waiting = OrderedDict((one.request_id, one) for one in requests)
        self.running: set[str] = set()


class Submissions:
    """Passes sequences to the engine as it drains: a call of any size works, and the engine's queue stays bounded.

    The engine holds at most ``max_running + max_waiting`` sequences, of one call at most a fourth of that (but not less
    than it can run). The rest of a call waits here; calls that wait get free places in turn. Not thread-safe: the owner
    makes one call at a time.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._places = client.info.max_running + client.info.max_waiting
        self.share = max(client.info.max_running, self._places // SHARE)
        self._calls: dict[str, _Call] = {}  # by engine id, of the sequences that have not ended
        self._turns: OrderedDict[_Call, None] = OrderedDict()  # calls with waiting sequences, the next one first
        self._running = 0

    @property
    def free(self) -> int:
        """How many further sequences the engine may hold."""
        return self._places - self._running

    def require_place(self) -> None:
        """Raises ``Overloaded`` when the engine holds as many sequences as it may."""
        if self.free <= 0:
            raise Overloaded(
                f"{self._running} sequences are running or waiting; the limit is {self._places} (--max-running and "
                "--max-waiting). Try again later.",
                running=self._running, limit=self._places,
            )  # fmt: skip

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Submit ``requests`` together, those beyond the call's share as the first ones end."""
        call = _Call(requests)
        self._calls |= dict.fromkeys(call.waiting, call)
        self._turns[call] = None
        self._fill()

    def ended(self, request_ids: Iterable[str]) -> None:
        """The engine has ended these; their places go to sequences that wait."""
        for request_id in request_ids:
            call = self._calls.get(request_id)
            if call is not None and request_id in call.running:
                call.running.discard(request_id)
                del self._calls[request_id]
                self._running -= 1
                if call.waiting:
                    self._turns.setdefault(call)
        self._fill()

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Abort sequences; returns those that the engine has not got: no event of them will come."""
        dropped: list[str] = []
        submitted: list[str] = []
        for request_id in request_ids:
            call = self._calls.get(request_id)
            if call is None:
                continue
            if request_id in call.running:
                submitted.append(request_id)
            else:
                dropped.append(request_id)
                del self._calls[request_id], call.waiting[request_id]
        if submitted:
            self._client.abort(submitted)
        return dropped

    def _fill(self) -> None:
        """Submit waiting sequences while there are places: one of each call in turn."""
        requests = []
        while self._turns and self.free > 0:
            call, _ = self._turns.popitem(last=False)
            if not call.waiting or len(call.running) >= self.share:
                continue  # ``ended`` adds it again when it may have another place
            request_id, one = call.waiting.popitem(last=False)
            requests.append(one)
            call.running.add(request_id)
            self._running += 1
            self._turns[call] = None
        if requests:
            self._client.submit(requests)
