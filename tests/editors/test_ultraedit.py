"""UltraEdit against its formulas written out, and its running moments against those of everything at once."""

from __future__ import annotations

import pytest
import torch

from goldenedit.editors import GradientProblem
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.ultraedit import UltraEditOptions, ultraedit


@pytest.mark.parametrize("sizes", [[10], [1, 9], [4, 4, 2]])
def test_running_moments_are_those_of_all_rows(sizes):
    rows = 5.0 + 3.0 * torch.randn(10, 6)
    parts = [RunningMoments.of(part) for part in rows.split(sizes)]
    moments = RunningMoments.from_columns(torch.cat([part.columns() for part in parts], 1))
    assert moments.count == 10
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    expected = (rows.double() - rows.double().mean(0)) / rows.double().std(0)
    torch.testing.assert_close(moments.normalized(rows), expected)


def test_a_feature_that_never_changes_counts_for_nothing():
    rows = torch.cat([torch.ones(5, 1), torch.randn(5, 1)], 1)
    assert not RunningMoments.of(rows).normalized(rows)[:, 0].any()


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_update_is_the_paper_s(tokens):
    H, G = torch.randn(tokens, 12), 1e-3 * torch.randn(tokens, 8)
    moments = RunningMoments.of(torch.randn(9, 20)) + RunningMoments.of(torch.cat([H, G], 1))
    options = UltraEditOptions(ultraedit_lr=1e-2, ultraedit_ridge=1.0)
    delta = ultraedit(GradientProblem(H, torch.randn(tokens, 8), G, moments, options))
    assert delta.rank == tokens
    hat = moments.normalized(torch.cat([H, G], 1))
    V = torch.stack([-1e-2 * (row[:12] @ row[:12]) * row[12:] for row in hat])
    H = H.double()
    expected = (torch.linalg.inv(H.T @ H + torch.eye(12, dtype=torch.float64)) @ H.T @ V).T
    torch.testing.assert_close(delta.dense().double(), expected, rtol=1e-4, atol=1e-6)
