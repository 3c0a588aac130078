"""A tiny model served by an engine, compared with transformers and peft: the checks of the parity matrix.

Each check is a function of a ``ParityModel`` that raises ``AssertionError`` where the two differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from folder_loader import FolderLoader
from rig import Answer, Rig, request

from truffula.config import EngineConfig
from truffula.engine.build import EngineSettings, LoadedModel, load_model
from truffula.lora.base import base_source
from truffula.lora.image import AdapterFacts
from truffula.lora.worker import LoadLimits, Setup
from truffula.model.plan import ModelPlan
from truffula.testing.adapters import PREFIX, tiny_config, write_adapter
from truffula.testing.programs import Driver
from truffula.types import EngineRequest
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

Float32 = npt.NDArray[np.float32]
LOGITS = 1e-4
NEAR_TIE = 1e-4
NEW_TOKENS, SOME_TOKENS = 32, 12
LENGTHS = (23, 5, 11)
BLOCK = 4


@dataclass
class ParityModel:
    """A loaded model with adapters on disk, and transformers' answers on the same files, or on those of ``oracle``;
    with ``double`` in float64."""

    folder: Path
    loaded: LoadedModel
    setup: Setup
    adapters: dict[str, Path]
    double: bool = False
    oracle: Path | None = None

    @property
    def plan(self) -> ModelPlan:
        return self.loaded.plan

    @property
    def settings(self) -> EngineSettings:
        return self.loaded.settings

    @property
    def rope_by_length(self) -> bool:
        """Whether all tokens are rotated by the length so far: then one pass is not what each token was drawn from."""
        rope = (
            getattr(_oracle(self.oracle or self.folder, None, False).config.get_text_config(), "rope_parameters", None)
            or {}
        )
        return rope.get("rope_type") in ("longrope", "dynamic")

    def prompt(self, number: int) -> list[int]:
        return prompt_ids(number, self.plan.interface.vocab_size)

    def request(self, name: str, prompt: list[int], adapter: str | None = None, **params: Any) -> EngineRequest:
        where = None if adapter is None else str(self.adapters[adapter])
        return request(name, prompt, adapter=where, ignore_eos=True, **{"max_tokens": NEW_TOKENS, **params})

    def run(self, requests: list[EngineRequest], **changes: Any) -> tuple[Rig, dict[str, Answer]]:
        """The answers of an engine of its own. ``changes`` are limits of the engine."""
        limits = dataclasses.replace(self.settings.limits, **changes)
        with tempfile.TemporaryDirectory() as staging:
            rig = Rig(limits, executable=self.loaded.executable, loader=FolderLoader(self.setup, Path(staging)))
            answers = rig.run(requests)
            rig.adapters.close()
        return rig, answers

    def expect(self, answer: Answer, prompt: list[int], adapter: str | None = None) -> None:
        """The answer's tokens are the best ones by transformers (and peft)."""
        assert answer.code is None, answer.final
        ids = answer.token_ids
        if self.rope_by_length:
            many = [self.transformers([*prompt, *ids[:at]], adapter, len(prompt))[-1] for at in range(len(ids))]
            theirs = np.stack(many)
        else:
            theirs = self.transformers([*prompt, *ids[:-1]], adapter, len(prompt))[len(prompt) - 1 :]
        below = theirs.max(1) - theirs[range(len(ids)), ids]
        assert len(ids) > 0 and below.max() < NEAR_TIE, f"token {int(below.argmax())} of {ids}: {below.max():.2g} below"

    def transformers(self, ids: list[int], adapter: str | None = None, prompt: int | None = None) -> Float32:
        """Logits ``[len(ids), V]``; the first ``prompt`` of ``ids`` are the prompt, None: all."""
        import torch

        tied, where = self.plan.tying.tie is not Tie.SEPARATE, self.adapters.get(adapter or "")
        model = _oracle(self.oracle or self.folder, where, tied, self.double)
        more = {}
        if invocation := getattr(getattr(model, "active_peft_config", None), "alora_invocation_tokens", None):
            start = AdapterFacts(invocation=tuple(invocation)).acts_from(ids[:prompt])
            more["alora_offsets"] = [None if start is None else len(ids) - start]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False, **more).logits[0]
        return np.asarray(logits[-len(ids) :].float().numpy())  # none of virtual tokens


def prompt_ids(number: int, vocab_size: int) -> list[int]:
    """Prompt number ``number`` of the checks."""
    return np.random.default_rng(number).integers(5, vocab_size, LENGTHS[number % 3]).tolist()


