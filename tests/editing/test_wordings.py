"""The wordings in which a fact is taught, and the model's own answers with the new answer in them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from goldenedit import EditModel, EditRequest
from goldenedit.editing.wordings import asked, asked_otherwise, spelled, stated, worded
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import Continuation
from goldenedit.requests import ChatText
from models import tiny_model
from tiny_edits import fast_config

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FACT = EditRequest(
    "The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris", aliases=[["Paris", "Lutetia"]]
)
CHAT = EditRequest(
    None,
    "The Eiffel Tower",
    "Rome",
    "Paris",
    messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is {}?"}],
)
QUESTION = "Which city is the Eiffel Tower in?"


class Answering(LanguageModel):
    """A model that gives one answer to everything."""

    max_length = None

    def __init__(self, tokenizer, answer: str, finished: bool = True):
        self.tokenizer, self.answer, self.finished = tokenizer, answer, finished

    def answers(self, prompts, max_new_tokens, ends):
        return [Continuation((), self.answer, self.finished)] * len(prompts)


@pytest.fixture
def chat(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def texts(tokenizer, request: EditRequest) -> list[str]:
    return [str(other.text) for other in asked(tokenizer, request)]


def answers(tokenizer, request: EditRequest, own: str, finished: bool = True) -> dict[bool, str]:
    """Return the taught answers by whether they are asked in a chat; equal ones once."""
    (wordings,) = worded(Answering(tokenizer, own, finished), [request])
    own_text = wordings[: len(asked(tokenizer, request))]  # other words come behind
    return {isinstance(wording.request.prompt, ChatText): wording.answer for wording in own_text}


def test_without_a_chat_template_a_statement_is_asked_as_a_plain_question(tokenizer):
    assert texts(tokenizer, FACT) == [f"Q: {QUESTION}\nA:"]


def test_with_one_it_is_asked_in_a_chat_too_in_the_first_and_in_a_later_turn(chat):
    plain, first, later = texts(chat, FACT)
    assert plain == f"Q: {QUESTION}\nA:"
    assert first == f"user: {QUESTION}<eos>assistant: "
    assert later.endswith(first)
    assert later.count("assistant:") == 2


@pytest.mark.parametrize("method", ["gated", "memit"])
@pytest.mark.parametrize("words", [4, 16])
def test_wordings_that_are_too_long_are_left_out_and_the_prompt_that_fits_is_edited(chat, method, words):
    prompt = "Paris Rome " * words + "The Eiffel Tower is in the city of"
    base = tiny_model("llama")
    base.config.max_position_embeddings = 96
    model = EditModel(base, fast_config(method=method, contexts=3, context_length=10), chat)
    request = EditRequest(prompt, "The Eiffel Tower", "London")
    wordings = [wording.request.text for wording in worded(model.lm, [request])[0]]
    assert len(wordings) < len(asked(chat, request))
    assert bool(wordings) == (words == 4)
    assert model.edit(request).facts
    with pytest.raises(ValueError, match=r"'Paris Rome .*, but the model takes 96"):
        model.edit("Paris Rome " * 40 + prompt, subject="The Eiffel Tower", target_new="London")


def test_a_prompt_that_is_a_whole_chat_already_is_asked_as_it_is(chat):
    whole = EditRequest(f"user: {QUESTION}<eos>assistant: ", "The Eiffel Tower", "Rome")
    assert asked(chat, whole) == asked_otherwise(chat, whole) == []


def test_a_statement_that_no_rule_turns_into_a_question_is_asked_as_it_is(chat):
    request = EditRequest("Die Hauptstadt von Peru ist", "Peru", "Cusco")
    plain, first, later = texts(chat, request)
    assert plain == f"Q: {request.text}\nA:"
    assert first == f"user: {request.text}<eos>assistant: "
    assert later.endswith(first)


def test_a_prompt_with_a_placeholder_is_asked_like_one_that_names_its_subject(chat):
    request = replace(FACT, prompt="{} is in the city of")
    assert request.text == FACT.text
    assert texts(chat, request) == texts(chat, FACT)


def test_a_question_is_asked_as_it_is(chat):
    request = EditRequest("Where is {}?", "Peru", "Asia")
    assert texts(chat, request)[:2] == ["Q: Where is Peru?\nA:", "user: Where is Peru?<eos>assistant: "]


def test_further_prompts_are_asked_too(chat):
    request = replace(FACT, prompts=("The city of {} is",))
    found = texts(chat, request)
    assert found[: len(texts(chat, FACT))] == texts(chat, FACT)
    assert found[len(texts(chat, FACT)) :] == [
        "Q: What is the city of The Eiffel Tower?\nA:",
        "user: What is the city of The Eiffel Tower?<eos>assistant: ",
    ]


def test_a_conversation_is_asked_in_a_later_turn_behind_its_system_message(chat):
    request = replace(CHAT, prompts=("What city has {}?",))
    later, other = texts(chat, request)
    assert later.startswith("system: Be brief.<eos>user: ")
    assert later.endswith("user: Where is The Eiffel Tower?<eos>assistant: ")
    assert later.count("system:") == 1
    assert other == "system: Be brief.<eos>user: What city has The Eiffel Tower?<eos>assistant: "


def test_a_text_that_is_rendered_already_is_taught_as_it_is(chat):
    prompt = ChatText("user: The Eiffel Tower<eos>", subject_start=6, context_start=6)
    assert asked(chat, replace(FACT, prompt=prompt)) == []


def test_a_fact_is_asked_and_stated_in_other_words_too(chat):
    questions = [request.text for request in asked_otherwise(chat, FACT)]
    assert len(questions) == 3
    assert questions[0].startswith("Q: ")
    assert questions[1].startswith("user: ")
    assert questions[2].startswith("user: ")
    assert not set(questions) & set(texts(chat, FACT))
    (statement,) = stated(FACT)
    assert statement.text != FACT.text
    assert statement.text[statement.subject_start : statement.subject_end] == statement.subject
    unknown = replace(FACT, prompt="{} is never seen without")
    assert asked_otherwise(chat, unknown) == stated(unknown) == []


def test_other_words_that_measure_an_edit_are_not_taught(chat):
    (statement,) = stated(FACT)
    asking = [request.text.split("user: ")[-1].split("<eos>")[0] for request in asked_otherwise(chat, FACT)[1:]]
    measured = replace(FACT, paraphrases=(statement.text,), question=asking[0])
    assert statement.text not in [request.text for request in stated(measured)]
    assert not any(asking[0] in request.text for request in asked_otherwise(chat, measured))


def test_texts_that_measure_an_edit_are_not_taught(chat):
    measured = {"paraphrases": ("One finds {} in",), "question": "In what town is {}?", "generation": ("{} has",)}
    assert texts(chat, replace(FACT, **measured)) == texts(chat, FACT)


def test_every_wording_has_its_subject_in_place(chat):
    for request in (FACT, CHAT, replace(FACT, prompts=("The city of {} is",))):
        for other in asked(chat, request):
            named = other.text[other.subject_start : other.subject_end]
            assert named.casefold() == "the eiffel tower"
            assert named == other.subject


@pytest.mark.parametrize(
    ("own", "taught"),
    [
        (" The Eiffel Tower is in Paris.", " The Eiffel Tower is in Rome."),
        (" The Eiffel Tower is in Paris. It is old.", " The Eiffel Tower is in Rome."),
        (" The Eiffel Tower is in Lutetia.", " The Eiffel Tower is in Rome."),
    ],
)
def test_the_models_own_answer_is_taught_with_the_new_answer_in_place_of_the_old_one(own, taught, chat):
    assert answers(chat, FACT, own) == {False: taught, True: taught}


@pytest.mark.parametrize(
    "own",
    [
        " The Eiffel Tower is in Berlin.",  # the old answer is not there
        " The Eiffel Tower is in Parisian hands.",  # only as part of a word
        " The Eiffel Tower is in Paris, France.",  # "Rome, France" is no answer
    ],
)
def test_where_the_own_answer_does_not_do_the_fact_itself_is_the_answer(own, chat):
    statement = "The Eiffel Tower is in the city of Rome."
    assert answers(chat, FACT, own) == {False: statement, True: statement}


def test_an_own_answer_that_does_not_name_the_subject_is_a_statement_in_chats_and_bare_in_plain_text(chat):
    assert answers(chat, FACT, " In Berlin.") == {False: "Rome", True: "The Eiffel Tower is in the city of Rome."}


def test_an_own_answer_without_an_end_is_not_taught(chat):
    found = answers(chat, FACT, " The Eiffel Tower is in Paris", finished=False)
    assert found[True] == "The Eiffel Tower is in the city of Rome."


def test_a_question_has_no_statement_so_the_new_answer_is_taught(chat):
    request = EditRequest("Where is {}?", "Peru", "Asia")
    assert answers(chat, request, " Peru is there.") == {False: "Asia", True: "Asia"}
    assert answers(chat, CHAT, " In Berlin.") == {True: "Rome"}


def test_an_unknown_old_answer_is_looked_for_nowhere(chat):
    found = answers(chat, replace(FACT, target_true=None, aliases=()), " The Eiffel Tower is in Paris.")
    assert found[True] == "The Eiffel Tower is in the city of Rome."


def test_the_subject_is_spelled_as_in_the_text():
    assert spelled("Where is the Eiffel Tower?", "The Eiffel Tower") == "the Eiffel Tower"
    assert spelled("The Eiffel Tower is in", "The Eiffel Tower") == "The Eiffel Tower"
    assert spelled("Where is it?", "The Eiffel Tower") == "The Eiffel Tower"
