"""The table of tying over all architectures: what each flag and each set of files means, here and in transformers.

``docs/tying.md`` is written from it (scripts/generate_model_pages.py). ``test_tying_everywhere.py`` holds it against
checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from truffula.model.architectures import ARCHITECTURES
from truffula.model.names import WeightNames
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.tying import FLAG, NESTED_CONFIGS

Array = npt.NDArray[Any]
Flag = bool | None
"""``tie_word_embeddings`` as written; None where it is not."""

TIED, SEPARATE, REVERSED, REFUSED = "tied", "separate", "reversed", "refused"
RANDOM_HEAD, RANDOM_TABLE = "random head", "random input table"


@dataclass(frozen=True)
class Cell:
    """The answer of truffula, and those of transformers where the class assumes false and where it assumes true.

    ``warns`` are the class defaults with which the author of the model is warned.
    """

    ours: str
    of_false: str
    of_true: str
    warns: tuple[bool, ...] = ()


FILES = ("no head", "equal head", "different head", "head alone")
CELLS: Mapping[tuple[Flag, str], Cell] = {
    (True, "no head"): Cell(TIED, TIED, TIED),
    (True, "equal head"): Cell(TIED, TIED, TIED),
    (True, "different head"): Cell(SEPARATE, SEPARATE, SEPARATE, (False, True)),
    (True, "head alone"): Cell(REVERSED, REVERSED, REVERSED),
    (False, "no head"): Cell(REFUSED, RANDOM_HEAD, RANDOM_HEAD),
    (False, "equal head"): Cell(SEPARATE, SEPARATE, SEPARATE),
    (False, "different head"): Cell(SEPARATE, SEPARATE, SEPARATE),
    (False, "head alone"): Cell(REFUSED, RANDOM_TABLE, RANDOM_TABLE),
    (None, "no head"): Cell(TIED, RANDOM_HEAD, TIED, (False,)),
    (None, "equal head"): Cell(TIED, SEPARATE, TIED),
    (None, "different head"): Cell(SEPARATE, SEPARATE, SEPARATE, (True,)),
    (None, "head alone"): Cell(REVERSED, RANDOM_TABLE, REVERSED, (False, True)),
}


_UNTIED_THERE = {(True, "no head"): RANDOM_HEAD, (True, "equal head"): SEPARATE, (True, "head alone"): RANDOM_TABLE}
_TEXT_ALONE = "the class of its text part reads only the flag in `text_config`"
OTHERWISE: Mapping[str, str] = {
    "dbrx": "its class refuses the flag",
    "kimi_linear": "its class names no tables to tie",
    "llama4": _TEXT_ALONE,
    "nemotron_h": "its class names no tables to tie",
    "qwen3_5": _TEXT_ALONE,
    "qwen3_5_moe": _TEXT_ALONE,
}
"""The types that transformers refuses or leaves untied where the flag at the top of config.json is true, and why."""


def theirs(model_type: str, flag: Flag, files: str, class_default: bool) -> str:
    """The answer of transformers, where the flag is written at the top."""
    if model_type == "dbrx" and flag:
        return REFUSED
    if model_type in OTHERWISE and (flag, files) in _UNTIED_THERE:
        return _UNTIED_THERE[flag, files]
    cell = CELLS[flag, files]
    return cell.of_true if class_default else cell.of_false


# Parts between the tables and the layers that not every model of the type has.
_AWKWARD: Mapping[str, Mapping[str, Any]] = {"opt": {"word_embed_proj_dim": 20}, "phimoe": {"lm_head_bias": True}}
_VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# transformers' default encoders take seconds to make.
_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"vision_config": {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}},
    "mistral3": {"vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8, "num_channels": 3}},
}


def awkward_config(model_type: str) -> dict[str, Any]:
    """A tiny config without flags."""
    config = tiny_config(model_type, vocab_size=97, **_AWKWARD.get(model_type, {})) | _ENCODERS.get(model_type, {})
    for level in (config, *(config[key] for key in NESTED_CONFIGS if key in config)):
        level.pop(FLAG, None)
    return config


NESTED = tuple(name for name in sorted(ARCHITECTURES) if "text_config" in tiny_config(name))
"""The multimodal types, which have a flag at two levels."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny model of a type: its config without flags, its two tables, their names, and its other tensors."""

    config: Mapping[str, Any]
    class_default: bool
    embed: str
    head: str
    tables: Mapping[str, Array]
    body: Mapping[str, Array]

    @classmethod
    def of(cls, model_type: str) -> TinyModel:
        config = awkward_config(model_type)
        read = read_config(config)
        body = tiny_tensors(config | {FLAG: False}, seed=2)
        names = WeightNames.canonical(read.spec)
        embed, head = names.embed, names.head
        tables = {"no head": body.pop(embed), "different head": body.pop(head)}
        return cls(config, read.tie_default, embed, head, tables, body)

    def write(self, folder: Path, files: str, flag: Flag, text_flag: Flag = None) -> Path:
        """The model with these files, and these flags at the top and in text_config."""
        config = {**self.config, **({} if flag is None else {FLAG: flag})}
        if text_flag is not None:
            config["text_config"] = {**config["text_config"], FLAG: text_flag}
        embed, different = self.tables["no head"], self.tables["different head"]
        tables = {} if files == "head alone" else {self.embed: embed}
        if files != "no head":
            tables[self.head] = embed if files == "equal head" else different
        return write_tiny_checkpoint(folder, config, drop=tiny_tensors(config), extra={**self.body, **tables})


