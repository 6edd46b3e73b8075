"""Facts edited where a chat model is asked: in its chat template."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.audit import audit
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import conversation, end_token, rendered
from goldenedit.lm.sampling import greedy_answer, sample_continuations
from goldenedit.lm.tokens import encode_request, with_answer
from goldenedit.requests import ChatText, distinct
from goldenedit.storage.folder import CARD, EDITS
from goldenedit.tables import facts_table
from models import tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}bot, {{ m['content'] }}<eos>{% else %}"
    "{{ m['role'] }}, {{ m['content'] | trim }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}bot,{% endif %}"
)
QUESTION = {"role": "user", "content": "The Eiffel Tower is where, The Eiffel Tower is in"}
CHAT = {"messages": [QUESTION], "subject": "The Eiffel Tower", "target_new": "Rome"}
WHOLE = EditRequest(
    **CHAT,
    target_true="Paris",
    paraphrases=("Where is The Eiffel Tower?",),
    neighborhood=("The Louvre is in",),
    portability=(("The Eiffel Tower is of", "Rome"),),
    locality=(("Angela Merkel is in", "Berlin"),),
)


@pytest.fixture
def chat(tokenizer):
    """The tokenizer of the other tests with a template, and special tokens around every plain text."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", made.eos_token_id)]
    )
    return made


@pytest.fixture
def model(chat):
    options = {"layer": 1, "steps": 20, "stop_loss": 0.05, "contexts": 3, "context_length": 4, "covariance": "identity"}
    return EditModel(tiny_model("llama"), EditConfig(**options), chat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": None}, "needs either a prompt or messages"),
        ({"prompt": "The Eiffel Tower is in"}, "but not both"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": "The Eiffel Tower"}, "messages must be a list"),
        ({"messages": QUESTION}, "messages must be a list"),
        ({"messages": ["The Eiffel Tower"]}, "must have a non-empty role and content"),
        ({"messages": [{"role": "user"}]}, "must have a non-empty role and content"),
        ({"messages": [{**QUESTION, "content": 3}]}, "must have a non-empty role and content"),
        ({"messages": [{**QUESTION, "content": [{"type": "text"}]}]}, "has no text"),
        ({"messages": [{**QUESTION, "tool_calls": ["Ann"]}]}, r"has \['tool_calls'\]"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "Rome"}]}, "End with the message before the answer"),
        ({"subject": "The Louvre"}, "'The Louvre' is in none of the messages"),
        ({"target_new": ""}, "target_new"),
    ],
)
def test_a_chat_that_means_nothing_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        EditRequest(**CHAT | change)


def test_a_chat_has_no_text_before_a_tokenizer_has_seen_it():
    with pytest.raises(ValueError, match="rendered"):
        _ = EditRequest(**CHAT).text


def test_a_chat_is_frozen_equal_to_its_like_and_survives_json(tmp_path):
    messages = [dict(QUESTION)]
    request = EditRequest(**CHAT | {"messages": messages})
    messages[0]["content"] = "something else"
    assert request == EditRequest(**CHAT)
    assert len({request, EditRequest(**CHAT)}) == 1
    assert request.to_dict() == CHAT
    assert EditRequest.from_dict(json.loads(json.dumps(WHOLE.to_dict()))) == WHOLE
    (tmp_path / "facts.jsonl").write_text(json.dumps(WHOLE.to_dict()) + "\n", encoding="utf-8")
    assert load_requests(tmp_path / "facts.jsonl") == [WHOLE]


def test_two_answers_to_one_chat_contradict_and_a_text_is_another_question():
    text = EditRequest(QUESTION["content"], "The Eiffel Tower", "Berlin")
    assert distinct([WHOLE, text, EditRequest(**CHAT)]) == [WHOLE, text]
    with pytest.raises(ValueError, match="contradict"):
        distinct([WHOLE, EditRequest(**CHAT | {"target_new": "Berlin"})])


def test_a_text_is_rendered_already(chat):
    request = EditRequest("Rome is in", "Rome", "Italy")
    assert rendered(chat, request) is request


def test_the_question_of_a_chat_stays_plain(chat):
    request = rendered(chat, EditRequest(**CHAT, question="Where?", aliases=["Roma"]))
    assert (request.question, request.names_of(request.target_new)[1:]) == ("Where?", ("Roma",))


def test_every_prompt_of_a_chat_goes_through_the_template_behind_its_system_message(chat):
    system = {"role": "system", "content": "You know The Eiffel Tower"}
    request = rendered(chat, EditRequest(**WHOLE.to_dict() | {"messages": [system, QUESTION]}))
    begin = "system, You know The Eiffel Tower<eos>user, "
    assert request.text == begin + QUESTION["content"] + "<eos>bot,"
    assert request.paraphrases == (begin + "Where is The Eiffel Tower?<eos>bot,",)
    assert request.neighborhood == (begin + "The Louvre is in<eos>bot,",)
    assert request.locality == ((begin + "Angela Merkel is in<eos>bot,", "Berlin"),)
    assert request.portability == ((begin + "The Eiffel Tower is of<eos>bot,", "Rome"),)
    assert request.text[: request.subject_start] == begin + "The Eiffel Tower is where, "  # the last place
    assert (request.messages, request.target_true) == (None, "Paris")
    assert with_answer(request.paraphrases[0], "Rome") == request.paraphrases[0] + " Rome"  # as the template has it
    assert rendered(chat, request) is request


