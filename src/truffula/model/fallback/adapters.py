"""Adapters on the modules of a transformers model: a forward hook per site applies them to the module's output.

A pass without adapters has no hooks: torch calls a module without any sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterLayout, Place
from truffula.kernels.program import ModelInterface, Site
from truffula.kernels.reference.linear import Segment, apply_adapters_
from truffula.kernels.reference.weights import Weight


def layout_of_sites(interface: ModelInterface) -> AdapterLayout:
    """Adapters as the hooks read them: in float32, a site's own number in place of an op's."""
    return AdapterLayout(
        "float32",
        tuple(
            Place(site.module, site.id, site.in_features, site.out_features, kind=site.kind) for site in interface.sites
        ),
    )


class AdapterHooks:
    """The hooks of a model, and the segments of rows that they act on in the next forward pass.

    ``rows`` are for modules that see every token of the pass, ``head_rows`` for the modules ``of_logits``: the output
    head, and others behind the choice of rows whose logits are computed.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], of_logits: Collection[str]) -> None:
        modules = dict(model.named_modules())
        self._hooks = [(modules[site.module], self._hook(site)) for site in sites]
        self._handles: list[RemovableHandle] = []
        self._of_logits = of_logits
        self.prepare(0, (), 0, ())

    def prepare(
        self, tokens: int | None, rows: Sequence[Segment], logits: int | None, head_rows: Sequence[Segment]
    ) -> None:
        """Set the segments of the next pass, over ``tokens`` rows, of which ``logits`` get logits.

        Both None: a pass over one sequence, whose segments are of all rows that a module sees, cached ones too.
        """
        self.tokens, self.rows, self.num_logits, self.head_rows = tokens, rows, logits, head_rows
        if (rows or head_rows) and not self._handles:
            self._handles = [module.register_forward_hook(hook) for module, hook in self._hooks]
        elif not (rows or head_rows):
            while self._handles:
                self._handles.pop().remove()

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def apply(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            behind = site.module in self._of_logits
            segments, count = (self.head_rows, self.num_logits) if behind else (self.rows, self.tokens)
            key = site.id, 0
            acting = [segment for segment in segments if key in segment.ops]
            if not acting:
                return None
            x = args[0].reshape(-1) if site.kind == "embed" else args[0].reshape(-1, site.in_features).float()
            if count is None:
                acting = [replace(segment, lo=0, hi=len(x)) for segment in acting]
            elif len(x) != count:  # which rows they are is not known
                raise KernelError(
                    f"{site.module} saw {len(x)} rows in a pass of {count}: an adapter cannot act there.",
                    param="adapter",
                )
            weight, made = _matrix(module), output.reshape(len(x), output.shape[-1]).clone()
            bias = getattr(module, "bias", None)
            # A table that scales its rows (Gemma) scales an adapter's as well, as in PEFT.
            scale = getattr(module, "embed_scale", 1.0) if site.kind == "embed" else 1.0
            y = weight[x].float() if site.kind == "embed" else made.float()
            if bias is not None:
                y = y - bias
            apply_adapters_(y, x, key, acting, Weight((weight,)))
            for rows in (slice(segment.lo, segment.hi) for segment in acting):  # base rows stay as they are
                made[rows] = (y[rows] * scale + (0.0 if bias is None else bias)).to(output.dtype)
            return made.view(output.shape)

        return apply


def _matrix(module: nn.Module) -> Tensor:
    """A module's weight as a table or a matrix [O, I]: Conv1D holds its transpose."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight
