"""A small base's sites, and adapters for it: shared by the tests of lora/."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from truffula.kernels.adapters import LowRank, SiteTensors
from truffula.kernels.inputs import Array
from truffula.kernels.program import ModuleSlice, Site
from truffula.lora.peft import BaseFacts, PeftAdapter, validate_adapter

BASE = BaseFacts(model="tiny-base")
D, KV, F = 12, 8, 20  # hidden, width of k and v, feed-forward


def llama_sites(layers: int = 2) -> tuple[Site, ...]:
    """q, k, v, o, gate, up, down of each layer; the tables on both ends."""
    sites: list[Site] = []

    def add(kind: str, layer: int | None, name: str, i: int, o: int) -> None:
        sites.append(Site(len(sites), kind, layer, i, o, (ModuleSlice(name, 0, o, o),)))  # type: ignore[arg-type]

    for layer in range(layers):
        root = f"model.layers.{layer}."
        for name, o in (("q_proj", 16), ("k_proj", KV), ("v_proj", KV)):
            add("linear", layer, f"{root}self_attn.{name}", D, o)
        add("linear", layer, f"{root}self_attn.o_proj", 16, D)
        for name in ("gate_proj", "up_proj"):
            add("linear", layer, f"{root}mlp.{name}", D, F)
        add("linear", layer, f"{root}mlp.down_proj", F, D)
    add("embed", None, "model.embed_tokens", 97, D)
    add("head", None, "lm_head", D, 97)
    return tuple(sites)


def fused_sites() -> tuple[Site, ...]:
    """One layer whose q, k, v PEFT knows as one ``qkv_proj`` (Phi-3)."""
    rows = (("q_proj", 0, 16), ("k_proj", 16, 24), ("v_proj", 24, 32))
    root = "model.layers.0.self_attn."
    return tuple(
        Site(
            number,
            "linear",
            0,
            D,
            hi - lo,
            (ModuleSlice(root + name, 0, hi - lo, hi - lo), ModuleSlice(f"{root}qkv_proj", lo, hi, 32)),
        )
        for number, (name, lo, hi) in enumerate(rows)
    )


@dataclass(frozen=True)
class Pair:
    """The low-rank part of a site, the only one that it has."""

    site: int
    a: Array
    b: Array
    scale: float


def pairs(sites: Iterable[SiteTensors]) -> list[Pair]:
    """What an adapter of plain LoRA holds at each site."""
    made = []
    for tensors in sites:
        (part,) = tensors.parts
        assert isinstance(part, LowRank)
        made.append(Pair(tensors.site, part.a, part.b, part.scale))
    return made


def validate(folder: Path, sites: tuple[Site, ...] | None = None) -> PeftAdapter:
    return validate_adapter(folder, sites if sites is not None else llama_sites(), base=BASE)
