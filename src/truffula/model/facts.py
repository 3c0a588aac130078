"""Facts about a model for reports: its parameters and their parts, its layers, its positions, where adapters act."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from truffula.kernels.program import ModelInterface
from truffula.model.config_view import load_defaults
from truffula.model.rows import LayerRows
from truffula.model.spec import ModelSpec

_NUMBER = re.compile(r"\.\d+\.")


def parameter_counts(spec: ModelSpec, *, tied: bool) -> tuple[int, int]:
    """The number of parameters, and of those that a token is multiplied with: without tables that are only looked up,
    and of experts the chosen ones."""
    total = active = 0
    for row in spec.rows:
        count = math.prod(row.shape)
        if row.key == "head" and tied:
            active += count
            continue
        total += count
        if row.kind not in ("embed", "table"):
            active += count * row.chosen // row.experts if row.experts else count
    return total, active


def part_of_weights(spec: ModelSpec) -> Mapping[str, str]:
    """The part of the model that each weight belongs to, by its name in the program: tables, attention (or what mixes
    tokens instead), MLPs, experts or others."""
    found = {row.key: "tables" for row in spec.rows if row.kind in ("embed", "head", "table")}
    for index, layer in enumerate(spec.layers):
        for name, part, _, _ in layer.branches:
            rows = LayerRows(spec.names, spec.hidden, index)
            part.rows(rows)
            words = {"mixer": "attention", "mlp": "MLPs"}
            found |= {row.key: "experts" if row.experts else words.get(name, "others") for row in rows.found}
    return {row.name: found.get(row.key, "others") for row in spec.rows}


def layer_kinds(spec: ModelSpec) -> str:
    """The parts of the layers with their numbers: ``12 × full attention, 12 × gated MLP``."""
    counts = Counter(part.kind for layer in spec.layers for _, part, _, _ in layer.branches)
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def describe_positions(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """How positions enter the layers: ``rope yarn, factor 4, base 1e+06; 64 columns``."""
    if not spec.ropes:
        alibi = any(getattr(layer.mixer, "alibi", ()) for layer in spec.layers)
        return "a learned table" if spec.position_offset is not None else "ALiBi" if alibi else "none"
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    defaults = load_defaults()[text.get("model_type", spec.model_type)]
    keys = [key for key in ("rope_parameters", "rope_scaling") if key in text]
    given = (text[keys[0]] if keys else defaults.fields.get("rope_parameters")) or {}
    tables = [value for value in given.values() if isinstance(value, Mapping)] or [given]
    kinds: dict[str, None] = {}
    for table in tables:
        kind = table.get("rope_type") or table.get("type") or "default"
        base = table.get("rope_theta") or text.get("rope_theta") or defaults.rope_theta
        bases = base.values() if isinstance(base, Mapping) else [base]
        factor = f", factor {table['factor']:g}" if isinstance(table.get("factor"), int | float) else ""
        kinds[f"{kind}{factor}, base {' or '.join(f'{each:g}' for each in bases)}"] = None
    columns = " or ".join(str(dims) for dims in sorted({rope.dims for rope in spec.ropes}))
    return f"rope {'; '.join(kinds)}; {columns} columns"


def site_kinds(interface: ModelInterface) -> dict[str, int]:
    """The number of sites of each kind of module but norms, named relative to its layer; ``*`` for the number of an
    expert."""
    kinds = Counter[str]()
    for path, count in Counter(
        _NUMBER.sub(".*.", site.modules[0].name) for site in interface.sites if site.kind != "norm"
    ).items():
        head, of_layer, rest = path.partition(".*.")
        kinds[rest if of_layer else head.rpartition(".")[2]] += count
    return dict(kinds)
