"""The next edit is made as the config says by then, and what came of it is told."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest

from goldenedit import get_edit_model
from models import NUM_LAYERS, tiny_model
from tiny_edits import MERKEL, TOWER, fast_config

# What stock PEFT 0.21 calls and says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

FACTS = [TOWER, MERKEL]
config = partial(fast_config, method="r-rome")
DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture
def base():
    return tiny_model("llama")


def test_one_config_serves_two_models(tokenizer):
    shared = config(layer="lga", proxy=FACTS)
    first = get_edit_model(tiny_model("llama"), shared, tokenizer)
    layer, scores = first.edit_config.target_layer, list(first.edit_config.layer_scores)
    assert (shared.target_layer, shared.layer_scores) == (layer, scores)
    shared.target_layer = (layer + 1) % NUM_LAYERS
    second = get_edit_model(tiny_model("llama", seed=1), config(layer=2), tokenizer)
    second.edit_config = shared
    other = get_edit_model(tiny_model("llama", seed=1), shared, tokenizer)
    assert (first.edit_config.target_layer, first.edit_config.layer_scores) == (layer, scores)
    assert list(first.edit(TOWER).deltas) == [DOWN.format(layer)]
    assert list(other.edit(TOWER).deltas) == [DOWN.format(other.edit_config.target_layer)]
    other.edit_config.steps = 1
    assert first.edit_config.steps == 4


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"layer": 2}, [2]),
        ({"layer": [0, 2]}, [0, 2]),
        ({"target_layer": 2}, [2]),
        ({"target_layer": None, "layer": 0}, [0]),
        ({"method": "memit", "layer": 0}, [0]),
    ],
)
@pytest.mark.parametrize("selected", ["by hand", "by lga"])
def test_the_next_edit_is_made_as_the_config_says_by_then(base, tokenizer, changes, layers, selected):
    options = {"layer": "lga", "proxy": FACTS} if selected == "by lga" else {}
    model = get_edit_model(base, config(**options), tokenizer)
    model.edit(MERKEL)
    for name, value in changes.items():
        setattr(model.edit_config, name, value)
    edit = model.edit(TOWER)
    assert list(edit.deltas) == [DOWN.format(layer) for layer in layers]
    assert edit.layers == tuple(layers)
    assert edit.config.target_layers == layers
    assert edit.config.method == changes.get("method", "r-rome")


def test_without_a_target_layer_the_selector_runs_again(base, tokenizer):
    model = get_edit_model(base, config(layer="lga", proxy=FACTS), tokenizer)
    layer = model.edit_config.target_layer
    model.edit_config.target_layer = None
    assert model.edit(TOWER).layers == (layer,)
    model.edit_config.layer = 2
    model.edit_config.layer = "lga"
    assert model.edit(MERKEL).layers == (layer,)


@pytest.mark.parametrize(
    ("layer", "changes"),
    [
        ("lga", {"layer_pattern": "window", "pattern_layers": 2}),
        ("lga", {"lga_loss": "answer"}),
        ("lga", {"tukey_kappa": 0.0}),
        ("lga", {"proxy_size": 1}),
        ("lga", {"proxy": [MERKEL]}),
        ("random", {"seed": 3}),
        ("auto", {"method": "memit"}),
    ],
)
def test_an_option_that_decides_the_layer_makes_the_selector_run_again(base, tokenizer, layer, changes):
    model = get_edit_model(base, config(layer=layer, proxy=FACTS), tokenizer)
    for name, value in changes.items():
        setattr(model.edit_config, name, value)
        assert (model.edit_config.target_layer, model.edit_config.layer_scores) == (None, None)
    expected = get_edit_model(tiny_model("llama"), config(layer=layer, **{"proxy": FACTS, **changes}), tokenizer)
    model.edit(TOWER)
    assert model.edit_config == expected.edit_config


def test_other_options_leave_the_chosen_layer(base, tokenizer):
    model = get_edit_model(base, config(layer="lga", proxy=FACTS), tokenizer)
    chosen = model.edit_config.target_layer, model.edit_config.layer_scores
    for name, value in {"steps": 5, "seed": 2, "method": "memit", "layer": "lga", "proxy_size": 100}.items():
        setattr(model.edit_config, name, value)
    assert (model.edit_config.target_layer, model.edit_config.layer_scores) == chosen


def test_an_array_of_layers_can_be_set(base, tokenizer):
    model = get_edit_model(base, config(), tokenizer)
    model.edit_config.layer = np.array([0, 2])
    assert model.edit_config.target_layers == [0, 2]


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("layer", "nowhere", "layer selector 'nowhere'"),
        ("layer", -1, "layer"),
        ("target_layer", [1, 1], "target_layer"),
        ("method", "magic", "magic"),
        ("steps", 0, "steps"),
        ("clamp", float("nan"), "clamp"),
        ("regularizer", "magic", "regularizer"),
    ],
)
def test_a_bad_value_is_refused_by_its_name_and_changes_nothing(base, tokenizer, option, value, error):
    model = get_edit_model(base, config(layer="lga", proxy=FACTS), tokenizer)
    before = copy.deepcopy(model.edit_config)
    with pytest.raises(ValueError, match=error):
        setattr(model.edit_config, option, value)
    assert model.edit_config == before
    model.edit(TOWER)


def test_a_layer_that_is_not_there_is_named_by_the_next_edit(base, tokenizer):
    edit_model = get_edit_model(base, config(), tokenizer)
    edit_model.edit_config.layer = 99
    with pytest.raises(ValueError, match="Layer 99 cannot be edited"):
        edit_model.edit(TOWER)
    assert edit_model.edits == {}
    edit_model.edit_config.layer = 1
    edit_model.edit(TOWER)


def test_an_edit_that_does_not_take_is_told(base, tokenizer, caplog):
    model = get_edit_model(base, config(steps=1, lr=1e-3, layer=2), tokenizer)
    edit = model.edit(FACTS)
    assert not any(fact.takes for fact in edit.facts)
    told = [record.getMessage() for record in caplog.records if "does not take" in record.getMessage()]
    for fact, text in zip(edit.facts, told, strict=True):
        assert repr(fact.request.shown) in text
        assert f"from {fact.probability_before:.4f} to {fact.probability_after:.4f}" in text
        assert "another layer (this was [2]" in text
        assert "EditConfig.steps" in text


def test_an_edit_that_takes_is_not_told(base, tokenizer, caplog):
    model = get_edit_model(base, config(method="lora", finetune_steps=100), tokenizer)
    edit = model.edit(TOWER.prompt, TOWER.subject, "Berlin")
    assert edit.facts[0].takes
    assert "does not take" not in caplog.text
