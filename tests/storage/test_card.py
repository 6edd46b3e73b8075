"""The model card, whole."""

from dataclasses import replace
from pathlib import Path

import pytest
from contents import edit_folder
from huggingface_hub import ModelCard

from goldenedit.config import EditConfig
from goldenedit.storage.card import render_card
from goldenedit.storage.folder import BaseModel, Edit, EditFolder

EXPECTED = Path(__file__).with_name("card.md")


def test_the_card_is_the_expected_one():
    assert render_card(edit_folder()) == EXPECTED.read_text(encoding="utf-8")


def test_the_metadata_of_the_card_are_what_the_hub_reads():
    data = ModelCard(render_card(edit_folder())).data
    assert data.library_name == "peft"
    assert data.base_model == "org/base-model"
    assert data.base_model_relation == "adapter"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["knowledge-editing", "r-rome", "golden-layer"]


@pytest.mark.parametrize("name", ['C:\\models\\a "quoted" one', "./models/x: y", "Ä/ö", "- a", "#1/x"])
def test_any_name_of_a_base_model_is_one_text_in_the_metadata(name):
    content = edit_folder()
    content = EditFolder(content.edits, content.config, BaseModel(name, "0" * 32), content.versions)
    assert ModelCard(render_card(content)).data.base_model == name


def test_every_fact_is_one_row_and_at_most_20_are_shown():
    content = edit_folder()
    facts = content.edits[0].facts * 15
    many = EditFolder([Edit("a", facts, content.edits[0].deltas)], content.config, content.base_model)
    card = render_card(many)
    assert "30 facts changed" in card
    assert "All 30 facts are in [edits.json](edits.json)." in card
    rows = [line for line in card.splitlines() if line.endswith((" 0.988 |", " 0.500 |"))]
    assert len(rows) == 20


def test_one_fact_is_a_fact_and_needs_no_pointer_to_the_others():
    content = edit_folder()
    card = render_card(EditFolder(content.edits[1:], EditConfig(layer=1), content.base_model))
    assert "1 fact changed" in card
    assert "facts are in" not in card


def test_conv1d_is_said():
    content = edit_folder()
    edits = [Edit(edit.name, edit.facts, edit.deltas, fan_in_fan_out=True) for edit in content.edits]
    card = render_card(EditFolder(edits, content.config, content.base_model))
    assert "vLLM and llama.cpp have no LoRA" in card
    assert "vLLM" not in render_card(content)


def test_the_selector_and_the_covariance_are_said():
    content = edit_folder()
    config = EditConfig(layer="lga", target_layer=4, covariance="identity", method="rome")
    card = render_card(EditFolder(content.edits, config, content.base_model))
    assert "| layer | 4, chosen by lga |" in card
    assert "| key covariance | identity |" in card
    assert "| editor | rome |" in card


def test_a_card_tells_what_storing_a_dense_change_costs_and_no_covariance_that_was_not_used():
    content = edit_folder()
    content = replace(content, config=replace(content.config, method="ft-m"))
    content.edits[0] = replace(content.edits[0], relative_error=0.0042)
    card = render_card(content)
    assert "| stored as low rank | relative error 4.2e-03 |\n| versions |" in card
    assert "key covariance" not in card
