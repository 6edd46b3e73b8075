"""What is left of an update once it is regularized."""

from __future__ import annotations

import pytest
import torch

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.regularizers import prune, rect


def delta(scale: float = 1.0) -> LowRankDelta:
    return LowRankDelta(torch.randn(3, 12), scale * torch.randn(8, 3))


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.4, 1.0])
def test_rect_keeps_the_entries_that_change_their_weight_most(kept):
    update, W = delta(), torch.randn(8, 12)
    found = rect(update.dense(), W, kept)
    survives = found != 0
    assert int(survives.sum()) == round(kept * W.numel())
    assert torch.equal(found[survives], update.dense()[survives])
    change = (update.dense() / W).abs()
    if 0 < kept < 1:
        assert change[survives].min() >= change[~survives].max()


def test_prune_leaves_a_small_update_alone():
    update, W = delta(1e-3), torch.randn(8, 12)
    torch.testing.assert_close(prune(update, W).dense(), update.dense())


def test_prune_bends_the_singular_values_above_that_of_the_weights():
    update, W = delta(100.0), torch.randn(8, 12)
    before, after = (torch.linalg.svdvals(change.dense())[:3] for change in (update, prune(update, W)))
    limit = torch.linalg.svdvals(W)[0]
    assert (before > limit).any()
    expected = torch.where(before > limit, before.log() - limit.log() + limit, before)
    torch.testing.assert_close(after.sort().values, expected.sort().values, rtol=1e-4, atol=1e-4)
