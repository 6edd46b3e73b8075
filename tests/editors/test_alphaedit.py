"""AlphaEdit: what is known stays, what is new goes in."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import KeyStatistics, LowRankDelta, Problem
from goldenedit.editors.alphaedit import AlphaEditOptions, alphaedit, in_null_space

D_IN, D_OUT = 24, 10
THRESHOLD = 0.05


def basis_of(C: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return a basis of the directions below a threshold."""
    values, vectors = torch.linalg.eigh(C.double())
    return vectors[:, values < threshold]


def solve(K: torch.Tensor, R: torch.Tensor, ridge: float, previous: torch.Tensor | None = None) -> LowRankDelta:
    options = AlphaEditOptions(null_space_threshold=THRESHOLD, null_space_ridge=ridge)
    return alphaedit(Problem.of(K, R, KeyStatistics(second_moment(D_IN)), options, previous))


@pytest.mark.parametrize("facts", [1, 5, 30])
@pytest.mark.parametrize("again", [False, True])
def test_the_update_is_the_paper_s(facts, again):
    basis = basis_of(second_moment(D_IN), THRESHOLD)
    K, R = torch.randn(D_IN, facts), torch.randn(D_OUT, facts)
    earlier = torch.randn(D_IN, 7)
    delta = solve(K, R, 0.3, earlier if again else None).dense().double()
    P = basis @ basis.T
    K, R = K.double(), R.double()
    seen = K @ K.T + ((earlier @ earlier.T).double() if again else 0.0)
    expected = R @ K.T @ P @ torch.linalg.inv(seen @ P + 0.3 * torch.eye(D_IN, dtype=torch.float64))
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_preserved_keys_keep_their_outputs():
    C = second_moment(D_IN)
    basis = basis_of(C, THRESHOLD)
    vectors = torch.linalg.eigh(C).eigenvectors
    preserved = vectors[:, -(D_IN - basis.shape[1]) :].float()
    delta = solve(torch.randn(D_IN, 5), torch.randn(D_OUT, 5), 0.1).dense()
    assert (delta @ preserved).abs().max() < 1e-5 * delta.abs().max()


def test_a_small_ridge_inserts_the_facts():
    K, R = torch.randn(D_IN, 4), torch.randn(D_OUT, 4)
    delta = solve(K, R, 1e-6)
    torch.testing.assert_close(delta.dense() @ K, R, rtol=1e-2, atol=1e-3)


def test_earlier_edits_are_disturbed_less_when_they_are_remembered():
    earlier, K, R = torch.randn(D_IN, 4), torch.randn(D_IN, 4), torch.randn(D_OUT, 4)
    forgetful, mindful = ((solve(K, R, 0.1, previous).dense() @ earlier).norm() for previous in (None, earlier))
    assert mindful < 0.5 * forgetful


@pytest.mark.parametrize("held", [False, True])
def test_the_projection_keeps_the_directions_below_the_threshold_alone(held):
    text = torch.randn(D_IN - 4, D_IN) @ torch.diag(torch.logspace(0, -3, D_IN))
    C = text.double().T @ text.double()
    basis, keys = basis_of(C, 0.01), torch.randn(D_IN, 5)
    assert 4 < basis.shape[1] < D_IN
    statistics = KeyStatistics.of(text if held else C, 0.0)
    torch.testing.assert_close(in_null_space(keys, statistics, 0.01), basis @ basis.T @ keys.double())
    strongest = statistics.strongest(0.01)
    assert strongest.shape == (D_IN, D_IN - basis.shape[1])
    torch.testing.assert_close(strongest.T @ basis, torch.zeros(strongest.shape[1], basis.shape[1]).double())


def test_no_null_space_is_an_error_that_names_the_option():
    with pytest.raises(ValueError, match="null_space_threshold"):
        in_null_space(torch.randn(D_IN, 1), KeyStatistics(second_moment(D_IN)), 1e-9)


def test_the_identity_has_no_null_space():
    with pytest.raises(ValueError, match="covariance"):
        in_null_space(torch.randn(D_IN, 1), KeyStatistics(None), 1.0)
