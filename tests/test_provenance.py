"""What edits, folders, cards and checkpoints say of how edits were made: by whom, where, with what."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from goldenedit import EditModel, get_edit_model
from goldenedit.audit import audit
from goldenedit.storage.checkpoint import write_checkpoint
from goldenedit.storage.folder import write_edit_folder
from goldenedit.storage.reading import read_edit_folder
from goldenedit.versions import library_versions
from models import tiny_model
from tiny_edits import MERKEL, TOWER
from tiny_edits import fast_config as config

# What stock PEFT 0.21 calls and says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")


@pytest.fixture
def edit_model(tokenizer):
    return get_edit_model(tiny_model("llama"), config(), tokenizer)


@pytest.fixture
def of_two_methods(edit_model, tokenizer):
    """A model with ROME at layer 0 and MEMIT at layer 2, whose config by now says neither."""
    model = get_edit_model(tiny_model("llama"), config(method="rome", layer=0), tokenizer)
    model.edit(TOWER)
    model.edit_config.method = "memit"
    model.edit_config.target_layer = 2
    model.edit(MERKEL)
    model.edit_config.method = "r-rome"
    model.edit_config.target_layer = 1
    return model


def assert_of_two_methods(model: EditModel, folder) -> None:
    """Assert that what is saved, and what a merge says, is how the edits were made."""
    model.save_pretrained(folder)
    content = read_edit_folder(folder)
    assert content.target_layers == [0, 2]
    assert [(way.method, way.target_layers) for way in content.configs] == [("rome", [0]), ("memit", [2])]
    card = (folder / "README.md").read_text()
    assert "2 facts changed by rome, memit at layers 0, 2" in card
    assert "r-rome" not in card
    with model.adapters.merged() as plain:
        write_checkpoint(folder / "checkpoint", plain, model.tokenizer, content)
    saved = json.loads((folder / "checkpoint" / "config.json").read_text())
    merged = model.merge_and_unload().config
    for golden, how in ((saved["golden_layers"], saved["goldenedit"]), (merged.golden_layers, merged.goldenedit)):
        assert golden == [0, 2]
        assert how["methods"] == ["memit", "rome"]


def test_the_layer_of_the_answers_is_an_edited_one_and_no_golden_one(tokenizer, tmp_path):
    model = get_edit_model(tiny_model("llama"), config(covariance="sampled", covariance_tokens=300), tokenizer)
    assert model.edit(TOWER).layers == (1, 2)
    model.save_pretrained(tmp_path)
    assert read_edit_folder(tmp_path).target_layers == [1, 2]
    assert "1 fact changed by gated at layers 1, 2" in (tmp_path / "README.md").read_text()
    assert model.merge_and_unload().config.golden_layers == [1]


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_edits_of_two_methods_that_are_joined_say_so(of_two_methods, tokenizer, tmp_path, how):
    of_two_methods.add_weighted_adapter(["edit_1", "edit_2"], [1.0, 1.0], "both", how)
    edit = of_two_methods.edits["both"]
    assert edit.layers == (0, 2)
    assert edit.config is None
    of_two_methods.save_pretrained(tmp_path / "joined", selected_adapters=["both"])
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "joined", tokenizer=tokenizer)
    assert (loaded.edits["both"].layers, loaded.edits["both"].configs) == (edit.layers, edit.configs)
    of_two_methods.set_adapter("both")
    for name, model in (("made", of_two_methods), ("loaded", loaded)):
        assert_of_two_methods(model, tmp_path / name)


def test_edits_of_two_methods_that_are_loaded_as_one_say_so(of_two_methods, tokenizer, tmp_path):
    of_two_methods.save_pretrained(tmp_path / "two")
    for method in ("from_pretrained", "load_adapter"):
        if method == "from_pretrained":
            loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "two", "both", tokenizer)
        else:
            loaded = get_edit_model(tiny_model("llama"), config(), tokenizer)
            loaded.load_adapter(tmp_path / "two", "both")
            loaded.set_adapter("both")
        assert list(loaded.edits) == ["both"]
        assert_of_two_methods(loaded, tmp_path / method)
    assert_of_two_methods(of_two_methods, tmp_path / "made")


def test_joined_edits_of_two_methods_are_audited_by_neither(of_two_methods):
    of_two_methods.add_weighted_adapter(["edit_1", "edit_2"], [1.0, 1.0], "both")
    of_two_methods.set_adapter("both")
    (found,) = audit(of_two_methods)
    assert [module.unexplained for module in found.modules] == [None, None]
    assert all("is not answered" in warning for warning in found.warnings)  # nothing is told about the changes


def test_an_edit_that_is_made_behind_unload_is_of_the_versions_here(edit_model, tokenizer, tmp_path):
    edit_model.edit(TOWER)
    content = edit_model._content(["edit_1"])
    old = [replace(content.edits[0], versions={"goldenedit": "0.0.1"})]
    write_edit_folder(tmp_path / "edit", replace(content, edits=old), "")
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    again.unload()
    again.edit(TOWER, name="edit_1")
    again.save_pretrained(tmp_path / "again")
    assert read_edit_folder(tmp_path / "again").versions == library_versions()


@pytest.mark.parametrize(
    ("option", "value"),
    [("covariance", "strangers/texts"), ("proxy", "strangers/facts.json"), ("layer", "hub:strangers/layers")],
)
def test_what_a_stranger_named_is_recorded_but_not_read_by_the_next_edit(
    edit_model, tokenizer, tmp_path, option, value
):
    edit_model.edit(TOWER)
    content = edit_model._content(["edit_1"])
    theirs = replace(content.config, **{option: value, "target_layer": 1})
    write_edit_folder(
        tmp_path / "edit", replace(content, config=theirs, edits=[replace(content.edits[0], configs=(theirs,))]), ""
    )
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    assert getattr(loaded.edits["edit_1"].config, option) == value
    assert "strangers" not in json.dumps(loaded.edit_config.to_dict())
    loaded.edit(MERKEL)
    assert loaded.edit_config.target_layers == [1]
    loaded.save_pretrained(tmp_path / "again")
    ways = [edit.config for edit in read_edit_folder(tmp_path / "again").edits]
    assert getattr(ways[0], option) == value
    assert getattr(ways[1], option) != value
