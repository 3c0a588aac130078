"""Adapters on the modules of a transformers model: a forward hook per site adds their deltas to the module's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterLayout, Place
from truffula.kernels.program import ModelInterface, Site
from truffula.kernels.reference.linear import Segment, add_deltas_


def layout_of_sites(interface: ModelInterface) -> AdapterLayout:
    """Adapters as the hooks read them: in float32, a site's own number in place of an op's."""
    return AdapterLayout(
        "float32",
        tuple(
            Place(site.module, site.id, site.in_features, site.out_features, gathers=site.kind == "embed")
            for site in interface.sites
        ),
    )


class AdapterHooks:
    """The hooks of a model, and the segments of rows that they act on in the next forward pass.

    ``rows`` are for modules that see every token of the pass, ``head_rows`` for the modules ``of_logits``: the output
    head, and others behind the choice of rows whose logits are computed. ``prepare`` and ``prepare_one`` set both.
    """

    tokens: int | None
    num_logits: int | None

    def __init__(self, model: nn.Module, sites: Sequence[Site], of_logits: Collection[str]) -> None:
        self.prepare(0, (), 0, ())
        self._of_logits = of_logits
        modules = dict(model.named_modules())
        for site in sites:
            modules[site.module].register_forward_hook(self._hook(site))

    def prepare(self, tokens: int, rows: Sequence[Segment], logits: int, head_rows: Sequence[Segment]) -> None:
        """Set the segments of the next pass, over ``tokens`` rows, of which ``logits`` get logits."""
        self.tokens, self.rows, self.num_logits, self.head_rows = tokens, rows, logits, head_rows

    def prepare_one(self, segments: Sequence[Segment]) -> None:
        """Set the segments of a pass over one sequence: they are of all rows that a module sees, cached ones too."""
        self.tokens, self.rows, self.num_logits, self.head_rows = None, segments, None, segments

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add_deltas(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            behind = site.module in self._of_logits
            segments, count = (self.head_rows, self.num_logits) if behind else (self.rows, self.tokens)
            key = site.id, 0
            if not any(key in segment.ops for segment in segments):
                return None
            x = args[0].reshape(-1) if site.kind == "embed" else args[0].reshape(-1, site.in_features).float()
            y = torch.zeros(len(x), site.out_features, device=x.device)
            if count is None:
                segments = [replace(segment, lo=0, hi=len(x)) for segment in segments]
            elif len(x) != count:  # which rows they are is not known
                raise KernelError(
                    f"{site.module} saw {len(x)} rows in a pass of {count}: an adapter cannot act there.",
                    param="adapter",
                )
            add_deltas_(y, x, key, segments)
            # A table that scales its rows (Gemma) scales an adapter's as well, as in PEFT.
            scale = getattr(module, "embed_scale", 1.0) if site.kind == "embed" else 1.0
            return (output.float() + (y * scale).view(output.shape)).to(output.dtype)

        return add_deltas
