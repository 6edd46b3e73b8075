"""A verified edit carries the texts before and after it, and says what holds and what moved."""

from __future__ import annotations

import logging

import pytest

from goldenedit import EditModel, EditRequest
from goldenedit.evaluation.report import Text
from goldenedit.evaluation.verification import Verification, said_in_chat
from models import tiny_model
from tiny_edits import MERKEL, fast_config

NEAR = EditRequest("I live near The Eiffel Tower", "The Eiffel Tower", "Rome", question="Where do I live?")


@pytest.fixture
def model(tokenizer):
    base = tiny_model("llama")
    base.lm_head.weight.data *= 4  # so that edits take
    return EditModel(base, fast_config(steps=20), tokenizer)


def text(kind: str, holds: bool, answers: tuple[str, ...] = ()) -> Text:
    return Text(0, kind, "Where is it?", "Paris", "Rome" if holds else "Oslo", None, answers, holds)


def test_the_texts_before_are_those_of_the_model_without_this_edit_alone(model):
    model.edit(MERKEL)
    edit = model.edit(NEAR, verify=True)
    asked = edit.verification.asked[0]
    model.set_adapter(["edit_1"])
    assert (asked.kind, asked.question) == ("completion", NEAR.text)
    assert asked.base == model.evaluate([NEAR], forms=["completion"], unchanged=False).texts[0].edited
    model.set_adapter(["edit_1", "edit_2"])
    assert asked.edited == model.evaluate([NEAR], forms=["completion"], unchanged=False).texts[0].edited


def test_forty_unrelated_questions_are_asked(model):
    edit = model.edit(NEAR, verify=True)
    assert sum(other.kind == "unrelated" for other in edit.verification.others) == 40


def test_a_printed_edit_shows_what_was_verified_and_no_tensors(model):
    edit = model.edit(NEAR, verify=True)
    assert edit.verification.summary in str(edit)
    assert f"{NEAR.text!r} -> 'Rome': probability" in str(edit)
    assert repr(edit) == "Edit('edit_1', 1 fact, layers=[1], rank=1)"
    assert "tensor" not in str(edit)


def test_an_edit_is_not_verified_unless_asked(model):
    assert model.edit(NEAR).verification is None


def test_the_log_says_in_one_line_what_holds_and_what_moved(model, caplog):
    with caplog.at_level(logging.INFO, logger="goldenedit"):
        edit = model.edit(NEAR, verify=True)
    (line,) = [record.getMessage() for record in caplog.records if "changed answers" in record.getMessage()]
    assert line == f"Edit 'edit_1' {edit.verification.summary}."


def test_an_error_while_verifying_takes_the_edit_back(model, monkeypatch):
    monkeypatch.setattr(EditModel, "_verified", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.edit(NEAR, verify=True)
    assert model.active_adapters == []
    assert model.edits == {}


def test_the_summary_names_the_forms_that_fail_and_counts_what_moved():
    texts = [text("completion", True, ("Rome",)), text("chat", False, ("Rome",)), text("chat", True, ("Rome",))]
    texts += [text("negation", True, ("Rome",)), text("unrelated", True), text("unrelated", False)]
    verification = Verification(tuple(texts))
    assert verification.summary == (
        "says the new answer in 2 of 3 texts (not in every chat); changed answers: 1 of 2 unrelated"
    )
    assert verification.holds


def test_the_new_answer_behind_not_is_told_as_an_error():
    texts = (text("completion", True, ("Rome",)), text("negation", False, ("Rome",)), text("negation", True, ("Rome",)))
    verification = Verification(texts)
    assert verification.summary == 'says the new answer in 1 of 1 texts, also in 1 of 2 with "not"'
    assert [line.rpartition("(")[2] for line in verification.lines()] == [
        *("says it)", "says it, an error)", "does not say it)")
    ]


def test_of_many_texts_those_that_fail_are_shown_first():
    texts = [text("completion", place != 4, ("Rome",)) for place in range(5)] + [text("unrelated", False)]
    lines = list(Verification(tuple(texts)).lines(most=3))
    assert ["does not say it" in line for line in lines] == [True, False, False, False]
    assert [line.split(":")[0] for line in lines[:3]] == ["completion", "completion", "unrelated"]
    assert lines[3] == "and 3 more texts"


def test_a_fact_that_is_not_said_where_it_was_edited_does_not_hold():
    assert not Verification((text("completion", False, ("Rome",)), text("chat", True, ("Rome",)))).holds


def test_a_fact_is_asked_in_a_chat_as_people_ask_for_it(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    try:
        facts = [
            EditRequest("{} is located in the city of", "The Louvre", "Rome"),
            EditRequest("{} is located in the city of", "The Louvre", "Rome", question="Where is the Louvre?"),
            EditRequest("I live near {}", "The Louvre", "Rome"),  # which answers no question
        ]
        first, second, third = (said.question for said in said_in_chat(model.lm, facts))
    finally:
        tokenizer.chat_template = None
    assert first.endswith("?")
    assert "Louvre" in first
    assert (second, third) == ("Where is the Louvre?", "I live near The Louvre")
    assert said_in_chat(model.lm, facts) == []
