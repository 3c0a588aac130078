"""``Divergences`` against torch's own KL and cross-entropy, over texts added one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from truffula.testing.predictions import Divergences


def test_kl_top1_and_perplexity_of_several_texts_are_torchs() -> None:
    rng = np.random.default_rng(0)
    found, kls, losses, same = Divergences(), [], [], []
    for count in (130, 1, 9):  # more rows than are worked on at once; a text of one token, behind which nothing comes
        base = rng.normal(size=(count, 50)).astype(np.float32) * 3
        other = base + rng.normal(size=base.shape).astype(np.float32)
        ids = rng.integers(0, 50, count).tolist()
        found.add(base, other, ids)
        p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (base, other))
        kls.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        losses.append(torch.nn.functional.nll_loss(q[:-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="none"))
        same.append(p.argmax(-1) == q.argmax(-1))
    result, kl = found.result(), torch.cat(kls)
    assert result.positions == 140
    assert result.kl_mean == pytest.approx(kl.mean().item())
    assert result.kl_max == pytest.approx(kl.max().item())
    assert result.perplexity == pytest.approx(torch.cat(losses).mean().exp().item())
    assert result.same_top1 == torch.cat(same).double().mean().item()


def test_a_text_whose_ids_are_not_its_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ids"):
        Divergences().add(np.zeros((3, 5), np.float32), np.zeros((3, 5), np.float32), [1, 2])
