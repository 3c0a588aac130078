"""Pairs on a parameter that holds the matrices of all experts (``target_parameters``).

PEFT wraps the module of the experts once for each of its adapted parameters, in their order, and names the tensors by
the wrapper alone: ``experts.base_layer.lora_A`` is of the first of two, ``experts.lora_A`` of the last. A has the rows
of all experts, one expert after the other; B the columns, one rank after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors, low_rank
from truffula.kernels.backend import Array
from truffula.kernels.program import Site
from truffula.kernels.stacked import StackedSlice
from truffula.lora.patterns import is_named

_INNER = ".base_layer"


def owner_of(module: str) -> str:
    """The module that a wrapper's name means."""
    while module.endswith(_INNER):
        module = module.removesuffix(_INNER)
    return module


def parameters_of(
    modules: Iterable[str], parameters: Mapping[str, Sequence[Site]], targets: Sequence[str] | None
) -> dict[str, str]:
    """The parameter that each of ``modules`` adapts, for those that are wrappers of one. ``parameters`` are the base's,
    with their sites, in their modules' order; ``targets`` is ``target_parameters``.

    Raises:
        AdapterError: A module has more or fewer wrappers than the configuration has parameters of it.
    """
    found = {module: module for module in modules if module in parameters}  # named in full
    wrappers: dict[str, list[str]] = {}
    owners = {parameter.rpartition(".")[0] for parameter in parameters}
    for module in modules:
        if (owner := owner_of(module)) in owners:
            wrappers.setdefault(owner, []).append(module)
    for owner, names in wrappers.items():
        every = [parameter for parameter in parameters if parameter.rpartition(".")[0] == owner]
        meant = every if targets is None else [parameter for parameter in every if is_named(parameter, targets)]
        if len(names) != len(meant):
            raise AdapterError(
                f"{owner} has LoRA on {len(names)} of its parameters, but target_parameters names "
                f"{', '.join(meant) or 'none of them'}: which tensors belong to which parameter is not known. The two "
                "files are of different adapters, or the file is incomplete.",
                param="target_parameters",
            )
        found |= dict(zip(sorted(names, key=len, reverse=True), meant, strict=True))
    return found


def pair_shapes(site: Site, place: StackedSlice, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B of a parameter."""
    inputs, outputs = (site.in_features, place.of) if not _turned(place) else (place.of, site.in_features)
    return (place.experts * rank, inputs), (outputs, rank * place.experts)


def site_tensors(sites: Sequence[Site], a: Array, b: Array, scale: float) -> Iterator[SiteTensors]:
    """The pair of each expert's site, as views of A and B. Sites of one expert share an A."""
    shared: dict[int, tuple[Array, Array]] = {}
    for site in sites:
        place = site.stacked
        assert place is not None
        if place.expert not in shared:
            rank = len(a) // place.experts
            own_a = a[place.expert * rank : (place.expert + 1) * rank]
            own_b = b[:, place.expert :: place.experts]
            shared[place.expert] = (own_b.T, own_a.T) if _turned(place) else (own_a, own_b)
        own_a, own_b = shared[place.expert]
        rows = own_b[place.lo : place.lo + site.out_features * place.step : place.step]
        yield low_rank(site.id, own_a, rows, scale)


def _turned(place: StackedSlice) -> bool:
    """Whether PEFT takes the parameter's matrices for their transposes: A is then of their outputs."""
    return place.columns and not place.peft_columns
