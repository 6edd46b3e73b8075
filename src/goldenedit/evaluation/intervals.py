"""95% intervals of figures over facts: Wilson's for a few facts, the bootstrap for more."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Interval = tuple[float, float]
Item = TypeVar("Item")
Value = TypeVar("Value")

_Z = 1.959964  # the normal distribution has 95% of its mass between -z and z


def wilson(share: float, n: int) -> Interval:
    """Return Wilson's 95% interval of a share of n facts, or of a mean of n values in [0, 1].

    For means it is conservative: values in [0, 1] with mean m have a variance of at most m (1 - m), because no such
    value is less than its square. The variance is m (1 - m) only if each value is 0 or 1, as it is for a share. So the
    interval of a mean is at least as wide as its variance requires.

    Args:
        share: The share or mean.
        n: Number of facts.

    Raises:
        ValueError: The share is not in [0, 1], or there are no facts.

    Example:
        ```python
        >>> [round(bound, 2) for bound in wilson(1.0, 1)]
        [0.21, 1.0]
        ```
    """
    if n < 1:
        raise ValueError(f"An interval needs at least one fact, got n = {n}. Leave out figures without facts.")
    if not -1e-9 <= share <= 1 + 1e-9:  # a mean of ones may exceed 1 by a rounding error
        raise ValueError(f"Wilson's interval is for values in [0, 1], got {share}. Use the bootstrap for others.")
    share = min(max(share, 0.0), 1.0)
    center = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + _Z**2 / n) for sign in (-1, 1))
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


def bootstrap(
    statistic: Callable[[Sequence[Item]], Value], items: Sequence[Item], resamples: int = 1000, seed: int = 0
) -> list[Value]:
    """Return a statistic of each of many resamples, in which the items are drawn with replacement.

    Args:
        statistic: What is computed from a resample, which has as many items as `items`.
        items: The facts, or whatever is drawn.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Example:
        ```python
        >>> values = bootstrap(lambda draw: sum(draw) / len(draw), [0.0, 1.0] * 10)
        >>> quantile_interval(values)
        (0.25, 0.7)
        ```
    """
    generator = random.Random(seed)
    return [statistic(generator.choices(items, k=len(items))) for _ in range(resamples)]


def quantile_interval(values: Sequence[float]) -> Interval:
    """Return the 95% interval of bootstrap values.

    Example:
        ```python
        >>> quantile_interval([index / 100 for index in range(101)])
        (0.02, 0.98)
        ```
    """
    ordered = sorted(values)
    low, high = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.025, 0.975))
    return low, high
