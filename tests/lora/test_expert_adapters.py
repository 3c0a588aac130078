"""Adapters on experts against peft: parameters of all experts, modules of single ones, routers and shared experts; and
adapters that peft itself does not apply, against their sum with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_backends import BEST, on_the_best
from served_base import Served

from truffula.errors import AdapterError
from truffula.kernels.backend import Backend
from truffula.model.read import read_config
from truffula.testing.adapters import PREFIX, write_adapter, write_tiny_adapter
from truffula.testing.oracle import Oracle
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft: of parameters
TOLERANCE = 1e-4
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SHARED = r".*(q_proj|shared_experts\.(gate_proj|up_proj|down_proj))"
# Parameters that peft adapts, beside q_proj or the modules given, for each family.
STACKED: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"target_parameters": EXPERTS},
        {"target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"], "use_rslora": True},
        {"target_parameters": EXPERTS[:1], "rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    ],
    "mixtral": [{"target_parameters": [*EXPERTS, "mlp.gate.weight"]}],
    "gpt_oss": [{"target_parameters": EXPERTS}, {"target_parameters": ["mlp.experts.down_proj"]}],
    "dbrx": [{"target_modules": ["Wqkv", "out_proj", "router.layer"]}],
    "gemma4_text": [
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[1:], "target_modules": ["router.proj", "mlp.down_proj"]},
    ],
    "kimi_linear": [{"target_modules": SHARED}, {"target_modules": SHARED, "target_parameters": EXPERTS}],
    "laguna": [{"target_parameters": EXPERTS, "target_modules": ["g_proj", "o_proj"]}],
    "granitemoe": [{"target_parameters": [*EXPERTS, "block_sparse_moe.router.weight"]}],
    "lfm2_moe": [{"target_parameters": [*EXPERTS, "feed_forward.gate.weight"]}],
    "nemotron_h": [{"target_parameters": ["experts.up_proj", "experts.down_proj", "mixer.gate.weight"]}],
    "jamba": [{"target_parameters": [*EXPERTS, "feed_forward.router.weight"]}],
}
BASES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 9}
}


def served_base(folder: Path, model_type: str, backend: Backend, **fields: Any) -> Served:
    config = tiny_config(model_type, **BASES.get(model_type, {}), **fields)
    return Served(write_tiny_checkpoint(folder / "model", config, seed=5), backend)


def saved_by_peft(base: Path, folder: Path, fields: dict[str, Any]) -> Path:
    """An adapter as ``save_pretrained`` leaves it, with random A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
    config = LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **fields})
    adapted = get_peft_model(model, config)
    for name, tensor in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def compare(served: Served, folders: list[Path]) -> None:
    """All adapters in one batch with a base row, each against peft alone."""
    prompts = [served.prompt(number) for number in range(len(folders) + 1)]
    slots = [served.add(folder) for folder in folders]
    rows = [*zip(slots, prompts, strict=False), (None, prompts[-1])]
    wanted = [served.peft(folder, ids) for folder, ids in zip([*folders, None], prompts, strict=True)]
    base = served.run([(None, ids) for ids in prompts])
    for number, (mine, theirs) in enumerate(zip(served.run(list(rows)), wanted, strict=True)):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE * max(1.0, float(np.abs(theirs).max()) / 10))
        assert number == len(folders) or np.abs(theirs - base[number]).max() > 100 * TOLERANCE


@on_the_best
@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in list(STACKED)[1:])]
)  # the slow ones: 10 s
def test_parameters_of_all_experts(tmp_path: Path, model_type: str, backend: Backend) -> None:
    served = served_base(tmp_path, model_type, backend)
    compare(served, [saved_by_peft(served.path, tmp_path / str(n), f) for n, f in enumerate(STACKED[model_type])])


@on_the_best
@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("qwen3_moe", ["gate", "gate_proj", "up_proj", "down_proj"]),
        pytest.param("mixtral", ["gate", "w1", "w2", "w3"], marks=pytest.mark.slow),
    ],
)
def test_modules_of_single_experts(tmp_path: Path, model_type: str, targets: list[str], backend: Backend) -> None:
    """As written before transformers stacked the experts; peft converts them."""
    served = served_base(tmp_path, model_type, backend)
    compare(
        served,
        [
            write_tiny_adapter(
                tmp_path / str(n), served.program.sites, targets=["q_proj", *targets], seed=n, rank=2 + n
            )
            for n in range(2)
        ],
    )


def _tensors(folder: Path) -> dict[str, Any]:
    from truffula.weights.safetensors import SafetensorsFile

    file = SafetensorsFile(folder / "adapter_model.safetensors")
    return {name: np.array(file.read(name)) for name in file.tensors}


@on_the_best
def test_one_projection_of_some_experts_is_folded(tmp_path: Path, backend: Backend) -> None:
    """What peft cannot convert: up without gate, with a rank of its own for one expert. Equals folding it by hand."""
    served = served_base(tmp_path, "qwen3_moe", backend)
    targets = r".*experts\.\d+\.up_proj"
    folder = write_tiny_adapter(
        tmp_path / "a", served.program.sites, targets=targets, rank_pattern={r"experts\.2\.up_proj": 7}
    )
    expect_folded(served, folder, tiny_config("qwen3_moe"))


def expect_folded(served: Served, folder: Path, config: dict[str, Any]) -> None:
    """The adapter does what transformers does with weights to which it was added."""
    (mine,) = served.run([(served.add(folder), ids := served.prompt(0))])
    tensors, added = tiny_tensors(config, seed=5), _tensors(folder)
    root, _ = read_config(config).spec.names.prefixes[0]
    for name in added:
        if name.endswith("lora_A.weight"):
            weight = root + name.removeprefix(f"{PREFIX}model.").replace(".lora_A", "")
            a, b = added[name], added[name.replace("lora_A", "lora_B")]
            tensors[weight] = tensors[weight] + 8 / len(a) * (b @ a)
    folded = write_tiny_checkpoint(folder.parent / "folded", config, extra=tensors)
    theirs = Oracle(folded, tied=False).logits(ids)
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
    assert np.abs(served.run([(None, ids)])[0] - theirs).max() > 100 * TOLERANCE


@on_the_best
@pytest.mark.slow  # 4 s
@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("jamba", ["dt_proj", "x_proj"]), ("falcon_h1", ["in_proj", "out_proj"]), ("nemotron_h", ["in_proj", "out_proj"])],
)
def test_modules_whose_weight_transformers_reads_itself(
    tmp_path: Path, model_type: str, targets: list[str], backend: Backend
) -> None:
    """peft refuses or misses them, but files have them: of merged adapters, of other trainers, of quantised bases."""
    served = served_base(tmp_path, model_type, backend)
    folder = write_tiny_adapter(tmp_path / "a", served.program.sites, targets=targets)
    expect_folded(served, folder, tiny_config(model_type))


def test_a_wrong_number_of_parameters_is_refused(tmp_path: Path) -> None:
    served = served_base(tmp_path, "qwen3_moe", next(iter(BEST.values())))
    folder = saved_by_peft(served.path, tmp_path / "a", {"target_parameters": EXPERTS})
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace("experts.down_proj", "experts.other"))
    with pytest.raises(AdapterError, match=r"target_parameters names .*gate_up_proj"):
        served.add(folder)
    (folder / "adapter_config.json").write_text(config)
    tensors = {name: array for name, array in _tensors(folder).items() if "layers.1.mlp" not in name}
    write_adapter(tmp_path / "less", {}, tensors)
    (tmp_path / "less" / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=r"no tensors in the file: .*layers\.1\.mlp\.experts\.down_proj"):
        served.add(tmp_path / "less")
