"""Regret, rank correlation and the best layer for each fact, on curves made by hand."""

from __future__ import annotations

import json

import pytest

from goldenedit.benchmark.golden_layers import PACKAGED, Curve, Measurement
from goldenedit.benchmark.report import rank_correlation, render, summarize
from goldenedit.cost import Cost
from goldenedit.evaluation.scores import FactMatches
from goldenedit.layer_selection import LayerSelection, Outcome


def outcome(rewrite: float, locality: float) -> Outcome:
    return Outcome(FactMatches(rewrite, [rewrite], locality=[locality]))


def curve(*layers: list[float], layers_at: tuple[int, ...] = (0, 1, 2)) -> Curve:
    """A curve whose facts have these shares of all their tokens at each layer, so that S is their mean."""
    found = {at: [outcome(share, share) for share in shares] for at, shares in zip(layers_at, layers, strict=True)}
    return Curve(found, Cost(6.0, 600), 60.0)


def selection(name: str, layer: int, scores: list[float | None] | None = None, cost: float = 0.2) -> LayerSelection:
    return LayerSelection(name, scores, [layer], 4, Cost(cost, 4), cost)


@pytest.fixture
def measured() -> Measurement:
    """Proxy facts say layer 1; the test facts of `a` have layer 2, those of `b` layer 1 as the best."""
    return Measurement(
        "tiny",
        3,
        {
            (PACKAGED, "r-rome"): curve([0.2, 0.4], [0.8, 1.0], [0.5, 0.5]),
            ("a", "r-rome"): curve([0.4, 0.4], [0.5, 0.3], [0.2, 0.8]),
            ("b", "r-rome"): curve([0.1, 0.1], [1.0, 1.0], [0.5, 0.5]),
        },
        {
            (PACKAGED, "lga sequence"): selection("lga", 1, [0.1, 0.3, 0.2]),
            ("a", "lga sequence"): selection("lga", 2, [0.1, 0.2, 0.3]),
            ("b", "lga sequence"): selection("lga", 0, [0.3, 0.2, 0.1]),
            (PACKAGED, "auto"): selection("auto", 1, [0.1, None, 0.2], cost=2.0),
            (PACKAGED, "causal_tracing"): selection("causal_tracing", 0, [3.0, 2.0, 1.0]),
            (PACKAGED, "middle"): LayerSelection("middle", None, [1]),
        },
    )


def results_of(summary, selector: str, proxy: str = PACKAGED):
    (found,) = (one for one in summary["selections"] if one["selector"] == selector and one["proxy"] == proxy)
    return {one["dataset"]: one for one in found["tests"]}


def test_regret_is_what_is_lost_against_the_best_layer_of_the_test_facts(measured):
    summary = summarize(measured)
    lga = results_of(summary, "lga sequence")
    assert lga["a"]["regret"] == pytest.approx(1 - 0.4 / 0.5)
    assert lga["b"]["regret"] == 0
    assert lga["a"]["interval"][0] <= lga["a"]["regret"] <= lga["a"]["interval"][1]
    brute = results_of(summary, "brute force of r-rome")
    assert brute["a"]["regret"] == lga["a"]["regret"]
    assert brute["b"]["rank_correlation"] == pytest.approx(1.0)
    chance = {one["dataset"]: one["regret"] for one in summary["random"]}
    assert chance["a"] == pytest.approx(1 - (0.4 + 0.4 + 0.5) / 3 / 0.5)


def test_a_selector_that_saw_a_datasets_facts_is_tested_on_that_dataset_alone(measured):
    summary = summarize(measured)
    assert list(results_of(summary, "lga sequence", "a")) == ["a"]
    assert results_of(summary, "lga sequence", "a")["a"]["regret"] == 0


def test_the_golden_layer_is_that_of_the_proxy_facts_and_each_fact_has_its_own_best(measured):
    curves = {one["dataset"]: one for one in summarize(measured)["curves"]}
    assert curves["a"]["golden"]["layer"] == curves["b"]["golden"]["layer"] == 1
    assert curves["a"]["golden"]["score"] == pytest.approx(0.4)
    assert curves["a"]["best"] == 2
    assert curves["a"]["per_sample"]["score"] == pytest.approx((0.5 + 0.8) / 2)
    assert "golden" not in curves[PACKAGED]


def test_the_held_out_best_layer_has_no_luck(measured):
    """The better layer of either fact of `a` is the worse one of the other: luck is all there is."""
    curves = {one["dataset"]: one for one in summarize(measured)["curves"]}
    assert curves["a"]["held_out_best"] == pytest.approx(0.25)
    assert curves["b"]["held_out_best"] == pytest.approx(1.0)


def test_selectors_are_ranked_by_the_layers_they_score(measured):
    summary = summarize(measured)
    assert results_of(summary, "auto")["b"]["rank_correlation"] == pytest.approx(1.0)  # of layers 0 and 2
    assert results_of(summary, "causal_tracing")["b"]["rank_correlation"] == pytest.approx(-0.5)
    assert results_of(summary, "middle")["b"]["rank_correlation"] is None


def test_the_report_says_what_the_summary_says(measured):
    summary = json.loads(json.dumps(summarize(measured)))
    report = render([summary], {"tiny": ["tiny-layers.png"]})
    assert report.startswith("# Golden layers\n")
    for row in (
        "| lga sequence | 1 | 0.100 |",
        "| best layer of the other test facts |  | 0.250 |",  # half of a, nothing of b
        "| lga sequence, own | 2, 0 | 0.450 |",  # nothing of a, nine tenths of b
        "| a | r-rome | 2 | 1: 0.400 | 0.300 to 0.500 | 2: 0.500 | 0.2",
        "| auto | b | r-rome | 100.0 | +90.0 | 100.0 | +90.0 |",
        "| brute force, r-rome | 60 | 3.00 | 1 | 1 |",
        "| lga sequence | 0.2 | 0.050 | 300 | 60 |",
        "| 2 | 0.500 | 0.500 | 0.500 |",
        "![tiny-layers.png](tiny-layers.png)",
    ):
        assert row in report


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
