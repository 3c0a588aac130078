"""The probe at the start: does a model of transformers give the same answers when we drive it as it gives alone?

The reference is the model's own attention, one sequence in one pass, without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from truffula.errors import UnsupportedModel
from truffula.kernels.adapters import AdapterImage, low_rank, make_image
from truffula.kernels.inputs import Array, SequenceSampling
from truffula.model.fallback.executable import TransformersExecutable
from truffula.model.fallback.paged import PAGED, PagedExecutable
from truffula.model.fallback.serial import SerialExecutable
from truffula.model.plan import PackingFails

_LEAST_LIMIT, _ROUNDINGS = 2e-3, 3.0
"""See ``_limit``. Of all model types of transformers, with random weights in bfloat16, harmless differences were at
most 1.9 times those of such a change (where another expert was chosen; 0.8 times otherwise), and mistakes at least 5
times. In float32: 2e-5, and 1 and more."""
_COMPANY = 0.15
"""Of log-probabilities of a sequence beside others of the same lengths: all its rows go through the same products,
whatever the others hold."""
_LENGTHS = (9, 6)
_SITES = 12


def probe_paged(executable: PagedExecutable) -> None:
    """Compare two packed sequences with each alone, and with each other's tokens changed.

    Raises:
        PackingFails: Log-probabilities differ, a sequence changes another, or an adapter not its own rows.
    """
    if problem := _problem(executable):
        raise PackingFails(problem)


def probe_serial(executable: SerialExecutable) -> None:
    """Compare a sequence that continues the model's cache with one pass over it; set ``whole_chunks`` and ``stacks``.

    Raises:
        UnsupportedModel: It differs both in chunks and token by token.
    """
    text = _texts(executable, executable.capacity.max_tokens)[0]
    alone = _alone(executable, text)
    limit = _limit(executable, text, alone)
    differs = []
    for whole in (True, False):
        executable.whole_chunks = whole
        executable.set_sequence(0, np.asarray(text, np.int32), np.zeros(0, np.int32), SequenceSampling())
        try:
            chunks = [_packed(executable, [text[at : at + 3]], [at])[0] for at in range(0, len(text), 3)]
            differs.append(float(np.abs(np.concatenate(chunks) - alone).max()))
        except Exception as error:  # noqa: BLE001  (foreign code raises anything)
            differs.append(np.inf)
            failure = f" ({type(error).__name__}: {' '.join(str(error).split())})"
        else:
            failure = ""
        if differs[-1] <= limit:
            executable.stacks = executable.described.trace.cache_widths[0] == 0
            executable.stacks = executable.stacks and not _problem(executable)
            return
    raise UnsupportedModel(
        f"config.json: {executable.described.class_name} of transformers does not continue its own cache: tokens one "
        f"by one differ from one pass by {differs[-1]:.1g} in log-probability{failure}.",
        param="model_type",
        value=executable.described.skeleton.model_type,
    )


def _problem(executable: PagedExecutable | SerialExecutable) -> str:
    """What goes wrong when sequences are computed together, without an adapter and with one on the first; or empty."""
    texts = _texts(executable, min(executable.capacity.max_tokens, executable.capacity.block_size))
    if len(texts) < 2 and executable.capacity.max_seqs > 1:
        return "there is no room to try two sequences in a step"
    own = [_alone(executable, text) for text in texts]
    limit = _limit(executable, texts[0], own[0])
    try:
        plain, mixed = _together(executable, texts), None
        others = _together(executable, [texts[0][::-1], *texts[1:]])
        if image := _adapter(executable):
            slot = executable.adapter(image)
            try:
                mixed = _together(executable, texts, slot)
            finally:
                executable.drop_adapter(slot)
    except Exception as error:  # noqa: BLE001  (foreign code raises anything)
        return f"packed sequences fail ({type(error).__name__}: {' '.join(str(error).split())})"
    differs = max(float(np.abs(alone - found).max()) for alone, found in zip(own, plain, strict=True))
    if not differs <= limit:
        return f"two packed sequences differ from each alone by {differs:.1g} in log-probability"
    if mixed is not None and np.array_equal(mixed[0], plain[0]):
        return "an adapter does not change the sequence that it acts on"
    beside = [rows[1] for rows in (others, mixed) if rows is not None and len(texts) > 1]
    if any(not float(np.abs(rows - plain[1]).max()) <= min(limit, _COMPANY) for rows in beside):
        return "the tokens of one sequence, or its adapter, change another sequence"
    return ""


def _limit(executable: TransformersExecutable, text: list[int], alone: Array) -> float:
    """Of differences of log-probabilities: several times what follows from changing the output of each module by one
    unit in the last place of its dtype."""
    signs = torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        sign = torch.randint(0, 2, output.shape, generator=signs).to(output.device) * 2 - 1
        return (output.float() * (1 + torch.finfo(output.dtype).eps * sign)).to(output.dtype)

    leaves = [module for module in executable.model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(rounded) for module in leaves]
    try:
        return max(_LEAST_LIMIT, _ROUNDINGS * float(np.abs(_alone(executable, text) - alone).max()))
    finally:
        for handle in handles:
            handle.remove()


def _texts(executable: TransformersExecutable, room: int) -> list[list[int]]:
    """Two texts of random tokens, one when there is no room for a second."""
    capacity = executable.capacity
    lengths = [min(length, room // 2 or 1) for length in _LENGTHS]
    if capacity.max_seqs < 2 or capacity.num_blocks < 3 or room < 2 or capacity.max_logit_rows < 2:
        lengths = lengths[:1]
    random = np.random.default_rng(0)
    vocab_size = executable.interface.vocab_size
    return [random.integers(min(5, vocab_size - 1), vocab_size, max(2, length)).tolist() for length in lengths]


@torch.inference_mode()
def _alone(executable: TransformersExecutable, text: list[int]) -> Array:
    """Log-probabilities ``[T, V]`` of one pass of the model with its own attention."""
    model, paged = executable.model, isinstance(executable, PagedExecutable)
    executable.hooks.prepare(None, [], None, [])
    if paged:
        model.set_attn_implementation(executable.described.skeleton.own_attention)
    try:
        logits = model(input_ids=executable.long(np.asarray(text))[None], use_cache=False).logits[0]
    finally:
        if paged:
            model.set_attn_implementation(PAGED)
    return _scores(logits)


def _together(executable: TransformersExecutable, texts: list[list[int]], adapter: int | None = None) -> list[Array]:
    """Log-probabilities of each text's rows, computed in three steps: beginnings of one length, then up to the last
    token, then that."""
    for slot, text in enumerate(texts):
        executable.set_sequence(slot, np.asarray(text, np.int32), np.zeros(0, np.int32), SequenceSampling())
    begin = min(len(text) for text in texts) - 1
    cuts = [(0, begin, len(text) - 1, len(text)) for text in texts]
    steps = []
    for n in range(3):
        pieces = [text[cut[n] : cut[n + 1]] for text, cut in zip(texts, cuts, strict=True)]
        if any(pieces):
            steps.append(_packed(executable, pieces, [cut[n] for cut in cuts], adapter))
    return [np.concatenate(rows) for rows in zip(*steps, strict=True)]


def _packed(
    executable: TransformersExecutable, texts: Sequence[list[int]], starts: Sequence[int], adapter: int | None = None
) -> list[Array]:
    """Log-probabilities of each text's rows, computed in one step; ``adapter`` acts on the first text.

    The rows are computed in several steps when one has too few rows of logits.
    """
    i, capacity = executable.inputs, executable.capacity
    rows = [(n, at) for n, text in enumerate(texts) for at in range(len(text))]
    found: list[Array] = []
    for lo in range(0, len(rows), capacity.max_logit_rows):
        _fill(executable, texts, starts, adapter, range(lo, min(len(rows), lo + capacity.max_logit_rows)))
        executable.run()
        found.append(_scores(torch.from_numpy(executable.logits())))
    i.T = i.N = i.R = i.G = 0
    return np.split(np.concatenate(found), np.cumsum([len(text) for text in texts])[:-1])


def _fill(
    executable: TransformersExecutable,
    texts: Sequence[list[int]],
    starts: Sequence[int],
    adapter: int | None,
    logit_rows: range,
) -> None:
    """One step's inputs: sequence n in slot n, with blocks of its own from 1 on."""
    i, capacity = executable.inputs, executable.capacity
    per_text = -(-max(start + len(text) for start, text in zip(starts, texts, strict=True)) // capacity.block_size)
    at = 0
    for n, (text, start) in enumerate(zip(texts, starts, strict=True)):
        rows = slice(at, at + len(text))
        position = np.arange(start, start + len(text))
        blocks = 1 + n * per_text + np.arange(per_text)
        i.token_ids[rows], i.position[rows], i.rope_pos[:, rows] = text, position, position
        i.slot_mapping[:, rows] = blocks[position // capacity.block_size] * capacity.block_size + (
            position % capacity.block_size
        )
        i.block_tables[:, n, :per_text] = blocks
        i.q_start[n], i.kv_len[n], i.seq_slot[n] = at, start + len(text), n
        at += len(text)
    i.q_start[len(texts)] = at
    i.T, i.N, i.R, i.G = at, len(texts), len(logit_rows), 0
    i.logit_rows[: i.R] = logit_rows
    if adapter is not None:
        i.G, i.seg[0] = 1, (0, len(texts[0]), adapter)
        i.seg_r[0], i.seg_weight[0] = (0, sum(row < len(texts[0]) for row in logit_rows)), 1.0


def _adapter(executable: TransformersExecutable) -> AdapterImage | None:
    """A random adapter of rank 1 on some of the sites."""
    random = np.random.default_rng(1)
    sites = [site for site in executable.interface.sites if site.kind == "linear"]
    sites = sites[:: max(1, len(sites) // _SITES)]
    parts = [
        low_rank(
            site.id,
            random.standard_normal((1, site.in_features)).astype(np.float32) / site.in_features**0.5,
            random.standard_normal((site.out_features, 1)).astype(np.float32),
            1.0,
        )
        for site in sites
    ]
    return make_image(executable.layout, parts, generation="probe") if parts else None


def _scores(logits: Any) -> Array:
    return np.asarray(torch.log_softmax(logits.float(), -1).cpu().numpy())
