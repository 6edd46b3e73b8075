"""`goldenedit edit`: what it says of a chat, and how facts are given."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest

from command import BY_HAND, NEAR, run, saved_model
from goldenedit import EditModel, EditRequest
from goldenedit.commands.edit import ask_in_chat
from goldenedit.evaluation.verification import Said
from goldenedit.loading import load_model
from goldenedit.storage.folder import EditedFact

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PLAIN = ["--method", "r-rome", "--set", "phrasings=none", "--set", "steps=10", *BY_HAND]  # taught at its prompt alone


@pytest.fixture
def chat_folder(tmp_path, tokenizer):
    """A tiny model whose tokenizer has a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return saved_model(tmp_path / "chat_model", tokenizer)


def test_a_fact_that_takes_and_does_not_hold_in_a_chat_is_told_with_a_remedy(capsys, chat_folder, tmp_path):
    arguments = ["edit", chat_folder, *NEAR, *PLAIN, "-o", str(tmp_path / "edit"), "--json"]
    code, output, errors = run(capsys, *arguments)
    assert code == 0
    result = json.loads(output)
    assert result["facts"][0]["takes"]
    [missed] = result["chat"]["missed"]
    assert (result["chat"]["asked"], result["chat"]["says"]) == (1, 0)
    shown = " ".join(errors.split())
    assert f"'{NEAR[1]}': expected 'Rome', got" in shown
    assert "repeat --prompt" in shown

    base, tokenizer = load_model(chat_folder)
    model = EditModel.from_pretrained(base, tmp_path / "edit", tokenizer=tokenizer)
    [text] = model.evaluate(forms=["chat"], unchanged=False).texts
    assert (missed["question"], missed["written"], missed["holds"]) == (text.question, text.edited, text.holds)


@pytest.mark.parametrize("options", [["--verify"], []], ids=["verified", "without a template"])
def test_nothing_is_asked_in_a_chat_twice_or_without_a_template(capsys, chat_folder, folder, options):
    model = chat_folder if options else folder
    code, output, errors = run(capsys, "edit", model, *NEAR, *PLAIN, *options, "--json")
    assert code == 0
    assert json.loads(output).get("chat") is None
    assert "in a chat" not in errors


def test_of_many_facts_a_sample_of_those_that_take_is_asked_in_a_chat(capsys):
    asked = []

    def said_in_chat(requests):
        asked.extend(requests)
        return [Said(request.text, "Rome", "Oslo", request.subject != "House 0") for request in requests]

    facts = [
        EditedFact(EditRequest("{} is in", f"House {number}", "Rome"), 0.0, 0.0 if number % 2 else 0.9, 1)
        for number in range(1000)
    ]
    told = ask_in_chat(SimpleNamespace(said_in_chat=said_in_chat), facts)
    assert 8 <= len(asked) <= 16
    numbers = [int(request.subject.split()[1]) for request in asked]
    assert all(number % 2 == 0 for number in numbers)
    assert max(numbers) > 900
    assert (told["asked"], told["says"]) == (len(asked), len(asked) - 1)
    assert "of the 500 facts" in capsys.readouterr().out


def test_a_prompt_that_is_repeated_teaches_one_fact_in_more_wordings(capsys, folder):
    more = ["--prompt", "My house is near The Eiffel Tower"]
    code, output, _ = run(capsys, "edit", folder, *NEAR, *more, *BY_HAND, "--set", "steps=2", "--json")
    assert code == 0
    [fact] = json.loads(output)["facts"]
    assert (fact["prompt"], fact["prompts"]) == (NEAR[1], [more[1]])
