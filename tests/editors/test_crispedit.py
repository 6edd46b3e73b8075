"""CrispEdit against its projection written out, entry by entry, and against the curvature it is to avoid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matrices import second_moment

from goldenedit.editing.training import Penalized
from goldenedit.editors import KeyStatistics, LowRankDelta, TrainingProblem
from goldenedit.editors.crispedit import CrispEditOptions, crispedit, flattest

D_IN, D_OUT = 12, 8


def problem(share: float) -> TrainingProblem:
    return TrainingProblem(
        D_IN,
        D_OUT,
        torch.Generator().manual_seed(0),
        CrispEditOptions(crispedit_share=share, finetune_cut=0.0),
        KeyStatistics(second_moment(D_IN).float()),
        second_moment(D_OUT, 1).float(),
    )


def projected(gradient: torch.Tensor, A: torch.Tensor, G: torch.Tensor, share: float) -> torch.Tensor:
    """Return the gradient without its parts along the entries of highest curvature, one entry at a time."""
    a, U_A = torch.linalg.eigh(A.double())
    g, U_G = torch.linalg.eigh(G.double())
    entries = sorted((float(g[i] * a[j]), i, j) for i in range(D_OUT) for j in range(D_IN))
    total, held = sum(entry[0] for entry in entries), 0.0
    kept = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for curvature, i, j in entries:
        held += curvature
        if held <= share * total:
            direction = torch.outer(U_G[:, i], U_A[:, j])
            kept += (gradient.double() * direction).sum() * direction
    return kept


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_a_step_along_the_gradient_is_the_projected_gradient(share):
    of_problem = problem(share)
    change = crispedit(of_problem)
    inputs, wanted = torch.randn(5, D_IN), torch.randn(5, D_OUT)
    (change(inputs) * wanted).sum().backward()
    change.coordinates.data -= 0.1 * change.coordinates.grad
    gradient = wanted.T @ inputs
    expected = -0.1 * projected(gradient, of_problem.statistics.second_moment, of_problem.output_gradients, share)
    torch.testing.assert_close(change.change().dense().double(), expected, rtol=1e-3, atol=1e-4)


def test_steps_of_adam_stay_within_the_flat_entries():
    of_problem = problem(0.05)
    change = crispedit(of_problem)
    optimizer = torch.optim.Adam(change.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (change(torch.randn(5, D_IN)) - torch.randn(5, D_OUT)).square().sum().backward()
        optimizer.step()
    delta = change.change().dense()
    assert delta.norm() > 0.1
    A, G = of_problem.statistics.second_moment, of_problem.output_gradients
    torch.testing.assert_close(projected(delta, A, G, 0.05).float(), delta, rtol=1e-3, atol=1e-4)
    # So it costs other text less than a change of the same size whose entries are chosen blindly.
    blind = torch.randn(D_OUT, D_IN)
    blind *= delta.norm() / blind.norm()
    assert (G @ delta @ A * delta).sum() < 0.3 * (G @ blind @ A * blind).sum()


def test_the_penalty_is_the_divergence_of_this_change_and_the_earlier_ones_together():
    of_problem = problem(1.0)
    earlier = [LowRankDelta(torch.randn(3, D_IN), torch.randn(D_OUT, 3)) for _ in range(2)]
    options = replace(of_problem.options, crispedit_penalty=7.0)
    change = crispedit(replace(of_problem, options=options, earlier=earlier))
    change.coordinates.data = torch.randn(D_OUT, D_IN)
    whole = change.change().dense() + sum(delta.dense() for delta in earlier)
    A, G = of_problem.statistics.second_moment, of_problem.output_gradients
    torch.testing.assert_close(change.penalty(), 7 * (G @ whole @ A * whole).sum() / 2, rtol=1e-3, atol=1e-3)
    assert not isinstance(crispedit(of_problem), Penalized)  # training ends where the answers are likely


def test_the_flattest_entries_hold_at_most_their_share_and_no_further_one_would_fit():
    curvature = torch.rand(6, 7).double()
    for share in (0.0, 0.1, 0.7):
        is_flat = flattest(curvature, share)
        held = curvature[is_flat].sum()
        assert held <= share * curvature.sum()
        assert held + curvature[~is_flat].min() > share * curvature.sum()
        assert not is_flat.any() or curvature[is_flat].max() <= curvature[~is_flat].min()
