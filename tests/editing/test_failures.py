"""An edit that fails says why: weights that are not finite, subjects without a key, tokens without an embedding."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.linalg import LinAlgError

from goldenedit import EditModel, EditRequest, get_edit_model
from goldenedit.editing.failures import explained, non_finite_weights
from models import tiny_model
from tiny_edits import TOWER, fast_config

EDITORS = ("gated", "null-space", "r-rome", "memit", "emmet", "ultraedit", "locft", "ft-l", "lora")


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("method", EDITORS)
def test_weights_that_are_not_finite_are_named(method, layer, number, tokenizer):
    base = tiny_model("llama")
    base.model.layers[layer].mlp.down_proj.weight.data[0, 0] = number
    with pytest.raises(ValueError, match=rf"not finite: model\.layers\.{layer}\.mlp\.down_proj\.weight\. Load another"):
        EditModel(base, fast_config(method=method, layer=1), tokenizer).edit(TOWER)


def test_a_layer_is_not_chosen_from_weights_that_are_not_finite(tokenizer):
    base = tiny_model("llama")
    base.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite: lm_head"):
        get_edit_model(base, fast_config(layer="lga", proxy_size=2), tokenizer)


@pytest.mark.parametrize("method", EDITORS[:5])
def test_a_subject_without_a_key_is_named(method, tokenizer):
    base = tiny_model("llama")
    base.model.layers[1].mlp.up_proj.weight.data.zero_()
    model = EditModel(base, fast_config(method=method, layer=1), tokenizer)
    with pytest.raises(ValueError, match="The MLP of layer 1 is silent at 'The Eiffel Tower'"):
        model.edit(TOWER)
    assert model.edits == {}


def test_a_system_without_a_solution_is_told_in_words():
    with pytest.raises(ValueError, match="has no solution"), explained(tiny_model("llama")):
        torch.linalg.solve(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"^as it was$"), explained(tiny_model("llama")):
        raise ValueError("as it was")
    assert issubclass(LinAlgError, RuntimeError)
    assert non_finite_weights(tiny_model("llama")) == []


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    base = tiny_model("llama")
    base.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"has embeddings of 20 tokens\. Pass the model's own tokenizer"):
        EditModel(base, fast_config(layer=1), tokenizer)


def test_a_fact_with_a_token_that_the_model_lacks_is_refused(tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<louvre>"])  # without resize_token_embeddings
    model = EditModel(tiny_model("llama"), fast_config(layer=1), more)
    with pytest.raises(ValueError, match=r"'I am in <louvre>' with token \d+, but the model has embeddings"):
        model.edit("I am in <louvre>", subject="<louvre>", target_new="Rome")
    assert model.edit(TOWER).facts


def test_any_text_with_a_token_that_the_model_lacks_is_refused(tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<louvre>"])
    louvre = EditRequest("I am in <louvre>", "<louvre>", "Rome", "Paris")
    lacks = r"the token \d+, but the model has embeddings of 200 tokens\. Pass the model's own tokenizer"
    with pytest.raises(ValueError, match=lacks):
        get_edit_model(tiny_model("llama"), fast_config(layer="lga", proxy=[louvre]), more)
    model = EditModel(tiny_model("llama"), fast_config(layer=1), more)
    model.edit(replace(TOWER, paraphrases=["<louvre> The Eiffel Tower"]))
    for measured in ([louvre], None):
        with pytest.raises(ValueError, match=lacks):
            model.evaluate(measured)
    with pytest.raises(IndexError):  # the user's own calls are those of the model
        model(input_ids=torch.tensor([[200]]))