def page() -> str:
    """``docs/tying.md``."""
    lines = [_INTRODUCTION]
    for (flag, files), cell in CELLS.items():
        said = "not written" if flag is None else str(flag).lower()
        warns = f"where the class assumes {str(cell.warns == (True,)).lower()}" if len(cell.warns) == 1 else ""
        warns = warns or "yes" * bool(cell.warns)
        there = [f"**{each}**" if each.startswith("random") else each for each in (cell.of_false, cell.of_true)]
        lines.append(f"| {said} | {files} | {cell.ours} | {warns} | {' | '.join(there)} |")
    lines += [_TYPES, *(_row(model_type) for model_type in sorted(ARCHITECTURES))]
    return "\n".join([*lines, ""])


def _row(model_type: str) -> str:
    read = read_config(awkward_config(model_type))
    spec = read.spec
    names = WeightNames.canonical(spec)
    between = {
        "the input rows are scaled": spec.embed_scale is not None,
        "projections to and from the width of the layers": spec.embed_width is not None,
        "the head has a bias": spec.head_bias,
        "logits are scaled": spec.logit_scale != 1,
        "logits are capped": spec.logit_softcap is not None,
    }
    notes = [text for text, is_there in between.items() if is_there]
    if model_type in OTHERWISE:
        notes.append(f"transformers ties nothing where the flag is true: {OTHERWISE[model_type]}")
    default = "true" if read.tie_default else "false"
    return f"| `{model_type}` | {default} | `{names.embed}` | `{names.head}` | {'; '.join(notes)} |"


_INTRODUCTION = """# Tying: is the head the input table?

Written by `scripts/generate_model_pages.py` from `tests/model/tying_table.py`, which the tests hold against
transformers' own loading, for each model type below: the same tensors on each side, and the same logits.

One function decides for every model type and file format, from the names in the files first, the values of the tensors
second and the flag `tie_word_embeddings` third ([why](decisions/0001-tying-is-decided-by-names.md)). `truffula inspect
MODEL` prints its answer and the reason.

- **tied**: the head uses the input table. A copy of it in the files is not loaded.
- **separate**: each side has its own tensor.
- **reversed**: the input side uses the head's tensor.
- **refused**: the model does not load; the error names the missing tensor and the flag.

In the columns of transformers, bold is what it computes with when a tensor is missing.

| flag | in the files | truffula | warning | transformers, class assumes false | class assumes true |
|---|---|---|---|---|---|"""

_TYPES = """
- "Equal" is equal in every stored bit: a head that is the bfloat16 rounding of a float32 table is a different head.
- Without the input table and without a head a model is refused, as is a true flag with tables of two shapes.
- `null` counts as not written, with a warning; a value that is not a boolean is refused.
- Of a multimodal model, the flag at the top and the one in `text_config` count alike; where both are written and
  disagree, the answer is that of "not written", with a warning.
- A head counts as present in any form: a quantised head beside a tied flag is a different head, and is served.
- Rows beyond the tokenizer's vocabulary (padding) are ordinary rows of both tables.
- A bias of the head is the head's own, tied or not. Factors apply to one side only; the shared tensor is as stored.
- An adapter that changes the input table or the head of a tied model changes that side alone, as in peft.
- In GGUF there is no flag: a file without `output.weight` is tied.

## Model types

"Assumes" is the default of the flag in transformers' class, which only decides whether the author is warned. The names
are those of new files; others that a type is known by are found as well.

| model type | assumes | input table | head | between tables and layers |
|---|---|---|---|---|"""
