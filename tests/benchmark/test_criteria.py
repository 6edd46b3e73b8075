"""Scores of facts, and what is lost at a layer, on curves made by hand and against plain loops."""

from __future__ import annotations

import math
from statistics import fmean, harmonic_mean

import pytest
import torch

from goldenedit.benchmark.criteria import CRITERIA, LayerCurve, rank_correlation
from goldenedit.evaluation.scores import FactLikelihoods, FactMatches
from goldenedit.layer_selection import Outcome, edit_score
from goldenedit.layer_selection.cells import Sight

SIGHT = Sight(
    {"completion": 1.0, "chat": 0.0, "rephrase": 0.5},
    {"subject": 0.5, "unrelated": 1.0},
    kl=0.01,
    agreement=1,
    fluency=4,
)


def outcome(rewrite: float, locality: float, portability: float | None = None) -> Outcome:
    others = [] if portability is None else [portability]
    return Outcome(FactMatches(rewrite, [rewrite], others, [locality]))


def curve(*layers: list[float], name: str = "knowedit") -> LayerCurve:
    """A curve whose facts have these shares of all their tokens at each layer, so that every score is their mean."""
    criterion = CRITERIA[name]
    parts = torch.stack([criterion.of([outcome(share, share) for share in shares]) for shares in layers])
    return LayerCurve(criterion, range(len(layers)), parts)


def test_what_a_user_sees_is_success_and_what_stays():
    criterion = CRITERIA["seen"]
    parts = criterion.of([Outcome(FactMatches(1.0), sight=SIGHT)])
    assert parts.tolist() == [[0.5, 0.75]]
    assert criterion.score(parts).item() == pytest.approx(harmonic_mean([0.5, 0.75]))


def test_knowedits_overall_is_the_mean_of_what_facts_have_prompts_for():
    criterion = CRITERIA["knowedit"]
    outcomes = [outcome(1.0, 0.5), outcome(0.0, 0.5, 0.4)]
    expected = fmean([0.5, 0.5, 0.4, 0.5])  # rewrite, rephrase, portability of one fact, locality
    assert criterion.score(criterion.of(outcomes)).item() == pytest.approx(expected)


def test_s_is_that_of_the_sweep():
    likelihoods = [
        FactLikelihoods((1.0, 2.0), [(1.0, 2.0), (3.0, 2.0)], [(5.0, 1.0), (1.0, 5.0)]),
        FactLikelihoods((3.0, 2.0), [(1.0, 2.0)], [(5.0, 1.0)]),
    ]
    criterion = CRITERIA["S"]
    for outcomes in (
        [Outcome(FactMatches(1.0), one) for one in likelihoods],
        [outcome(1.0, 0.5), outcome(0.25, 1.0)],
    ):
        assert criterion.score(criterion.of(outcomes)).item() == pytest.approx(edit_score(outcomes))


def test_a_part_that_is_zero_makes_a_harmonic_mean_zero():
    assert CRITERIA["S"].score(CRITERIA["S"].of([outcome(0.0, 1.0)])).item() == pytest.approx(0, abs=1e-9)


def test_what_nobody_measured_has_no_score():
    parts = CRITERIA["seen"].of([outcome(1.0, 1.0)])
    assert parts.isnan().all()
    assert math.isnan(CRITERIA["knowedit"].score(parts).item())


def test_what_is_lost_is_relative_to_the_best_layer_on_the_same_facts():
    found = curve([0.4, 0.4], [0.5, 0.3], [0.2, 0.8])
    assert found.best == 2
    lost, (low, high) = found.lost_at(1)
    assert lost == pytest.approx(1 - 0.4 / 0.5)
    assert low == pytest.approx(1 - 0.5 / 0.2)  # two times the first fact
    assert high == pytest.approx(1 - 0.3 / 0.8)
    assert found.lost_at(2) == (0.0, (0.0, 0.0))


def test_each_fact_at_the_layer_that_is_best_for_the_others_has_no_luck():
    """The better layer of either fact is the worse one of the other: luck is all there is."""
    assert curve([0.4, 0.4], [0.5, 0.3], [0.2, 0.8]).held_out[0] == pytest.approx(1 - 0.25 / 0.5)
    assert curve([0.1, 0.1, 0.2], [0.9, 0.8, 0.9]).held_out[0] == 0


def test_each_fact_at_its_best_layer():
    assert curve([0.4, 0.4], [0.5, 0.3], [0.2, 0.8]).per_fact()[0] == pytest.approx((0.5 + 0.8) / 2)


def test_a_layer_for_each_fact_is_judged_by_what_did_not_choose_it():
    by = curve([0.9, 0.1], [0.1, 0.9])  # the first layer for the first fact, the second for the second
    same = curve([0.6, 0.2], [0.2, 0.6])
    other = curve([0.2, 0.6], [0.6, 0.2])
    assert same.chosen_by(by)[0] == pytest.approx(1 - 0.6 / 0.4)  # a gain over the first layer, which is as good as any
    assert other.chosen_by(by)[0] == pytest.approx(1 - 0.2 / 0.4)


def test_of_equally_good_layers_a_fact_has_the_one_that_is_best_for_all():
    by = curve([0.5, 0.0, 0.0], [0.5, 0.9, 0.9])
    judged = curve([0.0, 0.5, 0.5], [0.5, 0.5, 0.5])
    assert judged.chosen_by(by)[0] == 0


def test_where_nothing_is_right_nothing_is_lost():
    found = curve([0.0, 0.0], [0.0, 0.0])
    assert found.lost_at(1) == (0.0, (0.0, 0.0))
    assert found.held_out == (0.0, (0.0, 0.0))


def test_the_plateau_has_the_layers_that_other_facts_could_make_the_best():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 60, generator=generator, dtype=torch.float64) * 0.2
    shares = [(noise[layer] + level).tolist() for layer, level in enumerate([0.5, 0.505, 0.3])]
    found = curve(*shares)
    assert found.plateau() == [0, 1]
    assert [low < score < high for score, (low, high) in zip(found.scores, found.intervals(), strict=True)] == [
        True
    ] * 3


def test_the_best_layer_is_always_on_the_plateau():
    assert curve([0.2], [0.9], [0.1]).plateau() == [1]
    assert curve([0.5], [0.5]).plateau() == [0, 1]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 1, 2], [1, 1, 5], 1.0),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation_is_spearmans(first, second, expected):
    assert rank_correlation(first, second) == (None if expected is None else pytest.approx(expected))
