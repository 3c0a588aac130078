"""The time between tokens is the engine's, not the client's: a gap counts when it arrives, not when it is read."""

import asyncio

from truffula.metrics import Metrics, RequestRecord
from truffula.params import SamplingParams
from truffula.server.generating import run
from truffula.types import GenerateRequest


class Watched:
    """Just enough of a request: what ``run`` reads of it."""

    def __init__(self, app, record):
        self.app = app
        self.state = type("State", (), {"record": record})()


def test_gaps_are_counted_before_anybody_reads_them(live):
    """The first delta is read, then nothing; the gaps between the others come all the same."""
    app = live.server.loading.app.asgi
    metrics: Metrics = app.state.truffula.metrics

    def gaps():
        labels = {"adapter": "__base_model__"}
        return metrics.registry.get_sample_value("truffula_inter_token_seconds_count", labels) or 0.0

    async def go():
        one = GenerateRequest(prompt="Hello", params=SamplingParams(max_tokens=150, ignore_eos=True, temperature=0))
        batches = run(Watched(app, RequestRecord(request_id="r", generates=True)), [one])
        read = sum(len(delta.tokens) for _, deltas in await anext(batches) for delta in deltas)
        while gaps() < before + read + 10:  # more than what was read could give; the test's own timeout bounds it
            await asyncio.sleep(0.005)
        await batches.aclose()
        return read

    before = gaps()
    future = asyncio.run_coroutine_threadsafe(go(), live.server.loading.loop)
    assert 0 < future.result(30) < 140
