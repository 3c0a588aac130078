"""Builds the ``Program`` of a ``ModelSpec``: the only implementation of the forward pass.

A pre-norm layer of six linears becomes eight ops: norm, qkv, rope, attention, output + residual, norm, gate-up with its
gated product, down + residual (the two residual sums ride in the linears' epilogues). A layer with norms after its
parts adds the residual in that norm instead. The rows whose logits are needed are selected before the last norm.
"""

from __future__ import annotations

from truffula.errors import ConfigError, KernelError
from truffula.kernels.program import (
    Embed,
    Epilogue,
    Logits,
    ModuleSlice,
    Output,
    Pointwise,
    Probe,
    Program,
    Ref,
    RopeRegime,
    RopeTable,
    TakeRows,
)
from truffula.model.builder import LayerBuilder, ProgramBuilder
from truffula.model.names import WeightNames
from truffula.model.spec import LayerSpec, ModelSpec
from truffula.weights.tying import TyingDecision


def build_program(spec: ModelSpec, names: WeightNames, tie: TyingDecision, more_ids: int = 0) -> Program:
    """The program of a model.

    Args:
        spec: The structure of the model.
        names: The tensor names of its weights in the checkpoint.
        tie: The tensors of embedding and head.
        more_ids: Ids behind the vocabulary, for adapters that have rows for them.

    Raises:
        KernelError: The spec is inconsistent, an internal error.
        ConfigError: ``more_ids`` of a model with further tables by token.
    """
    if more_ids and spec.per_layer is not None:
        raise ConfigError(
            f"{spec.model_type} computes inputs of its layers from token ids: adapters cannot add tokens to it "
            "(--adapter-tokens). Leave the option out.", param="adapter_tokens",
        )  # fmt: skip
    build = ProgramBuilder(spec, names, tie, more_ids)
    embed, head = build.tables()
    hidden = _write_embedding(build, embed)
    build.write_rope_rows()
    for index, layer in enumerate(spec.layers):
        _write_layer(build, index, layer)
    logits = _write_logits(build, head, hidden)
    build.add_norm_sites()
    return Program(
        name=spec.model_type,
        vocab_size=build.vocab_size,
        more_ids=more_ids,
        buffers=tuple(build.buffers.values()),
        weights=tuple(build.weights),
        sites=tuple(build.sites),
        rope_tables=tuple(RopeTable(i, **vars(table)) for i, table in enumerate(spec.ropes)),
        rope_regime=_rope_regime(spec),
        kv_groups=build.kv_groups,
        states=tuple(build.states),
        ops=tuple(build.ops),
        result=logits,
        output=Output("logits", build.vocab_size),
        max_positions=spec.max_positions,
        notes=(tie.reason,),
    )


def _write_embedding(build: ProgramBuilder, table: int) -> Ref:
    """The residual stream: input rows, plus learned positions, normed."""
    spec, names = build.spec, build.spec.names
    hidden, width, positions = build.buffer("hidden", spec.hidden), spec.embed_width or spec.hidden, None
    if spec.position_offset is not None:
        positions = build.buffer("positions", spec.hidden)
        build.ops.append(Embed(name="positions", table=build.weight("positions"), out=positions, source="position",
                               offset=spec.position_offset))  # fmt: skip
    module = build.module(names.embed)
    site = None
    if spec.embed_adapters:
        site = build.site(
            "embed", None, build.vocab_size, width, [ModuleSlice(module, 0, width, width)],
            virtual_scale=_virtual_scale(spec),
        )  # fmt: skip
    projected, norm = spec.embed_width is not None, spec.embed_norm
    rows = build.buffer("embedded", width) if projected else hidden
    # Some classes scale the output of the module, or add to it.
    stream = build.stream_after(-1) if norm is None else None
    build.ops.append(Embed(name="embed", table=table, out=rows, scale=spec.embed_scale, site=site,
                           add=None if projected else positions,
                           probe=Probe(module, "out") if projected else stream))  # fmt: skip
    if projected:
        build.linear("project_in", rows, hidden, stream, Epilogue(residual=positions))
    if norm is not None:
        build.norm("embed_norm", norm, hidden, hidden, Probe(build.module(norm.module5), "out"))
    if spec.per_layer is not None:
        spec.per_layer.write(build, hidden)
    return hidden


