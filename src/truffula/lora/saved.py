"""Tensors that take the place of the base's: saved modules, trained biases, trained rows, copies of tables.

    modules_to_save          <module>.weight, <module>.bias of a linear layer, a norm or a table
    bias: all, lora_only     <module>.bias, <module>.base_layer.bias
    trainable_token_indices  <table>.token_adapter.trainable_tokens_delta, which holds rows, not deltas
    save_embedding_layers    <table>.base_layer.weight, <table>.weight, which may be the base's own

``match_saved`` finds the sites of each from metadata alone; ``lora/assemble.py`` compares it with the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from msgspec.structs import replace

from truffula.errors import AdapterError
from truffula.kernels.program import ModuleSlice, Site
from truffula.lora.fields import LoraSettings
from truffula.lora.keys import KeyPlan, listed
from truffula.lora.patterns import tied_tables
from truffula.weights.checkpoint import TensorInfo

if TYPE_CHECKING:
    from truffula.lora.parsed import Sites

Parts = tuple[tuple[Site, ModuleSlice], ...]
_PADDING = 8
"""Padding is at most one row of so many: an adapter's tables with fewer rows than the others are of another base."""
RESIZED = (
    "The adapter was trained with a larger vocabulary, and the file does not have its tables. Save it with "
    "save_embedding_layers=True, or merge it into its base (PEFT's merge_and_unload) and serve that as a model"
)


def added_tokens(count: int) -> str:
    """The way out for an adapter with ``count`` rows that the base does not have."""
    return (
        "The adapter was trained with a larger vocabulary: start truffula with --adapter-tokens "
        f"{count} or more, or merge it into its base (PEFT's merge_and_unload) and serve that as a model"
    )


@dataclass(frozen=True)
class Saved:
    """A tensor that takes the place of the base's weights, biases or rows ``ids`` at the sites of ``parts``.

    ``shared``: of embedding and head, which are one tensor. ``copy``: it may be the base's own. ``by``: the field that
    writes it in a method other than LoRA.
    """

    kind: Literal["weight", "bias", "rows"]
    module: str
    info: TensorInfo
    parts: Parts
    ids: tuple[int, ...] = ()
    shared: bool = False
    copy: bool = False
    by: str = ""

    @property
    def field(self) -> str:
        """The field of ``adapter_config.json``, or the argument of ``save_pretrained``, that writes such tensors."""
        if self.by:
            return self.by
        if self.kind == "weight":
            return "save_embedding_layers" if self.copy else "modules_to_save"
        return "bias" if self.kind == "bias" else "trainable_token_indices"


def match_saved(
    plan: KeyPlan, infos: Mapping[str, TensorInfo], settings: LoraSettings, sites: Sites, *, tied: bool
) -> list[Saved]:
    """The tensors of ``plan`` that take the place of the base's. ``tied``: embedding and head of the base are one.

    Raises:
        AdapterError: A module that is not a site of the base, a tensor that no field accounts for, a field without its
            tensors, a shape that does not fit (``param``: the field or the tensor).
    """
    tables: dict[str, str] = {
        site.kind: name for name, parts in sites.by_name.items() for site, _ in parts if _is_table(site)
    }
    matcher = _Matcher(plan, infos, settings, sites, tables, tied)
    found = [*matcher.weights(), *matcher.biases(), *matcher.tokens()]
    _check_complete(found, settings, sites)
    return found


def is_saved(module: str, entries: Collection[str] | None) -> bool:
    """Whether an entry of ``modules_to_save`` is the end of ``module``'s path, or of one of its parents', as PEFT has
    it."""
    if not entries:
        return False
    parts = module.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(path.endswith(entry) for entry in entries for path in paths)


