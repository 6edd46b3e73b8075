"""EditConfig: what it refuses, and JSON both ways."""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from goldenedit.config import EditConfig
from goldenedit.editors import LowRankDelta, Problem, TrainingOptions, editor, option, relative
from goldenedit.registry import UnknownNameError
from goldenedit.requests import EditRequest
from plugins import restore_registries

FACTS = [
    EditRequest("{} is in", "The Eiffel Tower", "Rome", "Paris", ("You find The Eiffel Tower in",)),
    EditRequest("{} is in", "The Louvre", "Rome"),
]


@pytest.mark.parametrize(
    "config",
    [
        EditConfig(),
        EditConfig(layer=3, method="rome"),
        EditConfig(layer=[4, 2], covariance="identity", anchor_bare_prompt=False),
        EditConfig(proxy=FACTS, proxy_size=None),
        EditConfig(proxy="facts.jsonl", tukey_kappa=math.inf, lga_loss="answer"),
        EditConfig(layer="published", target_modules="model.layers.{}.mlp.down_proj"),
        EditConfig(target_layer=2, layer_scores=[None, 0.5, 1.5]),
        EditConfig(layer=2, answer_layer=5, kept_questions=12),
    ],
    ids=lambda config: str(config.layer),
)
def test_a_config_survives_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert EditConfig.from_dict(json.loads(text)) == config


def test_a_proxy_may_be_given_as_records():
    assert EditConfig(proxy=[fact.to_dict() for fact in FACTS]).proxy == FACTS


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"layer": np.int64(3)}, {"layer": 3}),
        ({"layer": np.array([2, 1])}, {"layer": [1, 2]}),
        ({"layer": [np.int32(2), 1]}, {"layer": [1, 2]}),
        ({"layer": range(1, 3)}, {"layer": [1, 2]}),
        ({"layer": torch.tensor(3)}, {"layer": 3}),
        ({"target_layer": np.int64(3)}, {"target_layer": 3}),
        ({"steps": np.int64(3), "lr": np.float32(0.5), "seed": np.uint8(1)}, {"steps": 3, "lr": 0.5, "seed": 1}),
        ({"proxy": Path("facts.jsonl")}, {"proxy": "facts.jsonl"}),
        ({"covariance": Path("texts.txt")}, {"covariance": "texts.txt"}),
    ],
)
def test_paths_and_numbers_of_numpy_are_kept_as_json_has_them(given, plain):
    assert EditConfig(**given) == EditConfig(**plain)
    assert json.loads(json.dumps(EditConfig(**given).to_dict())) == json.loads(
        json.dumps(EditConfig(**plain).to_dict())
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "mend"),
        ("layer", np.float64(1.0)),
        ("layer", np.array([1.0])),
        ("layer", np.array([])),
        ("layer", np.bool_(True)),
        ("layer", np.int64(-1)),
        ("layer", "middle"),
        ("layer", -1),
        ("layer", True),
        ("layer", [1, True]),
        ("layer", [1, -2]),
        ("layer", []),
        ("layer", [2, 2]),
        ("layer", ["1"]),
        ("layer", 1.5),
        ("layer", None),
        ("lga_loss", "mean"),
        ("lr", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "0.5"),
        ("lr", None),
        ("clamp", 0.0),
        ("clamp", math.nan),
        ("clamp", math.inf),
        ("steps", 0),
        ("steps", 2.0),
        ("steps", True),
        ("contexts", 0),
        ("context_length", 0),
        ("batch_size", 0),
        ("contrast", -1),
        ("covariance_tokens", 0),
        ("proxy_size", 0),
        ("kl_factor", -1),
        ("weight_decay", math.nan),
        ("stop_loss", -0.1),
        ("ridge", -1e-9),
        ("tukey_kappa", math.nan),
        ("contrast_weight", -1.0),
        ("proxy", 3),
        ("covariance", 3),
        ("covariance", ""),
        ("seed", "zero"),
        ("seed", 0.5),
        ("target_modules", 3),
        ("answer_layer", -1),
        ("answer_layer", 2.5),
        ("answer_layer", True),
        ("answer_layer", "last"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        EditConfig(**{option: value})


@pytest.mark.parametrize("value", [None, "wide", [], True])
def test_a_record_with_a_bad_fence_is_refused_by_name(value):
    with pytest.raises(ValueError, match="tukey_kappa"):
        EditConfig.from_dict({"tukey_kappa": value})


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ValueError, match="layr"):
        EditConfig.from_dict({"layr": 3})


def test_every_option_has_a_help():
    assert all(entry.metadata.get("help") for entry in fields(EditConfig))


def test_layers_are_sorted_and_are_the_targets():
    config = EditConfig(layer=[5, 1, 3])
    assert config.layer == config.target_layer == config.target_layers == [1, 3, 5]


@pytest.mark.parametrize("layer", [3, [3], (3,)])
def test_one_layer_is_a_number(layer):
    config = EditConfig(layer=layer)
    assert config.layer == config.target_layer == 3
    assert config.target_layers == [3]


