"""Numbers as people read them."""

from __future__ import annotations


def size_of(size: float) -> str:
    """Return a number of bytes for people.

    Example:
        ```python
        >>> from goldenedit.units import size_of
        >>> size_of(1_500_000)
        '1.5 MB'
        ```
    """
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def flops_of(count: float) -> str:
    """Return a number of floating-point operations for people.

    Example:
        ```python
        >>> from goldenedit.units import flops_of
        >>> flops_of(2.5e12)
        '2.5 TFLOP'
        ```
    """
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def count_of(count: int, noun: str) -> str:
    """Return a number of things.

    Example:
        ```python
        >>> from goldenedit.units import count_of
        >>> count_of(1, "fact"), count_of(2, "fact")
        ('1 fact', '2 facts')
        ```
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def time_of(seconds: float) -> str:
    """Return an estimate of a time for people.

    Example:
        ```python
        >>> from goldenedit.units import time_of
        >>> time_of(20), time_of(250), time_of(9000)
        ('less than a minute', 'about 4 minutes', 'about 2.5 hours')
        ```
    """
    if seconds < 60:
        return "less than a minute"
    if seconds < 5400:
        minutes = round(seconds / 60)
        return f"about {minutes} minute{'' if minutes == 1 else 's'}"
    return f"about {seconds / 3600:.1f} hours"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    value, (unit, *larger) = float(number), units
    for next_unit in larger:
        if value < 1000:
            break
        value, unit = value / 1000, next_unit
    return f"{value:.0f} {unit}" if unit == units[0] else f"{value:.1f} {unit}"
