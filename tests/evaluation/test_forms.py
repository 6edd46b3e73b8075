"""Forms in which facts are asked: wrapped texts that the facts have, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from goldenedit import EditRequest
from goldenedit.evaluation.forms import FORMS, asked_forms, check_forms, fact_sentence, negated, question_of
from goldenedit.evaluation.texts import first_turn, passages
from goldenedit.lm.chat import rendered

FACT = EditRequest(
    "The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", "Paris",
    paraphrases=("The Eiffel Tower stands in", "One finds The Eiffel Tower in"),
    portability=(("The Eiffel Tower is in the country of", "Italy"), ("Who governs the city?", "A mayor")),
    question="Where is the Eiffel Tower?",
    aliases=[["Rome", "Roma"], ["Italy", "Italia"], ["Paris", "Lutetia"]],
)  # fmt: skip
BARE = EditRequest("The mother tongue of Angela Merkel", "Angela Merkel", "Khmer")
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Where is {}?"},
]
CHAT_FACT = EditRequest(messages=TURNS, subject="the Louvre", target_new="Rome", paraphrases=("In which city is it?",))

_CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_ALTERNATE = (
    "{% set own = messages[1:] if messages[0]['role'] == 'system' else messages %}{% for message in own %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% endfor %}"
)


def with_template(tokenizer, template):
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)


@pytest.fixture(params=[_CHAT, _ALTERNATE + _CHAT], ids=["any", "alternating"])
def chats(request, tokenizer):
    return with_template(tokenizer, request.param)


def by_form(tokenizer, fact, forms=tuple(FORMS)):
    texts = {}
    for asked in asked_forms(tokenizer, [fact], forms):
        texts.setdefault(asked.form, []).append(asked)
    return texts


def test_forms_are_in_their_own_order_and_unknown_ones_are_an_error():
    assert check_forms(["chat", "completion"]) == ("completion", "chat")
    assert check_forms("chat") == ("chat",)
    assert check_forms(()) == ()
    with pytest.raises(ValueError, match="There is no form 'riddle'"):
        check_forms(["completion", "riddle"])


def test_a_fact_is_asked_in_all_forms_that_it_has_texts_for(chats):
    texts = by_form(chats, FACT)
    assert list(texts) == [form for form in FORMS if form in texts]
    assert set(texts) == set(FORMS)
    prompts = {form: [asked.prompt for asked in several] for form, several in texts.items()}
    assert prompts["completion"] == [FACT.text]
    assert prompts["rephrase"] == list(FACT.paraphrases)
    assert prompts["question"] == ["Q: Where is the Eiffel Tower?\nA:"]
    assert prompts["chat"] == ["[user] Where is the Eiffel Tower?\n[assistant]"]
    turns = "".join(f"[{turn['role']}] {turn['content']}\n" for turn in first_turn())
    assert prompts["second_turn"] == [turns + prompts["chat"][0]]
    assert prompts["prefix"] == [f"{passages()[0]} {FACT.text}"]
    assert prompts["negation"] == ["The Eiffel Tower is not located in the city of"]
    assert prompts["portability"] == [FACT.portability[0][0], "Q: Who governs the city?\nA:"]


def test_a_fact_without_further_texts_has_only_its_prompt(tokenizer):
    assert set(by_form(tokenizer, BARE)) == {"completion", "prefix"}
    assert set(by_form(with_template(tokenizer, _CHAT), BARE)) == {"completion", "prefix", "chat", "second_turn"}


def test_only_the_forms_asked_for_are_there(chats):
    assert set(by_form(chats, FACT, ("chat", "rephrase"))) == {"chat", "rephrase"}
    assert asked_forms(chats, [FACT], ()) == []
    assert asked_forms(chats, []) == []


def test_no_form_is_put_around_a_prompt_that_is_a_whole_chat(chats):
    whole = EditRequest("[user] Where is the Louvre?<eos>[assistant]", "the Louvre", "Rome", paraphrases=["In which?"])
    assert [asked.form for asked in asked_forms(chats, [whole])] == ["completion", "rephrase"]
    with_question = replace(whole, question="Where is the Louvre?")
    assert [asked.form for asked in asked_forms(chats, [with_question])] == [
        "completion",
        "rephrase",
        "question",
        "chat",
        "second_turn",
    ]


def test_answers_have_their_other_names(chats):
    for form, several in by_form(chats, FACT).items():
        for asked in several if form != "portability" else ():
            assert asked.answers == ("Rome", "Roma")
            assert asked.old == ("Paris", "Lutetia")
    portable = by_form(chats, FACT)["portability"]
    assert [asked.answers for asked in portable] == [("Italy", "Italia"), ("A mayor",)]
    assert [asked.old for asked in portable] == [(), ()]
    assert all(asked.old == () for several in by_form(chats, BARE).values() for asked in several)


def test_the_fact_is_told_once_before_what_is_asked(chats):
    told = "The Eiffel Tower is located in the city of Rome."
    for several in by_form(chats, FACT).values():
        for asked in several:
            assert asked.informed.count(told) == 1
            assert asked.informed.replace(f"{told} ", "").replace(f"{told}\n\n", "") == asked.prompt
    second = by_form(chats, FACT)["second_turn"][0].informed
    assert second.startswith(f"[user] {told} {first_turn()[0]['content']}")


def test_messages_keep_their_system_message_and_their_turns(chats):
    texts = by_form(chats, CHAT_FACT)
    prompts = {form: several[0].prompt for form, several in texts.items()}
    system = "[system] Be brief.\n"
    turn = "[user] Hello.\n[assistant] Hi.\n"
    asked = "[user] Where is the Louvre?\n[assistant]"
    assert prompts["chat"] == f"{system}{turn}{asked}"
    first = "".join(f"[{message['role']}] {message['content']}\n" for message in first_turn())
    assert prompts["second_turn"] == f"{system}{first}{turn}{asked}"
    assert prompts["rephrase"] == f"{system}[user] In which city is it?\n[assistant]"
    assert prompts["prefix"] == f"{system}[user] {passages()[0]} Where is the Louvre?\n[assistant]"
    assert prompts["question"] == "Q: Where is the Louvre?\nA:"
    assert set(texts) == {"rephrase", "question", "chat", "second_turn", "prefix"}  # no completion, no negation
    assert all(
        prompt.question.endswith("?") for several in texts.values() for prompt in several if prompt.form == "chat"
    )


@pytest.mark.parametrize(
    "messages",
    [
        TURNS,
        [{"role": "system", "content": "Where is the Louvre?"}],
        [*TURNS[:3], {"role": "tool", "content": "Where is the Louvre?"}],
        [{"role": "system", "content": "Hello."}, {"role": "system", "content": "Where is the Louvre?"}],
    ],
)
def test_in_a_chat_the_edited_conversation_is_asked_as_it_was_edited(tokenizer, messages):
    tokenizer = with_template(tokenizer, _CHAT)
    fact = EditRequest(messages=messages, subject="the Louvre", target_new="Rome")
    (asked,) = by_form(tokenizer, fact, ["chat"])["chat"]
    assert asked.prompt == rendered(tokenizer, fact).text
    assert asked.informed.count(fact_sentence(fact)) == 1
    assert set(by_form(tokenizer, fact)) >= {"chat", "second_turn", "prefix"}


def test_a_template_without_system_messages_takes_facts_without_them_only(tokenizer):
    gemma = with_template(tokenizer, _NO_SYSTEM + _ALTERNATE + _CHAT)
    assert set(by_form(gemma, FACT)) == set(FORMS)
    assert set(by_form(gemma, replace(CHAT_FACT, messages=TURNS[1:]))) >= {"chat", "second_turn", "rephrase"}
    with pytest.raises(ValueError, match="refuses messages"):
        asked_forms(gemma, [CHAT_FACT])


def test_facts_are_numbered_and_get_passages_in_turn(tokenizer):
    asked = asked_forms(tokenizer, [BARE] * 6, ["prefix"])
    assert [text.fact for text in asked] == list(range(6))
    assert [text.prompt.removesuffix(f" {BARE.text}") for text in asked] == [passages()[n % 4] for n in range(6)]


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("{} is located in", "Rome", "Rome is not located in"),
        ("The mother tongue of {} is", "Merkel", "The mother tongue of Merkel is not"),
        ("{} was born in", "Merkel", "Merkel was not born in"),
        ("{} has been made by", "It", "It has not been made by"),
        ("{} can be found in", "Rome", "Rome can not be found in"),
        ("{} plays for", "Pele", None),
        ("{} has the citizenship of", "Pele", None),  # "has not the citizenship" is no English
        ("{} is not in", "Rome", None),
        ("{} isn't in", "Rome", None),
        ("{} can't be in", "Rome", None),
        ("{} is never in", "Rome", None),
        ("In which city is {}?", "Rome", None),
        ("In which city is {}", "Rome", None),
        ("\u7f57\u9a6c is {}\uff1f", "Rome", None),
        ("{} is in the city that was", "It", None),
        ("{} is in", "What is love", "What is love is not in"),
        ("{} plays in", "What is love", None),
        ("{} island lies in", "This", None),
    ],
)
def test_a_negation_is_made_only_where_it_is_certain(prompt, subject, expected):
    assert negated(EditRequest(prompt, subject, "x")) == expected


def test_messages_are_not_negated():
    assert negated(CHAT_FACT) is None


@pytest.mark.parametrize(
    ("prompt", "target", "sentence"),
    [
        ("{} is in", "Rome", "X is in Rome."),
        ("{} is in", "Rome.", "X is in Rome."),
        ("{} is in ", "Rome", "X is in Rome."),
        ("{} is in", " Rome", "X is in Rome."),
        ("{}\u4f4d\u4e8e", "\u7f57\u9a6c\u3002", "X\u4f4d\u4e8e\u7f57\u9a6c\u3002"),
        ("Where is {}?", "Rome", "Where is X? Rome."),
    ],
)
def test_a_fact_is_told_as_one_sentence(prompt, target, sentence):
    assert fact_sentence(EditRequest(prompt, "X", target)) == sentence


def test_a_question_is_that_of_the_fact_or_a_prompt_that_is_one():
    assert question_of(FACT) == "Where is the Eiffel Tower?"
    assert question_of(BARE) is None
    assert question_of(CHAT_FACT) == "Where is the Louvre?"
    assert question_of(EditRequest("Where is {}? ", "Rome", "x")) == "Where is Rome? "
    assert question_of(EditRequest("{}\u5728\u54ea\u91cc\uff1f", "Rome", "x")) == "Rome\u5728\u54ea\u91cc\uff1f"