@pytest.mark.parametrize("layer", ["lga", "published"])
def test_no_layer_is_a_target_before_the_selector_has_run(layer):
    assert EditConfig(layer=layer).target_layer is None
    assert EditConfig(layer=layer).target_layers == []


def test_constants_without_a_value_have_the_default_of_their_units():
    relative, published = EditConfig("alphaedit"), EditConfig("alphaedit", relative_constants=False)
    assert (relative.constant("null_space_ridge"), published.constant("null_space_ridge")) == (0.2, 10.0)
    assert EditConfig("memit", relative_constants=False).constant("covariance_weight") == 15_000
    assert EditConfig("ultraedit", ultraedit_lr=0.5, relative_constants=False).constant("ultraedit_lr") == 0.5
    with pytest.raises(ValueError, match="null_space_threshold must be a number above"):
        EditConfig(null_space_threshold=0.0)


# ---------------------------------------------------------------------- editors of other packages


@dataclass(kw_only=True)
class Mine:
    """Options of an editor of another package; `ridge` and `steps` are names of fields of EditConfig too."""

    ridge: float | None = relative(0.2, published=7.0, unit="key energy", help="How strict.")
    steps: int = option(2, least=1, whole=True, help="How often.")


@pytest.fixture
def mine(monkeypatch):
    """An editor called "mine"."""
    restore_registries(monkeypatch)

    @editor("mine", options=Mine)
    def mine(problem: Problem) -> LowRankDelta:
        return LowRankDelta(problem.options.ridge * problem.keys.T, problem.residuals)


@pytest.mark.usefixtures("mine")
def test_options_of_another_editor_are_not_those_of_the_config_with_the_same_name():
    given = EditConfig(method="mine", options={"ridge": 0.5})
    assert given.editor_options == {"ridge": 0.5, "steps": 2}
    assert given.options == {"ridge": 0.5}
    assert (given.ridge, given.steps) == (EditConfig().ridge, EditConfig().steps)
    assert (given.constant("ridge"), given.constant("steps")) == (0.5, 2)
    other = EditConfig(method="mine", ridge=0.7, steps=9)
    assert other.editor_options == {"ridge": None, "steps": 2}
    assert (other.constant("ridge"), other.ridge, other.steps) == (0.2, 0.7, 9)
    assert replace(other, relative_constants=False).constant("ridge") == 7.0
    assert EditConfig.from_dict(json.loads(json.dumps(given.to_dict()))) == given


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rigde": 0.5}, r"'mine' has no option 'rigde'\. Its options are \['ridge', 'steps'\]"),
        ({"clamp": 4.0}, "'mine' has no option 'clamp'"),
        ({"ridge": -1.0}, r"EditConfig\(method='mine'\)\.options\.ridge must be a number above"),
        ({"steps": 1.5}, r"options\.steps must be a whole number"),
        ([("ridge", 0.5)], "options must map names to values"),
    ],
)
def test_what_the_editor_does_not_take_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        EditConfig(method="mine", options=options)


def test_an_option_of_a_built_in_editor_is_its_keyword_wherever_it_is_given():
    given = EditConfig("memit", options={"covariance_weight": 2.0})
    assert given == EditConfig("memit", covariance_weight=2.0)
    assert given.options == {}
    with pytest.raises(ValueError, match=r"options\.covariance_weight must be a number of at least 0"):
        EditConfig("memit", options={"covariance_weight": -1.0})
    with pytest.raises(ValueError, match=r"'emmet' has no option 'covariance_weight'\. Its options are \['gram_ridge'"):
        EditConfig("emmet", options={"covariance_weight": 2.0})


def test_options_are_those_of_each_config():
    options = {"covariance_weight": 2.0}
    EditConfig("memit", options=options)
    assert options == {"covariance_weight": 2.0}


def record_of_a_stranger() -> dict:
    selected = {"layer": "theirs", "layer_pattern": "window", "target_layer": [1, 2], "layer_scores": [0.5, 1.5, None]}
    return EditConfig(layer="lga", seed=3).to_dict() | selected | {"method": "gone", "options": {"ridge": [1, 2]}}


def test_a_record_is_read_where_its_editor_and_its_selector_are_not_installed():
    record = record_of_a_stranger()
    with pytest.raises(UnknownNameError):
        EditConfig.from_dict(record)
    config = EditConfig.read(record)
    assert (config.method, config.options, config.layer) == ("gone", {"ridge": [1, 2]}, "theirs")
    assert (config.target_layers, config.layer_pattern, config.seed) == ([1, 2], "window", 3)
    assert config.to_dict() == record
    with pytest.raises(UnknownNameError, match=r"Unknown editor 'gone'.*install the package"):
        _ = config.editor
    with pytest.raises(UnknownNameError, match=r"Unknown layer selector 'theirs'.*install the package"):
        _ = config.selector


