"""``MlaSpec``: multi-head latent attention, which caches one latent and one rotated key per token for all heads."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

from truffula.kernels.program import Mla, Pointwise, Ref, Rope
from truffula.model.parts.attention import PositionScale
from truffula.model.rows import LayerRows, NormSpec

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class MlaSpec:
    """One layer's latent attention. Heads of q have ``nope`` columns without position, then ``rope`` rotated ones.

    ``q_rank`` is the width of the queries' latent, which ``q_norm`` norms; None: one projection makes the queries.
    ``rank`` is the width of the cached latent. ``table`` is an index into ``ModelSpec.ropes``, or None for a layer
    without rotary embedding. ``position_scale`` multiplies q after it. ``bias`` is that of the projections to latents
    and of the output.
    """

    heads: int
    nope: int
    rope: int
    dim_v: int
    rank: int
    scale: float
    table: int | None
    kv_norm: NormSpec
    q_rank: int | None = None
    q_norm: NormSpec | None = None
    rope_layout: Literal["half", "interleaved"] = "interleaved"
    position_scale: PositionScale | None = None
    bias: bool = False

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "latent attention"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return (self.rank + self.rope,)

    def first_module(self, names: ModuleNames) -> str:
        return f"{names.attention}.{'q_proj' if self.q_rank is None else 'q_a_proj'}"

    def last_module(self, names: ModuleNames) -> str:
        return names.out

    def rows(self, rows: LayerRows) -> None:
        attention, q_width = rows.names.attention, self.heads * (self.nope + self.rope)
        if self.q_rank is None:
            rows.linear("q", [(f"{attention}.q_proj", q_width)], rows.hidden)
        else:
            rows.linear("q_a", [(f"{attention}.q_a_proj", self.q_rank)], rows.hidden, bias=self.bias)
            rows.norm("q_norm", self.q_norm, self.q_rank)
            rows.linear("q_b", [(f"{attention}.q_b_proj", q_width)], self.q_rank)
        kv_a = [(f"{attention}.kv_a_proj_with_mqa", self.rank + self.rope)]
        rows.linear("kv_a", kv_a, rows.hidden, bias=self.bias)
        rows.norm("kv_norm", self.kv_norm, self.rank)
        rows.linear("kv_b", [(f"{attention}.kv_b_proj", self.heads * (self.nope + self.dim_v))], self.rank)
        rows.linear("out", [(rows.names.out, rows.hidden)], self.heads * self.dim_v, bias=self.bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        q, latent = self._queries(build, x), build.buffer("latent", self.rank + self.rope)
        build.linear("kv_a", x, latent, build.probe(f"{build.names.attention}.kv_a_proj_with_mqa", "out"))
        key, latent_only = Ref(latent.buffer, self.rank, self.rope), Ref(latent.buffer, 0, self.rank)
        build.norm("kv_norm", self.kv_norm, latent_only, latent_only)
        self._rotate(build, "rope_q", q, self.heads, self.nope)
        self._rotate(build, "rope_k", key, 1, 0)
        if self.position_scale is not None:
            params = astuple(self.position_scale)
            build.append(Pointwise(name="position_scale", kind="position_scale", x=q, out=q, params=params))
        attended = build.buffer("attended", self.heads * self.dim_v)
        group, (plane,) = build.kv_planes()
        kv_b = build.weight("kv_b")
        build.append(Mla(name="mla", probe=build.probe(build.names.out, "in"), q=q, latent=latent, out=attended,
                         kv_b=kv_b, slices=build.program.site_slices[build.prefix + "kv_b"], group=group, plane=plane,
                         heads=self.heads, nope=self.nope, rope=self.rope, dim_v=self.dim_v, rank=self.rank,
                         scale=self.scale))  # fmt: skip
        build.output("out", attended)

    def _queries(self, build: LayerBuilder, x: Ref) -> Ref:
        attention, q = build.names.attention, build.buffer("q", self.heads * (self.nope + self.rope))
        if self.q_rank is None:
            build.linear("q", x, q, build.probe(f"{attention}.q_proj", "out"))
            return q
        assert self.q_norm is not None
        q_a = build.buffer("q_a", self.q_rank)
        build.linear("q_a", x, q_a, build.probe(f"{attention}.q_a_proj", "out"))
        build.norm("q_norm", self.q_norm, q_a, q_a)
        build.linear("q_b", q_a, q, build.probe(f"{attention}.q_b_proj", "out"))
        return q

    def _rotate(self, build: LayerBuilder, key: str, x: Ref, heads: int, start: int) -> None:
        if self.table is not None:
            build.append(Rope(name=key, x=x, rows=build.rope_rows(self.table), heads=heads, head_dim=start + self.rope,
                              start=start, dims=self.rope, layout=self.rope_layout))  # fmt: skip
