"""``StackedSlice``: the place of an expert's site in a parameter that holds the matrices of all experts."""

from __future__ import annotations

import msgspec


class StackedSlice(msgspec.Struct, frozen=True, gc=False):
    """Rows of matrix number ``expert`` of the parameter ``name`` (``model.layers.3.mlp.experts.gate_up_proj``).

    The site's rows are ``lo, lo + step ..`` of ``of`` rows. ``columns``: the parameter is stored [E, I, O];
    ``peft_columns``: PEFT takes it to be stored so.
    """

    name: str
    expert: int
    experts: int
    lo: int
    step: int
    of: int
    columns: bool = False
    peft_columns: bool = False