@pytest.mark.parametrize("name", [entry.name for entry in fields(EditConfig) if entry.type == "bool"])
@pytest.mark.parametrize("value", ["no", None, 0, 1.0], ids=repr)
def test_a_switch_takes_only_true_and_false(name, value):
    assert isinstance(getattr(EditConfig(), name), bool)
    with pytest.raises(ValueError, match=f"EditConfig.{name} must be True or False"):
        EditConfig(**{name: value})


@pytest.mark.parametrize("method", ["mend", "alpha edit"])
def test_an_unknown_method_is_told_with_what_there_is(method):
    with pytest.raises(UnknownNameError, match=rf"Unknown method '{method}' in EditConfig\..* Use one of .*'r-rome'"):
        EditConfig(method)


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "Gone!"), ("method", 3), ("layer", "no such"), ("layer", [2, 2]), ("steps", 0), ("stepz", 1)],
)
def test_what_means_nothing_is_refused_in_a_record_too(name, value):
    with pytest.raises(ValueError, match=name):
        EditConfig.read(EditConfig().to_dict() | {name: value})


def test_a_record_of_what_is_installed_is_read_as_any_other():
    config = EditConfig("memit", layer=2, covariance_weight=3.0)
    assert EditConfig.read(config.to_dict()) == config


# ---------------------------------------------------------------------- options of other packages


@dataclass(slots=True)
class Slotted:
    """Options without a dictionary."""

    weight: float = option(1.0, help="A weight.")
    count: int = option(3, help="A number.", whole=True)


@dataclass(kw_only=True)
class Longer(TrainingOptions):
    """Options of an editor that trains longer than others."""

    finetune_steps: int = option(50, least=1, whole=True, help="Steps.")
    momentum: float = option(0.9, help="Momentum.", least=0.0)


@pytest.fixture
def theirs(monkeypatch):
    restore_registries(monkeypatch)
    editor("slotted", options=Slotted)(lambda problem: None)
    editor("longer", options=Longer, learns="training")(lambda problem: None)


def test_options_may_have_slots_and_numpy_numbers(theirs):
    config = EditConfig("slotted", options={"weight": np.float32(2), "count": np.int64(5)})
    assert config.editor_options == {"weight": 2.0, "count": 5}
    assert EditConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2.5}, "count must be a whole number, got 2.5"),
        ({"weight": math.nan}, "weight must be a number, got nan"),
    ],
)
def test_options_without_bounds_must_be_numbers(theirs, options, message):
    with pytest.raises(ValueError, match=message):
        EditConfig("slotted", options=options)


def test_keywords_reach_an_editor_that_inherits_their_options(theirs):
    assert EditConfig("longer").editor_options == {
        "finetune_steps": 50,
        "finetune_lr": None,
        "finetune_stop_loss": 0.01,
        "momentum": 0.9,
    }
    config = EditConfig("longer", finetune_steps=99, finetune_lr=0.1, options={"momentum": 0.5})
    assert (config.editor_options["finetune_steps"], config.editor_options["finetune_lr"]) == (99, 0.1)
    assert EditConfig("longer", finetune_steps=99, options={"finetune_steps": 7}).editor_options["finetune_steps"] == 7


def test_a_built_in_option_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match="covariance_weight is given twice, as 2 and in options as 3"):
        EditConfig("memit", covariance_weight=2, options={"covariance_weight": 3})
    config = EditConfig("memit", covariance_weight=2)
    config.options = {"covariance_weight": 3}
    assert config.covariance_weight == 3


def test_a_record_of_a_missing_editor_must_have_options_by_name():
    with pytest.raises(ValueError, match=r"EditConfig\.options must map names to values, got None"):
        EditConfig.read({"method": "gone", "options": None})


@pytest.mark.parametrize(
    ("layer", "num_layers", "expected"),
    [
        (3, 30, 20),  # at two thirds of the depth
        (3, 12, 8),
        ([3, 9], 12, 10),  # the next one behind the edited layers
        (8, 12, 9),
        ([1, 10], 12, 11),
        ([1, 11], 12, None),
        (0, 2, 1),
        (0, 1, None),
    ],
)
def test_answers_come_at_two_thirds_of_the_depth_or_just_behind_the_edited_layers(layer, num_layers, expected):
    config = EditConfig(layer=layer)
    assert config.layer_of_answers(num_layers) == expected
    if expected is not None:
        assert EditConfig(layer=layer, answer_layer=num_layers - 1).layer_of_answers(num_layers) == num_layers - 1


@pytest.mark.parametrize("answers", [0, 4, 12])
def test_answers_do_not_come_at_or_before_an_edited_layer_or_behind_the_last_one(answers):
    config = EditConfig(layer=[2, 4], answer_layer=answers)
    with pytest.raises(ValueError, match=rf"answer_layer {answers} must come behind .*\[2, 4\].*layer 12"):
        config.layer_of_answers(12)


def test_a_config_shows_the_editor_the_layer_and_what_differs_from_the_defaults():
    assert repr(EditConfig()) == "EditConfig(method='gated', layer='lga')"
    config = EditConfig("memit", layer=3, seed=2)
    assert repr(config) == "EditConfig(method='memit', layer=3, target_layer=3, seed=2)"
    assert eval(repr(config)) == config
