"""From the config to the layers: every selector gives the same kind of answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.config import SCORED_SELECTORS
from goldenedit.layer_selection import LayerSelection, select
from goldenedit.layer_selection.auto import PLATEAU, auto_scores
from models import NUM_LAYERS, tiny_model
from zoo import zoo_model

FACTS = [
    EditRequest(
        f"{subject} is in the city of",
        subject,
        "Rome",
        "Paris",
        paraphrases=(f"One finds {subject} in",),
        neighborhood=("The Louvre is in", "Berlin is in the city of"),
    )
    for subject in ("The Eiffel Tower", "The Kingdom of Cambodia", "the company")
]
CONFIG = EditConfig(layer=0, contexts=2, steps=4, covariance_tokens=300, proxy=FACTS)


def selected(tokenizer, **options) -> tuple[EditConfig, LayerSelection]:
    model = get_edit_model(tiny_model("llama"), replace(CONFIG, **options), tokenizer)
    assert model.layer_selection is not None
    return model.edit_config, model.layer_selection


@pytest.mark.parametrize("selector", SCORED_SELECTORS)
def test_every_selector_says_what_it_found_and_what_it_cost(selector, tokenizer):
    config, found = selected(tokenizer, layer=selector, tukey_kappa=float("inf"))
    assert found.selector == selector
    assert found.scores == config.layer_scores
    assert len(found.scores) == NUM_LAYERS
    assert found.layers == [config.target_layer] == [max(range(NUM_LAYERS), key=found.scores.__getitem__)]
    assert found.facts == len(FACTS)
    assert found.cost.seconds > 0
    assert found.forward_equivalents > 1
    assert LayerSelection.from_dict(found.to_dict()) == found
    assert selected(tokenizer, layer=selector, tukey_kappa=float("inf"))[1] == found  # from the cache, with its cost


def test_auto_takes_the_layer_that_gradients_single_out_among_the_good_ones(tokenizer):
    _, auto = selected(tokenizer, layer="auto", tukey_kappa=float("inf"))
    response, lga = (
        selected(tokenizer, layer=name, tukey_kappa=float("inf"))[1] for name in ("linear_response", "lga")
    )
    assert auto.cost.flops == response.cost.flops + lga.cost.flops
    best = max(response.scores)
    good = [layer for layer in range(NUM_LAYERS) if response.scores[layer] >= (1 - PLATEAU) * best]
    assert auto.layers == [max(good, key=lga.scores.__getitem__)]


@pytest.mark.parametrize(
    ("response", "gradients", "golden"),
    [
        ([0.5, 0.799, 0.80, 0.798, 0.3], [9.0, 1.0, 2.0, 3.0, 9.0], 3),
        ([0.5, 0.799, 0.80, 0.78, 0.3], [9.0, 3.0, 2.0, 9.0, 9.0], 1),  # a layer below the plateau stays out
        ([0.5, 0.799, 0.80, 0.798, 0.3], [9.0, -1.0, -2.0, -3.0, 9.0], 2),  # gradients say nothing: the best response
        ([0.5, 0.799, float("nan"), 0.80, 0.3], [1.0, 2.0, 9.0, 1.0, 1.0], 1),
    ],
)
def test_scores_of_auto_are_cut_off_at_the_plateau(response, gradients, golden):
    scores = auto_scores(torch.tensor(response).double(), torch.tensor(gradients).double(), float("inf"))
    assert int(scores.nan_to_num(-1).argmax()) == golden
    assert scores[~scores.isnan()].max() <= max(value for value in response if value == value) + 1e-6


def test_a_layer_outside_the_fence_of_gradients_is_not_singled_out():
    response = torch.full((8,), 0.8).double()
    gradients = torch.tensor([1.0, 1.1, 1.2, 90.0, 1.3, 1.0, 1.1, 1.2]).double()
    assert int(auto_scores(response, gradients, 1.0).argmax()) == 4
    assert int(auto_scores(response, gradients, float("inf")).argmax()) == 3


def test_a_random_layer_is_one_of_the_models_and_the_same_for_a_seed(tokenizer):
    drawn = [selected(tokenizer, layer="random", seed=seed)[1].layers for seed in range(12)]
    assert drawn == [selected(tokenizer, layer="random", seed=seed)[1].layers for seed in range(12)]
    assert {layer for layers in drawn for layer in layers} == set(range(NUM_LAYERS))


def test_the_sweep_has_the_score_of_the_edits_themselves(tokenizer):
    _, found = selected(tokenizer, layer="sweep")
    for layer in range(NUM_LAYERS):
        parts = []
        for fact in FACTS:
            model = EditModel(tiny_model("llama"), replace(CONFIG, layer=layer), tokenizer)
            model.edit(fact)
            parts.append(model.evaluate([fact]).edited["probability"].scores)
        means = [
            sum(values) / len(FACTS)
            for values in zip(*((p.efficacy, p.paraphrase, p.neighborhood) for p in parts), strict=True)
        ]
        assert found.scores[layer] == pytest.approx(3 / sum(1 / mean for mean in means) if min(means) else 0.0)


def test_a_sweep_that_was_stopped_costs_what_all_of_it_cost(tokenizer, monkeypatch, tmp_path):
    plain, calls = select.sweep, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            return plain(*arguments, **options)
        plain(*arguments, **options, layers=[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(select, "sweep", stopped)
    with pytest.raises(KeyboardInterrupt):
        selected(tokenizer, layer="sweep")
    resumed = selected(tokenizer, layer="sweep")[1]
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    assert selected(tokenizer, layer="sweep")[1].cost.flops == resumed.cost.flops


@pytest.mark.parametrize("selector", SCORED_SELECTORS)
def test_layers_may_differ_in_width(selector, tokenizer):
    base = zoo_model("deepseek_v2")  # a dense first layer, then experts with a narrower shared one
    model = EditModel(base, replace(CONFIG, layer=selector), tokenizer)
    model.select_layer()
    assert len({model.architecture.shape(base, layer) for layer in range(model.architecture.num_layers)}) == 2
    assert all(score is not None for score in model.edit_config.layer_scores)
