"""An adapter's tensors by the op that adds them: what every backend's layout begins with."""

from __future__ import annotations

from truffula.errors import KernelError
from truffula.kernels.backend import AdapterImage, SiteTensors
from truffula.kernels.program import Linear, Logits, Program, Site, SiteSlice

AtSlice = tuple[SiteSlice, SiteTensors]
"""Columns of an op's product, and what an adapter adds to them."""


def by_op(program: Program, image: AdapterImage) -> dict[int, list[AtSlice]]:
    """Which slices of which ops ``image`` changes, in the order of the op's slices.

    Raises:
        KernelError: A site that does not exist or that no op serves, or a shape that does not fit it.
    """
    by_site: dict[int, SiteTensors] = {}
    for tensors in image.sites:
        _check(program, tensors)
        by_site[tensors.site] = tensors
    made: dict[int, list[AtSlice]] = {}
    for index, op in enumerate(program.ops):
        if isinstance(op, Linear):
            slices: tuple[SiteSlice, ...] = op.slices
        elif isinstance(op, Logits) and op.site is not None:
            slices = (SiteSlice(op.site, 0, op.out.width),)
        else:
            continue
        present = [(item, by_site.pop(item.site)) for item in slices if item.site in by_site]
        if present:
            made[index] = present
    for site in by_site:
        raise KernelError(f"no op serves site {program.sites[site].module!r}.", param=program.sites[site].module)
    return made


def _check(program: Program, tensors: SiteTensors) -> None:
    if not 0 <= tensors.site < len(program.sites):
        raise KernelError(f"the adapter names site {tensors.site}; the program has {len(program.sites)}.", param="site")
    site: Site = program.sites[tensors.site]
    a, b = tensors.a.shape, tensors.b.shape
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0 and (a[1], b[0]) == (site.in_features, site.out_features)
    if not fits:
        want = f"[r, {site.in_features}] and [{site.out_features}, r]"
        raise KernelError(f"site {site.module}: A {list(a)}, B {list(b)}; expected {want}.", param=site.module)
