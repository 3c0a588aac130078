"""Pairs of all experts: of PEFT on a parameter that holds their matrices (``target_parameters``), or stacked by expert.

Stacked, A is [E, r, I] and B [E, O, r], and one that all experts share is [1, ..] or a matrix: ``experts.w1.lora_A``
and ``experts.w1.lora_B`` (Tinker), or of gates and ups together ``experts.gate_up_proj`` (Miles).

PEFT wraps the module of the experts once for each of its adapted parameters, in their order, and names the tensors by
the wrapper alone: ``experts.base_layer.lora_A`` is of the first of two, ``experts.lora_A`` of the last. A has the rows
of all experts, one expert after the other; B the columns, one rank after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors, low_rank
from truffula.kernels.backend import Array
from truffula.kernels.program import ModuleSlice, Site
from truffula.kernels.stacked import StackedSlice
from truffula.lora.patterns import is_named
from truffula.weights.checkpoint import TensorInfo

_INNER = ".base_layer"
_SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
Groups = Mapping[str, Sequence[Site]]


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


def groups_of(sites: Iterable[Site], name_of: Callable[[Site, ModuleSlice | StackedSlice], str]) -> Groups:
    """The sites of all experts by the names of stacked pairs: the leaves of their modules, ``w1``, ``w3``, ``w2`` and
    ``gate_proj``, ``up_proj``, ``down_proj`` for experts of three, and their parameters."""
    found: dict[str, list[Site]] = {}
    leaves: dict[str, dict[str, None]] = {}
    members: dict[str, dict[str, list[Site]]] = {}
    for site in sites:
        if site.stacked is None:
            continue
        parameter, module = name_of(site, site.stacked), name_of(site, site.modules[0])
        owner, leaf = parameter.rpartition(".")[0], module.rpartition(".")[2]
        leaves.setdefault(owner, {})[leaf] = None
        members.setdefault(owner, {}).setdefault(leaf, []).append(site)
        for name in {parameter, f"{module.rpartition('.')[0].rpartition('.')[0]}.{leaf}"}:
            found.setdefault(name, []).append(site)
    for owner, names in leaves.items():
        spellings = [list(names)] + [list(each) for each in _SPELLINGS if len(names) == len(each)]
        for spelling in spellings:
            for name, leaf in zip(spelling, names, strict=True):
                found.setdefault(f"{owner}.{name}", members[owner][leaf])
    return found


def stacked_by_expert(a: TensorInfo, b: TensorInfo, module: str, parameters: Collection[str]) -> bool:
    """Whether a pair that is named like a group of experts' sites is stacked; else it is PEFT's, on a parameter."""
    return module not in parameters or 3 in (len(a.shape), len(b.shape))


def check_stacked(a: TensorInfo, b: TensorInfo, sites: Sequence[Site], rank: int, module: str) -> None:
    """Raise ``AdapterError`` unless the shapes are those of a stacked pair."""
    place = sites[0].stacked
    assert place is not None
    whole = len(sites) > place.experts
    if whole and place.step > 1:
        raise AdapterError(
            f"{a.name}: gates and ups of {module} alternate in the base, and how the pair has them is not known. Save "
            "gate_proj and up_proj apart.", param=a.name,
        )  # fmt: skip
    outputs = place.of if whole else sites[0].out_features
    for info, matrix in ((a, (rank, sites[0].in_features)), (b, (outputs, rank))):
        if info.shape not in (matrix, (1, *matrix), (place.experts, *matrix)):
            raise AdapterError(
                f"{info.name} has shape {list(info.shape)}, but {module} of {place.experts} experts needs "
                f"{[place.experts, *matrix]}, or {[1, *matrix]} for all: the adapter was made for another base.",
                param=info.name, found=list(info.shape), expected=[place.experts, *matrix],
            )  # fmt: skip


def of_each_expert(sites: Sequence[Site], a: Array, b: Array, scale: float) -> Iterator[SiteTensors]:
    """The stacked pair of each expert's site, as views of A and B. Sites share a view of what their experts share."""
    views: dict[tuple[bool, int], Array] = {}

    def own(of_a: bool, expert: int) -> Array:
        whole = a if of_a else b
        at = expert if len(whole.shape) == 3 and len(whole) > 1 else 0
        return views.setdefault((of_a, at), whole if len(whole.shape) == 2 else whole[at])

    for site in sites:
        place = site.stacked
        assert place is not None
        rows = own(False, place.expert)
        lo = place.lo if len(rows) > site.out_features else 0
        part = rows if len(rows) == site.out_features else rows[lo : lo + site.out_features]
        yield low_rank(site.id, own(True, place.expert), part, scale)


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
