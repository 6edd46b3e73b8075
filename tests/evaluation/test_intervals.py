"""Intervals against what is known about them: their width, their coverage, and where they end."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.evaluation.intervals import bootstrap, quantile_interval, wilson

shares = st.floats(0, 1)
counts = st.integers(1, 10_000)


@given(shares, counts)
def test_an_interval_holds_its_share_and_lies_between_0_and_1(share, n):
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1
    assert low < high


@given(shares, counts)
def test_failures_have_the_interval_of_successes_mirrored(share, n):
    low, high = wilson(share, n)
    assert wilson(1 - share, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(shares, counts)
def test_more_facts_never_widen_an_interval(share, n):
    (low, high), (fewer_low, fewer_high) = wilson(share, n + 1), wilson(share, n)
    assert high - low <= fewer_high - fewer_low + 1e-12


@given(st.lists(shares, min_size=1, max_size=30))
def test_the_interval_of_a_mean_is_at_least_as_wide_as_that_of_its_variance(values):
    """Score intervals solve (mean - m)^2 = z^2 variance / n; a mean in [0, 1] has no larger variance than a share."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert variance <= mean * (1 - mean) + 1e-12


@given(shares, counts)
def test_each_end_is_the_share_from_which_the_figure_is_1_96_deviations_away(share, n):
    for end in wilson(share, n):
        if 1e-6 < end < 1 - 1e-6:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4)


@pytest.mark.parametrize(("share", "bounds"), [(1.0, (0.2065, 1.0)), (0.0, (0.0, 0.7935))])
def test_one_fact_decides_little(share, bounds):
    assert wilson(share, 1) == pytest.approx(bounds, abs=1e-4)


def test_a_published_interval():
    """Newcombe 1998, table I: 81 of 263."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


@pytest.mark.parametrize("share", [1 + 1e-12, -1e-12])
def test_rounding_beyond_0_and_1_is_no_error(share):
    low, high = wilson(share, 3)
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("share", [1.1, -0.2, float("nan"), float("inf")])
def test_a_value_outside_of_0_and_1_is_refused_by_its_value(share):
    with pytest.raises(ValueError, match=f"got {share}"):
        wilson(share, 3)


def test_no_facts_are_refused():
    with pytest.raises(ValueError, match="got n = 0"):
        wilson(0.5, 0)


@given(st.lists(shares, min_size=1, max_size=20), st.integers(0, 5))
def test_resamples_hold_the_items_alone_and_are_the_same_for_the_same_seed(items, seed):
    draws = bootstrap(list, items, 10, seed)
    assert all(len(draw) == len(items) and set(draw) <= set(items) for draw in draws)
    assert draws == bootstrap(list, items, 10, seed)


@given(st.lists(shares, min_size=1))
def test_the_interval_of_values_lies_within_them(values):
    low, high = quantile_interval(values)
    assert min(values) <= low <= high <= max(values)
