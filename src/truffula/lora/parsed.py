"""An adapter as its metadata says, matched with a base: ``Pair`` and others of ``ParsedAdapter``; the base's ``Sites``
by the names that the adapter has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors
from truffula.kernels.backend import Array
from truffula.kernels.inputs import Float32
from truffula.kernels.program import ModuleSlice, Site
from truffula.kernels.stacked import StackedSlice
from truffula.lora.base import BaseWeights
from truffula.lora.fields import LoraSettings
from truffula.lora.image import NO_FACTS, AdapterFacts
from truffula.lora.roots import TEXT_ROOTS, root_used, text_root_of
from truffula.lora.saved import Parts, Saved, with_rows
from truffula.lora.stacked import groups_of
from truffula.lora.variants import PLAIN, Form
from truffula.weights.checkpoint import TensorInfo


@dataclass(frozen=True)
class BaseFacts:
    """The base's name, for messages, and its weights, which some kinds of adapter need.

    ``matched``: what was matched with this base before; None: it is not kept.
    """

    model: str = "the base model"
    weights: BaseWeights | None = None
    matched: Matched | None = None

    @property
    def tied(self) -> bool:
        return self.weights is not None and self.weights.tied

    @property
    def more_ids(self) -> int:
        """Ids behind the base's vocabulary that adapters may have rows for."""
        return 0 if self.weights is None else self.weights.source.more_ids

    def own_sites(self, sites: Sequence[Site]) -> Sequence[Site]:
        """``sites`` with tables of the base's own rows."""
        return with_rows(sites, self.weights.source.vocab_size) if self.weights is not None and self.more_ids else sites

    @property
    def kv_heads(self) -> Mapping[int, int]:
        """The number of KV heads of each layer."""
        return {} if self.weights is None else self.weights.source.kv_heads

    def need(self, what: str) -> BaseWeights:
        """The weights. Raises ``AdapterError`` when they are not given."""
        if self.weights is None:
            raise AdapterError(f"{what} needs the base's weights, which are not given here.", param="base")
        return self.weights


@dataclass(frozen=True)
class Pair:
    """A and B of one module, and the sites that B's rows belong to; or of a parameter of ``experts`` experts,
    ``grouped``: stacked by expert.

    ``form``: how A and B are stored. ``magnitude`` [O] (DoRA), ``b_bias`` [O] and ``diagonal`` [r] (KaSA): tensors of
    variants.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    parts: Parts
    rank: int
    experts: int = 0
    form: Form = PLAIN
    magnitude: TensorInfo | None = None
    b_bias: TensorInfo | None = None
    diagonal: TensorInfo | None = None
    grouped: bool = False

    @property
    def sites(self) -> list[Site]:
        return [site for site, _ in self.parts]

    @property
    def tensors(self) -> list[TensorInfo]:
        return [info for info in (self.a, self.b, self.magnitude, self.b_bias, self.diagonal) if info is not None]


@dataclass(frozen=True)
class Computed:
    """A module of a method other than LoRA: ``make`` computes its parts from ``infos``, by key. With ``make_prefix`` it
    is no module, but the values of ``KvPrefix``."""

    module: str
    infos: tuple[TensorInfo, ...]
    make: Callable[[Mapping[str, Array]], Iterable[SiteTensors]]
    rank: int = 0
    make_prefix: Callable[[Mapping[str, Array]], Float32] | None = None


@dataclass
class ParsedAdapter:
    """An adapter's pairs and the tensors that take the place of the base's, matched with it from metadata alone."""

    settings: LoraSettings
    pairs: list[Pair] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: AdapterFacts = NO_FACTS

    @property
    def rank(self) -> int:
        ranks = [pair.rank for pair in self.pairs] + [item.rank for item in self.computed]
        return max(ranks, default=0)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that is read."""
        infos = [*(info for pair in self.pairs for info in pair.tensors), *(saved.info for saved in self.saved)]
        infos += [info for item in self.computed for info in item.infos]
        return {info.name: info for info in infos}


class Matched:
    """Metadata of LoRA adapters that was matched with one base, the last used last: adapters of one training recipe
    differ in their values alone. Together they have ``most`` tensors at most."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._kept: dict[tuple[bytes, bytes], tuple[ParsedAdapter, int]] = {}

    def get(self, key: tuple[bytes, bytes], count: int, match: Callable[[], ParsedAdapter]) -> ParsedAdapter:
        """What ``match`` makes of an adapter of ``count`` tensors with this configuration and header of its file;
        nothing else may decide it."""
        found = self._kept.pop(key, None) or (match(), count)
        self._kept[key] = found
        while sum(kept for _, kept in self._kept.values()) > self._most:
            del self._kept[next(iter(self._kept))]
        return found[0]


class Sites:
    """The base's sites, by the module paths of the class that the adapter with these ``modules`` was saved from."""

    def __init__(self, sites: Sequence[Site], modules: Collection[str]) -> None:
        self.all = sites
        linear = [site for site in sites if site.kind == "linear"]
        self._own_root = text_root_of(site.module for site in linear)
        tails = {m.name.removeprefix(self._own_root) for site in sites if site.kind != "head" for m in site.modules}
        places = {site.stacked.name for site in linear if site.stacked is not None}
        owners = {name.removeprefix(self._own_root).rpartition(".")[0] for name in places}
        self.tails = frozenset(tails | owners | {f"{owner}.base_layer" for owner in owners})
        self.root = root_used(modules, self.tails, self._own_root)
        self.by_name: dict[str, list[tuple[Site, ModuleSlice]]] = {}
        for site in sites:
            for module in site.modules:
                self.by_name.setdefault(self.name_of(site, module), []).append((site, module))
        self.parameters: dict[str, list[Site]] = {}  # of all experts
        for site in linear:
            if site.stacked is not None:
                self.parameters.setdefault(self.name_of(site, site.stacked), []).append(site)
        self.groups = groups_of(linear, self.name_of)
        for parts in self.by_name.values():
            parts.sort(key=lambda part: part[1].lo)
        self.head_name = TEXT_ROOTS[self.root]
        self.names = frozenset(self.by_name)
        self.linear_names = frozenset(self.name_of(site, module) for site in linear for module in site.modules)
        self.layers = 1 + max((site.layer for site in linear if site.layer is not None), default=0)
        self.fused_leaves = {leaf_of(m.name) for site in linear for m in site.modules if not _is_own(site, m)}

    def name_of(self, site: Site, module: ModuleSlice | StackedSlice) -> str:
        """A module of a site by the adapter's names."""
        return TEXT_ROOTS[self.root] if site.kind == "head" else self.root + module.name.removeprefix(self._own_root)


def leaf_of(module: str) -> str:
    return module.rpartition(".")[2]


def _is_own(site: Site, module: ModuleSlice) -> bool:
    """Whether this name means the whole site, rather than a fused module that holds it."""
    return module.lo == 0 and module.hi == module.of == site.out_features


def names_in_use(site: Site, fused: set[str], sites: Sites) -> list[str]:
    """The names by which PEFT may know this site. A base has either a fused module or its parts, never both, and only
    the adapter shows which: a pattern like ``.*up_proj`` does not mean ``gate_up_proj`` where no such module is in use.
    """
    whole = [m for m in site.modules if not _is_own(site, m) and leaf_of(m.name) in fused]
    return [sites.name_of(site, m) for m in whole or [m for m in site.modules if _is_own(site, m)]]