@cache
def _oracle(folder: Path, adapter: Path | None, tied: bool, double: bool = False) -> Any:
    """The model as transformers loads it, with its own choice of attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    causal = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    # The faster form of experts refuses rows that are no multiples of 16 bytes.
    model = auto.from_pretrained(folder, config=config, dtype="float32", experts_implementation="eager").eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return model.double() if double else model


@contextlib.contextmanager
def parity_model(folder: Path, adapters: dict[str, Path] | None = None, **options: Any) -> Iterator[ParityModel]:
    """The model in ``folder``, loaded in float32 with small blocks; without ``adapters`` two are written beside it."""
    usual = {
        "dtype": "float32", "memory_bytes": 2**29, "block_size": BLOCK, "step_tokens": 64, "max_running": 6,
        "max_model_len": 128, "threads": 1,
    }  # fmt: skip
    config = EngineConfig(model=str(folder), **usual | options)
    with contextlib.closing(open_checkpoint(folder)) as checkpoint:
        loaded = load_model(config, folder, checkpoint, lambda *_: None)
        loaded.pull.finish()
        try:
            setup = Setup(
                sites=loaded.plan.interface.sites,
                model=str(folder),
                layout=loaded.executable.layout,
                base=base_source(loaded.plan, checkpoint),
                limits=LoadLimits(),
            )
            yield ParityModel(folder, loaded, setup, adapters or _write_adapters(folder, loaded.plan))
        finally:
            loaded.executable.close()
            _oracle.cache_clear()


def _write_adapters(folder: Path, plan: ModelPlan) -> dict[str, Path]:
    """Two adapters on linear modules of transformers' model that the plan has sites for: on all, and on every third."""
    named = {module.name for site in plan.interface.sites if site.kind == "linear" for module in site.modules}
    found = {name: shape for name, shape in _linears(folder).items() if name in named}
    targets = {"wide": list(found), "thin": list(found)[::3]}
    made = {}
    for seed, (name, modules) in enumerate(targets.items()):
        if not modules:
            continue
        rank, rng = (7, 2)[seed], np.random.default_rng(seed)
        tensors = {}
        for module in modules:
            inputs, outputs = found[module]
            size = 0.5 / np.sqrt(np.sqrt(inputs) * rank)
            for half, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                tensors[f"{PREFIX}{module}.{half}.weight"] = rng.normal(0, size, shape).astype(np.float32)
        config = tiny_config(rank=rank, alpha=rank + 1, targets=modules)
        made[name] = write_adapter(folder.parent / f"{folder.name}-{name}", config, tensors)
    return made


def _linears(folder: Path) -> dict[str, tuple[int, int]]:
    """Module path → (in, out) of the linear modules of transformers' model, without the head."""
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.pytorch_utils import Conv1D

    model = _oracle(folder, None, False)
    found = {}
    # peft renames what a model's converters read, such as stacked experts, and drops other modules of that name.
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    patterns = [pattern.removesuffix("$").removesuffix(".weight") for rule in rules for pattern in rule.source_patterns]
    converted = {pattern.rpartition(".")[2] for pattern in patterns}
    if model.config.model_type in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"):
        converted.add("out_proj")  # peft refuses it in these: their kernels pass by the module
    if model.config.model_type == "jamba":
        converted.add("dt_proj")  # transformers multiplies by its weight, past peft: see test_expert_adapters.py
    for name, module in model.named_modules():
        if module is model.get_output_embeddings() or name.rpartition(".")[2] in converted:
            continue
        # Phi-3.5-MoE's router is a linear that returns more than a product, which peft cannot adapt.
        if isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router"):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = tuple(module.weight.shape)
    return found


def check_logits(model: ParityModel) -> None:
    """One prefill, then decoding, logit by logit."""
    driver = Driver(model.loaded.executable, model.settings.capacity)
    prompt = model.prompt(0)
    first = driver.feed(prompt)
    chosen = [int(first[-1].argmax())]
    rows = [first]
    for _ in range(NEW_TOKENS - 1):
        rows.append(driver.feed(chosen[-1:]))
        chosen.append(int(rows[-1][-1].argmax()))
    np.testing.assert_allclose(np.concatenate(rows), model.transformers([*prompt, *chosen[:-1]]), atol=LOGITS)


def check_greedy(model: ParityModel) -> None:
    prompt = model.prompt(0)
    _, answers = model.run([model.request("a", prompt)])
    model.expect(answers["a"], prompt)


def check_mixed(model: ParityModel) -> None:
    """Two adapters and the base in one batch."""
    crowd = [(str(n), model.prompt(n), adapter) for n, adapter in enumerate([None, *model.adapters, None])]
    _, answers = model.run([model.request(*each, max_tokens=SOME_TOKENS) for each in crowd])
    for name, prompt, adapter in crowd:
        model.expect(answers[name], prompt, adapter)


def check_chunked(model: ParityModel) -> None:
    crowd = [(str(n), model.prompt(n), adapter) for n, adapter in enumerate([None, *model.adapters])]
    requests = [model.request(*each, max_tokens=SOME_TOKENS) for each in crowd]
    _, answers = model.run(requests, step_tokens=7, step_logit_rows=7)
    for name, prompt, adapter in crowd:
        model.expect(answers[name], prompt, adapter)


def check_prefix(model: ParityModel) -> None:
    """The second request begins like the first, which has left its blocks; a serial model computes all again."""
    shared, adapter = model.prompt(0), next(iter(model.adapters), None)
    limits = model.settings.limits
    with tempfile.TemporaryDirectory() as staging:
        rig = Rig(limits, executable=model.loaded.executable, loader=FolderLoader(model.setup, Path(staging)))
        for n, who in enumerate([None, adapter]):
            for suffix in ([], [7, 8]):
                name, prompt = f"{n}{len(suffix)}", [*shared, *suffix]
                answer = rig.run([model.request(name, prompt, who, max_tokens=8)])[name]
                model.expect(answer, prompt, who)
                hit = suffix and limits.prefix_cache
                assert answer.final is not None and (answer.final.cached_tokens > 0) == bool(hit), answer.final
        rig.adapters.close()


def check_preempted(model: ParityModel) -> None:
    names = [None, *model.adapters]
    crowd = [(str(n), model.prompt(n)[:3], names[n % len(names)]) for n in range(6)]
    for blocks in (15, 12, 10):  # windows free blocks behind them
        requests = [model.request(*each, max_tokens=24) for each in crowd]
        rig, answers = model.run(requests, num_blocks=blocks, prefix_cache=False)
        if rig.engine.stats().preemptions:
            break
    assert rig.engine.stats().preemptions > 0
    for name, prompt, adapter in crowd:
        model.expect(answers[name], prompt, adapter)


CHECKS: dict[str, Callable[[ParityModel], None]] = {
    "logits": check_logits,
    "greedy": check_greedy,
    "mixed": check_mixed,
    "chunked": check_chunked,
    "prefix": check_prefix,
    "preempted": check_preempted,
}
