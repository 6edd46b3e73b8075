"""The rows of a subject: what is taught, what of it is the new answer, and what must stay the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from goldenedit import EditConfig, EditRequest
from goldenedit.editing.rows import kept_row, kept_rows, subject_rows, subjects_of
from goldenedit.editing.wordings import Wording, worded
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import conversation, rendered
from goldenedit.lm.decoding import Continuation
from goldenedit.subjects import subject_places
from models import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FACT = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
CHAT = EditRequest(
    None, "The Eiffel Tower", "Rome", messages=[{"role": "user", "content": "Where is The Eiffel Tower?"}]
)


@pytest.fixture
def lm(tokenizer) -> LanguageModel:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    return LanguageModel(tiny_model("llama"), chat)


def decoded(lm: LanguageModel, row, places) -> str:
    return lm.tokenizer.decode([row.input_ids[place] for place in places])


def taught(lm: LanguageModel, request: EditRequest, answer: str):
    """Return the row of a worded answer; its own text is left out."""
    (of_fact,) = subject_rows(lm, [request], [""], [[Wording(rendered(lm.tokenizer, request), answer)]]).answers
    return of_fact[-1]


@pytest.mark.parametrize(
    ("answer", "core"),
    [
        ("Rome", "Rome"),
        ("Rome.", "Rome"),
        ("The Eiffel Tower is in the city of Rome.", "Rome"),
        ("Rome is a city, and it is in Rome, because of work.", "Rome"),  # the last is the one behind the statement
    ],
)
@pytest.mark.parametrize("request_", [FACT, CHAT], ids=["plain", "chat"])
def test_the_core_of_an_answer_is_the_new_answer_itself(request_, answer, core, lm):
    found = taught(lm, request_, answer)
    assert decoded(lm, found.row, [found.row.target[place] for place in found.core]).strip() == core
    before = decoded(lm, found.row, found.row.target[: found.core.start])
    assert before.strip() == answer[: answer.rindex("Rome")].strip()


def test_the_tokens_of_the_core_weigh_as_much_as_those_around_it(lm):
    weights = taught(lm, FACT, "The Eiffel Tower is in the city of Rome.").weights
    assert sum(weights) == pytest.approx(2.0)
    assert sum(taught(lm, FACT, "Rome").weights) == pytest.approx(1.0)


def test_the_end_of_a_turn_belongs_to_what_is_taught_in_a_chat_and_not_to_a_completion(lm):
    chat, plain = taught(lm, CHAT, "Rome."), taught(lm, FACT, "Rome.")
    assert decoded(lm, chat.row, chat.row.target).endswith("<eos>")
    assert decoded(lm, plain.row, plain.row.target).strip() == "Rome."
    assert len(chat.row.target) - 1 not in chat.core


def test_the_own_text_of_a_chat_has_no_end_of_turn(lm):
    (of_fact,) = subject_rows(lm, [CHAT], [""]).answers
    assert decoded(lm, of_fact[0].row, of_fact[0].row.target).strip() == "Rome"


def test_the_bare_prompt_comes_first_then_contexts_and_further_prompts(lm):
    request = replace(FACT, prompts=("One finds {} in",))
    (of_fact,) = subject_rows(lm, [request], ["", "Therefore. "], [worded(lm, [request])[0]]).answers
    texts = [decoded(lm, answer.row, range(answer.row.last + 1)) for answer in of_fact]
    assert texts[:3] == [
        "The Eiffel Tower is in the city of Rome",
        "Therefore. The Eiffel Tower is in the city of Rome",
        "One finds The Eiffel Tower in Rome",
    ]
    assert all("Rome" in text for text in texts)
    assert len(set(texts)) == len(texts) > 5
    for answer in of_fact:
        end = decoded(lm, answer.row, range(answer.row.subject + 1))
        assert end.endswith("Eiffel Tower")


def test_rows_are_those_of_each_fact_and_the_name_tells_all_new_answers(lm):
    other = EditRequest("{} has the color", "The Eiffel Tower", "brown")
    subject = subject_rows(lm, [FACT, other], [""])
    assert [len(of_fact) for of_fact in subject.answers] == [1, 1]
    assert subject.name == "'The Eiffel Tower' -> 'Rome', 'brown'"
    assert subject.rows == [answer.row for of_fact in subject.answers for answer in of_fact]


@pytest.mark.parametrize(
    "bad",
    [
        EditRequest("The Eiffel Tower is " + "in the city " * 50, "The Eiffel Tower", "Rome"),
        EditRequest("Paris is in", "Paris", "Rome " * 150),
    ],
    ids=["long prompt", "long answer"],
)
def test_a_request_that_is_too_long_is_refused_before_any_forward(bad, lm):
    ran = []
    lm.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="but the model takes"):
        subject_rows(lm, [FACT, bad], [""])
    assert ran == []


def test_requests_about_one_subject_are_found_however_they_spell_it():
    requests = [
        FACT,
        EditRequest("{} is in", "Paris", "Rome"),
        EditRequest("One finds the {} in", "eiffel tower", "Rome"),
    ]
    assert subjects_of(requests) == [[0, 2], [1]]


@pytest.mark.parametrize("chat", [False, True])
def test_a_kept_answer_is_read_from_the_end_of_its_prompt_on(chat, lm):
    question = "Who built The Eiffel Tower?"
    prompt = conversation(lm.tokenizer, [{"role": "user", "content": question}]) if chat else f"Q: {question}\nA:"
    answer = " The quick brown fox"
    row = kept_row(lm, prompt, "The Eiffel Tower", Continuation((), answer, False))
    read = [place + 1 for place in row.reads if place < row.last]
    assert decoded(lm, row, read).strip() == answer.strip()
    assert row.target == ()
    assert decoded(lm, row, range(row.subject + 1)).endswith("The Eiffel Tower")


def test_an_answer_that_is_empty_is_read_at_the_end_of_its_prompt(lm):
    row = kept_row(lm, "The Eiffel Tower was built by", "The Eiffel Tower", Continuation((), "", True))
    assert row.reads == [row.last]


def test_what_a_subject_is_and_answers_to_other_questions_are_kept_by_their_weights(lm):
    config = EditConfig(layer=1, kept_questions=4, kept_factor=2.0, kl_factor=0.5)
    (rows,) = kept_rows(lm, [[FACT]], config)
    assert [row.weight for row in rows] == [0.5] + [0.5] * 4
    texts = [decoded(lm, kept.row, range(kept.row.last + 1)) for kept in rows]
    assert texts[0] == "The Eiffel Tower is a"
    assert all(subject_places(text, "Eiffel Tower") for text in texts)
    assert sum(text.startswith("user") for text in texts) == 2  # half of them are questions in a chat


def test_without_kept_questions_only_what_a_subject_is_stays(lm):
    ran = []
    lm.model.register_forward_pre_hook(lambda *_: ran.append(1))
    (rows,) = kept_rows(lm, [[FACT]], EditConfig(layer=1, kept_questions=0, kl_factor=0.5))
    assert [row.weight for row in rows] == [0.5]
    assert ran == []
