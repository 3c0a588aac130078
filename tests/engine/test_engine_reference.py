"""The engine on real backends, float32: greedy tokens are the same alone, mixed, chunked, cached, preempted, resumed.

On the reference a token may differ where the two best logits lie within 1e-4 of each other; such near-ties are counted.
On the native backend none may: nor may a logprob. Nor on Triton's kernels, as their interpreter computes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from folder_loader import FolderLoader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_backends import INTERPRETED, SINGLE, needs_triton
from rig import Answer, Rig, composed, limits, request

from truffula.kernels.inputs import Capacity
from truffula.lora.worker import LoadLimits, Setup
from truffula.model.load import WeightReader, plan_model
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.oracle import Oracle
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.types import AdapterRef, EngineRequest
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

NEAR = 1e-4
CAPACITY = Capacity(
    max_tokens=64, max_seqs=8, max_logit_rows=64, max_segments=64, num_blocks=80, block_size=4, max_blocks_per_seq=32,
    num_states=60,
)  # fmt: skip


@dataclass
class Real:
    """A loaded model, folders of its adapters, and what each request answers alone (asked once)."""

    executable: object
    vocab_size: int
    setup: Setup
    staging: Path
    adapters: dict[str, str]
    windows: tuple[int | None, ...]
    recurrent: bool
    tied: bool
    exact: bool
    answers: dict[bytes, Answer] = field(default_factory=dict)
    near_ties: int = 0
    compared: int = 0

    def rig(self, **changes) -> Rig:
        usual = {"vocab_size": self.vocab_size, "num_blocks": 80, "eos_token_ids": (self.vocab_size - 1,)}
        usual["kv_windows"] = self.windows
        if self.recurrent:
            usual |= {"num_states": CAPACITY.num_states, "state_bytes": 1}
        lim = limits(**{**usual, **changes})
        return Rig(lim, executable=self.executable, loader=FolderLoader(self.setup, self.staging))

    def run(self, crowd: list[EngineRequest], **changes) -> tuple[Rig, dict[str, Answer]]:
        rig = self.rig(**changes)
        answers = rig.run(crowd)
        rig.adapters.close()
        return rig, answers

    def alone(self, req: EngineRequest) -> Answer:
        """``req`` by itself, its prompt in one piece, with the two best logprobs of each token."""
        params = msgspec.structs.replace(req.params, logprobs=2)
        req = msgspec.structs.replace(req, params=params, request_id="alone")
        key = msgspec.msgpack.encode(req)
        if key not in self.answers:
            self.answers[key] = self.run([req], step_tokens=64, step_logit_rows=64, prefix_cache=False)[1]["alone"]
        return self.answers[key]

    def assert_same(self, got: Answer, expected: Answer) -> None:
        if self.exact:
            assert got.token_ids == expected.token_ids
        for place, token in enumerate(expected.token_ids):
            self.compared += 1
            if place < len(got.token_ids) and got.token_ids[place] == token:
                continue
            (_, best), (_, second) = expected.top_logprobs[place]
            assert best - second < NEAR, f"token {place}: {got.token_ids} for {expected.token_ids}"
            self.near_ties += 1
            return
        assert got.finish_reason == expected.finish_reason
        assert len(got.token_ids) == len(expected.token_ids)

    def assert_few_ties(self) -> None:
        assert self.near_ties <= 1 + self.compared // 200, f"{self.near_ties} near-ties in {self.compared} tokens"


FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 7}),
    # Latent attention.
    "latent": ("youtu", {"q_lora_rank": None}),
    # Gemma 3 by its own rule would have five sliding layers first. The blocks hold four tokens.
    "gemma3": ("gemma3_text", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3-short": ("gemma3_text", {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}),
    "qwen3_5": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 4}),
    "bamba": ("bamba", {}),
    "gemma3-long": ("gemma3_text", {"sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"]}),
}


# In the slow suite: bamba, and these on the reference, which takes most of a second for each test of them.
SLOW = {"lfm2", "qwen3_5", "mistral", "gemma3-short", "gemma3-long"}
PARAMS = [
    pytest.param(
        (b, f), marks=[pytest.mark.slow] * (f == "bamba" or (b == "reference" and f in SLOW)), id=f"{b}-{f}"
    )
    for b in SINGLE for f in FAMILIES
]  # fmt: skip


@pytest.fixture(scope="module", params=PARAMS)
def real(request, tmp_path_factory):
    name, family = request.param
    root: Path = tmp_path_factory.mktemp(family)
    model_type, changes = FAMILIES[family]
    folder = write_tiny_checkpoint(
        root / "base", tiny_config(model_type, vocab_size=61, num_hidden_layers=2, **changes), seed=3
    )
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    pull = WeightReader(checkpoint, plan)
    executable = {**SINGLE, **INTERPRETED}[name].load(plan.program, "float32", pull, CAPACITY)
    adapters = {
        name: str(write_tiny_adapter(root / name, folder, rank=rank, alpha=4 * rank, targets=targets, seed=rank))
        for name, rank, targets in [("thin", 1, ["q_proj", "down_proj", "w2"]), ("wide", 7, "all-linear")]
    }
    setup = Setup(sites=list(plan.program.sites), layout=executable.layout, model=str(folder), limits=LoadLimits())
    staging = Path(tempfile.mkdtemp(dir=root))
    windows = tuple(group.window for group in plan.program.kv_groups)
    tied = plan.tying.tie is not Tie.SEPARATE
    recurrent = bool(plan.program.states)
    yield Real(executable, 61, setup, staging, adapters, windows, recurrent, tied, exact=name != "reference")
    executable.close()


SHARED = [list(range(1, 30)), [7] * 22, [5, 6] * 13]


@st.composite
def crowds(draw):
    crowd = []
    for i in range(draw(st.integers(1, 6))):
        shared = draw(st.sampled_from(SHARED))
        prompt = shared[: draw(st.integers(0, len(shared)))] + draw(st.lists(st.integers(0, 59), max_size=6))
        adapter = draw(st.sampled_from([None, "thin", "wide", "both"]))
        crowd.append((f"r{i}", prompt or [3], adapter, draw(st.integers(1, 8))))
    return crowd


def named(real: Real, adapter: str) -> str | AdapterRef | None:
    if adapter == "both":
        return composed({real.adapters["thin"]: 0.75, real.adapters["wide"]: -0.5})
    return real.adapters[adapter]


def made(real: Real, crowd) -> list[EngineRequest]:
    return [
        request(name, prompt, adapter=adapter and named(real, adapter), max_tokens=new)
        for name, prompt, adapter, new in crowd
    ]


LIGHT = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def hold_in_any_company(real: Real, examples: int) -> None:
    """Crowds, however they are cut and whatever memory there is, against each request alone."""

    @settings(max_examples=examples, **LIGHT)
    @given(crowds(), st.integers(1, 64), st.integers(1, 8), st.integers(12, 80), st.booleans())
    def holds(crowd, step_tokens, max_running, num_blocks, prefix_cache):
        requests = made(real, crowd)
        changes = {"step_tokens": step_tokens, "max_running": max_running, "num_blocks": num_blocks}
        _, answers = real.run(requests, prefix_cache=prefix_cache, **changes)
        for req in requests:
            real.assert_same(answers[req.request_id], real.alone(req))
        real.assert_few_ties()

    holds()


def test_greedy_tokens_in_any_company(real):
    # A step of torch's takes many times a native one's, and its bits are not promised: more of it in the slow suite.
    hold_in_any_company(real, 15 if real.exact else 6)


@pytest.mark.slow
@pytest.mark.parametrize("real", [pytest.param(("triton", "gemma3"), marks=needs_triton, id="gemma3")], indirect=True)
def test_greedy_tokens_of_interpreted_kernels_in_any_company(real):
    hold_in_any_company(real, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_greedy_tokens_in_any_company_at_length(real):
    hold_in_any_company(real, 150)


def test_chunked_at_every_budget(real):
    req = request("r", list(range(1, 40)), adapter=real.adapters["wide"], max_tokens=6)
    for step_tokens in (1, 2, 3, 5, 7, 16, 38, 39, 40):
        _, answers = real.run([req], step_tokens=step_tokens)
        real.assert_same(answers["r"], real.alone(req))


def test_with_a_prefix_hit_of_every_length(real):
    prompt = list(range(1, 34))
    crowd = {
        shared: request(f"hit{shared}", [*prompt[:shared], 50, 51, 52], max_tokens=4) for shared in range(0, 33, 3)
    }
    # First, because an engine's KV lies in the executable: one engine at a time.
    expected = {shared: real.alone(req) for shared, req in crowd.items()}
    rig = real.rig()
    rig.run([request("warm", prompt, max_tokens=1)])
    snapshots = {0, 32}
    for shared, req in crowd.items():
        answer = rig.run([req])[req.request_id]
        hit = shared // 4 * 4
        found = max(border for border in snapshots if border <= hit)
        assert answer.final.cached_tokens == (found if real.recurrent else hit)
        snapshots.add(hit)
        real.assert_same(answer, expected[shared])
    rig.adapters.close()


def test_after_preemption(real):
    crowd = [
        request(
            f"r{i}", [i, i + 1, i + 2], adapter=[None, real.adapters["thin"]][i % 2], max_tokens=24, ignore_eos=True
        )
        for i in range(6)
    ]
    rig, answers = real.run(crowd, num_blocks=13, prefix_cache=False)
    assert rig.engine.stats().preemptions > 0
    for req in crowd:
        real.assert_same(answers[req.request_id], real.alone(req))


def test_resumed_after_every_token(real):
    req = request("r", [5, 9, 4, 4], adapter=real.adapters["wide"], max_tokens=8, ignore_eos=True)
    whole = real.alone(req)
    for shown in range(1, 8):
        resumed = msgspec.structs.replace(req, resume_ids=whole.token_ids[:shown])
        _, answers = real.run([resumed])
        got = answers["r"]
        got.token_ids = whole.token_ids[:shown] + got.token_ids
        real.assert_same(got, whole)


def test_greedy_tokens_are_those_of_transformers(real):
    """Long enough that blocks behind the windows are freed, in chunks, beside others and behind a prefix hit."""
    prompt = list(range(1, 34))
    requests = {
        name: request(str(name), prompt, adapter=name and real.adapters[name], max_tokens=24, ignore_eos=True)
        for name in (None, "wide")
    }
    rig = real.rig(step_tokens=11)
    answers = rig.run(list(requests.values()))
    tokens = {name: answers[str(name)].token_ids for name in requests}
    again = rig.run([msgspec.structs.replace(requests[None], request_id="again")])["again"]
    assert again.final.cached_tokens == 32 and again.token_ids == tokens[None]
    rig.adapters.close()
    for name, ids in tokens.items():
        oracle = Oracle(Path(real.setup.model), tied=real.tied, adapter=Path(real.adapters[name]) if name else None)
        logits = oracle.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
        assert len(ids) == len(logits) == 24
        assert (logits[range(24), ids] >= logits.max(1) - NEAR).all()


def test_base_and_adapters_differ_at_all(real):
    tokens = {
        tuple(real.alone(request("r", [5, 9, 4, 4], adapter=a and named(real, a), max_tokens=12)).token_ids)
        for a in (None, "thin", "wide", "both")
    }
    assert len(tokens) >= 2


@settings(max_examples=6, **LIGHT)
@given(crowds(), st.integers(0, 2**64 - 1), st.integers(3, 64))
def test_sampled_tokens_in_any_company(real, crowd, seed, step_tokens):
    requests = [
        msgspec.structs.replace(
            req, choice=i, params=msgspec.structs.replace(req.params, temperature=0.9, top_p=0.95, seed=seed + i)
        )
        for i, req in enumerate(made(real, crowd))
        if seed + i < 2**64
    ]
    _, answers = real.run(requests, step_tokens=step_tokens)
    for req in requests:
        assert answers[req.request_id].token_ids == real.alone(req).token_ids


def test_prompt_logprobs_are_the_same_in_chunks(real):
    prompt = list(range(3, 30))
    whole = real.run([request("r", prompt, max_tokens=1, prompt_logprobs=2)], step_tokens=64)[1]["r"]
    for rows in (1, 3, 8):
        chunked = real.run([request("r", prompt, max_tokens=1, prompt_logprobs=2)], step_logit_rows=rows)[1]["r"]
        assert chunked.prompt_logprobs == whole.prompt_logprobs or not real.exact
        assert [entry[0] for entry in chunked.prompt_logprobs[1:]] == pytest.approx(
            [entry[0] for entry in whole.prompt_logprobs[1:]], abs=NEAR
        )
