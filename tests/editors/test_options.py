"""Options of editors: bounds, units, and what an editor may not be given."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from goldenedit import EditConfig
from goldenedit.editors import EDITORS, Editor, TrainingOptions, option, relative
from goldenedit.editors.options import check_fields, default_of, is_relative, resolved


@dataclass(kw_only=True)
class Options:
    """One option of each kind."""

    count: int = option(3, least=1, whole=True, help="How many.")
    rate: float = option(0.5, above=0.0, help="How fast.")
    ridge: float | None = relative(0.2, published=10.0, unit="key energy", help="How strict.")
    share: float | None = relative(0.02, published=5e-4, least=0.0, help="How much.")
    spare: bool = option(True, help="Whether.")
    kind: str = option("plain", help="Which.")


ENTRIES = {entry.name: entry for entry in fields(Options)}
UNITS = {"key energy": 4.0}


def read(options: Options, relative_constants: bool) -> Options:
    return resolved(options, relative_constants, UNITS.__getitem__)


def test_defaults_are_those_of_the_units_in_use():
    assert read(Options(), True) == Options(ridge=0.2 * 4.0, share=0.02)
    assert read(Options(), False) == Options(ridge=10.0, share=5e-4)


def test_what_is_set_is_in_these_units_too():
    assert read(Options(ridge=3.0, share=0.0), True) == Options(ridge=12.0, share=0.0)
    assert read(Options(ridge=3.0, share=0.0), False) == Options(ridge=3.0, share=0.0)


def test_options_without_units_are_read_as_they_are():
    assert read(Options(count=7, rate=0.1, spare=False, kind="other"), False) == Options(
        count=7, rate=0.1, spare=False, kind="other", ridge=10.0, share=5e-4
    )


def test_defaults_are_told_apart():
    assert [name for name, entry in ENTRIES.items() if is_relative(entry)] == ["ridge", "share"]
    assert [default_of(ENTRIES["ridge"], units) for units in (True, False)] == [0.2, 10.0]
    assert default_of(ENTRIES["count"], True) == default_of(ENTRIES["count"], False) == 3


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", 0, "a whole number of at least 1"),
        ("count", 2.0, "a whole number"),
        ("count", True, "a whole number"),
        ("count", None, "a whole number"),
        ("rate", 0.0, "a number above 0.0"),
        ("rate", float("nan"), "a number"),
        ("rate", float("inf"), "a number"),
        ("ridge", 0.0, "a number above 0.0"),
        ("ridge", "1", "a number"),
        ("share", -1e-9, "a number of at least 0.0"),
        ("spare", 1, "of the type of its default True"),
        ("spare", None, "of the type of its default True"),
        ("kind", 1, "of the type of its default 'plain'"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(name, value, wanted):
    with pytest.raises(ValueError, match=rf"Here\.{name} must be {wanted}"):
        check_fields("Here", ENTRIES, {name: value})


@pytest.mark.parametrize("values", [{}, {"count": 1}, {"rate": 1}, {"ridge": None, "share": None}, {"share": 0.0}])
def test_a_value_within_its_bounds_is_taken(values):
    check_fields("Here", ENTRIES, values)


def function(problem):
    return None


def test_an_editor_refuses_what_its_options_do_not_have_or_take():
    record = Editor("mine", function, options=Options)
    record.check_options({"count": 4})
    with pytest.raises(ValueError, match=r"editor 'mine' has no option 'cuont'\. Its options are .*'count'"):
        record.check_options({"cuont": 4})
    with pytest.raises(ValueError, match=r"EditConfig\(method='mine'\)\.options\.count must be a whole number"):
        record.check_options({"count": 0})


def test_what_options_themselves_refuse_is_told_with_the_editor():
    @dataclass
    class Ordered:
        low: float = option(0.0, help="Least.", least=0.0)
        high: float = option(1.0, help="Most.", least=0.0)

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError("low is above high")

    record = Editor("mine", function, options=Ordered)
    record.check_options({"low": 0.5})
    with pytest.raises(ValueError, match=r"editor 'mine' refuses the options .*: low is above high"):
        record.check_options({"low": 2.0})


def test_an_editor_that_trains_must_have_the_options_of_training():
    with pytest.raises(ValueError, match="'mine', which trains, must extend TrainingOptions"):
        Editor("mine", function, options=Options, learns="training")
    assert Editor("mine", function, options=TrainingOptions, learns="training").fields["finetune_steps"].default == 25


def test_an_editor_cannot_read_what_there_is_not():
    with pytest.raises(
        ValueError, match=r"reads of the editor 'mine' must be .*'covariance'.* got \('covariance', 'moon'\)"
    ):
        Editor("mine", function, reads=("covariance", "moon"))


@pytest.mark.parametrize("name", EDITORS.names())
def test_options_of_built_in_editors_have_a_help_and_are_keywords_of_the_config(name):
    keywords = {entry.name: entry for entry in fields(EditConfig)}
    for option_name, entry in EDITORS.get(name).fields.items():
        assert entry.metadata["help"]
        assert keywords[option_name].default == entry.default
        # These differ between editors that train. All defaults are in the help.
        own = {"default"} if option_name in ("finetune_lr", "finetune_cut") else set()
        for word in keywords[option_name].metadata.keys() - own:
            assert keywords[option_name].metadata[word] == entry.metadata[word]
    assert set(EDITORS.get(name).constants) <= set(keywords)