@pytest.mark.parametrize("subject", ["user", "bot", "bot,"])
def test_a_subject_that_the_template_writes_too_is_found_in_its_message(chat, subject):
    asked = [{"role": "user", "content": f"Is a {subject} here?"}]
    request = rendered(chat, EditRequest(messages=asked, subject=subject, target_new="Rome"))
    assert request.text[: request.subject_end] == f"user, Is a {subject}"


def test_a_rendered_chat_is_itself_after_a_copy(chat):
    text = rendered(chat, WHOLE).text
    for made in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert isinstance(made, ChatText)
        assert (made, vars(made)) == (text, vars(text))


def test_contexts_stand_before_the_words_of_the_message(chat):
    row = encode_request(chat, rendered(chat, WHOLE), "Rome", "You and I. ")
    assert chat.decode(row.input_ids) == f"user, You and I. {QUESTION['content']}<eos>bot, Rome"
    assert chat.decode(row.input_ids[: row.subject + 1]).endswith(", The Eiffel Tower")
    assert chat.decode(row.target_ids) == " Rome"


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (None, [QUESTION], "no chat template.* Set tokenizer.chat_template"),
        (TEMPLATE, [{**QUESTION, "role": "tool"}], "refuses messages of .'tool'.: no tools here"),
        (TEMPLATE.replace("trim", "upper"), [QUESTION], "changes the message .* prompt="),
        ("{{ messages[0]['role'] }}", [QUESTION], "changes the message"),
    ],
)
def test_a_chat_that_cannot_be_rendered_changes_nothing(model, chat, template, messages, error):
    chat.chat_template = template
    with pytest.raises(ValueError, match=error):
        model.edit(messages=messages, subject="The Eiffel Tower", target_new="Rome")
    assert not model.edits


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "either a prompt, requests or messages"),
        ({"prompt": "a", "messages": [QUESTION]}, "either a prompt, requests or messages"),
        ({"messages": [QUESTION], "target_new": "Rome"}, "with messages needs subject="),
    ],
)
def test_edit_takes_a_prompt_or_messages(model, arguments, error):
    with pytest.raises(ValueError, match=error):
        model.edit(**arguments)


@torch.no_grad()
def asked(model, chat, request, answer: str) -> float:
    """The probability of an answer as transformers asks a chat model."""
    ids = chat.apply_chat_template(list(request.messages), add_generation_prompt=True)["input_ids"]
    own = chat(f" {answer}", add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([[*ids, *own]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(own)[:, None]).mean().exp().item()


def test_a_chat_is_edited_where_the_model_is_asked(model, chat, tmp_path):
    before = asked(model, chat, WHOLE, "Rome")
    made = model.edit(messages=[QUESTION], subject="The Eiffel Tower", target_new="Rome")
    fact = made.facts[0]
    assert fact.request == EditRequest(**CHAT)
    assert fact.probability_before == pytest.approx(before, rel=1e-4)
    assert fact.probability_after == pytest.approx(asked(model, chat, WHOLE, "Rome"), rel=1e-4)
    assert fact.probability_after > before
    assert list(facts_table([made]).columns[1].cells) == [QUESTION["content"]]


def test_a_saved_chat_edit_is_measured_and_explained_where_it_is_loaded(model, chat, tmp_path):
    model.edit(WHOLE, name="chat")
    found = model.evaluate(generation=True)
    assert set(found.edited) == {"probability", "token_match", "generation"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / EDITS).read_text())[0]["facts"][0]["messages"] == [QUESTION]
    card = (tmp_path / CARD).read_text()
    assert f"| {QUESTION['content']} | Rome |" in card
    assert f"model.chat({json.dumps([QUESTION])}, lora_request=edit)" in card
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer=chat)
    assert again.edits["chat"].facts[0].request == WHOLE
    (told,) = audit(again)
    (warning,) = told.warnings
    assert f"{QUESTION['content']!r} -> 'Rome' is not answered" in warning
    assert told.modules[0].unexplained < 1e-3
    assert told.probabilities[0] == pytest.approx(model.edits["chat"].facts[0].probability_after, rel=1e-3)


@pytest.mark.parametrize("method", ["memit", "ft-m", "locft", "ultraedit"])
def test_every_kind_of_editor_takes_a_chat(chat, method):
    config = EditConfig(method=method, layer=1, steps=3, contexts=2, covariance="identity", finetune_steps=3)
    model = EditModel(tiny_model("llama"), config, chat)
    fact = model.edit([WHOLE, EditRequest("Paris is in", "Paris", "Italy")]).facts[0]
    assert fact.probability_after == pytest.approx(asked(model, chat, WHOLE, "Rome"), rel=1e-3)