def own_vocabulary(plan: KeyPlan, infos: Mapping[str, TensorInfo], sites: Sites, more_ids: int) -> int | None:
    """The number of rows of the adapter's tables, whose vocabulary was resized before training; None where they are
    the base's, or the file has none. Raises ``AdapterError`` for tables of unequal rows, or of more than ``more_ids``
    above the base's. So few rows that they are of another base are left to the check of shapes."""
    found: dict[str, int] = {}  # rows by key
    of_base = 0
    pairs = {m: key for m, key in plan.a.items() if m in plan.embeddings}
    heads = {m: key for m, key in plan.b.items() if m not in plan.embeddings}
    for group, axis in ((plan.weights, 0), (plan.copies, 0), (pairs, 1), (heads, 0)):
        for module, key in group.items():
            site = sites.by_name[module][0][0] if module in sites.by_name else None
            if site is not None and _is_table(site) and len(infos[key].shape) == 2:
                found[key], of_base = infos[key].shape[axis], table_shape(site)[0]
    sizes = {*found.values()}
    if sizes <= {of_base} or min(sizes) < of_base - of_base // _PADDING:
        return None
    first = next(key for key, rows in found.items() if rows != of_base)
    if len(sizes) > 1:
        raise AdapterError(
            f"{first} has {found[first]} rows, and others of its tables {max(sizes - {found[first]})}: a vocabulary is "
            "resized in all of them. The file is of several adapters, or was edited.", param=first,
        )  # fmt: skip
    if found[first] > of_base + more_ids:
        raise AdapterError(
            f"{first} has {found[first]} rows, but the base's table has {of_base}"
            f"{f' and {more_ids} more' if more_ids else ''}. {added_tokens(found[first] - of_base)}.",
            param=first, found=found[first], limit=of_base + more_ids,
        )  # fmt: skip
    return found[first]


def with_rows(sites: Sequence[Site], rows: int) -> list[Site]:
    """``sites`` with tables of ``rows`` rows."""
    return [_with_rows(site, rows) if _is_table(site) else site for site in sites]


def _with_rows(site: Site, rows: int) -> Site:
    if site.kind == "embed":
        return replace(site, in_features=rows)
    return replace(site, out_features=rows, modules=tuple(replace(m, hi=rows, of=rows) for m in site.modules))


@dataclass(frozen=True)
class _Matcher:
    plan: KeyPlan
    infos: Mapping[str, TensorInfo]
    settings: LoraSettings
    sites: Sites
    tables: Mapping[str, str]
    tied: bool

    def weights(self) -> Iterator[Saved]:
        copies = {module for module in self.plan.weights if self._is_copy(module)}
        every = [(m, k, m in copies) for m, k in self.plan.weights.items()]
        if both := self.plan.weights.keys() & self.plan.copies.keys():
            raise _stray(self.plan.copies[min(both)], "save_embedding_layers", "It has another weight of this table")
        every += [(m, k, True) for m, k in self.plan.copies.items()]
        for module, key, copy in every:
            if not copy and not is_saved(module, self.settings.modules_to_save):
                raise _stray(key, "modules_to_save", "Its modules_to_save does not name this module")
            parts = self._parts(module, key, "modules_to_save")
            check_weight(self.infos[key], parts)
            # PEFT loads a copy into the base, whose embedding and head may be one tensor.
            shared = self.tied and _is_table(parts[0][0]) and (copy or tied_tables(self.settings) == "saved")
            yield from self._on_both("weight", module, key, parts, shared=shared, copy=copy)

    def biases(self) -> Iterator[Saved]:
        of_all = self.settings.bias not in (None, "none")
        for module, key in self.plan.biases.items():
            named = is_saved(module, self.settings.modules_to_save)
            copy = module == self.tables.get("head") and not (named or of_all)
            if not (named or of_all or copy):
                raise _stray(key, "bias", "Its bias is 'none' and its modules_to_save does not name this module")
            parts = self._parts(module, key, "modules_to_save" if named else "bias")
            _check_shape(self.infos[key], (parts[0][1].of,))
            yield Saved("bias", module, self.infos[key], parts, copy=copy)

    def tokens(self) -> Iterator[Saved]:
        given = self.settings.trainable_token_indices
        embed, head = self.tables.get("embed", ""), self.tables.get("head", "")
        by_entry = given if isinstance(given, dict) else {embed: given} if given else {}
        used: set[str] = set()
        # With save_embedding_layers PEFT writes the rows of a tied head, too, which are the embedding's.
        follows = self.tied and {embed, head} <= self.plan.tokens.keys() and not any(map(head.endswith, by_entry))
        for module, key in self.plan.tokens.items():
            named = embed if follows else module
            entry = next((name for name in by_entry if name and named.endswith(name)), None)
            if entry is None:
                raise _stray(key, "trainable_token_indices", "Its trainable_token_indices does not name this table")
            used.add(entry)
            parts, ids = self._parts(module, key, "trainable_token_indices"), tuple(by_entry[entry])
            site = parts[0][0]
            if not _is_table(site):
                raise AdapterError(f"{key}: trained rows are of an embedding or a head.", param=key)
            rows, width = table_shape(site)
            if highest := [i for i in ids if i >= rows]:
                raise AdapterError(
                    f"trainable_token_indices names token {max(highest)}, but {module} has {rows} rows. {RESIZED}.",
                    param="trainable_token_indices", found=max(highest), limit=rows,
                )  # fmt: skip
            if len(set(ids)) < len(ids):
                raise AdapterError("trainable_token_indices names a token twice.", param="trainable_token_indices")
            _check_shape(self.infos[key], (len(ids), width))
            shared = follows or (self.tied and site.kind == "embed" and head not in self.plan.tokens)
            if shared:  # PEFT keeps equal lists of both as one
                used |= {name for name, other in by_entry.items() if head.endswith(name) and tuple(other) == ids}
            yield from self._on_both("rows", module, key, parts, shared=shared, ids=ids)
        if absent := [name for name in by_entry if name not in used]:
            raise AdapterError(
                f"trainable_token_indices names {listed(absent)}, but the file has no trained rows of it. The file is "
                "incomplete, or of another adapter.",
                param="trainable_token_indices",
            )

    def _is_copy(self, module: str) -> bool:
        return module in self.tables.values() and not is_saved(module, self.settings.modules_to_save)

    def _on_both(
        self, kind: Literal["weight", "rows"], module: str, key: str, parts: Parts, *, shared: bool,
        ids: tuple[int, ...] = (), copy: bool = False,
    ) -> Iterator[Saved]:  # fmt: skip
        """The tensor at its table and, when ``shared``, at the other one."""
        info = self.infos[key]
        yield Saved(kind, module, info, parts, ids, shared, copy)
        other = self.tables.get("head" if parts[0][0].kind == "embed" else "embed")
        has_own = other in (self.plan.weights.keys() | self.plan.copies if kind == "weight" else self.plan.tokens)
        if shared and other is not None and not has_own:
            yield Saved(kind, module, info, tuple(self.sites.by_name[other]), ids, shared, copy)

    def _parts(self, module: str, key: str, field: str) -> Parts:
        found = tuple(self.sites.by_name.get(module, ()))
        if not found:
            raise AdapterError(
                f"{key} ({field}): whole tensors are served for linear layers, norms, the embedding and the head of "
                f"the base, and {module} is none of these here. Train the adapter without it.",
                param=field, key=key,
            )  # fmt: skip
        if not is_whole(found):
            raise AdapterError(
                f"{key} ({field}): {module} cannot be replaced as one module here.", param=field, key=key
            )
        return found


