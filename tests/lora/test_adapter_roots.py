"""An adapter has the module names of the class it was trained on. It is served on every class with the same text model,
and its configuration means what PEFT reads in it there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import write_tiny_gguf
from kernel_backends import on_the_best
from lora_bases import llama_sites, pairs, validate
from served_base import Served
from wrapped_modules import VISION, linears, save_peft

from truffula.errors import AdapterError
from truffula.kernels.backend import Backend
from truffula.kernels.program import ModuleSlice, Site
from truffula.lora.peft import PeftAdapter, inspect_adapter
from truffula.lora.roots import TEXT_ROOTS, other_part
from truffula.testing.adapters import PREFIX, tiny_config, tiny_tensors, write_adapter
from truffula.testing.tiny import tiny_config as tiny_model_config
from truffula.testing.tiny import write_tiny_checkpoint

NEW, OLD, TEXT = "model.language_model.", "language_model.model.", "model."
CONFIG = tiny_config(rank=4, alpha=8, targets=["q_proj", "v_proj"])
# A class keeps its other parts beside the text model.
PARTS = {
    root: {("model." if root == NEW else "") + name: shape for name, shape in VISION.items()} for root in TEXT_ROOTS
}


def under(root: str) -> tuple[Site, ...]:
    """``llama_sites`` as a base has them whose text model is at ``root``."""

    def renamed(site: Site) -> Site:
        name = TEXT_ROOTS[root] if site.kind == "head" else root + site.module.removeprefix(TEXT)
        own = site.modules[0]
        return Site(site.id, site.kind, site.layer, site.in_features, site.out_features,
                    (ModuleSlice(name, own.lo, own.hi, own.of),))  # fmt: skip

    return tuple(renamed(site) for site in llama_sites())


def tensors(root: str = TEXT, **overrides: Any) -> dict[str, Any]:
    made = tiny_tensors(llama_sites(), CONFIG | overrides)
    return {key.replace(PREFIX + TEXT, PREFIX + root): value for key, value in made.items()}


def vision(root: str = NEW) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    halves = {"A": (4, 16), "B": (16, 4)}
    return {
        f"{PREFIX}{name}.lora_{half}.weight": rng.standard_normal(shape).astype(np.float32)
        for name in PARTS[root]
        for half, shape in halves.items()
    }


def assert_same(one: PeftAdapter, other: PeftAdapter) -> None:
    assert [(s.site, s.scale) for s in pairs(one.sites)] == [(s.site, s.scale) for s in pairs(other.sites)]
    for mine, theirs in zip(pairs(one.sites), pairs(other.sites), strict=True):
        assert np.array_equal(mine.a, theirs.a) and np.array_equal(mine.b, theirs.b)


# ---- every class's names, on every class's base


@pytest.mark.parametrize("base", [TEXT, NEW])
@pytest.mark.parametrize("root", TEXT_ROOTS)
def test_the_names_of_every_class_are_the_same_adapter(tmp_path: Path, root: str, base: str) -> None:
    write_adapter(tmp_path / "plain", CONFIG, tensors())
    write_adapter(tmp_path / "named", CONFIG, tensors(root))
    assert_same(validate(tmp_path / "named", under(base)), validate(tmp_path / "plain"))


# What PEFT is asked for, with {root} for the path of the text model; and whether the other parts are adapted too.
ASKED: dict[str, dict[str, Any]] = {
    "a list, which the vision tower has too": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but the other parts": {
        "target_modules": "all-linear",
        "exclude_modules": r".*(vision_tower|multi_modal_projector).*",
    },
    "a regex with the prefix": {"target_modules": r"{root}layers\.\d+\.(self_attn|mlp)\.(q|v|up|down)_proj"},
    "full names": {"target_modules": ["{root}layers.0.self_attn.q_proj", "{root}layers.1.mlp.down_proj"]},
    "Unsloth's language layers": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
    },
    "Unsloth's vision and language layers": {
        "target_modules": r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp).*?"
        r"(?:q_proj|v_proj|fc1|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj|gate_proj|up_proj|down_proj)))"
    },
    "rank_pattern and alpha_pattern by full name": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"{root}layers.0.self_attn.q_proj": 2, r"vision_tower\..*": 3},
        "alpha_pattern": {"{root}layers.1.self_attn.v_proj": 5},
        "exclude_modules": ["fc1"],
    },
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers_pattern with the prefix": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "exclude_modules by full name": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["{root}layers.0.self_attn.q_proj"],
    },
}


def filled(value: Any, root: str) -> Any:
    if isinstance(value, str):
        return value.replace("{root}", root)
    if isinstance(value, list):
        return [filled(item, root) for item in value]
    return {filled(key, root): item for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("base", [TEXT, pytest.param(NEW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("root", [NEW, OLD, TEXT, "model.text_model."])
@pytest.mark.parametrize("asked", ASKED)
def test_a_configuration_means_what_peft_reads_on_its_class(tmp_path: Path, asked: str, root: str, base: str) -> None:
    fields = {name: filled(value, root) for name, value in ASKED[asked].items()}
    modules = linears(llama_sites(), root, PARTS[root])
    loaded = save_peft(tmp_path, modules, r=4, lora_alpha=8, **fields)
    adapter = validate(tmp_path, under(base))
    names = {site.id: root + site.module.removeprefix(TEXT) for site in llama_sites()}
    assert {names[s.site]: (s.a.shape[0], pytest.approx(s.scale)) for s in pairs(adapter.sites)} == {
        name: value for name, value in loaded.items() if name not in PARTS[root]
    }
    beside = {name for name in loaded if name in PARTS[root]}
    words = [warning for warning in adapter.warnings if "Left out" in warning]
    assert len(words) == bool(beside)
    for part in ("vision_tower", "multi_modal_projector"):
        count = sum(part in name for name in beside)
        assert not count or f"{count} module{'s' * (count > 1)} of {part}" in words[0]
    idle = [warning for warning in adapter.warnings if "matches no module" in warning or "names no module" in warning]
    # PEFT expands all-linear to leaf names, also those that exclude_modules takes out everywhere.
    assert not idle or asked == "all-linear but the other parts"


# ---- transformers' own classes


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("LlavaForConditionalGeneration", NEW),
        ("Qwen2VLForConditionalGeneration", NEW),
        ("Mistral3ForConditionalGeneration", NEW),
        ("SmolVLMForConditionalGeneration", "model.text_model."),
        ("VoxtralForConditionalGeneration", NEW),
        ("VideoLlavaForConditionalGeneration", NEW),
        ("Llama4ForConditionalGeneration", OLD),
        ("Qwen2_5OmniForConditionalGeneration", "thinker.model.language_model."),
    ],
)
def test_every_linear_layer_of_a_multimodal_class_is_text_or_left_out(name: str, root: str) -> None:
    import torch
    import transformers

    multimodal = getattr(transformers, name)
    with torch.device("meta"):
        model = multimodal(multimodal.config_class())
    layers = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    text = [path for path in layers if path.startswith(f"{root}layers.")]
    others = [path for path in layers if path not in text and path != TEXT_ROOTS[root]]
    assert text and others
    assert [path for path in text if other_part(path) is not None] == []
    assert [path for path in others if other_part(f"{path}.") is None] == []


# ---- a whole model: transformers' Gemma 3, adapted by PEFT


@on_the_best
def test_a_gemma3_adapter_of_the_multimodal_class_agrees_with_peft(tmp_path: Path, backend: Backend) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny_model_config("gemma3_text", num_hidden_layers=4)
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = Gemma3Config(
        text_config={k: v for k, v in text.items() if k != "model_type"},
        vision_config=sight | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(settings).eval()
    model.save_pretrained(tmp_path / "wrapped")
    asked = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False,
                       target_modules=["q_proj", "v_proj", "down_proj", "fc1"])  # fmt: skip
    get_peft_model(model, asked).save_pretrained(tmp_path / "adapter")
    (tmp_path / "text").mkdir()
    inner = {**settings.text_config.to_dict(), "model_type": "gemma3_text", "tie_word_embeddings": True}
    write_tiny_checkpoint(tmp_path / "text", inner, extra=_text_tensors(tmp_path / "wrapped"))
    base = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "wrapped")
    with torch.no_grad():
        without = base(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0].numpy()
        peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        theirs = peft(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0].numpy()
    assert np.abs(theirs - without).max() > 1e-2
    for folder in ("wrapped", "text"):
        served = Served(tmp_path / folder, backend)
        (mine,) = served.run([(served.add(tmp_path / "adapter"), [5, 6, 7, 8])])
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def _text_tensors(wrapped: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    found = {}
    for name, value in load_file(wrapped / "model.safetensors").items():
        for prefix in ("model.language_model.", "language_model.model."):
            if name.startswith(prefix):
                found["model." + name.removeprefix(prefix)] = value
    assert found
    return found


@on_the_best
@pytest.mark.parametrize("architecture", ["gemma3", "qwen2", "llama"])
def test_on_a_gguf_base_too(tmp_path: Path, architecture: str, backend: Backend) -> None:
    """A GGUF file holds the text model alone: whatever class an adapter was trained on, its answer is the same."""
    served = Served(write_tiny_gguf(tmp_path / "base.gguf", architecture).path, backend)
    made = tiny_tensors(served.program.sites, CONFIG, seed=3)
    rows = [(None, [5, 6, 7, 8])]
    for number, root in enumerate((TEXT, NEW, OLD)):
        named = {key.replace(PREFIX + TEXT, PREFIX + root): value for key, value in made.items()}
        beside = vision(root) if root != TEXT else {}
        rows.append((served.add(write_adapter(tmp_path / str(number), CONFIG, named | beside)), [5, 6, 7, 8]))
    base, *answers = (served.run([row])[0] for row in rows)
    assert np.abs(answers[0] - base).max() > 1e-2
    for answer in answers[1:]:
        assert np.array_equal(answer, answers[0])


# ---- what is left out, and what is refused


def test_parts_that_text_does_not_pass_through_are_counted(tmp_path: Path) -> None:
    write_adapter(
        tmp_path, CONFIG | {"target_modules": "all-linear"}, tensors(NEW, target_modules="all-linear") | vision()
    )
    adapter = validate(tmp_path)
    assert [w for w in adapter.warnings if "Left out" in w] == [
        "Left out, because text does not pass through them: 1 module of multi_modal_projector, 3 modules of "
        "vision_tower. The 14 modules of the text model are served."
    ]
    alone = inspect_adapter(tmp_path)
    assert alone.error is None and alone.modules == 14 and any("3 modules of vision_tower" in w for w in alone.warnings)


@pytest.mark.parametrize(
    "module",
    [
        "visual.blocks.0.attn.qkv",  # Qwen2-VL, before and since transformers 4.52
        "model.visual.merger.mlp.0",
        "model.vision_tower.encoder.layers.0.attention.o_proj",  # Pixtral
        "vision_model.transformer.layers.0.mlp.fc1",  # Llama 3.2 Vision
        "model.connector.modality_projection.proj",  # SmolVLM
        "audio_tower.layers.0.self_attn.q_proj",  # Voxtral, Gemma 3n
        "thinker.visual.blocks.0.attn.q",  # Qwen2.5-Omni
    ],
)
def test_other_models_parts_are_left_out_too(tmp_path: Path, module: str) -> None:
    ones = {f"{PREFIX}{module}.lora_{half}.weight": np.ones((4, 4), np.float32) for half in "AB"}
    write_adapter(tmp_path / "with", CONFIG, tensors() | ones)
    write_adapter(tmp_path / "plain", CONFIG, tensors())
    with_parts = validate(tmp_path / "with")
    assert_same(with_parts, validate(tmp_path / "plain"))
    assert sum("Left out" in warning for warning in with_parts.warnings) == 1


def test_a_projector_that_was_trained_whole_is_left_out(tmp_path: Path) -> None:
    """``modules_to_save=["multi_modal_projector"]``, usual where LLaVA is trained: text does not pass through it."""
    config = CONFIG | {"modules_to_save": ["multi_modal_projector"]}
    saved = {f"{PREFIX}model.multi_modal_projector.linear_1.weight": np.ones((4, 4), np.float32)}
    write_adapter(tmp_path / "with", config, tensors(NEW) | saved)
    write_adapter(tmp_path / "plain", CONFIG, tensors())
    adapter = validate(tmp_path / "with")
    assert_same(adapter, validate(tmp_path / "plain"))
    assert any("1 module of multi_modal_projector" in warning for warning in adapter.warnings)
    write_adapter(tmp_path / "more", config | {"modules_to_save": ["multi_modal_projector", "lm_head"]}, tensors(NEW))
    with pytest.raises(AdapterError, match="modules_to_save"):
        validate(tmp_path / "more")


def test_an_adapter_of_the_vision_part_alone_would_change_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, vision())
    with pytest.raises(AdapterError, match=r"adapts only .*3 modules of vision_tower.* would change nothing"):
        validate(tmp_path)


def test_names_of_two_classes_in_one_file_are_refused(tmp_path: Path) -> None:
    mixed = {k: v for k, v in tensors(NEW).items() if ".0." in k} | {k: v for k, v in tensors().items() if ".1." in k}
    write_adapter(tmp_path, CONFIG, mixed)
    with pytest.raises(AdapterError, match="several prefixes"):
        validate(tmp_path)


def test_an_unknown_prefix_is_not_called_another_base(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, tensors("somewhere.else."))
    with pytest.raises(AdapterError, match=r"begin with 'somewhere\.else\.', .*rename") as caught:
        validate(tmp_path)
    assert "another base" not in caught.value.message


@pytest.mark.parametrize("root", [OLD, "thinker.model."])
def test_the_output_head_of_a_multimodal_class_is_the_bases(tmp_path: Path, root: str) -> None:
    head = {
        f"{PREFIX}{TEXT_ROOTS[root]}.lora_A.weight": np.ones((4, 12), np.float32),
        f"{PREFIX}{TEXT_ROOTS[root]}.lora_B.weight": np.ones((97, 4), np.float32),
    }
    write_adapter(tmp_path, CONFIG | {"target_modules": ["q_proj", "v_proj", "lm_head"]}, tensors(root) | head)
    adapted = [llama_sites()[s.site].module for s in validate(tmp_path).sites]
    assert adapted[-1] == "lm_head" and len(adapted) == 1 + len(tensors(root)) // 2


def test_an_adapter_of_a_multimodal_classes_tables_alone_is_served(tmp_path: Path) -> None:
    """No layer says which class it is of: the tables' own names do."""
    table = {
        f"{PREFIX}{OLD}embed_tokens.lora_embedding_A": np.ones((4, 97), np.float32),
        f"{PREFIX}{OLD}embed_tokens.lora_embedding_B": np.ones((12, 4), np.float32),
    }
    head = {
        f"{PREFIX}{TEXT_ROOTS[OLD]}.lora_A.weight": np.ones((4, 12), np.float32),
        f"{PREFIX}{TEXT_ROOTS[OLD]}.lora_B.weight": np.ones((97, 4), np.float32),
    }
    for number, some in enumerate((table, head, table | head)):
        targets = ["embed_tokens"] * (some is not head) + ["lm_head"] * (some is not table)
        write_adapter(tmp_path / str(number), CONFIG | {"target_modules": targets}, some)
        assert len(validate(tmp_path / str(number)).sites) == len(targets)


def test_missing_tensors_are_named_as_the_adapter_names_them(tmp_path: Path) -> None:
    less = {k: v for k, v in tensors(NEW).items() if "layers.1.self_attn.v_proj" not in k}
    write_adapter(tmp_path, CONFIG, less)
    with pytest.raises(
        AdapterError, match=r"no tensors in the file: model\.language_model\.layers\.1\.self_attn\.v_proj"
    ):
        validate(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
