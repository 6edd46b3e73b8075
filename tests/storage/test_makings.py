"""What an edit folder says of how its edits were made, and folders that the release before saved."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from contents import assert_refused, assert_same, change_json, edit_folder

from goldenedit import EditConfig, EditModel
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EDIT_CONFIG,
    EDIT_STATE,
    EDITS,
    Beside,
    EditFolder,
    joined,
    write_edit_folder,
)
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model

# What stock PEFT 0.21 says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

MEMIT = EditConfig(method="memit", layer=2, covariance="identity")


def of_several_makings() -> EditFolder:
    """Return edits of two makings, the second of both, by other versions and beside an adapter."""
    content = edit_folder()
    first, second = content.edits
    second = replace(
        second,
        layers=(0, 2),
        configs=(MEMIT, content.config),
        versions={"goldenedit": "0.0.9", "torch": "2.13.0"},
        beside=(Beside("mine", "0123456789abcdef"), Beside("other", "fedcba9876543210")),
        by_parameter=False,
        relative_error=0.25,
        contexts_hash="abc",
    )
    return replace(content, edits=[first, second])


def test_how_each_edit_was_made_comes_back(tmp_path):
    content = of_several_makings()
    write_edit_folder(tmp_path, content, "")
    found = read_edit_folder(tmp_path)
    assert_same(found, content)
    assert found.versions == {"goldenedit": "0.1.0, 0.0.9", "peft": "0.21.2", "torch": "2.13.0"}
    assert found.configs == [content.config, MEMIT]
    assert found.target_layers == [0, 1, 2]
    write_edit_folder(tmp_path / "again", found, "")
    assert_same(read_edit_folder(tmp_path / "again"), content)


def test_edits_that_are_joined_keep_how_each_part_was_made():
    content = of_several_makings()
    edit, _ = joined("both", content.edits)
    assert edit.layers == (0, 1, 2)
    assert edit.configs == (content.config, MEMIT)
    assert edit.config is None
    assert edit.versions == content.versions
    assert edit.beside == content.edits[1].beside


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("configs", [3]),
        ("configs", [{"steps": "many"}]),
        ("configs", [{"magic": 1}]),
        ("layers", "1"),
        ("layers", [True]),
        ("layers", [-1]),
        ("versions", {"goldenedit": 1}),
        ("versions", [1]),
        ("beside", [{"name": 1, "hash": "a"}]),
        ("beside", [{"name": "a"}]),
        ("beside", ["a"]),
    ],
)
def test_a_record_that_says_nonsense_of_how_an_edit_was_made_is_an_error(tmp_path, name, value):
    write_edit_folder(tmp_path, of_several_makings(), "")
    change_json(tmp_path / EDIT_CONFIG, lambda sidecar: sidecar["edits"][1].update({name: value}))
    assert_refused(tmp_path, EDIT_CONFIG)


# ---------------------------------------------------------------------- folders that the release before saved

VERSION_2 = Path(__file__).with_name("version_2")  # AlphaEdit at layer 1, MEMIT at layers 0 and 2, evaluated


def test_a_folder_of_the_release_before_is_read(tokenizer):
    content = read_edit_folder(VERSION_2)
    (first, second) = content.edits
    assert (first.name, first.layers, first.config.method) == ("edit_1", (1,), "alphaedit")
    assert (second.name, second.layers, second.config.method) == ("merkel", (0, 2), "memit")
    assert first.config.covariance_tokens == 50
    assert first.config.covariance == "sampled"
    assert content.target_layers == [0, 1, 2]
    assert first.versions == second.versions == content.versions
    assert content.versions["goldenedit"]
    assert first.beside == ()
    assert list(first.state) == ["keys/model.layers.1.mlp.down_proj"]
    assert content.evaluation is not None
    model = EditModel.from_pretrained(tiny_model("llama"), VERSION_2, tokenizer=tokenizer)
    for edit in model.edits.values():
        for fact in edit.facts:
            (likelihood,) = likelihoods(model.lm, [(fact.request.text, fact.request.target_new)])
            if edit is second:  # the one that was made with the other one on
                assert math.exp(-likelihood.nll) == pytest.approx(fact.probability_after, rel=1e-4)


def test_a_folder_of_the_release_before_is_saved_again_and_edited_on(tmp_path, tokenizer):
    model = EditModel.from_pretrained(tiny_model("llama"), VERSION_2, tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    before, after = read_edit_folder(VERSION_2), read_edit_folder(tmp_path)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, EDITS, EDIT_STATE):
        assert (tmp_path / name).read_bytes() == (VERSION_2 / name).read_bytes()
    assert before.versions == after.versions
    assert [edit.configs for edit in after.edits] == [edit.configs for edit in before.edits]
    model.edit("Berlin is a", "Berlin", "lazy dog")
    assert list(model.edits) == ["edit_1", "merkel", "edit_2"]