def is_whole(parts: Parts) -> bool:
    """Whether the rows of a module's sites, in their order, are all of its rows, each once."""
    starts, ends = [part.lo for _, part in parts], [part.hi for _, part in parts]
    return [*starts, parts[0][1].of] == [0, *ends]


def check_weight(info: TensorInfo, parts: Parts) -> None:
    """Raise ``AdapterError`` unless a tensor may be the whole weight of a module."""
    site, module = parts[0]
    if _is_table(site):
        _check_shape(info, table_shape(site))
    elif site.kind == "linear":
        _check_shape(info, (module.of, site.in_features), (site.in_features, module.of))
    else:
        _check_shape(info, (site.out_features,))


def _check_shape(info: TensorInfo, *expected: tuple[int, ...]) -> None:
    if info.shape not in expected:
        raise AdapterError(
            f"{info.name} has shape {list(info.shape)}, but the base needs {list(expected[0])}: the adapter was made "
            "for another base.",
            param=info.name, found=list(info.shape), expected=list(expected[0]),
        )  # fmt: skip


def _check_complete(found: Sequence[Saved], settings: LoraSettings, sites: Sites) -> None:
    """Every module that ``modules_to_save`` names has its weight in the file."""
    covered = {site.id for saved in found if saved.kind == "weight" for site, _ in saved.parts}
    entries = settings.modules_to_save
    names = {sites.name_of(site, module) for site in sites.all if site.id not in covered for module in site.modules}
    missing = [name for name in names if is_saved(name, entries)]
    if missing:
        raise AdapterError(
            f"Modules that modules_to_save names have no tensors in the file: {listed(missing)}. The file is "
            "incomplete, or of another adapter.",
            param="modules_to_save",
            modules=sorted(missing)[:10],
        )


def _is_table(site: Site) -> bool:
    return site.kind in ("embed", "head")


def table_shape(site: Site) -> tuple[int, int]:
    """Rows and width of an embedding or a head."""
    embeds = site.kind == "embed"
    return (site.in_features, site.out_features) if embeds else (site.out_features, site.in_features)


def _stray(key: str, field: str, why: str) -> AdapterError:
    return AdapterError(
        f"The file contains {key}, and adapter_config.json does not account for it. {why}: one of the two files is of "
        "another adapter, or was edited.",
        param=field,
        key=key,
    )
