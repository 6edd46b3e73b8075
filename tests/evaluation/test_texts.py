"""The packaged texts keep what their README promises."""

import re

import pytest

from goldenedit.evaluation.texts import first_turn, passages, plain_texts, unrelated_questions
from goldenedit.requests import proxy_facts

KINDS = {"plain_texts": plain_texts, "unrelated_questions": unrelated_questions, "passages": passages}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def first_turn_texts() -> list[str]:
    return [message["content"] for message in first_turn()]


def all_texts() -> list[str]:
    return [*plain_texts(), *unrelated_questions(), *passages(), *first_turn_texts()]


@pytest.mark.parametrize(("kind", "count"), [("plain_texts", 64), ("unrelated_questions", 40), ("passages", 4)])
def test_there_are_as_many_as_documented(kind, count):
    assert len(KINDS[kind]()) == count


@pytest.mark.parametrize(("kind", "most"), [("plain_texts", 65), ("passages", 60)])
def test_passages_have_the_documented_length_and_end_with_a_sentence(kind, most):
    for text in KINDS[kind]():
        assert 45 <= len(text.split()) <= most, text
        assert text.endswith((".", '."', '?"')), text


def test_questions_are_short_single_questions():
    for question in unrelated_questions():
        assert len(question.split()) <= 12, question
        assert question.endswith("?"), question
        assert question.count("?") == 1, question


def test_the_first_turn_is_one_short_exchange():
    assert [message["role"] for message in first_turn()] == ["user", "assistant"]
    assert all(set(message) == {"role", "content"} for message in first_turn())
    assert 20 <= sum(len(text.split()) for text in first_turn_texts()) <= 40


def test_texts_are_trimmed_ascii_on_one_line():
    for text in all_texts():
        assert text.isascii(), text
        assert text == " ".join(text.split()), text


def test_no_text_is_there_twice_not_even_in_part():
    texts_of_words = [words(text) for text in all_texts()]
    assert len(set(map(tuple, texts_of_words))) == len(texts_of_words)
    runs = [run for text in texts_of_words for run in {tuple(text[i : i + 7]) for i in range(len(text) - 6)}]
    assert len(set(runs)) == len(runs)


def test_no_text_names_the_subject_of_a_proxy_fact():
    subjects = {fact.subject for fact in proxy_facts()}
    for text in all_texts():
        named = [name for name in subjects if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)]
        assert not named, text


def test_each_call_returns_a_new_list():
    first_turn().clear()
    plain_texts().clear()
    assert len(first_turn()) == 2
    assert len(plain_texts()) == 64
