"""What is left of an update once it is regularized."""

from __future__ import annotations

import pytest
import torch

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.regularizers import prune, rect, sphere


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


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_sphere_shrinks_the_update_in_the_main_directions_of_the_normalized_rows(eta, alpha):
    update, W = delta(), torch.randn(8, 12)
    normalized = torch.stack([row / row.norm() for row in W.double()])
    S = sum(torch.outer(row, row) for row in normalized) / len(W)
    assert S.trace() == pytest.approx(1.0)
    values, vectors = torch.linalg.eigh(S)
    chosen, share = [], 0.0
    for index in range(11, -1, -1):  # largest eigenvalue first
        if share < eta - 1e-9:
            chosen.append(vectors[:, index])
            share += float(values[index])
    U = torch.stack(chosen, 1) if chosen else torch.zeros(12, 1, dtype=torch.float64)
    expected = update.dense().double() @ (torch.eye(12, dtype=torch.float64) - alpha * U @ U.T)
    found = sphere(update, W, eta, alpha)
    assert torch.equal(found.B, update.B)
    torch.testing.assert_close(found.dense().double(), expected, rtol=1e-4, atol=1e-5)


def test_sphere_survives_a_row_of_zeros():
    W = torch.randn(8, 12)
    W[0] = 0.0
    assert sphere(delta(), W).dense().isfinite().all()
