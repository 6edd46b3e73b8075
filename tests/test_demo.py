"""The demo's second process: what it says is shown."""

import pytest

from goldenedit import demo
from goldenedit.config import EditConfig
from goldenedit.model import get_edit_model
from goldenedit.requests import EditRequest
from goldenedit.storage.folder import EditedFact
from models import tiny_model

TOWER = EditRequest(demo.PROMPT, demo.SUBJECT, demo.TARGET)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A tiny model that lies in a folder, with an edit that lies in another."""
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = EditConfig(layer=1, steps=2, contexts=2, context_length=3, covariance="identity", contrast=0)
    model = get_edit_model(tiny_model("llama"), config, tokenizer)
    model.edit(TOWER)
    model.save_pretrained(tmp_path / "edit")
    return model, str(base), tmp_path / "edit"


def test_stock_peft_gives_the_same_logits_and_its_warnings_are_shown(saved, monkeypatch, capsys):
    warns = "import warnings; warnings.warn('look here')\n"
    monkeypatch.setattr(demo, "_STOCK_PEFT", warns + demo._STOCK_PEFT)
    assert demo._difference_in_fresh_process(*saved) < 1e-4
    shown = capsys.readouterr().err
    assert "look here" in shown
    assert "Loading weights" not in shown


def test_a_result_has_the_weakest_token_and_says_why_an_edit_does_not_take():
    fact = EditedFact(TOWER, 0.0123, 0.71, 20, weakest_after=0.12)
    assert demo._result(fact) == (
        "The Eiffel Tower → Rome: probability 0.012 → 0.710, weakest 0.120 (one token of the answer is unlikely)"
    )
    assert demo._result(EditedFact(TOWER, 0.0123, 0.98, 20)).endswith("0.012 → 0.980")


def test_what_the_process_said_is_in_the_error(saved):
    model, base, folder = saved
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ChildProcessError, match=r"PEFT alone \(exit code 1\)") as caught:
        demo._difference_in_fresh_process(model, base, folder)
    assert "Traceback" in str(caught.value)
    assert "_STOCK_PEFT" not in str(caught.value)
