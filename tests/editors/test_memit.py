"""MEMIT against its least-squares problem, solved the slow way; PMET asks it for other values."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import EDITORS, KeyStatistics, LowRankDelta, Problem
from goldenedit.editors.memit import MemitOptions, memit

D_IN, D_OUT = 24, 10


def solve(K: torch.Tensor, R: torch.Tensor, statistics: KeyStatistics, weight: float) -> LowRankDelta:
    return memit(Problem.of(K, R, statistics, MemitOptions(covariance_weight=weight)))


@pytest.mark.parametrize("facts", [1, 5, 40])
@pytest.mark.parametrize("weight", [1e-2, 1.0, 150.0])
@pytest.mark.parametrize("identity", [True, False])
def test_the_update_solves_its_normal_equations(facts, weight, identity):
    C = None if identity else second_moment(D_IN)
    K, R = torch.randn(D_IN, facts), torch.randn(D_OUT, facts)
    delta = solve(K, R, KeyStatistics(C), weight)
    assert delta.rank == facts
    K, R = K.double(), R.double()
    C = torch.eye(D_IN, dtype=torch.float64) if C is None else C.double()
    expected = R @ K.T @ torch.linalg.inv(weight * C + K @ K.T)
    torch.testing.assert_close(delta.dense().double(), expected, rtol=1e-4, atol=1e-5)


def test_no_other_update_has_a_lower_objective():
    C = second_moment(D_IN).float()
    K, R, weight = torch.randn(D_IN, 6), torch.randn(D_OUT, 6), 0.5

    def objective(change):
        return (change @ K - R).square().sum() + weight * torch.trace(change @ C @ change.T)

    best = solve(K, R, KeyStatistics(C), weight).dense()
    for size in (1e-3, 1e-2, 1.0):
        assert objective(best) <= objective(best + size * torch.randn(D_OUT, D_IN))


def test_a_small_weight_inserts_the_facts_and_a_large_one_changes_nothing():
    statistics = KeyStatistics(second_moment(D_IN))
    K, R = torch.randn(D_IN, 3), torch.randn(D_OUT, 3)
    torch.testing.assert_close(solve(K, R, statistics, 1e-8).dense() @ K, R, rtol=1e-2, atol=1e-3)
    assert solve(K, R, statistics, 1e9).dense().norm() < 1e-4 * R.norm()


def test_pmet_is_memit_s_update_of_values_that_the_attention_helped_to_find():
    memit_record, pmet = EDITORS.get("memit"), EDITORS.get("pmet")
    assert pmet.function is memit_record.function is memit
    assert pmet.options is memit_record.options
    assert (memit_record.vectors, pmet.vectors) == (("mlp",), ("mlp", "attention"))
