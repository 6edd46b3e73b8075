"""An evaluation that a card cannot show is refused with the name of the figure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from contents import edit_folder, evaluation, figures, text
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.storage.card import render_card
from goldenedit.storage.measured import checked_evaluation

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
BAD_NUMBERS = (None, True, "0.5", [], {}, float("nan"), float("inf"), -float("inf"), 10**400)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value in nested JSON."""
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    return [path, *(below for key, item in inner for below in paths(item, (*path, key)))]


PATHS = paths(evaluation())[1:]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return the fixed evaluation with another value at a path."""
    whole = evaluation()
    place: Any = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return whole


def test_a_whole_evaluation_is_right_and_comes_back_equal():
    assert checked_evaluation(evaluation()) == evaluation()
    assert checked_evaluation(None) is None


def test_an_evaluation_of_families_alone_is_right():
    old = {key: value for key, value in evaluation().items() if key not in ("texts", "general")}
    for state in ("edited", "base"):
        old[state] = {name: old[state][name] for name in ("probability", "token_match")}
    assert checked_evaluation(old) == old


def test_unknown_forms_kinds_and_families_are_right():
    whole = evaluation()
    whole["edited"]["says"]["riddle"] = figures(exact=0.5, contains=0.5)
    whole["edited"]["unchanged"]["weather"] = figures(same=0.5, kl=0.1)
    whole["edited"]["rhymes"] = whole["base"]["rhymes"] = figures(first=0.5)
    whole["texts"].insert(0, text("riddle", "What?", "a", "b"))
    card = render_card(replace(edit_folder(), evaluation=checked_evaluation(whole)))
    assert "| riddle | 2 | 0.50 |" in card
    assert "| weather | 2 | 0.50 |" in card
    assert "| rhymes | first | 2 | 0.500 |" in card
    assert "| riddle | What? | a | b |" in card


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("edited", "says", "chat", "contains"), "says: chat: contains"),
        (("edited", "says", "chat", "n"), "says: chat: n"),
        (("edited", "in_prompt", "chat", "contains"), "in_prompt: chat: contains"),
        (("edited", "unchanged", "subject", "kl"), "unchanged: subject: kl"),
        (("edited", "unchanged", "subject", "keyword"), "unchanged: subject: keyword"),
        (("edited", "text", "worst"), "text: worst"),
        (("edited", "text", "intervals", "kl", 0), "text: the interval of kl"),
        (("edited", "probability", "efficacy"), "probability: efficacy"),
        (("base", "probability", "efficacy"), "probability of the base model: efficacy"),
        (("base", "says", "chat", "contains"), "says of the base model: chat: contains"),
    ],
)
def test_a_figure_that_is_no_finite_number_is_named(path, named, bad):
    with pytest.raises(ValueError, match=f"evaluation: {named} must be a finite number"):
        checked_evaluation(changed(path, bad))


@pytest.mark.parametrize(
    ("path", "bad", "named"),
    [
        (("own_facts",), 1, "own_facts"),
        (("facts",), True, "facts"),
        (("edited",), [], "edited"),
        (("base",), None, "base"),
        (("edited", "says"), "good", "says"),
        (("edited", "says", "chat"), 0.5, "says: chat"),
        (("edited", "says", "chat", "intervals"), [0, 1], "says: chat: intervals"),
        (("edited", "says", "chat", "intervals", "contains"), [0.0], "the interval of contains must have two bounds"),
        (("edited", "says", "a\nb"), {}, "a name that cannot be printed"),
        (("edited", "unchanged", "\u202e"), {}, "a name that cannot be printed"),
        (("edited", "unchanged", "x" * 101), {}, "a name that cannot be printed"),
        (("edited", "unchanged", ""), {}, "a name that cannot be printed"),
        (("texts",), {}, "texts must be a list"),
        (("texts", 1), "text", "text 1"),
        (("texts", 1, "kind"), "\x1b", "text 1 has a name that cannot be printed"),
        (("texts", 1, "base"), None, "text 1: base must be a string"),
        (("texts", 1, "informed"), 3, "text 1: informed"),
        (("texts", 1, "answers"), ["Rome", 3], "text 1: answers"),
        (("texts", 1, "fact"), 0.5, "text 1: fact"),
        (("texts", 1, "holds"), None, "text 1: fact must be a whole number and holds"),
        (("general",), None, "general"),
        (("general", "base"), [], "general: base"),
        (("general", "edited", "arc_easy", "acc,none"), {"stderr": 0.1}, "acc,none: there is no value"),
        (("general", "edited", "arc_easy", "acc,none", "value"), float("nan"), "acc,none: value must be a finite"),
        (("general", "edited", "arc_easy", "acc,none", "stderr"), "N/A", "acc,none: stderr"),
        (("general", "edited", "arc_easy", "acc,none", "n"), True, "acc,none: n must be a finite number"),
    ],
)
def test_what_is_damaged_is_named(path, bad, named):
    with pytest.raises(ValueError, match=named):
        checked_evaluation(changed(path, bad))


@given(st.sampled_from(PATHS), JSON)
def test_whatever_is_damaged_is_refused_by_name_or_a_card_shows_it(path, value):
    message = ""
    try:
        render_card(replace(edit_folder(), evaluation=checked_evaluation(changed(path, value))))
    except ValueError as error:
        message = str(error)
    assert not message or message.startswith("evaluation"), message


@given(JSON)
def test_whatever_stands_in_place_of_an_evaluation_is_refused(value):
    if value is not None:
        with pytest.raises(ValueError, match="evaluation"):
            checked_evaluation(value)
