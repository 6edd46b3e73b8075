"""What the summary and the report say of curves made by hand."""

from __future__ import annotations

import json

import pytest

from goldenedit.benchmark.golden_layers import PACKAGED, Choice, Curve, Measurement
from goldenedit.benchmark.report import render, summarize
from goldenedit.benchmark.run import write_report
from goldenedit.cost import Cost
from goldenedit.evaluation.scores import FactMatches
from goldenedit.layer_selection import LayerSelection, Outcome
from goldenedit.layer_selection.cells import Sight


def outcome(share: float) -> Outcome:
    sight = Sight({"chat": share}, {"unrelated": share}, kl=1 - share, agreement=share, fluency=4 * share)
    return Outcome(FactMatches(share, [share], locality=[share]), sight=sight)


def curve(*layers: list[float]) -> Curve:
    """A curve whose facts have these shares at each layer, so that every score is their mean."""
    found = {at: [outcome(share) for share in shares] for at, shares in enumerate(layers)}
    return Curve(found, Cost(6.0, 600), 60.0)


def selection(name: str, layer: int, scores: list[float | None] | None = None, cost: float = 0.2) -> LayerSelection:
    return LayerSelection(name, scores, [layer], 4, Cost(cost, 4), cost)


@pytest.fixture
def measured() -> Measurement:
    """The test facts of `a` have layer 2, those of `b` layer 1 as the best."""
    return Measurement(
        "tiny",
        3,
        {
            ("a", "locft"): curve([0.4, 0.4], [0.5, 0.3], [0.2, 0.8]),
            ("b", "locft"): curve([0.1, 0.1], [1.0, 1.0], [0.5, 0.5]),
            ("b", "memit"): curve([0.1, 0.1], [0.2, 0.2], [0.5, 0.5]),
        },
        [
            Choice("lga sequence", PACKAGED, selection("lga", 1, [0.1, 0.3, 0.2])),
            Choice("lga sequence", "a", selection("lga", 2, [0.1, 0.2, 0.3])),
            Choice("auto", PACKAGED, selection("auto", 1, [0.1, None, 0.2], cost=2.0), ("memit",)),
            Choice("causal_tracing", PACKAGED, selection("causal_tracing", 0, [3.0, 2.0, 1.0])),
            Choice("middle", PACKAGED, LayerSelection("middle", None, [1])),
        ],
        [0, 1, 2],
    )


def results_of(summary, selector: str, proxy: str = PACKAGED):
    (found,) = (one for one in summary["selections"] if one["selector"] == selector and one["proxy"] == proxy)
    return {(one["dataset"], one["method"], one["criterion"]): one for one in found["tests"]}


def test_regret_is_what_is_lost_against_the_best_layer_of_the_test_facts(measured):
    lga = results_of(summarize(measured), "lga sequence")
    assert lga["a", "locft", "S"]["regret"] == pytest.approx(1 - 0.4 / 0.5)
    assert lga["b", "locft", "S"]["regret"] == 0
    assert lga["a", "locft", "S"]["above_chance"] == pytest.approx(0.2 - 0.5)
    assert lga["b", "locft", "seen"]["is_in_plateau"]
    assert not lga["b", "memit", "seen"]["is_in_plateau"]


def test_a_selector_is_tested_where_its_facts_are_not_of_another_dataset_and_on_its_editors(measured):
    summary = summarize(measured)
    assert {dataset for dataset, _, _ in results_of(summary, "lga sequence", "a")} == {"a"}
    assert {method for _, method, _ in results_of(summary, "auto")} == {"memit"}


def test_curves_have_intervals_plateau_and_what_chance_loses(measured):
    curves = {(one["dataset"], one["method"], one["criterion"]): one for one in summarize(measured)["curves"]}
    of_a = curves["a", "locft", "S"]
    assert of_a["best"] == 2
    assert of_a["chance"]["lost"] == pytest.approx(0.5)
    assert of_a["any_layer"] == pytest.approx(1 - (0.4 + 0.4 + 0.5) / 3 / 0.5)
    assert of_a["per_fact"]["score"] == pytest.approx((0.5 + 0.8) / 2)
    assert curves["b", "locft", "knowedit"]["plateau"] == [1]
    assert set(of_a["per_fact_by"]) == {"seen", "knowedit"}


def test_selectors_are_ranked_by_the_layers_they_score(measured):
    summary = summarize(measured)
    assert results_of(summary, "causal_tracing")["b", "locft", "S"]["rank_correlation"] == pytest.approx(-0.5)
    assert results_of(summary, "auto")["b", "memit", "S"]["rank_correlation"] is None  # of two layers
    assert results_of(summary, "middle")["b", "locft", "S"]["rank_correlation"] is None


def test_a_layer_that_was_not_edited_has_no_regret(measured):
    measured.choices.append(Choice("late", PACKAGED, LayerSelection("late", None, [9])))
    summary = summarize(measured)
    assert "regret" not in results_of(summary, "late")["a", "locft", "S"]
    assert "| late |" not in render([summary])


def test_the_report_says_what_the_summary_says(measured):
    summary = json.loads(json.dumps(summarize(measured)))
    report = render([summary], {"tiny": ["tiny-a.png"]})
    assert report.startswith("# Golden layers\n")
    for row in (
        "| a | locft | S | 2 | 2 | 0.500 (0.200 to 0.800) | 0 to 2 | 0.500",
        "| b | locft | seen | 2 | 1 | 1.000 (1.000 to 1.000) | 1 | 0.000 (0.000 to 0.000) | 0.467 |",
        "| 1 | 0.400 (0.300 to 0.500) | 0.400 (0.300 to 0.500) | 0.600 (0.500 to 0.700) |",
        "| lga sequence | packaged | 1 | 0.100 | 0.200",  # a fifth of a, nothing of b
        "| **by chance** |  |  | 0.250 | 0.500 |",
        "| a | locft | 2 | 3 | 6 | 3.0 | 60 |",
        "![tiny-a.png](tiny-a.png)",
    ):
        assert row in report


def test_outcomes_without_what_a_user_sees_are_reported_by_scores_of_papers():
    plain = {at: [Outcome(FactMatches(share, locality=[share]))] for at, share in enumerate([0.2, 0.4, 0.6])}
    summary = summarize(Measurement("tiny", 3, {("a", "ft-m"): Curve(plain, Cost(1.0, 1), 1.0)}, [], [0, 1, 2]))
    assert {one["criterion"] for one in summary["curves"]} == {"knowedit", "S"}
    assert "says it" not in render([summary])


def test_a_summary_of_another_version_is_left_out_and_told(measured, tmp_path, caplog):
    (tmp_path / "old.summary.json").write_text(json.dumps({"model": "old", "curves": []}))
    (tmp_path / "tiny.summary.json").write_text(json.dumps(summarize(measured)))
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "## tiny" in report
    assert "## old" not in report
    assert "old.summary.json is of another version" in caplog.text
    assert (tmp_path / "tiny-a.png").is_file()
