"""From the config to the layers: every selector gives the same kind of answer."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.cache import cache_dir
from goldenedit.editors import EDITORS, LowRankDelta, editor
from goldenedit.layer_selection import SELECTORS, LayerSelection, brute_force, selector
from goldenedit.lm import LanguageModel, covariance
from models import NUM_LAYERS, tiny_model
from plugins import restore_registries
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
    golden = {"layer_pattern": "golden", **options}
    model = get_edit_model(tiny_model("llama"), replace(CONFIG, **golden), tokenizer)
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
    asks_nothing = {"method": "null-space", "phrasings": "none", "kept_questions": 0}  # answers are asked only once
    sweep = partial(selected, tokenizer, layer="sweep", **asks_nothing)
    with pytest.raises(KeyboardInterrupt):
        sweep()
    resumed = sweep()[1]
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    assert sweep()[1].cost.flops == resumed.cost.flops


@pytest.mark.parametrize("selector", SCORED)
def test_layers_may_differ_in_width(selector, tokenizer):
    base = zoo_model("deepseek_v2")  # a dense first layer, then experts with a narrower shared one
    model = EditModel(base, replace(CONFIG, layer=selector), tokenizer)
    model.select_layer()
    assert len({model.architecture.shape(base, layer) for layer in range(model.architecture.num_layers)}) == 2
    assert all(score is not None for score in model.edit_config.layer_scores)


@pytest.mark.parametrize("selector", SCORED)
def test_where_the_cache_cannot_be_written_all_is_as_it_is_where_it_can(selector, tokenizer, tmp_path, monkeypatch):
    passes = Counter()

    def counted(name, compute, *arguments, **options):
        passes[name] += 1
        return compute(*arguments, **options)

    for name in ("second_moments", "input_moments"):
        monkeypatch.setattr(covariance, name, partial(counted, name, getattr(covariance, name)))
    models = []
    for place in ("folder", "file"):
        (tmp_path / "file").touch()
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / place))
        model = EditModel(tiny_model("llama"), replace(CONFIG, layer=selector), tokenizer)
        if place == "file":
            with pytest.warns(UserWarning, match="layer_scores cannot be written .* GOLDENEDIT_CACHE"):
                model.select_layer()
        else:
            model.select_layer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.edit(FACTS[0])
        models.append(model)
    assert set(passes.values()) == {2}  # one pass for each model, for the selection and the edit together
    assert models[0].edit_config.layer_scores == models[1].edit_config.layer_scores
    first, second = (model.edits["edit_1"].deltas for model in models)
    assert first.keys() == second.keys()
    for path, delta in first.items():
        assert torch.equal(delta.A, second[path].A)
        assert torch.equal(delta.B, second[path].B)


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


# ---------------------------------------------------------------------- selectors and editors of other packages


@pytest.fixture
def registered(monkeypatch):
    restore_registries(monkeypatch)


def favoring(layer: int):
    def scores(lm, facts, config):
        return torch.eye(lm.architecture.num_layers)[layer]

    return scores


def test_selectors_that_one_function_makes_have_scores_of_their_own(tokenizer, registered):
    for layer in range(NUM_LAYERS):
        selector(f"favors-{layer}")(favoring(layer))
    assert [selected(tokenizer, layer=f"favors-{n}")[1].layers for n in range(NUM_LAYERS)] == [[0], [1], [2]]


def test_a_partial_function_can_be_a_selector(tokenizer, registered):
    selector("partial")(partial(lambda layer, lm, facts, config: favoring(layer)(lm, facts, config), 1))
    assert selected(tokenizer, layer="partial")[1].layers == [1]


@pytest.mark.parametrize("layer", ["sweep", "key_response"])
def test_scores_of_another_version_of_the_editor_are_not_used(layer, tokenizer, registered, monkeypatch):
    calls = []

    def counted(problem):
        calls.append(problem)
        return EDITORS.get("rome").function(problem)

    rome = EDITORS.get("rome")
    for version, is_measured in ((1, True), (1, False), (2, True)):
        calls.clear()
        monkeypatch.setitem(
            EDITORS._records, "counted", replace(rome, name="counted", function=counted, version=version)
        )
        selected(tokenizer, layer=layer, method="counted")
        assert bool(calls) == is_measured


def test_scores_are_kept_for_the_tokens_of_the_facts(tokenizer):
    invented = [replace(fact, prompt=fact.prompt.replace("is in", "is Zorblax in")) for fact in FACTS]
    selected(tokenizer, layer="lga", proxy=invented)
    there = kept("layer_scores")
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["Zorblax"])
    base = tiny_model("llama")
    base.resize_token_embeddings(len(changed))
    plain = kept("layer_scores")
    assert plain == there
    lm = LanguageModel(base, tokenizer)
    assert lm.cache_key(1, tokens=lm.tokens_of(invented)) != LanguageModel(base, changed, weights=lm.weights).cache_key(
        1, tokens=LanguageModel(base, changed).tokens_of(invented)
    )


def test_a_chat_template_that_is_set_later_counts(tokenizer):
    model = EditModel(tiny_model("llama"), CONFIG, copy.deepcopy(tokenizer))
    model.select_layer()
    before, key = model.lm, model.lm.cache_key(1)
    model.select_layer()
    assert model.lm is before
    model.tokenizer.chat_template = "{{ messages[0].content }}"
    model.select_layer()
    assert model.lm.cache_key(1) != key


@pytest.mark.parametrize(
    ("layer", "method", "count"), [("sweep", "ft-m", 0), ("sweep", "unread", 0), ("auto", "ft-m", 1)]
)
def test_statistics_are_computed_only_where_they_are_read(layer, method, count, tokenizer, registered, monkeypatch):
    passes, compute = [], covariance.second_moments
    monkeypatch.setattr(
        covariance, "second_moments", lambda *args, **kwargs: passes.append(1) or compute(*args, **kwargs)
    )
    editor("unread")(lambda problem: LowRankDelta(problem.keys.T, problem.residuals))
    selected(tokenizer, layer=layer, method=method, finetune_steps=1, anchor_bare_prompt=False)
    assert len(passes) == count


def test_a_selector_without_scores_reads_the_facts_and_returns_layers(tokenizer, registered):
    selector("counting", is_scored=False)(lambda lm, facts, config: [len(facts) - 1])
    assert selected(tokenizer, layer="counting")[1].layers == [len(FACTS) - 1]
    selector("wrong", is_scored=False)(lambda lm, facts, config: 1)
    with pytest.raises(ValueError, match=r"selector 'wrong' returned 1\. Return a list"):
        selected(tokenizer, layer="wrong")
