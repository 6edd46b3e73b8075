"""CounterFact's scores on numbers that can be checked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.evaluation.intervals import wilson
from goldenedit.evaluation.scores import (
    FactGenerations,
    FactLikelihoods,
    FactMatches,
    generation_scores,
    harmonic_mean,
    probability_scores,
    says,
    token_match_scores,
    with_intervals,
)

EDITED = (1.0, 2.0)  # the new answer is likelier
KEPT = (2.0, 1.0)  # the old answer is likelier
EVEN = (1.0, 1.0)


def test_scores_of_two_facts():
    scores = probability_scores(
        [
            FactLikelihoods(EDITED, [EDITED, KEPT], [KEPT, KEPT, KEPT, EDITED], [1.0, 0.5]),
            FactLikelihoods(EDITED, [EDITED, EDITED], [KEPT, EDITED], [0.0, 0.5]),
        ]
    )
    assert scores.efficacy == 1.0
    assert scores.paraphrase == 0.75
    assert scores.neighborhood == 0.625
    assert scores.score == pytest.approx(3 / (1 / 1 + 1 / 0.75 + 1 / 0.625))
    assert scores.paraphrase_accuracy == 0.5
    assert scores.n == 2


def test_each_fact_counts_once_whatever_the_number_of_its_prompts():
    scores = probability_scores(
        [FactLikelihoods(EDITED, [EDITED] * 9, [KEPT] * 9), FactLikelihoods(KEPT, [KEPT], [EDITED])]
    )
    assert (scores.efficacy, scores.paraphrase, scores.neighborhood) == (0.5, 0.5, 0.5)


def test_answers_of_equal_likelihood_count_for_neither():
    scores = probability_scores([FactLikelihoods(EVEN, [EVEN], [EVEN])])
    assert (scores.efficacy, scores.paraphrase, scores.neighborhood, scores.score) == (0.0, 0.0, 0.0, 0.0)


def test_facts_without_prompts_of_a_kind_do_not_count_for_it():
    scores = probability_scores([FactLikelihoods(EDITED, [], [KEPT]), FactLikelihoods(EDITED, [EDITED], [])])
    assert (scores.paraphrase, scores.neighborhood) == (1.0, 1.0)


def test_what_was_not_asked_has_no_score():
    scores = probability_scores([FactLikelihoods(EDITED, [EDITED], [])])
    assert (scores.paraphrase, scores.neighborhood, scores.score, scores.paraphrase_accuracy) == (1.0, None, None, None)
    assert with_intervals(probability_scores, [FactLikelihoods(EDITED, [], [])]).intervals.keys() == {"efficacy"}


def test_no_facts_raise():
    with pytest.raises(ValueError, match="no facts"):
        probability_scores([])


@pytest.mark.parametrize(
    ("values", "mean"), [([1.0, 1.0, 0.5], 0.75), ([0.25], 0.25), ([1.0, 0.0], 0.0), ([], 0.0), ([0.5, 0.5], 0.5)]
)
def test_harmonic_mean(values, mean):
    assert harmonic_mean(values) == pytest.approx(mean)


@given(st.lists(st.floats(0.01, 1.0), min_size=1))
def test_harmonic_mean_lies_between_the_least_and_the_mean(values):
    mean = harmonic_mean(values)
    assert min(values) * (1 - 1e-9) <= mean <= sum(values) / len(values) * (1 + 1e-9)


nlls = st.tuples(st.floats(0, 20), st.floats(0, 20))
facts = st.builds(FactLikelihoods, nlls, st.lists(nlls), st.lists(nlls), st.lists(st.floats(0, 1)))


@given(st.lists(facts, min_size=1, max_size=5))
def test_scores_lie_between_0_and_1(facts):
    scores = probability_scores(facts)
    for value in (scores.efficacy, scores.paraphrase, scores.neighborhood, scores.score, scores.paraphrase_accuracy):
        assert value is None or -1e-12 <= value <= 1 + 1e-12
    assert (scores.paraphrase is None) == (not any(fact.paraphrases for fact in facts))


def test_token_match_of_two_facts_and_none_where_nothing_was_asked():
    scores = token_match_scores([FactMatches(1.0, [1.0, 0.5], [0.0], [1.0]), FactMatches(0.5, [0.25], [], [0.5, 1.0])])
    assert (scores.rewrite, scores.rephrase, scores.portability, scores.locality, scores.n) == (
        0.75,
        0.5,
        0.0,
        0.875,
        2,
    )
    assert token_match_scores([FactMatches(1.0)]).locality is None


def test_generation_of_two_facts():
    scores = generation_scores([FactGenerations(True, [True, False]), FactGenerations(False, [False], [True])])
    assert (scores.rewrite, scores.rephrase, scores.portability, scores.n) == (0.5, 0.25, 1.0, 2)


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        (" Rome, the capital", "Rome", True),
        ("rome", " Rome ", True),
        ("\n Rome.", "Rome", True),
        ("Romeo", "Rome", False),
        ("It is in Rome", "Rome", False),
        ("", "Rome", False),
        ("New York City", "new york", True),
        ("罗马是意大利的首都", "罗马", True),
        ("ローマです", "ローマ", True),
    ],
)
def test_a_text_says_what_it_begins_with(text, answer, said):
    assert says(text, answer) == said


def test_intervals_are_quantiles_of_facts_drawn_anew():
    """For a share of n facts they are those of the binomial distribution."""
    facts = [FactMatches(float(index < 60)) for index in range(100)]
    found = with_intervals(token_match_scores, facts, resamples=4000)
    low, high = found.intervals["rewrite"]
    assert low == pytest.approx(0.6 - 1.96 * (0.6 * 0.4 / 100) ** 0.5, abs=0.015)
    assert high == pytest.approx(0.6 + 1.96 * (0.6 * 0.4 / 100) ** 0.5, abs=0.015)
    assert found.intervals.keys() == {"rewrite"}
    assert with_intervals(token_match_scores, facts, resamples=4000) == found


def test_one_success_of_one_is_not_certain():
    found = with_intervals(probability_scores, [FactLikelihoods(EDITED, [EDITED], [KEPT])])
    for name in ("efficacy", "paraphrase", "neighborhood", "score"):
        assert found.intervals[name] == pytest.approx((0.2065, 1.0), abs=1e-3)
    assert found.to_dict()["score"] == 1.0


@pytest.mark.parametrize("count", [9, 10, 200])
def test_facts_that_all_agree_have_an_interval_of_wilson(count):
    found = with_intervals(probability_scores, [FactLikelihoods(EDITED, [EDITED], [KEPT])] * count, resamples=50)
    assert set(found.intervals.values()) == {wilson(1.0, count)}


@pytest.mark.parametrize(("count", "is_wilson"), [(8, True), (10, False)])
def test_a_few_facts_are_not_resampled(count, is_wilson):
    facts = [FactMatches(float(index % 2)) for index in range(count)]
    assert (with_intervals(token_match_scores, facts).intervals["rewrite"] == wilson(0.5, count)) is is_wilson


@pytest.mark.parametrize("others", [1, 30])
def test_facts_without_prompts_of_a_kind_do_not_narrow_its_interval(others):
    facts = [FactMatches(1.0, rephrase=[1.0]), *[FactMatches(1.0)] * others]
    found = with_intervals(token_match_scores, facts, resamples=50)
    assert found.intervals == {"rewrite": wilson(1.0, others + 1), "rephrase": wilson(1.0, 1)}


@given(st.lists(facts, min_size=1, max_size=12))
def test_intervals_lie_between_0_and_1_and_are_never_points(facts):
    found = with_intervals(probability_scores, facts, resamples=20)
    for low, high in found.intervals.values():
        assert -1e-9 <= low < high <= 1 + 1e-9
