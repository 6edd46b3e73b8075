"""What editors are asked: columns of keys and residuals, the statistics beside them, and units."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import FactKeys, GradientProblem, KeyStatistics, LowRankDelta, Problem, TrainingProblem
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.record import NoOptions
from goldenedit.editors.statistics import UnreadStatistics

D_IN, D_OUT, FACTS = 24, 10, 3


def problem(anchored: tuple[int, ...] = (0, 2), contrasts: tuple[int, ...] = ()) -> Problem:
    facts = [
        FactKeys(
            torch.randn(D_IN),
            torch.randn(D_IN),
            torch.randn(D_IN, 2, dtype=torch.float64) if index in contrasts else None,
            index in anchored,
        )
        for index in range(FACTS)
    ]
    return Problem(facts, torch.randn(D_OUT, FACTS), KeyStatistics(second_moment(D_IN), 0.1))


def test_every_key_has_a_residual_and_an_anchored_fact_has_two():
    asked = problem(anchored=(0, 2))
    first, second, third = asked.facts
    expected = torch.stack([first.mean, second.mean, third.mean, first.bare, third.bare], 1)
    assert torch.equal(asked.keys, expected)
    assert torch.equal(asked.residuals, asked.fact_residuals[:, [0, 1, 2, 0, 2]])
    assert asked.owners.tolist() == [0, 1, 2, 0, 2]


def test_without_anchors_there_is_one_column_for_each_fact():
    asked = problem(anchored=())
    assert torch.equal(asked.keys, torch.stack([fact.mean for fact in asked.facts], 1))
    assert torch.equal(asked.residuals, asked.fact_residuals)


@pytest.mark.parametrize("anchored", [(0,), (0, 2), (0, 1, 2)])
def test_folding_back_gives_a_rank_for_each_fact_and_the_same_change(anchored):
    asked = problem(anchored)
    delta = LowRankDelta(torch.randn(FACTS + len(anchored), D_IN), asked.residuals.float(), experts=2)
    folded = asked.folded(delta)
    assert folded.rank == FACTS
    assert folded.experts == 2
    torch.testing.assert_close(folded.dense(), delta.dense())
    assert torch.equal(folded.B, asked.fact_residuals)


def test_other_changes_are_returned_as_they_are():
    asked = problem(anchored=(0, 2))
    of_facts = LowRankDelta(torch.randn(FACTS, D_IN), torch.randn(D_OUT, FACTS))
    of_keys = LowRankDelta(torch.randn(5, D_IN), asked.residuals + 1e-3)
    assert asked.folded(of_facts) is of_facts
    assert asked.folded(of_keys) is of_keys


def test_without_anchors_there_is_nothing_to_fold():
    asked = problem(anchored=())
    delta = LowRankDelta(torch.randn(FACTS, D_IN), asked.residuals)
    folded = asked.folded(delta)
    assert torch.equal(folded.A, delta.A)
    assert torch.equal(folded.B, delta.B)


def test_contrast_keys_of_all_facts_are_text_beside_the_others():
    asked = problem(contrasts=(0, 1))
    keys = torch.randn(D_IN, 4).double()
    contrast = torch.cat([asked.facts[0].contrast, asked.facts[1].contrast], 1)
    torch.testing.assert_close(asked.statistics.solve(keys), asked.text_statistics.solve(keys, contrast))
    assert not torch.allclose(asked.statistics.solve(keys), asked.text_statistics.solve(keys))
    plain = problem()
    assert plain.statistics is plain.text_statistics


def test_units_are_sizes_of_keys_and_text():
    asked = problem(anchored=(1,))
    energy = sum(key.square().sum().item() for key in asked.keys.T) / 4
    C = second_moment(D_IN)
    assert asked.unit("key energy") == pytest.approx(energy)
    assert asked.unit("mean eigenvalue") == pytest.approx(torch.linalg.eigvalsh(C).mean().item(), rel=1e-5)
    assert asked.unit("key energy per trace") == pytest.approx(energy / C.trace().item(), rel=1e-5)


def test_units_of_gradients_are_sizes_of_what_enters_and_leaves():
    inputs, outputs, gradients = torch.randn(5, D_IN), torch.randn(5, D_OUT), torch.randn(5, D_OUT)
    asked = GradientProblem(inputs, outputs, gradients, RunningMoments.of(torch.cat([inputs, gradients], 1)))
    assert asked.unit("input energy") == pytest.approx(inputs.square().sum().item() / 5)
    length = sum(row.norm().item() for row in outputs) / 5
    assert asked.unit("output length") == pytest.approx(length / (D_IN * D_OUT**0.5))


@pytest.mark.parametrize(
    "asked",
    [
        problem(),
        GradientProblem(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4), RunningMoments.of(torch.ones(2, 7))),
        TrainingProblem(D_IN, D_OUT, torch.Generator()),
    ],
    ids=lambda asked: type(asked).__name__,
)
def test_an_unknown_unit_is_told(asked):
    with pytest.raises(ValueError, match="Unknown unit 'mile'"):
        asked.unit("mile")


def test_plain_matrices_pose_the_problem_of_a_paper():
    K, R = torch.randn(D_IN, FACTS), torch.randn(D_OUT, FACTS)
    asked = Problem.of(K, R)
    assert torch.equal(asked.keys, K)
    assert torch.equal(asked.residuals, R)
    assert all(torch.equal(fact.bare, fact.mean) and fact.contrast is None for fact in asked.facts)
    keys = torch.randn(D_IN, 2).double()
    assert torch.equal(asked.statistics.solve(keys), keys)
    assert (asked.options, asked.previous) == (None, None)
    statistics, options, previous = KeyStatistics(second_moment(D_IN)), NoOptions(), torch.randn(D_IN, 4)
    given = Problem.of(K, R, statistics, options, previous)
    assert (given.statistics, given.options, given.previous) == (statistics, options, previous)


def test_the_identity_has_the_mean_eigenvalue_one_and_unread_statistics_have_none():
    K, R = torch.randn(D_IN, FACTS), torch.randn(D_OUT, FACTS)
    assert Problem.of(K, R).unit("mean eigenvalue") == 1.0
    with pytest.raises(ValueError, match="does not declare that it reads key statistics"):
        Problem.of(K, R, UnreadStatistics()).unit("mean eigenvalue")
