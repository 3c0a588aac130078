"""What the decoder writes: few ops, fused as promised, every slice a site, every buffer within its bounds."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import get_args, get_type_hints

import pytest

from truffula.kernels.program import Attention, Embed, Epilogue, Linear, Logits, Norm, Op, Program, Rope, WeightId
from truffula.kernels.validate import validate
from truffula.model.architectures import ARCHITECTURES
from truffula.model.decoder import build_program
from truffula.model.names import WeightNames
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config
from truffula.weights.tying import Tie, TyingDecision


def program(model_type: str, tie: Tie = Tie.TIED, **overrides: object) -> Program:
    spec = read_config(tiny_config(model_type, **overrides)).spec
    return build_program(spec, WeightNames.canonical(spec), TyingDecision(tie, f"{tie.value} by hand"))


def weights_of(part: Op | Epilogue) -> list[int]:
    """The weights that an op, or its epilogue, reads: the fields whose type is WeightId, as often as they occur."""
    found: list[int] = []
    for name, hint in get_type_hints(type(part), include_extras=True).items():
        value = getattr(part, name)
        if isinstance(value, Epilogue):
            found += weights_of(value)
        elif value is not None and WeightId in (hint, *get_args(hint)):
            found.append(value)
    return found


@pytest.mark.parametrize("tie", list(Tie))
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_program_is_valid(model_type: str, tie: Tie) -> None:
    made = program(model_type, tie)
    validate(made)
    assert made.notes == (f"{tie.value} by hand",)
    # Every weight that is declared is used, and every one once per use.
    used = Counter(weight for op in made.ops for weight in weights_of(op))
    assert set(used) == {decl.id for decl in made.weights}
    assert all(count == (2 if len(made.weights[weight].uses) == 2 else 1) for weight, count in used.items())


def test_a_llama_layer_is_eight_ops() -> None:
    made = program("llama")
    names = [op.name.removeprefix("layers.0.") for op in made.ops if op.layer == 0]
    assert names == ["before_mixer", "qkv", "rope", "attention", "out", "before_mlp", "mlp_in", "mlp_out"]
    outside = [op.name for op in made.ops if op.layer is None]
    assert outside == ["embed", "rope0", "take_rows", "final_norm", "logits"]


def test_residuals_ride_in_the_epilogues_and_the_gate_is_fused() -> None:
    linears = {op.name.removeprefix("layers.0."): op for op in program("llama").ops if isinstance(op, Linear)}
    assert linears["out"].epilogue.residual == linears["out"].out
    assert linears["mlp_out"].epilogue.residual == linears["mlp_out"].out
    assert linears["mlp_in"].epilogue.glu and linears["mlp_in"].epilogue.activation == "silu"
    assert linears["mlp_in"].out.width == 56
    assert linears["qkv"].epilogue.residual is None


def test_norms_behind_a_part_carry_the_residual() -> None:
    made = program("gemma2")
    norms = {op.name.removeprefix("layers.0."): op for op in made.ops if isinstance(op, Norm) and op.layer == 0}
    assert set(norms) == {"before_mixer", "after_mixer", "before_mlp", "after_mlp"}
    assert norms["after_mixer"].plus == norms["after_mixer"].out
    assert all(op.epilogue.residual is None for op in made.ops if isinstance(op, Linear))


def test_windows_ropes_and_caps_are_where_they_belong() -> None:
    made = program("gemma3_text")
    windows = [op.window for op in made.ops if isinstance(op, Attention)]
    assert windows == [7, 7, 7, 7, 7, None, 7]
    rows = {op.layer: op.rows for op in made.ops if isinstance(op, Rope)}
    assert rows[5] != rows[0] == rows[6]
    caps = {op.softcap for op in program("gemma2").ops if isinstance(op, Attention)}
    assert caps == {50.0}
    logits = program("gemma2").ops[-1]
    assert isinstance(logits, Logits) and logits.softcap == 30.0


def test_layers_with_one_window_form_a_kv_group() -> None:
    def groups(model_type: str, **changes: object) -> list[tuple[int | None, set[int]]]:
        made = program(model_type, **changes)
        validate(made)
        in_group = {op.layer: op.group for op in made.ops if isinstance(op, Attention)}
        assert all(in_group[plane.layer] == group.id for group in made.kv_groups for plane in group.planes)
        return [(group.window, {plane.layer for plane in group.planes}) for group in made.kv_groups]

    assert groups("gemma3_text") == [(None, {5}), (7, {0, 1, 2, 3, 4, 6})]
    assert groups("gemma2") == [(None, {1}), (7, {0, 2})]
    assert groups("mistral") == [(7, {0, 1, 2})]
    assert groups("llama") == [(None, {0, 1, 2})]
    # A window that no position reaches frees nothing.
    assert groups("mistral", sliding_window=512) == [(None, {0, 1, 2})]
    assert groups("mistral", sliding_window=511) == [(511, {0, 1, 2})]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3"])
def test_sites_cover_every_linear_row_once(model_type: str) -> None:
    made = program(model_type)
    for op in made.ops:
        if isinstance(op, Linear):
            spans = [(item.lo, item.hi) for item in op.slices]
            assert spans[0][0] == 0 and spans[-1][1] == made.weights[op.weight].shape[0]
            assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
            for item in op.slices:
                site = made.sites[item.site]
                assert (site.out_features, site.in_features) == (item.hi - item.lo, made.weights[op.weight].shape[1])
    kinds = Counter(site.kind for site in made.sites)
    layers = len({op.layer for op in made.ops if op.layer is not None})
    norms = [op for op in made.ops if isinstance(op, Norm)]
    assert kinds == {"linear": 7 * layers, "embed": 1, "head": 1, "norm": len(norms)}


@pytest.mark.parametrize(
    ("model_type", "module", "transform"),
    [
        ("llama", "model.layers.1.input_layernorm", "none"),
        ("llama", "model.norm", "none"),
        ("gemma3", "model.language_model.layers.1.self_attn.q_norm", "plus_one"),
        ("gpt2", "transformer.h.1.ln_2", "none"),
    ],
)
def test_norms_are_sites_after_all_others(model_type: str, module: str, transform: str) -> None:
    """Named as PEFT does; ``transform`` takes a saved weight to what the op multiplies with."""
    made = program(model_type)
    ops = [op for op in made.ops if isinstance(op, Norm)]
    assert [op.site for op in ops] == [*range(len(made.sites) - len(ops), len(made.sites))]
    site = next(site for site in made.sites if site.module == module)
    op = next(op for op in ops if op.site == site.id)
    assert op.weight is not None and made.weights[op.weight].shape == (site.out_features,)
    assert (site.kind, site.transform, site.in_features) == ("norm", transform, site.out_features)
    assert {part.transform for part in made.weights[op.weight].parts} == {transform}


def test_fused_modules_address_their_slices() -> None:
    made = program("llama")
    modules = {module.name: (module.lo, module.hi, module.of) for site in made.sites for module in site.modules[1:]}
    assert modules["model.layers.2.mlp.gate_up_proj"] == (56, 112, 112)
    k = next(site for site in made.sites if site.module == "model.layers.2.self_attn.k_proj")
    fused = next(module for module in k.modules if module.name.endswith("qkv_proj"))
    assert (fused.lo, fused.hi, fused.of) == (32, 48, 64)


def test_a_tied_table_is_one_weight_with_two_sites() -> None:
    made = program("qwen2")
    embed, logits = made.ops[0], made.ops[-1]
    assert isinstance(embed, Embed) and isinstance(logits, Logits)
    assert embed.table == logits.weight
    assert made.weights[embed.table].uses == {"rows", "matmul"}
    assert embed.site is not None and logits.site is not None and embed.site != logits.site
    assert (made.sites[embed.site].kind, made.sites[logits.site].kind) == ("embed", "head")
    apart = program("qwen2", Tie.SEPARATE).ops
    assert isinstance(apart[0], Embed) and isinstance(apart[-1], Logits) and apart[0].table != apart[-1].weight


def test_reversed_tying_takes_the_heads_tensor() -> None:
    made = program("qwen2", Tie.REVERSED)
    assert [part.name for part in made.weights[0].parts] == ["lm_head.weight"]


def test_a_spec_is_data() -> None:
    spec = read_config(tiny_config("qwen3")).spec
    assert hash(spec) == hash(read_config(tiny_config("qwen3")).spec)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.hidden = 1  # type: ignore[misc]
