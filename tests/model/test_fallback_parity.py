"""Models that transformers computes, against transformers alone and peft, in every way an engine cuts a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fallback_types import FAST, small_config, write_small
from parity import CHECKS, ParityModel, parity_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from truffula import LLM, SamplingParams
from truffula.testing.oracle import Oracle


@pytest.fixture(scope="module", params=FAST)
def model(request, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    with parity_model(write_small(folder, small_config(request.param))) as model:
        assert model.plan.implementation.kind == FAST[request.param], model.plan.implementation.reason
        yield model


@pytest.mark.parametrize("check", [check for check in CHECKS if check != "greedy"])  # the logits say as much
def test_parity_with_transformers(model: ParityModel, check: str) -> None:
    CHECKS[check](model)


@pytest.mark.slow
def test_an_activated_adapter_acts_from_its_invocation_on(tmp_path: Path) -> None:
    """In one batch with plain LoRA and the base: the invocation in the middle, absent, and twice."""
    model = write_small(tmp_path / "model", small_config("persimmon", vocab_size=128))
    adapters: dict[str | None, Path | None] = {None: None}
    for name, more in (("plain", {}), ("called", {"alora_invocation_tokens": [50, 9]})):
        fields = LoraConfig(r=3, lora_alpha=6, target_modules=["query_key_value", "dense_h_to_4h"], **more)
        fields.task_type = "CAUSAL_LM"
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), fields)
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0, 0.4)
        peft.save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
    prompts = [[5, 6, 7, 50, 9, 12, 13], [5, 6, 7, 8, 10, 12, 13], [50, 9, 5, 50, 9]]
    asked = [(name, prompt) for name in adapters for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    named = {name: path for name, path in adapters.items() if name is not None and path is not None}
    with LLM(model, adapters=named, backend="reference", dtype="float32") as llm:
        outs = llm.generate([prompt for _, prompt in asked], params, adapters=[name for name, _ in asked])
    for out, (name, prompt) in zip(outs, asked, strict=True):
        oracle = Oracle(model, tied=False, adapter=adapters[name])
        logits = oracle.logits([*prompt, *out.token_ids], len(prompt))
        assert out.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), (name, prompt)
