"""`goldenedit chat`: lines of the input are messages, and the edited model answers."""

from __future__ import annotations

import io
import json
import sys

import pytest
from transformers import AutoModelForCausalLM

from command import run, saved_model
from goldenedit import EditConfig, get_edit_model

PROMPT = "I live near The Eiffel Tower"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def edit(tmp_path, tokenizer):
    """An edit of a tiny model with a chat template, in a folder."""
    base = saved_model(tmp_path / "model", tokenizer)
    config = EditConfig("r-rome", layer=1, steps=10, contexts=2, covariance="identity", phrasings="none")
    model = get_edit_model(AutoModelForCausalLM.from_pretrained(base), config, tokenizer)
    model.edit(PROMPT, subject="The Eiffel Tower", target_new="Rome")
    model.save_pretrained(tmp_path / "edit")
    return tmp_path / "edit"


def chat(monkeypatch, capsys, edit, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code, output, errors = run(capsys, "chat", str(edit), "--max-new-tokens", "3", *options)
    assert code == 0, errors
    return output


def test_a_line_is_gone_on_with_by_both_models(monkeypatch, capsys, edit):
    turns = json.loads(chat(monkeypatch, capsys, edit, [PROMPT], "--complete", "--compare", "--json"))
    assert [turn["prompt"] for turn in turns] == [PROMPT]
    assert turns[0]["edited"].startswith("Rome")
    assert not turns[0]["base"].startswith("Rome")


def test_quiet_prints_answers_alone(monkeypatch, capsys, edit):
    answers = chat(monkeypatch, capsys, edit, [PROMPT, "", PROMPT, "/quit", PROMPT], "--complete", "-q").splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_turns_belong_to_one_conversation_until_a_new_one(monkeypatch, capsys, edit, tmp_path, tokenizer):
    tokenizer = type(tokenizer).from_pretrained(tmp_path / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    asked = ["Where?", "/new", "Where?"]
    turns = json.loads(chat(monkeypatch, capsys, edit, asked, "--system", "Be brief.", "--json"))
    assert turns[0] == turns[1]


def test_a_system_message_needs_a_chat_template(monkeypatch, capsys, edit):
    code, _, errors = run(capsys, "chat", str(edit), "--system", "Be brief.")
    assert code == 2
    assert "--system needs a chat template" in errors


def test_each_model_has_a_conversation_of_its_own(monkeypatch, capsys, edit, tmp_path, tokenizer):
    tokenizer = type(tokenizer).from_pretrained(tmp_path / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [PROMPT, "And then?"]
    both = json.loads(chat(monkeypatch, capsys, edit, asked, "--compare", "--json"))
    alone = json.loads(chat(monkeypatch, capsys, edit, asked, "--json"))
    assert [turn["edited"] for turn in both] == [turn["edited"] for turn in alone]
    assert both[0]["base"] != both[0]["edited"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    text = f"user: {PROMPT}\nassistant: {both[0]['base']}\nuser: And then?\nassistant:"
    ids = tokenizer(text, return_tensors="pt")
    written = base.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert both[1]["base"] == tokenizer.decode(written).strip()


def test_messages_from_a_file_stand_before_their_answers(monkeypatch, capsys, edit):
    lines = chat(monkeypatch, capsys, edit, [PROMPT], "--complete").splitlines()
    assert lines[-2] == f"> {PROMPT}"
    assert lines[-1].startswith("Rome")
