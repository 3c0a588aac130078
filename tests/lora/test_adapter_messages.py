"""A refusal says what was found, why, and what to do: each in words, and a command that it gives works when run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_bases import BASE, llama_sites, pairs, validate
from pages import ROOT, blocks

from truffula.errors import AdapterError
from truffula.lora.foreign import describe_file
from truffula.lora.peft import BaseFacts, inspect_adapter, validate_adapter
from truffula.testing.adapters import PREFIX, tiny_config, tiny_tensors, write_adapter
from truffula.testing.files import write_safetensors

CONFIG = tiny_config(rank=4, alpha=8, targets=["q_proj", "v_proj"])
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PLAIN = tiny_tensors(llama_sites(), CONFIG)
ONES = np.ones((4, 4), np.float32)
CONVOLUTION = [f"{PREFIX}model.layers.0.linear_attn.conv1d.lora_{half}.weight" for half in "AB"]
Make = Callable[[Path], Any]


def renamed(change: Callable[[str], str]) -> Make:
    return lambda folder: write_adapter(folder, CONFIG, {change(key): value for key, value in PLAIN.items()})


def configured(**fields: Any) -> Make:
    return lambda folder: write_adapter(folder, {k: v for k, v in (CONFIG | fields).items() if v is not ...}, PLAIN)


def beside(name: str, value: Any, **fields: Any) -> Make:
    return lambda folder: write_adapter(folder, CONFIG | fields, PLAIN | {PREFIX + name: value})


def files(*names: str, without: tuple[str, ...] = (TENSORS_FILE,)) -> Make:
    def make(folder: Path) -> None:
        write_adapter(folder, CONFIG, PLAIN)
        for name in without:
            (folder / name).unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return make


def shards(folder: Path) -> None:
    """Two of three."""
    write_adapter(folder, CONFIG, PLAIN)
    (folder / TENSORS_FILE).unlink()
    for number in (1, 2):
        part = {key: value for key, value in PLAIN.items() if f"layers.{number - 1}." in key}
        write_safetensors(folder / f"adapter_model-0000{number}-of-00003.safetensors", part)


def pickled(folder: Path) -> None:
    import torch

    write_adapter(folder, CONFIG, PLAIN)
    (folder / TENSORS_FILE).unlink()
    torch.save({key: torch.from_numpy(value) for key, value in PLAIN.items()}, folder / "adapter_model.bin")


def mlx(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    transposed = {
        key.removeprefix(PREFIX).replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): value.T.copy()
        for key, value in PLAIN.items()
    }
    write_safetensors(folder / "adapters.safetensors", transposed)


def mlx_by_another_name(folder: Path) -> None:
    mlx(folder)
    (folder / "adapters.safetensors").rename(folder / TENSORS_FILE)


def trainer_output(folder: Path) -> None:
    for step in (10, 9, 20):
        write_adapter(folder / f"checkpoint-{step}", CONFIG, PLAIN)


def several(folder: Path) -> None:
    for name in ("pirate", "haiku"):
        write_adapter(folder / name, CONFIG, PLAIN)


WRAPPED: list[tuple[str, Make, list[str]]] = [
    ("torch.compile", renamed(lambda k: f"_orig_mod.{k}"), ["8 of 8", "torch.compile", "model._orig_mod"]),
    ("torch.compile inside", renamed(lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod.")), ["wrapper of torch.compile"]),
    ("DDP", renamed(lambda k: f"module.{k}"), ["DistributedDataParallel", "DeepSpeed", "model.module"]),
    (
        "FSDP inside",
        renamed(lambda k: k.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
        ["4 of 8", "wrapper of FSDP", "FULL_STATE_DICT"],
    ),
    (
        "activation checkpointing",
        renamed(lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")),
        ["wrapper of activation checkpointing", "checkpoint_wrapper"],
    ),
    ("Lightning", renamed(lambda k: f"_forward_module.{k}"), ["Lightning"]),
    ("DDP of torch.compile", renamed(lambda k: f"module._orig_mod.{k}"), ["torch.compile", "DistributedDataParallel"]),
    ("PEFT twice", renamed(lambda k: PREFIX + k), ["twice", "get_peft_model once"]),
    ("PEFT twice in DDP", renamed(lambda k: f"module.{PREFIX}{k}"), ["twice", "DistributedDataParallel"]),
    ("a pickle", pickled, ["adapter_model.bin", "pickle", "can run code", "save_pretrained"]),
]
MESSAGES: list[tuple[str, Make, list[str]]] = [
    # what lies in the folder
    ("shards", shards, ["of 3 shards 1 are missing, the first is number 3"]),
    ("an empty folder", lambda folder: folder.mkdir(exist_ok=True), ["is empty", CONFIG_FILE, TENSORS_FILE]),
    (
        "something else",
        files("notes.txt", without=(TENSORS_FILE, CONFIG_FILE)),
        [f"no {CONFIG_FILE}", "save_pretrained"],
    ),
    ("no configuration", files(without=(CONFIG_FILE,)), [f"no {CONFIG_FILE}", "rank and scale"]),
    ("no tensors", files(), [f"no {TENSORS_FILE}", "weights are missing"]),
    ("an MLX folder", mlx, ["MLX", "adapters.safetensors", "lora_A = lora_a.T", "scale * rank", "docs/adapters.md"]),
    ("MLX by another name", mlx_by_another_name, ["MLX", "lora_parameters", "docs/adapters.md"]),
    ("torchtune", files("adapter_model.pt"), ["adapter_model.pt", "pickle", "torchtune", "FullModelHFCheckpointer"]),
    (
        "a trainer's output",
        trainer_output,
        ["checkpoint-20, checkpoint-10, checkpoint-9", "trainer's output folder", "FOLDER/checkpoint-20"],
    ),
    ("a folder of adapters", several, ["haiku, pirate", "a folder of adapters", "FOLDER/haiku", "--adapter-dir"]),
    (
        "a merged model",
        files("config.json", "model.safetensors", without=(TENSORS_FILE, CONFIG_FILE)),
        ["config.json", "full model", "merged", "truffula serve"],
    ),
    ("a model's weights beside a configuration", files("model.safetensors"), ["model.safetensors", "full model"]),
    ("a GGUF file inside", files("lora-f16.gguf"), ["lora-f16.gguf", "GGUF are not served", "PEFT folder"]),
    # what the tensors are
    (
        "ZeRO-3",
        lambda f: write_adapter(f, CONFIG, dict.fromkeys(PLAIN, ONES[:0])),
        ["8 of 8", "no values", "ZeRO-3", "gather"],
    ),
    (
        "an unmerged base_layer copy",
        beside("model.layers.0.self_attn.q_proj.base_layer.weight", ONES),
        ["base_layer copy of q_proj", "unmerged", "save_pretrained"],
    ),
    (
        "a merged model's tensors",
        lambda f: write_adapter(f, CONFIG, {"model.embed_tokens.weight": ONES, "model.norm.weight": ONES}),
        ["full (merged) model", "truffula serve"],
    ),
    ("MLX names", renamed(lambda k: k.replace(".lora_A.weight", ".lora_a")), ["lora_a", "MLX", "torchtune"]),
    (
        "a copy of a table of another size",
        beside("lm_head.base_layer.weight", np.ones((99, 12), np.float32)),
        [
            "lm_head.base_layer.weight",
            "99 rows",
            "has 97",
            "larger vocabulary",
            "--adapter-tokens 2",
            "merge_and_unload",
        ],
    ),
    (
        "a convolution",
        lambda folder: write_adapter(folder, CONFIG, PLAIN | dict.fromkeys(CONVOLUTION, ONES)),
        ["LoRA on a convolution is not supported", "linear_attn.conv1d", "leave conv1d out of target_modules"],
    ),
    ("half a pair of an embedding", beside("model.embed_tokens.lora_embedding_A", ONES), ["Incomplete pair"]),
    (
        "a saved head with added tokens",
        beside("lm_head.weight", np.ones((99, 12), np.float32), modules_to_save=["lm_head"]),
        ["lm_head.weight", "99 rows", "has 97", "larger vocabulary"],
    ),
    (
        "a saved layer that is not named",
        beside("model.layers.0.mlp.up_proj.weight", np.ones((20, 12), np.float32)),
        ["modules_to_save does not name this module", "another adapter"],
    ),
    (
        "a saved convolution",
        beside("model.layers.0.conv1d.weight", ONES, modules_to_save=["conv1d"]),
        ["linear layers, norms, the embedding and the head", "Train the adapter without it"],
    ),
    ("a bias", beside("model.layers.0.self_attn.q_proj.base_layer.bias", ONES[0]), ["bias is 'none'"]),
    (
        "DoRA's tensors",
        beside("model.layers.0.self_attn.q_proj.lora_magnitude_vector", ONES[0]),
        ["use_dora is not set", "lora_magnitude_vector of model.layers.0.self_attn.q_proj"],
    ),
    (
        "a magnitude without a pair",
        beside("model.layers.0.self_attn.o_proj.lora_magnitude_vector", ONES[0], use_dora=True),
        ["lora_magnitude_vector of a module without lora_A and lora_B"],
    ),
    (
        "trained rows that are not named",
        beside("model.embed_tokens.token_adapter.trainable_tokens_delta", ONES),
        ["trainable_token_indices does not name this table"],
    ),
    (
        "trained rows beyond the table",
        beside("model.embed_tokens.token_adapter.trainable_tokens_delta", ONES, trainable_token_indices=[1, 97]),
        ["names token 97", "has 97 rows", "larger vocabulary"],
    ),
    (
        "half a pair",
        lambda f: write_adapter(f, CONFIG, dict(list(PLAIN.items())[1:])),
        ["Incomplete pair", "save it again"],
    ),
    ("NaN", lambda f: write_adapter(f, CONFIG, PLAIN | {min(PLAIN): PLAIN[min(PLAIN)] * np.nan}), ["NaN", "earlier"]),
    ("no tensors in the file", lambda f: write_adapter(f, CONFIG, {}), ["contains no tensors", "Save it again"]),
    # what the configuration says
    (
        "modules_to_save",
        configured(modules_to_save=["lm_head"]),
        ["modules_to_save names have no tensors in the file: lm_head"],
    ),
    (
        "trainable tokens",
        configured(trainable_token_indices=[5]),
        ["trainable_token_indices names model.embed_tokens", "no trained rows"],
    ),
    ("DoRA", configured(use_dora=True), ["use_dora is set", "no lora_magnitude_vector of model.layers.0"]),
    ("KaSA", configured(kasa_config={}), ["kasa_config is set", "no lora_diag of model.layers.0"]),
    ("biases of B", configured(lora_bias=True), ["lora_bias is set", "no bias of lora_B of model.layers.0"]),
    (
        "blocks that do not divide",
        configured(use_bdlora={"nblocks": 3, "target_modules_bd_a": ["proj"]}),
        ["use_bdlora.nblocks is 3, which does not divide 4"],
    ),
    (
        "groups that do not divide",
        configured(use_qalora=True, qalora_group_size=5),
        ["qalora_group_size is 5, which does not divide 12"],
    ),
    ("a classifier", configured(task_type="SEQ_CLS", modules_to_save=["score"]), ["SEQ_CLS", "another head"]),
    ("a misspelt method", configured(peft_type="LORAA"), ["peft_type is 'LORAA'", "Did you mean LORA?"]),
    ("lower case", configured(peft_type="lora"), ["peft_type is 'lora'", "Did you mean LORA?"]),
    ("another method", configured(peft_type="OFT"), ["'OFT'", "it rotates the weight", "merge_and_unload"]),
    ("one that PEFT converts", configured(peft_type="HIRA"), ["'HIRA'", "save_as_lora"]),
    ("no method", configured(peft_type=...), ["peft_type: missing", "LORA"]),
    ("no alpha", configured(lora_alpha=...), ["lora_alpha: missing", "scale"]),
    ("no rank", configured(r=...), ["r: missing", "scale"]),
    (
        "PiSSA by iterations",
        configured(init_lora_weights="pissa_niter_4"),
        ["path_initial_model_for_weight_conversion"],
    ),
    ("LoRA-GA", configured(init_lora_weights="lora_ga"), ["path_initial_model_for_weight_conversion"]),
    ("CorDA", configured(init_lora_weights="corda"), ["path_initial_model_for_weight_conversion"]),
    ("LoftQ", configured(init_lora_weights="loftq"), ["LoftQ", "quantised", "merge_and_unload"]),
    ("an unknown start", configured(init_lora_weights="xavier"), ["xavier", "gaussian", "eva"]),
    (
        "a broken pattern",
        configured(target_modules=r"model\.layers\.(q_proj"),
        ["target_modules", "missing ), unterminated subpattern", "at position 15"],
    ),
    ("a pattern broken at its end", configured(target_modules="q_proj["), ["at position 6"]),
    (
        "a broken rank pattern",
        configured(rank_pattern={"q_proj(": 4}),
        ["rank_pattern", "'q_proj('", "at position 6"],
    ),
    ("a pattern that ends too early", configured(alpha_pattern={"q_proj\\": 4}), ["alpha_pattern", "pattern"]),
]


def refusal(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        validate(folder)
    assert str(folder) not in caught.value.message
    return caught.value


@pytest.mark.parametrize(("make", "words"), [c[1:] for c in WRAPPED + MESSAGES], ids=[c[0] for c in WRAPPED + MESSAGES])
def test_a_refusal_says_what_it_is_and_the_way_out(tmp_path: Path, make: Make, words: list[str]) -> None:
    make(tmp_path)
    message = refusal(tmp_path).message
    assert [word for word in words if word not in message] == [], message
    assert "another base" not in message and "nothing:" not in message and "\n" not in message


@pytest.mark.parametrize("make", [c[1] for c in WRAPPED], ids=[c[0] for c in WRAPPED])
def test_the_command_of_a_refusal_makes_the_adapter_that_was_meant(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "plain", CONFIG, PLAIN)
    make(tmp_path / "found")
    message = refusal(tmp_path / "found").message
    command = shlex.split(message[message.index("python -c") :])
    assert command[:2] == ["python", "-c"] and command[3:5] == ["&&", "mv"]
    monkeypatch.chdir(tmp_path / "found")
    exec(compile(command[2], "command", "exec"), {})  # no process of its own: it would import torch each time
    Path(command[5]).replace(command[6])
    mended, plain = validate(tmp_path / "found"), validate(tmp_path / "plain")
    for mine, theirs in zip(pairs(mended.sites), pairs(plain.sites), strict=True):
        assert (mine.site, mine.scale) == (theirs.site, theirs.scale)
        assert np.array_equal(mine.a, theirs.a) and np.array_equal(mine.b, theirs.b)


def test_the_documented_script_converts_an_mlx_adapter(tmp_path: Path) -> None:
    (script,) = (block for block in blocks(ROOT / "docs" / "adapters.md", "python") if "def convert_mlx" in block.code)
    namespace: dict[str, Any] = {}
    exec(script.code, namespace)
    mlx(tmp_path / "mlx")
    namespace["convert_mlx"](str(tmp_path / "mlx"), str(tmp_path / "peft"))
    write_adapter(tmp_path / "plain", CONFIG, PLAIN)
    converted, plain = validate(tmp_path / "peft"), validate(tmp_path / "plain")
    for mine, theirs in zip(pairs(converted.sites), pairs(plain.sites), strict=True):
        assert (mine.site, mine.scale) == (theirs.site, theirs.scale)
        assert np.array_equal(mine.a, theirs.a) and np.array_equal(mine.b, theirs.b)


# ---- another base: said only where shapes or names say so, with both sides


def test_another_width_is_another_base_with_both_shapes_and_its_name(tmp_path: Path) -> None:
    wide = {key: value.repeat(2, -1) if "lora_A" in key else value for key, value in PLAIN.items()}
    write_adapter(tmp_path, CONFIG | {"base_model_name_or_path": "org/wide"}, wide)
    message = refusal(tmp_path).message
    for word in ("[4, 24]", "[4, 12]", "another base", "'org/wide'", "base_model_name_or_path", BASE.model):
        assert word in message


def test_more_layers_are_another_base(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, tiny_tensors(llama_sites(4), CONFIG))
    message = refusal(tmp_path).message
    assert "4 of 8 are not in tiny-base" in message
    assert "has a layer 3, the base only 2 layers" in message and "another base" in message


def test_another_architecture_is_another_base(tmp_path: Path) -> None:
    keys = (f"{PREFIX}transformer.h.0.attn.c_attn.lora_{half}.weight" for half in "AB")
    write_adapter(tmp_path, CONFIG | {"base_model_name_or_path": ""}, dict.fromkeys(keys, ONES))
    message = refusal(tmp_path).message
    assert "another base" in message and "model.layers.0.mlp.down_proj" in message
    assert "does not name the base" in message


def test_one_odd_module_is_not_another_base(tmp_path: Path) -> None:
    odd = {f"{PREFIX}model.layers.0.self_attn.z_proj.lora_{half}.weight": ONES for half in "AB"}
    write_adapter(tmp_path, CONFIG, PLAIN | odd)
    message = refusal(tmp_path).message
    assert "1 of 5 is not in tiny-base" in message and "no such layers" in message and "another base" not in message


# ---- files in an adapter's place, and reports


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora.gguf", ["GGUF", "not served", "PEFT folder"]),
        ("adapter.zip", ["archive", "Unpack"]),
        ("adapter.tar.gz", ["archive", "Unpack"]),
        (TENSORS_FILE, ["Give its folder: /somewhere"]),
        (CONFIG_FILE, ["Give its folder: /somewhere"]),
        ("adapter_model.bin", ["pickle", "never read"]),
        ("adapter.pt", ["pickle"]),
        ("notes.txt", ["is a file", "folder"]),
    ],
)
def test_a_file_is_not_an_adapter_and_the_message_says_what_is(name: str, words: list[str]) -> None:
    message = describe_file(Path("/somewhere") / name)
    assert [word for word in (*words, name) if word not in message] == []


@pytest.mark.parametrize("name", ["unsloth/tiny-base-bnb-4bit", "org/tiny-base-GPTQ", "org/tiny-base-AWQ"])
def test_a_quantised_base_is_mentioned(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, CONFIG | {"base_model_name_or_path": name}, PLAIN)
    (warning,) = validate(tmp_path).warnings
    assert name in warning and "quantised" in warning and "differ slightly" in warning
    assert validate_adapter(tmp_path, llama_sites(), base=BaseFacts("tiny-base-q4_k_m.gguf")).warnings == ()


def test_a_report_of_a_refused_adapter_has_its_fields_and_no_size(tmp_path: Path) -> None:
    configured(use_dora=True)(tmp_path)
    report = inspect_adapter(tmp_path, llama_sites(), BASE)
    assert report.error is not None and (report.rank, report.modules, report.nbytes) == (0, 0, 0)
    assert {row.field for row in report.rows} >= set(CONFIG)
