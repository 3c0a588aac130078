"""Merged adapters equal those of peft's ``add_weighted_adapter``, in whatever order their parts are named."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lora_bases import llama_sites, pairs, validate
from peft.utils import merge_utils
from pool_rig import Rig
from transformers import LlamaConfig, LlamaForCausalLM

from truffula.errors import AdapterError, InvalidRequest, TruffulaError
from truffula.lora.compose import MAX_WEIGHT, compose, merge
from truffula.lora.folder import open_adapter
from truffula.lora.merging import MergePart, combined, drawn, merge_adapters
from truffula.testing.adapters import tiny_config, tiny_tensors, write_adapter, write_tiny_adapter
from truffula.types import MAX_ADAPTERS, AdapterRef, Credential, MergeMethod, WeightedAdapter

STRATEGIES = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
SHAPE = (5, 7)


def method(strategy: str, density: float = 0.4, sign: str = "total") -> MergeMethod:
    return MergeMethod(strategy=strategy, density=density, sign=sign)


def merged(parts: Sequence[tuple[Path, float]], how: MergeMethod | None, out: Path, rank: int | None = None) -> Path:
    with ExitStack() as stack:
        opened = [MergePart(path.name, stack.enter_context(open_adapter(path)), weight) for path, weight in parts]
        out.mkdir()
        merge_adapters(opened, how, rank).write(out)
    return out


def deltas(folder: Path) -> dict[int, np.ndarray]:
    """What the adapter adds at each site: s B A."""
    return {pair.site: pair.scale * (pair.b.astype(np.float64) @ pair.a) for pair in pairs(validate(folder).sites)}


# The formulas, value by value

distinct = arrays(np.float32, SHAPE, elements=st.floats(-4, 4, width=32), unique=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(distinct, min_size=1, max_size=3), st.sampled_from(STRATEGIES),
    st.sampled_from([0.03, 0.2, 0.5, 0.97, 1.0]), st.sampled_from(["total", "frequency"]), st.data(),
)  # fmt: skip
def test_each_formula_is_that_of_peft(tensors, strategy, density, sign, data):
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, -0.7]), min_size=len(tensors), max_size=len(tensors)))
    masks = iter([drawn(SHAPE, density, f"seed\0{index}") for index in range(len(tensors))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda input: torch.from_numpy(next(masks)))
        arguments = [[torch.from_numpy(one) for one in tensors], torch.tensor(weights), density]
        signs = [sign] if "ties" in strategy else []
        expected = getattr(merge_utils, strategy)(*arguments, *signs).numpy()
    # peft and torch disagree about which of several equally large values to keep; distinct values have no such choice.
    if "dare" in strategy or len({abs(v) for one in tensors for v in one.ravel()}) == sum(one.size for one in tensors):
        got = combined(tensors, weights, method(strategy, density, sign), "seed")
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_dare_keeps_the_share_that_was_asked_for_and_draws_the_same_again():
    mask = drawn((300, 400), 0.3, "one")
    assert abs(mask.mean() - 0.3) < 0.01
    assert np.array_equal(mask, drawn((300, 400), 0.3, "one"))
    assert not np.array_equal(mask, drawn((300, 400), 0.3, "another"))
    assert drawn((4, 3), 0.5, "known").astype(int).ravel().tolist() == [0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]


# Whole adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of peft with three adapters: other scales and modules, one on the embedding table, one of other ranks."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    rows = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        "b": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "c": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "rank_pattern": {".*1.*q_proj": 3}},
    }
    model = None
    for name, fields in rows.items():
        lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
        if model is None:
            model = peft.get_peft_model(LlamaForCausalLM(config), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    model.save_pretrained(root, save_embedding_layers=False)
    return {"model": model, "root": root}


def of_peft(trained: dict[str, Any], names: str, weights: list[float], out: Path, **how: Any) -> Path:
    """The adapter that peft merges, saved."""
    model = trained["model"]
    model.add_weighted_adapter(list(names), weights, "merged", **how)
    model.save_pretrained(out, selected_adapters=["merged"], save_embedding_layers=False)
    model.delete_adapter("merged")
    return out / "merged"


@pytest.mark.parametrize(
    ("names", "weights", "strategy", "fields"),
    [
        ("ab", [0.7, -0.4], "linear", {}),
        ("abc", [0.7, -0.4, 1.5], "linear", {}),
        ("abc", [1.0, 2.0, -1.0], "linear", {"rank": 5}),
        ("ab", [0.7, -0.4], "ties", {"density": 0.3}),
        ("ab", [1.0, 0.5], "ties", {"density": 0.6, "sign": "frequency"}),
        ("ab", [-0.7, 0.4], "magnitude_prune", {"density": 0.3}),
        ("ab", [0.7, 0.4], "dare_linear", {"density": 1.0}),
        ("ab", [0.7, -0.4], "dare_ties", {"density": 1.0}),
    ],
)
def test_merged_adapters_are_those_of_peft(trained, tmp_path, names, weights, strategy, fields):
    parts = [(trained["root"] / name, weight) for name, weight in zip(names, weights, strict=True)]
    rank, sign = fields.get("rank"), fields.get("sign", "total")
    if strategy == "linear":
        how, kind = None, {"combination_type": "svd", "svd_rank": rank} if rank else {"combination_type": "cat"}
    else:
        how = method(strategy, fields["density"], sign)
        kind = {"combination_type": strategy, "density": fields["density"], "majority_sign_method": sign}
    expected = deltas(of_peft(trained, names, weights, tmp_path / "peft", **kind))
    got = deltas(merged(parts, how, tmp_path / "ours", rank))
    assert got.keys() == expected.keys()
    for site, delta in got.items():
        np.testing.assert_allclose(delta, expected[site], rtol=1e-4, atol=2e-5)
    again = deltas(merged(parts[::-1], how, tmp_path / "reversed", rank))
    assert all(np.array_equal(again[site], delta) for site, delta in got.items())


def test_a_merged_adapter_loads_in_peft(trained, tmp_path):
    out = merged([(trained["root"] / name, 0.5) for name in "abc"], None, tmp_path / "ours")
    model = trained["model"]
    model.load_adapter(out, "ours")
    model.set_adapter("ours")
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        got = model(input_ids=ids).logits
        model.add_weighted_adapter(list("abc"), [0.5] * 3, "merged", combination_type="cat")
        model.set_adapter("merged")
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    model.delete_adapter("merged")
    model.delete_adapter("ours")


def test_what_is_not_merged(tmp_path):
    sites = llama_sites()
    write_tiny_adapter(tmp_path / "a", sites, rank=4)
    write_tiny_adapter(tmp_path / "other", sites, rank=2)
    config = tiny_config(rank=4, alpha=4, targets=["q_proj"])
    tensors = {
        key: np.pad(array, [(0, 0), (0, 1)]) if "lora_A" in key else array
        for key, array in tiny_tensors(sites, config).items()
    }
    write_adapter(tmp_path / "wide", config, tensors)
    for name, how, error, text in [
        ("other", method("ties"), InvalidRequest, "need equal ranks.*a 4, other 2"),
        ("wide", None, AdapterError, "different bases"),
    ]:
        with pytest.raises(error, match=text):
            merged([(tmp_path / "a", 1.0), (tmp_path / name, 1.0)], how, tmp_path / f"{name}-out")


# In a server: derived generations


def test_a_merge_is_a_generation_of_its_own_that_changes_with_its_parts(tmp_path):
    rig = Rig(tmp_path)
    a, b = rig.write("a", seed=1), rig.write("b", seed=2)

    def ref(*parts: tuple[AdapterRef, float], how: MergeMethod | None = None) -> AdapterRef:
        return merge([WeightedAdapter(*part) for part in parts], how or method("dare_ties"))

    first = rig.loaded(ref((a, 0.7), (b, 0.3)))
    assert rig.lookup(ref((b, 0.3), (a, 0.7))).generation == first, "the order of the parts has no effect"
    others = [
        ref((a, 0.7), (b, 0.31)), ref((a, 0.7)), ref((a, 0.7), (b, 0.3), how=method("dare_ties", 0.5)),
        ref((a, 0.7), (b, 0.3), how=method("dare_linear")),
        ref((a, 0.7), (b, 0.3), how=method("dare_ties", sign="frequency")),
    ]  # fmt: skip
    assert len({first, *map(rig.loaded, others)}) == 6
    changed = rig.write("b", seed=3)
    assert rig.lookup(ref((a, 0.7), (changed, 0.3))).status == "loading"
    assert rig.loaded(ref((a, 0.7), (changed, 0.3))) != first
    assert list(rig.loader.staging.folders[0].iterdir()) == []
    # What a request gets is what the command line writes.
    out = merged([(tmp_path / "a", 0.7), (tmp_path / "b", 0.3)], method("dare_ties"), tmp_path / "out")
    assert validate(out).generation == rig.loaded(ref((a, 0.7), (changed, 0.3)))


def test_a_merge_fails_with_the_part_that_is_wrong(tmp_path):
    rig = Rig(tmp_path)
    good, bad = rig.write("good"), rig.write("bad")
    (tmp_path / "bad/adapter_model.safetensors").write_bytes(b"x")
    status = rig.lookup(merge([WeightedAdapter(good), WeightedAdapter(bad)], method("ties")))
    while status.status == "loading":
        rig.poll()
        status = rig.lookup(merge([WeightedAdapter(good), WeightedAdapter(bad)], method("ties")))
    assert status.error is not None and status.error.message.startswith("bad: ")


# Weighted sums


def part(name: str, weight: float, **fields: Any) -> WeightedAdapter:
    return WeightedAdapter(AdapterRef(name=name, locator=f"/{name}", **fields), weight)


def test_what_a_sum_is():
    assert compose([part("a", 1.0)]) == part("a", 1.0).ref
    assert compose([part("a", 0.5), part("a", 0.5)]) == part("a", 1.0).ref
    assert compose([part("a", 1.0), part("b", 0.0)]) == part("a", 1.0).ref
    assert compose([part("a", 0.1), part("a", -0.1)]) is None
    both = compose([part("a", 0.7), part("b", -0.3)])
    assert both is not None and both == compose([part("b", -0.3), part("a", 0.7)])
    assert (both.name, both.label, both.kind) == ("a=0.7+b=-0.3", "a+b", "composed")
    assert compose([WeightedAdapter(both, 2.0), part("b", 0.6)]) == compose([part("a", 1.4)])
    assert compose([part("a", 1.0, fingerprint="1"), part("b", 1.0)]) != both
    for ref in (both, merge(both.parts, method("ties"))):  # they cross to the engine and to the loading workers
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(ref), type=AdapterRef) == ref


def test_a_clients_right_is_part_of_a_merge_and_its_token_of_no_text():
    rights = [Credential("one", "hf_secret"), Credential("two", "hf_secret"), None]
    refs = [merge([part("a", 1.0, kind="hub", credential=right)], method("ties")) for right in rights]
    assert len({ref.locator for ref in refs}) == 3
    assert "hf_secret" not in str([(ref.name, ref.locator, ref.label, ref) for ref in refs])


@pytest.mark.parametrize("weight", [MAX_WEIGHT * 1.01, -2 * MAX_WEIGHT, float("nan"), float("inf")])
def test_weights_out_of_range(weight):
    for make in (lambda parts: compose(parts), lambda parts: merge(parts, method("ties"))):
        with pytest.raises(InvalidRequest, match="weight"):
            make([part("a", weight)])


def test_too_many_adapters():
    many = [part(f"a{n}", 1.0) for n in range(MAX_ADAPTERS + 1)]
    for make in (lambda: compose(many), lambda: merge(many, method("ties"))):
        with pytest.raises(TruffulaError, match=f"at most {MAX_ADAPTERS}"):
            make()
    assert compose(many[:MAX_ADAPTERS]) is not None
