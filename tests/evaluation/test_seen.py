"""From texts of two models to figures, and what is asked for them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from goldenedit import EditRequest
from goldenedit.evaluation.forms import FORMS, Asked
from goldenedit.evaluation.harm import KINDS, Compared, Other
from goldenedit.evaluation.seen import Baseline, Measurement, SeenOptions, ask, baseline, has_ended, seen, texts_of
from goldenedit.evaluation.texts import plain_texts, unrelated_questions
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import Continuation
from goldenedit.lm.tokens import Row, prompt_tokens
from models import tiny_model
from tiny_edits import MERKEL, TOWER

REQUESTS = [
    EditRequest("The tower is in", "The tower", "Rome", "Paris", aliases=["Roma"]),
    EditRequest("The river is in", "The river", "Berlin"),
]
ROW = Row((3, 4), -1, (1,), 1)
SAME, CHANGED = Compared((True, True), (0.0, 0.0)), Compared((True, False), (0.5, 1.5))


def asked(fact, form, answers=("Rome", "Roma"), old=("Paris",)):
    return Asked(fact, form, f"prompt of {form}", f"informed of {form}", f"question of {form}", answers, old)


def measured(judge=None, control=True):
    """Return a measurement of two facts by hand."""
    texts = [
        asked(0, "completion"),
        asked(0, "rephrase"),
        asked(0, "rephrase"),
        asked(0, "negation"),
        asked(1, "completion", ("Berlin",), ()),
        asked(1, "negation", ("Berlin",), ()),
    ]
    others = [
        Other(0, "neighbors", "n", "n"),
        Other(0, "subject", "s", "What is it known for?"),
        Other(1, "subject", "t", "When did it begin?"),
        Other(-1, "unrelated", "u", "u"),
        Other(-1, "unrelated", "v", "v"),
    ]
    continuations = [
        Continuation((1,), text, False)
        for text in (" In Rome.", " It is known for Gustave. And", " It began in 1889.", " Yes.", " No.")
    ]
    base = Baseline(
        REQUESTS,
        SeenOptions(judge=judge),
        texts,
        ["Paris.", "Paris.", "Rome.", "Paris.", "Bonn.", "Bonn."],
        ["Rome.", "Rome.", "Rome.", "Rome.", "Berlin.", "Bonn."],
        others,
        continuations,
        [ROW] * 7,
    )
    return Measurement(
        base,
        ["Rome.", "In Roma.", "Paris.", "Rome.", "Berlin.", "Bonn."],
        {1: "It is known for Rome.", 2: "It began in 1889.", 4: "Rome."},
        [SAME, CHANGED, SAME, SAME, CHANGED, SAME, CHANGED],
        [CHANGED, SAME, SAME, SAME, SAME, SAME, CHANGED] if control else (),
    )


def test_shares_are_means_over_facts():
    says = seen([measured()]).says
    assert (says["completion"].contains.value, says["completion"].exact.value, says["completion"].n) == (1.0, 1.0, 2)
    assert (says["rephrase"].contains.value, says["rephrase"].exact.value, says["rephrase"].n) == (0.5, 0.0, 1)
    assert says["negation"].contains.value == 0.5  # one of two facts: not to be told is better
    assert set(says) == {"completion", "rephrase", "negation"}
    assert list(says) == [form for form in FORMS if form in says]


def test_the_base_model_is_asked_for_the_old_answer_where_it_is_negated():
    base = seen([measured()], edited=False)
    assert base.says["negation"].contains.value == 1.0
    assert base.says["negation"].n == 1  # the old answer of the other fact is not known
    assert base.says["completion"].contains.value == 0.0
    assert base.says["rephrase"].contains.value == 0.5
    assert all(scores.same.value == 1.0 and scores.kl == 0.0 for scores in base.unchanged.values())
    assert base.text.kl == 0.0
    assert base.text.agreement == 1.0


def test_the_base_model_with_the_fact_in_its_prompt_is_told_for_both():
    for edited in (True, False):
        informed = seen([measured()], edited=edited).in_prompt
        assert informed["completion"].contains.value == 1.0
        assert informed["negation"].contains.value == 0.5


def test_unchanged_prompts_count_by_kind():
    unchanged = seen([measured()]).unchanged
    assert list(unchanged) == list(KINDS)
    assert (unchanged["neighbors"].same.value, unchanged["neighbors"].n) == (1.0, 1)
    assert unchanged["neighbors"].control.value == 0.0
    subject = unchanged["subject"]
    assert (subject.same.value, subject.same.facts, subject.n) == (0.5, 2, 2)
    assert subject.kl == pytest.approx(0.25)  # at the last token of each prompt
    assert subject.says_new.value == 0.5
    assert subject.keyword.value == 0.5  # 1889 is still said, Gustave is not
    assert (unchanged["unrelated"].same.value, unchanged["unrelated"].same.facts) == (0.5, 2)
    assert unchanged["unrelated"].says_new is None


def test_text_counts_by_token():
    text = seen([measured()]).text
    assert text.tokens == 4
    assert text.kl == pytest.approx(0.5)
    assert text.agreement == pytest.approx(0.75)
    assert text.worst == pytest.approx(1.0)
    assert text.control == pytest.approx(0.5)


def test_what_was_not_measured_is_left_out():
    whole = measured(control=False)
    figures = seen([whole])
    assert figures.text.control is None
    assert all(scores.control is None for scores in figures.unchanged.values())
    base = whole.base
    bare = Measurement(Baseline(base.requests, base.options, base.asked, base.answers, ()), whole.written, {})
    figures = seen([bare])
    assert figures.in_prompt == figures.unchanged == {}
    assert figures.text is None
    assert set(figures.to_dict()) == {"says"}
    without_texts = Measurement(
        Baseline(base.requests, base.options, (), (), (), base.others, base.continuations, base.rows[:5]),
        (), whole.others, whole.compared[:5],
    )  # fmt: skip
    assert seen([without_texts]).text is None
    assert seen([without_texts], edited=False).text is None


def test_a_judge_decides_on_the_first_name():
    calls = []

    def judge(question, answer, text):
        calls.append((question, answer, text))
        return text == "Rome."

    says = seen([measured(judge)]).says
    assert ("question of completion", "Rome", "Rome.") in calls
    assert says["completion"].judge.value == 0.5
    assert says["rephrase"].judge.value == 0.0
    assert seen([measured()]).says["completion"].judge is None


def test_the_parts_about_each_fact_make_up_the_whole():
    whole = measured()
    parts = []
    for fact in (0, 1):
        texts = [place for place, text in enumerate(whole.base.asked) if text.fact == fact]
        others = [place for place, other in enumerate(whole.base.others) if other.fact in (fact, -1)]
        rows = [*others, 5, 6]
        parts.append(
            Measurement(
                whole.base.about(fact),
                [whole.written[place] for place in texts],
                {index: whole.others[place] for index, place in enumerate(others) if place in whole.others},
                [whole.compared[place] for place in rows],
                [whole.control[place] for place in rows],
            )
        )
    assert [len(part.base.rows) for part in parts] == [6, 5]
    assert seen(parts).says == seen([whole]).says
    assert seen(parts).in_prompt == seen([whole]).in_prompt
    assert seen(parts).unchanged["subject"] == seen([whole]).unchanged["subject"]
    assert seen(parts).unchanged["unrelated"].n == 4  # two prompts under each of two edits
    assert seen(parts).unchanged["unrelated"].same.facts == 2
    assert seen(parts).text.kl == pytest.approx(seen([whole]).text.kl)
    assert seen(parts, edited=False).says == seen([whole], edited=False).says


def test_texts_tell_what_both_models_write():
    texts = texts_of(measured())
    assert [text.kind for text in texts[:6]] == [text.form for text in measured().base.asked]
    # Rome behind "not", the fourth text, is wrong, and Bonn, the sixth, is right.
    assert [text.holds for text in texts] == [True, True, False, False, True, True, True, False, True, True, False]
    assert [text.says for text in texts[:7]] == [True, True, False, True, True, False, False]
    assert (texts[0].base, texts[0].edited, texts[0].informed, texts[0].answers) == (
        "Paris.", "Rome.", "Rome.", ("Rome", "Roma")
    )  # fmt: skip
    changed = texts[7]
    assert (changed.base, changed.edited) == ("It is known for Gustave. And", "It is known for Rome.")
    assert texts[6].edited == texts[6].base == "In Rome."
    assert texts[-1].edited == "Rome."


def test_a_baseline_asks_each_prompt_once(tokenizer, monkeypatch):
    lm = LanguageModel(tiny_model("bloom"), tokenizer)
    options = SeenOptions(max_new_tokens=3, continuation=4, texts=2)
    base = baseline(lm, tokenizer, [TOWER, MERKEL], options)
    assert len(base.answers) == len(base.informed) == len(base.asked)
    assert {text.form for text in base.asked} == {"completion", "prefix", "negation"}
    assert len(base.others) == len(base.continuations) == len(base.rows) - 2
    assert len([other for other in base.others if other.fact == -1]) == len(unrelated_questions())
    for other, continuation, row in zip(base.others, base.continuations, base.rows, strict=False):
        assert row.target_ids[: len(continuation.tokens)] == list(continuation.tokens), other
        assert len(row.target) == len(continuation.tokens) + continuation.finished
    written, others = ask(lm, base)
    assert written == base.answers
    assert set(others) == {place for place, other in enumerate(base.others) if other.kind == "subject"}
    monkeypatch.setattr(
        "goldenedit.lm.language_model.greedy", lambda *_, **__: pytest.fail("the model was asked again")
    )
    assert baseline(lm, tokenizer, [TOWER, MERKEL], options) == base


def test_other_prompts_that_changed_are_asked_again(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    base = baseline(lm, tokenizer, [TOWER], SeenOptions(("completion",), max_new_tokens=2, continuation=2, texts=0))
    compared = [SAME] * len(base.rows)
    unrelated = [place for place, other in enumerate(base.others) if other.kind == "unrelated"]
    compared[unrelated[1]] = CHANGED
    _, others = ask(lm, base, compared)
    assert set(others) - {place for place, other in enumerate(base.others) if other.kind == "subject"} == {unrelated[1]}


def test_texts_that_do_not_fit_are_left_out_and_said_so(tokenizer, caplog):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    with caplog.at_level(logging.WARNING, "goldenedit"):
        base = baseline(
            lm, tokenizer, [TOWER], SeenOptions(("completion", "prefix"), unchanged=False, max_new_tokens=2)
        )
    assert [text.form for text in base.asked] == ["completion"]
    assert "1 of 2 texts that ask for facts are left out" in caplog.text


def test_other_prompts_that_do_not_fit_are_left_out_and_said_so(tokenizer, caplog):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    fact = replace(TOWER, neighborhood=("The river is in", "The river " * 200 + "is in"))
    base = baseline(lm, tokenizer, [fact], SeenOptions((), max_new_tokens=2, continuation=2, texts=0))
    assert [other.question for other in base.others if other.kind == "neighbors"] == ["The river is in"]
    assert "1 of 46 prompts whose answers should not change are left out" in caplog.text


def test_a_prompt_that_has_no_room_for_the_fact_before_it_is_asked_without(tokenizer, caplog):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    length = len(prompt_tokens(tokenizer, TOWER.text))
    lm.model.config.max_position_embeddings = length + 3  # with the fact before it, the prompt is twice as long
    options = SeenOptions(("completion",), unchanged=False, max_new_tokens=2)
    base = baseline(lm, tokenizer, [TOWER], options)
    assert [text.form for text in base.asked] == ["completion"]
    assert list(base.informed) == [None]
    assert "1 of 1 texts are not asked with the fact in the prompt" in caplog.text
    result = Measurement(base, list(base.answers), {})
    assert seen([result]).in_prompt == {}
    assert seen([result]).says["completion"].n == 1
    assert texts_of(result)[0].informed is None


@pytest.mark.parametrize(
    ("text", "ended"), [("", False), (" Rome", False), (" Rome. He", True), (" Rome\n", True), ("\n\n", False)]
)
def test_an_answer_ends_with_its_first_sentence(text, ended):
    assert has_ended(text) is ended


def test_there_are_as_many_packaged_texts_as_are_compared_by_default():
    assert SeenOptions().texts <= len(plain_texts())
