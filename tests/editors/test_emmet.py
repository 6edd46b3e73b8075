"""EMMET: exact insertion at the least cost to other keys."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors.emmet import emmet
from goldenedit.editors.keys import FactKeys
from goldenedit.editors.rome import r_rome
from goldenedit.editors.statistics import KeyStatistics

D_IN, D_OUT = 24, 10


@pytest.mark.parametrize("facts", [1, 5, 20])
@pytest.mark.parametrize("identity", [True, False])
def test_every_fact_is_inserted_exactly(facts, identity):
    K, R = torch.randn(D_IN, facts), torch.randn(D_OUT, facts)
    delta = emmet(K, R, KeyStatistics(None if identity else second_moment(D_IN)))
    assert delta.rank == facts
    torch.testing.assert_close(delta.dense() @ K, R, rtol=1e-3, atol=1e-4)


def test_no_other_exact_update_costs_less():
    C = second_moment(D_IN).float()
    K, R = torch.randn(D_IN, 4), torch.randn(D_OUT, 4)
    best = emmet(K, R, KeyStatistics(C)).dense()
    Q = torch.linalg.qr(K).Q
    for _ in range(5):
        other = torch.randn(D_OUT, D_IN)
        exact = best + other - (other @ Q) @ Q.T  # the same at K
        assert torch.trace(best @ C @ best.T) <= torch.trace(exact @ C @ exact.T)


def test_one_fact_is_r_rome_s():
    statistics = KeyStatistics(second_moment(D_IN))
    key, residual = torch.randn(D_IN), torch.randn(D_OUT, 1)
    expected = r_rome([FactKeys(key, key)], residual, statistics).dense()
    torch.testing.assert_close(emmet(key[:, None], residual, statistics).dense(), expected, rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_statistics_does_not_matter():
    K, R = torch.randn(D_IN, 4), torch.randn(D_OUT, 4)
    one, other = (emmet(K, R, KeyStatistics(scale * second_moment(D_IN)), 0.1).dense() for scale in (1.0, 300.0))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_ridge_bounds_what_two_keys_that_are_all_but_the_same_ask_for():
    key = torch.randn(D_IN, 1)
    K = torch.cat([key, key + 1e-4 * torch.randn(D_IN, 1)], 1)
    R = torch.tensor([[1.0, -1.0]]).expand(D_OUT, 2)
    exact, kept = (emmet(K, R, KeyStatistics(None), ridge).dense().norm() for ridge in (0.0, 0.1))
    assert kept < 0.01 * exact