def _virtual_scale(spec: ModelSpec) -> float | None:
    """See ``Site``. Inputs of layers that are computed from token ids have no rows for virtual tokens."""
    if spec.per_layer is not None or spec.embed_scaled == "ids":
        return None
    return 1.0 if spec.embed_scaled == "module" or spec.embed_scale is None else spec.embed_scale


def _rope_regime(spec: ModelSpec) -> RopeRegime | None:
    found = {RopeRegime(table.border, grows=not table.long_freq) for table in spec.ropes if table.border}
    if len(found) > 1:
        raise KernelError(f"The rotary tables depend on the length in {len(found)} ways.")
    return found.pop() if found else None


def _write_layer(build: ProgramBuilder, index: int, layer: LayerSpec) -> None:
    branches = [
        (LayerBuilder(build, index, name, after, layer.residual_multiplier), part, before)
        for name, part, before, after in layer.branches
    ]
    if not layer.parallel:
        for writer, part, before in branches:
            part.write(writer, writer.input(before))
        if layer.scalar is not None:
            writer, stream = branches[-1][0], build.buffer("hidden", build.spec.hidden)
            writer.append(Pointwise(name="scalar", kind="scale", x=stream, out=stream, weight=writer.weight("scalar"),
                                    probe=build.stream_after(index)))  # fmt: skip
        return
    inputs: list[Ref] = []  # both are written first, as the parts add to the stream
    for writer, _, before in branches:
        shared = before is None and inputs
        inputs.append(inputs[0] if shared else writer.input(before, f"normed_{writer.part}"))
    for (writer, part, _), x in zip(branches, inputs, strict=True):
        part.write(writer, x)


def _write_last(build: ProgramBuilder, hidden: Ref) -> Ref:
    """The input of the head: the rows whose logits are needed, normed and projected."""
    spec, norm, after = build.spec, build.spec.final_norm, build.stream_after(len(build.spec.layers) - 1)
    if spec.embed_width is not None:
        # Adapters act on token rows, so the rows are taken after the projection.
        if norm is not None:
            build.norm("final_norm", norm, hidden, hidden, Probe(build.module(norm.module5), "out"))
        projected = build.buffer("projected", spec.embed_width)
        after = Probe(build.module(spec.names.project_out), "out")
        build.linear("project_out", hidden, projected, after)
        hidden, norm = projected, None
    last = build.buffer("last", hidden.width, "R")
    build.ops.append(TakeRows(name="take_rows", x=hidden, out=last, probe=after))
    if norm is None:
        return last
    normed = build.buffer("last_normed", spec.hidden, "R")
    build.norm("final_norm", norm, last, normed, Probe(build.module(norm.module5), "out"))
    return normed


def _write_logits(build: ProgramBuilder, head: int, hidden: Ref) -> Ref:
    spec, vocab, module = build.spec, build.vocab_size, build.spec.names.head
    if vocab != build.weights[head].shape[0]:
        raise KernelError(f"The head has {build.weights[head].shape[0]} rows for {vocab} ids.")
    logits = build.buffer("logits", vocab, "R", "float32")
    last = _write_last(build, hidden)
    # transformers applies scale and softcap after the head, so the output of its module differs then.
    plain = spec.logit_softcap is None and spec.logit_scale == 1.0
    site = build.site("head", None, last.width, vocab, [ModuleSlice(module, 0, vocab, vocab)])
    build.ops.append(Logits(name="logits", x=last, weight=head, out=logits, bias=build.bias("head"),
                            scale=spec.logit_scale, softcap=spec.logit_softcap, site=site,
                            probe=Probe(module, "out") if plain else None))  # fmt: skip
    return logits
