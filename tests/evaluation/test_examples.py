"""The texts that a card shows."""

from __future__ import annotations

from goldenedit.evaluation.examples import examples
from goldenedit.evaluation.report import Text


def asked(fact: int, form: str) -> Text:
    return Text(fact, form, f"{form} of {fact}?", "Paris", "Rome", None, ("Rome",), holds=True)


def other(kind: str, edited: str = "as before", fact: int = 0, holds: bool = False) -> Text:
    return Text(fact, kind, f"{kind} ({edited})?", "as before", edited, None, (), holds)


def test_one_fact_is_shown_as_edited_and_in_a_chat_beside_the_rest_of_its_subject():
    texts = [asked(0, form) for form in ("completion", "rephrase", "question", "chat", "second_turn", "prefix")]
    texts += [other("neighbors", "else"), other("subject"), other("subject", "else"), other("unrelated", "else", -1)]
    assert examples(texts) == [texts[0], texts[3], texts[8]]


def test_of_several_facts_two_are_shown():
    texts = [asked(fact, form) for fact in range(3) for form in ("completion", "question", "chat")]
    assert examples(texts) == [texts[0], texts[5]]


def test_a_second_fact_without_a_question_leaves_it_to_its_other_forms():
    texts = [asked(0, "completion"), asked(0, "chat"), asked(1, "completion"), asked(1, "rephrase")]
    assert examples(texts) == [texts[0], texts[3]]


def test_without_a_chat_template_the_question_is_shown():
    texts = [asked(0, form) for form in ("completion", "rephrase", "question")]
    assert examples(texts) == [texts[0], texts[2]]


def test_a_fact_in_messages_is_shown_once():
    texts = [asked(0, "chat")]
    assert examples(texts) == texts


def test_a_prompt_that_reads_differently_comes_before_one_that_reads_the_same():
    texts = [other("subject"), other("neighbors"), other("unrelated", "else", -1), other("unrelated", "more", -1)]
    assert examples(texts) == [texts[2]]


def test_where_nothing_reads_differently_the_first_prompt_is_shown():
    texts = [other("unrelated", fact=-1, holds=True), other("subject", holds=True)]
    assert examples(texts) == [texts[1]]


def test_nothing_asked_and_nothing_compared_shows_nothing():
    assert examples([]) == []
