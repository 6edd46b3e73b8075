"""Figures and their intervals."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.evaluation.report import FormScores, Share, UnchangedScores, share_of, text_scores

_GROUPS = st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=20)


def test_one_of_one_is_far_from_certain():
    assert Share(1.0, 1).interval == pytest.approx((0.2065, 1.0), abs=1e-3)
    assert Share(0.0, 1).interval == pytest.approx((0.0, 0.7935), abs=1e-3)


@given(_GROUPS)
def test_a_share_is_the_mean_over_facts_and_in_its_interval(groups):
    share = share_of(groups)
    assert share.facts == len(groups)
    assert share.value == pytest.approx(sum(sum(group) / len(group) for group in groups) / len(groups))
    low, high = share.interval
    assert 0 <= low <= share.value <= high <= 1
    assert low < high


def test_facts_without_prompts_do_not_count():
    assert share_of([[True], [], [False, True]]) == Share(0.75, 2)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_order_of_facts_changes_nothing(answers):
    share = share_of([[answer] for answer in answers])
    assert share == share_of([[answer] for answer in reversed(answers)])


def test_figures_that_were_not_measured_are_left_out():
    share = Share(0.5, 2)
    scores = FormScores(share, share).to_dict()
    assert set(scores) == {"exact", "contains", "intervals", "n"}
    assert set(FormScores(share, share, share).to_dict()) == {"exact", "contains", "judge", "intervals", "n"}
    assert set(UnchangedScores(share, 3, 0.1).to_dict()) == {"same", "kl", "n", "intervals"}
    full = UnchangedScores(share, 3, 0.1, share, share, share).to_dict()
    assert set(full["intervals"]) == {"same", "control", "keyword", "says_new"}
    assert json.loads(json.dumps(full)) == full


def test_texts_are_averaged_over_tokens_and_the_worst_over_texts():
    scores = text_scores([[0.0, 0.3], [0.6]], [[True, False], [True]], None)
    assert scores.kl == pytest.approx(0.3)
    assert scores.agreement == pytest.approx(2 / 3)
    assert scores.tokens == 3
    assert scores.worst == pytest.approx(0.6)
    assert scores.control is None
    assert scores.intervals == {}  # two texts give none
    assert "control" not in scores.to_dict()


@given(st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=4), min_size=10, max_size=14))
def test_intervals_of_texts_hold_their_figures(kl):
    scores = text_scores(kl, [[value < 1 for value in text] for text in kl], kl)
    for name, (low, high) in scores.intervals.items():
        assert low - 1e-9 <= getattr(scores, name) <= high + 1e-9
    assert scores.control == scores.kl
    record = scores.to_dict()
    assert json.loads(json.dumps(record)) == record
