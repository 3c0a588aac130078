"""Builds the ``Program`` of a ``ModelSpec``: the only implementation of the forward pass.

A pre-norm layer of six linears becomes eight ops: norm, qkv, rope, attention, output + residual, norm, gate-up with its
gated product, down + residual (the two residual sums ride in the linears' epilogues). A layer with norms after its
parts adds the residual in that norm instead. The rows whose logits are needed are selected before the last norm.
"""

from __future__ import annotations

from truffula.errors import KernelError
from truffula.kernels.program import (
    Embed,
    Logits,
    ModuleSlice,
    Output,
    Probe,
    Program,
    Ref,
    RopeTable,
    TakeRows,
    WeightPart,
)
from truffula.model.builder import LayerBuilder, ProgramBuilder
from truffula.model.names import WeightNames
from truffula.model.spec import LayerSpec, ModelSpec
from truffula.weights.tying import TyingDecision


def build_program(spec: ModelSpec, names: WeightNames, tie: TyingDecision) -> Program:
    """The program of a model.

    Args:
        spec: The structure of the model.
        names: The tensor names of its weights in the checkpoint.
        tie: The tensors of embedding and head.

    Raises:
        KernelError: The spec is inconsistent, an internal error.
    """
    build = ProgramBuilder(spec, names, tie)
    embed, head = build.tables()
    hidden, module = build.buffer("hidden", spec.hidden), build.module(spec.names.embed)
    site = build.site("embed", None, spec.vocab_size, spec.hidden, [ModuleSlice(module, 0, spec.hidden, spec.hidden)])
    # Some classes scale the output of the module.
    build.ops.append(Embed(name="embed", table=embed, out=hidden, scale=spec.embed_scale, site=site,
                           probe=build.stream_after(-1)))  # fmt: skip
    build.write_rope_rows()
    for index, layer in enumerate(spec.layers):
        _write_layer(build, index, layer)
    logits = _write_logits(build, head, hidden)
    return Program(
        name=spec.model_type,
        vocab_size=spec.vocab_size,
        buffers=tuple(build.buffers.values()),
        weights=tuple(build.weights),
        sites=tuple(build.sites),
        rope_tables=tuple(RopeTable(i, table.inv_freq, table.factor) for i, table in enumerate(spec.ropes)),
        kv_groups=build.kv_groups,
        states=tuple(build.states),
        ops=tuple(build.ops),
        result=logits,
        output=Output("logits", spec.vocab_size),
        max_positions=spec.max_positions,
        notes=(tie.reason,),
    )


def _write_layer(build: ProgramBuilder, index: int, layer: LayerSpec) -> None:
    branches = [
        (LayerBuilder(build, index, name, after, layer.residual_multiplier), part, before)
        for name, part, before, after in layer.branches
    ]
    if not layer.parallel:
        for writer, part, before in branches:
            part.write(writer, writer.input(before))
        return
    inputs: list[Ref] = []  # both are written first, as the parts add to the stream
    for writer, _, before in branches:
        shared = before is None and inputs
        inputs.append(inputs[0] if shared else writer.input(before, f"normed_{writer.part}"))
    for (writer, part, _), x in zip(branches, inputs, strict=True):
        part.write(writer, x)


def _write_logits(build: ProgramBuilder, head: int, hidden: Ref) -> Ref:
    spec, vocab, module = build.spec, build.spec.vocab_size, build.spec.names.head
    if vocab != build.weights[head].shape[0]:
        raise KernelError(f"The head has {build.weights[head].shape[0]} rows for {vocab} ids.")
    last = build.buffer("last", spec.hidden, "R")
    logits = build.buffer("logits", vocab, "R", "float32")
    build.ops.append(TakeRows(name="take_rows", x=hidden, out=last, probe=build.stream_after(len(spec.layers) - 1)))
    if spec.final_norm is not None:
        normed = build.buffer("last_normed", spec.hidden, "R")
        build.norm("final_norm", spec.final_norm, last, normed, Probe(build.module(spec.final_norm.module5), "out"))
        last = normed
    bias = None
    if spec.head_bias:
        name = build.names.head.removesuffix(".weight") + ".bias"
        bias = build.declare("head.bias", (vocab,), (WeightPart(name),), "vector")
    # transformers applies scale and softcap after the head, so the output of its module differs then.
    plain = spec.logit_softcap is None and spec.logit_scale == 1.0
    site = build.site("head", None, spec.hidden, vocab, [ModuleSlice(module, 0, vocab, vocab)])
    build.ops.append(Logits(name="logits", x=last, weight=head, out=logits, bias=bias, scale=spec.logit_scale,
                            softcap=spec.logit_softcap, site=site,
                            probe=Probe(module, "out") if plain else None))  # fmt: skip
    return logits
