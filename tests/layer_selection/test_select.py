"""From the config to the layers: every selector gives the same kind of answer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.cache import cache_dir
from goldenedit.layer_selection import SELECTORS, LayerSelection, brute_force
from goldenedit.lm import covariance
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
SCORED = [name for name in SELECTORS.names() if SELECTORS.get(name).is_scored]
CONFIG = EditConfig(layer=0, contexts=2, steps=4, covariance_tokens=300, proxy=FACTS)


def selected(tokenizer, **options) -> tuple[EditConfig, LayerSelection]:
    model = get_edit_model(tiny_model("llama"), replace(CONFIG, **options), tokenizer)
    assert model.layer_selection is not None
    return model.edit_config, model.layer_selection


@pytest.mark.parametrize("selector", SCORED)
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


def test_auto_is_the_selector_that_measured_best(tokenizer):
    _, auto = selected(tokenizer, layer="auto")
    assert replace(auto, selector="key_response") == selected(tokenizer, layer="key_response")[1]


def test_a_random_layer_is_one_of_the_models_and_the_same_for_a_seed(tokenizer):
    drawn = [selected(tokenizer, layer="random", seed=seed)[1].layers for seed in range(12)]
    assert drawn == [selected(tokenizer, layer="random", seed=seed)[1].layers for seed in range(12)]
    assert {layer for layers in drawn for layer in layers} == set(range(NUM_LAYERS))


def test_the_sweep_has_the_score_of_the_edits_themselves(tokenizer):
    _, found = selected(tokenizer, layer="sweep")
    for layer in range(NUM_LAYERS):
        parts = []
        for fact in FACTS:
            model = EditModel(tiny_model("llama"), replace(CONFIG, layer=layer, target_layer=None), tokenizer)
            model.edit(fact)
            parts.append(model.evaluate([fact]).edited["probability"].scores)
        means = [
            sum(values) / len(FACTS)
            for values in zip(*((p.efficacy, p.paraphrase, p.neighborhood) for p in parts), strict=True)
        ]
        assert found.scores[layer] == pytest.approx(3 / sum(1 / mean for mean in means) if min(means) else 0.0)


def test_a_sweep_that_was_stopped_costs_what_all_of_it_cost(tokenizer, monkeypatch, tmp_path):
    plain, calls = brute_force.sweep, []

    def stopped(lm, facts, config, store, options):
        calls.append(1)
        if len(calls) > 1:
            return plain(lm, facts, config, store, options)
        plain(lm, facts, config, store, replace(options, layers=[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(brute_force, "sweep", stopped)
    with pytest.raises(KeyboardInterrupt):
        selected(tokenizer, layer="sweep")
    resumed = selected(tokenizer, layer="sweep")[1]
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    assert selected(tokenizer, layer="sweep")[1].cost.flops == resumed.cost.flops


@pytest.mark.parametrize("selector", SCORED)
def test_layers_may_differ_in_width(selector, tokenizer):
    base = zoo_model("deepseek_v2")  # a dense first layer, then experts with a narrower shared one
    model = EditModel(base, replace(CONFIG, layer=selector), tokenizer)
    model.select_layer()
    assert len({model.architecture.shape(base, layer) for layer in range(model.architecture.num_layers)}) == 2
    assert all(score is not None for score in model.edit_config.layer_scores)


@pytest.mark.parametrize("selector", SCORED)
def test_where_the_cache_cannot_be_written_all_is_as_it_is_where_it_can(selector, tokenizer, tmp_path, monkeypatch):
    passes, compute = [], covariance.second_moments

    def counted(*arguments, **options):
        passes.append(arguments)
        return compute(*arguments, **options)

    monkeypatch.setattr(covariance, "second_moments", counted)
    models, needed = [], []
    for place in ("folder", "file"):
        (tmp_path / "file").touch()
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / place))
        model = EditModel(tiny_model("llama"), replace(CONFIG, layer=selector), tokenizer)
        if place == "file":
            with pytest.warns(UserWarning, match="layer_scores cannot be written .* GOLDENEDIT_CACHE"):
                model.select_layer()
        else:
            model.select_layer()
        needed.append(len(passes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.edit(FACTS[0])
        models.append(model)
    assert needed[1] - needed[0] <= needed[0] + 1  # not a pass a layer; the edit's own is cached in the first
    assert models[0].edit_config.layer_scores == models[1].edit_config.layer_scores
    deltas = [next(iter(model.edits["edit_1"].deltas.values())) for model in models]
    assert torch.equal(deltas[0].A, deltas[1].A)
    assert torch.equal(deltas[0].B, deltas[1].B)


def kept(folder: str) -> set[str]:
    """Names of what a folder of the cache holds."""
    return {path.name for path in (cache_dir() / folder).iterdir()}


def beginning_with_a_token(tokenizer):
    changed = copy.deepcopy(tokenizer)
    token = changed.eos_token
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, changed.eos_token_id)]
    )
    return changed


@pytest.mark.parametrize("selector", SCORED)
def test_scores_found_before_the_tokenizer_began_texts_otherwise_are_not_used(selector, tokenizer):
    _, plain = selected(tokenizer, layer=selector)
    there = kept("layer_scores")
    _, found = selected(beginning_with_a_token(tokenizer), layer=selector)
    assert len(kept("layer_scores") - there) == 1
    assert found.cost.seconds != plain.cost.seconds  # of another run
    everything = kept("layer_scores")
    assert selected(tokenizer, layer=selector)[1] == plain
    assert kept("layer_scores") == everything


def test_scores_of_another_version_of_the_algorithm_are_not_used(tokenizer, monkeypatch):
    _, plain = selected(tokenizer, layer="lga")
    there = kept("layer_scores")
    newer = replace(SELECTORS.get("lga"), version=SELECTORS.get("lga").version + 1)
    monkeypatch.setitem(SELECTORS._records, "lga", newer)
    _, found = selected(tokenizer, layer="lga")
    assert len(kept("layer_scores") - there) == 1
    assert found.scores == plain.scores
    assert found.cost.seconds != plain.cost.seconds


def test_statistics_of_another_tokenizer_or_algorithm_are_not_used(tokenizer, monkeypatch):
    def moment(tokenizer):
        model = EditModel(tiny_model("llama"), replace(CONFIG, layer=1), tokenizer)
        return model.lm.statistics(model.edit_config, [1])[1].second_moment

    plain = moment(tokenizer)
    there = kept("key_statistics")
    assert (moment(beginning_with_a_token(tokenizer)) - plain).norm() > 0.01 * plain.norm()
    everything = kept("key_statistics")
    assert len(everything - there) == 1
    monkeypatch.setattr(covariance, "_VERSION", covariance._VERSION + 1)
    assert (moment(tokenizer) - plain).norm() == 0
    assert len(kept("key_statistics") - everything) == 1
