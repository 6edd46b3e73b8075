"""How an EditModel saves and loads edit folders."""

from __future__ import annotations

import os

import pytest

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model

TOWER = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
MERKEL = EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "German")
FAST = {"layer": 1, "steps": 2, "contexts": 1, "covariance": "identity", "contrast": 0}


@pytest.fixture
def model(tokenizer) -> EditModel:
    """A tiny model with two edits."""
    model = get_edit_model(tiny_model("llama"), EditConfig(**FAST), tokenizer)
    model.edit(TOWER, name="tower")
    model.edit(MERKEL, name="merkel")
    return model


@pytest.mark.parametrize("selected", ["tower", ["tower", "tower"]], ids=repr)
def test_an_edit_that_is_selected_twice_or_by_a_plain_name_is_saved_once(model, tmp_path, selected):
    model.save_pretrained(tmp_path, selected)
    assert [edit.name for edit in read_edit_folder(tmp_path).edits] == ["tower"]


def test_saving_keeps_a_card_that_was_changed_by_hand_and_replaces_one_that_was_rendered(model, tmp_path, caplog):
    card = tmp_path / "README.md"
    model.save_pretrained(tmp_path, "tower")
    rendered = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() != rendered
    card.write_text("# My edits\n")
    for _ in range(2):
        caplog.clear()
        model.save_pretrained(tmp_path)
        assert card.read_text() == "# My edits\n"
        assert "changed by hand" in caplog.text
    card.unlink()
    model.save_pretrained(tmp_path, "tower")
    assert card.read_text() == rendered


def test_saving_into_a_project_keeps_its_readme(model, tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(b"# My project\r\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"# My project\r\n"
    assert f"{tmp_path / 'README.md'} was written" in caplog.text
    assert len(read_edit_folder(tmp_path).edits) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("verb", ["save_pretrained", "save_merged"])
def test_who_may_read_one_file_of_a_folder_may_read_all(model, tmp_path, verb):
    getattr(model, verb)(tmp_path / "saved")
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1


@pytest.mark.parametrize("path", ["", "a\0b"], ids=repr)
@pytest.mark.parametrize("verb", ["save_pretrained", "save_merged"])
def test_a_path_that_is_none_is_refused_and_nothing_is_saved(model, tmp_path, monkeypatch, verb, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not the path of a folder"):
        getattr(model, verb)(path)
    assert list(tmp_path.iterdir()) == []


def test_edits_of_other_weights_are_refused_with_what_differs(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    more = tiny_model("llama")
    more.resize_token_embeddings(202)
    with pytest.raises(ValueError, match=r"differ in their weights: .*added tokens \(this one has embeddings of 202\)"):
        EditModel.from_pretrained(more, tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"They differ in class LlamaForCausalLM and Qwen3ForCausalLM\."):
        EditModel.from_pretrained(tiny_model("qwen3"), tmp_path, tokenizer=tokenizer)
