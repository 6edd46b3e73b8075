"""EMMET: exact insertion at the least cost to other keys."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import KeyStatistics, LowRankDelta, Problem
from goldenedit.editors.emmet import EmmetOptions, emmet
from goldenedit.editors.rome import r_rome

D_IN, D_OUT = 24, 10


def solve(K: torch.Tensor, R: torch.Tensor, statistics: KeyStatistics, ridge: float = 0.0) -> LowRankDelta:
    return emmet(Problem.of(K, R, statistics, EmmetOptions(gram_ridge=ridge)))


@pytest.mark.parametrize("facts", [1, 5, 20])
@pytest.mark.parametrize("identity", [True, False])
def test_every_fact_is_inserted_exactly(facts, identity):
    K, R = torch.randn(D_IN, facts), torch.randn(D_OUT, facts)
    delta = solve(K, R, KeyStatistics(None if identity else second_moment(D_IN)))
    assert delta.rank == facts
    torch.testing.assert_close(delta.dense() @ K, R, rtol=1e-3, atol=1e-4)


def test_no_other_exact_update_costs_less():
    C = second_moment(D_IN).float()
    K, R = torch.randn(D_IN, 4), torch.randn(D_OUT, 4)
    best = solve(K, R, KeyStatistics(C)).dense()
    Q = torch.linalg.qr(K).Q
    for _ in range(5):
        other = torch.randn(D_OUT, D_IN)
        exact = best + other - (other @ Q) @ Q.T  # the same at K
        assert torch.trace(best @ C @ best.T) <= torch.trace(exact @ C @ exact.T)


def test_one_fact_is_r_rome_s():
    statistics = KeyStatistics(second_moment(D_IN))
    key, residual = torch.randn(D_IN, 1), torch.randn(D_OUT, 1)
    expected = r_rome(Problem.of(key, residual, statistics)).dense()
    torch.testing.assert_close(solve(key, residual, statistics).dense(), expected, rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_statistics_does_not_matter():
    K, R = torch.randn(D_IN, 4), torch.randn(D_OUT, 4)
    one, other = (solve(K, R, KeyStatistics(scale * second_moment(D_IN)), 0.1).dense() for scale in (1.0, 300.0))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_ridge_bounds_what_two_keys_that_are_all_but_the_same_ask_for():
    key = torch.randn(D_IN, 1)
    K = torch.cat([key, key + 1e-4 * torch.randn(D_IN, 1)], 1)
    R = torch.tensor([[1.0, -1.0]]).expand(D_OUT, 2)
    exact, kept = (solve(K, R, KeyStatistics(None), ridge).dense().norm() for ridge in (0.0, 0.1))
    assert kept < 0.01 * exact