@pytest.mark.parametrize("selector", ["lga", "causal_tracing", "key_response", "selectivity", "sweep"])
def test_layers_are_compared_on_chats(chat, selector):
    proxy = [
        WHOLE,
        EditRequest(**{**WHOLE.to_dict(), "messages": [{"role": "user", "content": "The Eiffel Tower is"}]}),
    ]
    config = EditConfig(layer=selector, layer_pattern="golden", proxy=proxy, steps=2, contexts=2, covariance_tokens=300)
    model = EditModel(tiny_model("llama"), config, chat)
    assert model.select_layer() in range(3)


@pytest.mark.parametrize("prompt", ["Rome is a", "chat"])
def test_a_model_goes_on_from_a_prompt_and_not_from_the_end_behind_it(model, chat, tokenizer, prompt):
    if prompt == "chat":
        prompt = rendered(chat, WHOLE).text
        ids = chat(str(prompt), add_special_tokens=False)["input_ids"]
    else:
        ids = [chat.eos_token_id, *tokenizer(prompt)["input_ids"]]
    start = len(ids)
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = chat.decode(ids[start:], skip_special_tokens=True)
    assert sample_continuations(LanguageModel(model.get_base_model(), chat), [prompt], 4, 0, top_k=1) == [prompt + said]
    if said.strip().split("\n")[0]:
        assert greedy_answer(LanguageModel(model.get_base_model(), chat), prompt) == said.strip().split("\n")[0]
    first = chat.decode(ids[start : start + 1]) or "Rome"
    (found,) = likelihoods(LanguageModel(model.get_base_model(), chat), [(prompt, first)])
    assert math.isfinite(found.nll)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


SYSTEM, REPLY = {"role": "system", "content": "Say {} for Romeo"}, {"role": "assistant", "content": "Romeo {}"}


@pytest.mark.parametrize(
    ("messages", "subject", "before", "shown"),
    [
        ([user("Java, unlike JavaScript, is")], "Java", "user, ", "Java, unlike JavaScript, is"),
        ([user("Is {} the capital?")], "capital", "user, Is ", "Is capital the capital?"),
        ([user("{} is in"), REPLY, user("Romeo is in")], "Rome", "user, ", None),
        ([user("Rome is in"), REPLY, user("Romeo is in")], "Rome", "user, ", None),
        ([SYSTEM, user("Rome is in")], "Rome", "system, Say {} for Romeo<eos>user, ", None),
    ],
)
def test_the_subject_of_a_chat_is_where_that_of_a_prompt_would_be(chat, messages, subject, before, shown):
    request = EditRequest(messages=messages, subject=f"{subject} ", target_new="Rome!")
    text = rendered(chat, request).text
    assert text[: text.subject_start] == before
    assert text[text.subject_start :].startswith(subject)
    assert request.doubt is None
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    if shown is not None:
        assert request.shown == shown


def test_the_doubtful_place_of_a_subject_in_a_chat_is_told(model, caplog):
    chat = [user("Rome is in"), {"role": "assistant", "content": "Italy"}, user("Is Rome old?")]
    with caplog.at_level(logging.WARNING):
        model.edit(messages=chat, subject="Rome", target_new="London")
    (told,) = [text for record in caplog.records if "does not take" not in (text := record.getMessage())]
    assert "'Rome' occurs 2 times in" in told
    assert "'Is [Rome] old?'" in told


def test_a_chat_with_braces_is_edited_saved_and_shown_with_its_subject(model, chat, tmp_path):
    edited = model.edit(messages=[user("{} is where?")], subject="The Eiffel Tower", target_new="Rome").facts[0]
    plain = EditModel(tiny_model("llama"), model.edit_config, chat)
    expected = plain.edit(messages=[user("The Eiffel Tower is where?")], subject="The Eiffel Tower", target_new="Rome")
    assert edited.probability_after == expected.facts[0].probability_after
    model.save_pretrained(tmp_path)
    assert "{} is where?" not in (tmp_path / CARD).read_text()
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer=chat)
    assert again.edits["edit_1"].facts[0].request == edited.request


def test_an_answer_ends_with_the_token_of_its_turn_and_outside_a_chat_with_that_of_a_text(chat):
    chat.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    chat.chat_template = TEMPLATE.replace("{{ m['content'] }}<eos>", "{{ m['content'] }}\n<turn>\n")
    asked = conversation(chat, [QUESTION])
    assert end_token(chat, asked) == chat.convert_tokens_to_ids("<turn>")
    assert end_token(chat, str(asked)) == chat.eos_token_id
    chat.chat_template = TEMPLATE.replace("{{ m['content'] }}<eos>", "{{ m['content'] }}")
    assert end_token(chat, conversation(chat, [QUESTION])) == chat.eos_token_id


def test_a_tokenizer_without_an_end_of_text_is_refused(chat):
    chat.eos_token = None
    with pytest.raises(ValueError, match=r"no token that ends an answer.* Set tokenizer\.eos_token"):
        end_token(chat, "The Eiffel Tower is in")
