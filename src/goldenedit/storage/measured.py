"""Check the evaluation that an edit folder contains, which may come from a stranger.

An evaluation has "own_facts", "facts", "edited" and "base", and may have "texts" and "general". "edited" and "base"
have groups of figures by form or by kind of prompt ("says", "in_prompt", "unchanged"), the figures on plain text
("text"), and those of each family of scores. Older folders have only the families.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_LONGEST_NAME = 100
_GROUPS = {"says": ("exact", "contains", "n"), "in_prompt": ("contains", "n"), "unchanged": ("same", "kl", "n")}
_TEXT = ("kl", "agreement", "tokens", "worst")


def checked_evaluation(evaluation: Any) -> dict[str, Any] | None:
    """Return the evaluation of an edit folder, None if there is none.

    Forms, kinds, families and figures that this version does not know are allowed.

    Raises:
        ValueError: A card could not show it; the message names the figure.
    """
    if evaluation is None:
        return None
    record = _record("evaluation", evaluation)
    if not isinstance(record.get("own_facts"), bool):
        raise ValueError(f"evaluation: own_facts must be true or false, got {record.get('own_facts')!r}")
    if not _is_whole(record.get("facts")):
        raise ValueError(f"evaluation: facts must be a whole number, got {record.get('facts')!r}")
    edited, base = (_record(f"evaluation: {state}", record.get(state)) for state in ("edited", "base"))
    _check_groups(edited, is_base=False)
    _check_groups(base, is_base=True)
    for family, scores in edited.items():
        if family != "text" and family not in _GROUPS:
            where = f"evaluation: {family}"
            _check_figures(where, scores, ("n",))
            _check_figures(f"{where} of the base model", base.get(family), scores["intervals"], has_intervals=False)
    _check_texts(record.get("texts", []))
    if "general" in record:
        _check_general(record["general"])
    return record


def _check_groups(state: Mapping[str, Any], is_base: bool) -> None:
    """Check what a user sees of a model: the figures by form or kind, and those on plain text."""
    of_whom = " of the base model" if is_base else ""
    for group, required in _GROUPS.items():
        where = f"evaluation: {group}{of_whom}"
        for name, figures in _record(where, state.get(group, {})).items():
            _check_figures(f"{where}: {name}", figures, required)
    if "text" in state:
        _check_figures(f"evaluation: text{of_whom}", state["text"], _TEXT)


def _check_figures(where: str, figures: Any, required: Any, has_intervals: bool = True) -> None:
    """Check that figures are numbers or null, those that are required or have an interval numbers."""
    record = _record(where, figures)
    intervals = _record(f"{where}: intervals", record.get("intervals", None if has_intervals else {}))
    for name in (*required, *intervals):
        _check_number(f"{where}: {name}", record.get(name))
    for name, value in record.items():
        if name != "intervals" and value is not None:
            _check_number(f"{where}: {name}", value)
    for name, bounds in intervals.items():
        if not isinstance(bounds, list | tuple) or len(bounds) != 2:
            raise ValueError(f"{where}: the interval of {name} must have two bounds, got {bounds!r}")
        for bound in bounds:
            _check_number(f"{where}: the interval of {name}", bound)


def _check_texts(texts: Any) -> None:
    if not isinstance(texts, list | tuple):
        raise ValueError(f"evaluation: texts must be a list, got {texts!r}")
    for place, text in enumerate(texts):
        where = f"evaluation: text {place}"
        record = _record(where, text)
        for name in ("kind", "question", "base", "edited"):
            if not isinstance(record.get(name), str):
                raise ValueError(f"{where}: {name} must be a string, got {record.get(name)!r}")
        _check_name(where, record["kind"])
        if not isinstance(record.get("informed"), str | None):
            raise ValueError(f"{where}: informed must be a string or null, got {record['informed']!r}")
        answers = record.get("answers")
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{where}: answers must be strings, got {answers!r}")
        if not _is_whole(record.get("fact")) or not isinstance(record.get("holds"), bool):
            raise ValueError(f"{where}: fact must be a whole number and holds true or false")


def _check_general(general: Any) -> None:
    """Check the results of tasks of lm-evaluation-harness."""
    states = _record("evaluation: general", general)
    for state in ("edited", "base"):
        for task, metrics in _record(f"evaluation: general: {state}", states.get(state)).items():
            for metric, result in _record(f"evaluation: general: {task}", metrics).items():
                where = f"evaluation: general: {task}: {metric}"
                figures = _record(where, result)
                if "value" not in figures:
                    raise ValueError(f"{where}: there is no value")
                for name in ("value", "stderr", "n"):
                    if figures.get(name) is not None:
                        _check_number(f"{where}: {name}", figures[name])


def _record(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {value!r}")
    for name in value:
        _check_name(where, name)
    return dict(value)


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError(f"{where} has a name that cannot be printed: {name!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.maxsize


def _check_number(where: str, value: Any) -> None:
    # The comparison is False for NaN, infinities and whole numbers that no float holds.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{where} must be a finite number, got {value!r}")
