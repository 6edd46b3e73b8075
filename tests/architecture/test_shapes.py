"""The parts of a model by its config alone are those that are found with weights."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, T5Config

from goldenedit.architecture import UnsupportedArchitectureError, read_architecture
from goldenedit.architecture.shapes import cache_width, model_without_weights, read_shapes
from goldenedit.architecture.sizes import Shape
from models import EXPERTS_CONFIGS, MLP_WIDTH, NUM_LAYERS, TINY_CONFIGS, UNSUPPORTED_CONFIGS, WIDTH, tiny_model

CONFIGS = TINY_CONFIGS | EXPERTS_CONFIGS | UNSUPPORTED_CONFIGS


@pytest.mark.parametrize("name", TINY_CONFIGS | EXPERTS_CONFIGS)
def test_the_parts_are_those_that_are_found_with_weights(name):
    assert read_shapes(model_without_weights(CONFIGS[name]())) == read_architecture(tiny_model(name))


@pytest.mark.parametrize("name", TINY_CONFIGS | EXPERTS_CONFIGS)
def test_no_weights_are_loaded_and_forwards_are_as_before(name):
    model = model_without_weights(CONFIGS[name]())
    forwards = [module.forward for module in model.modules()]
    read_shapes(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [module.forward for module in model.modules()] == forwards


def test_models_without_an_mlp_cannot_be_edited():
    with pytest.raises(UnsupportedArchitectureError, match="EditConfig\\(target_modules="):
        read_shapes(model_without_weights(CONFIGS["mamba"]()))


def test_maps_are_chosen_by_hand():
    path = "backbone.layers.{}.mixer.in_proj"
    found = read_shapes(model_without_weights(CONFIGS["mamba"]()), path)
    assert found.down_projections == {index: path.format(index) for index in range(NUM_LAYERS)}


def test_a_config_of_another_kind_of_model_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="No causal LM can be built from T5Config"):
        model_without_weights(T5Config())


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_the_cache_is_as_wide_as_the_one_that_a_model_returns(name):
    model = tiny_model(name)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_width(model_without_weights(CONFIGS[name]())) == numbers // 5


def test_models_without_a_cache_have_no_width_of_it():
    assert cache_width(model_without_weights(BertConfig(num_hidden_layers=1, hidden_size=24, is_decoder=False))) is None


def test_sizes_of_a_tiny_model():
    shape, model = Shape.of(CONFIGS["llama"]()), tiny_model("llama")
    assert (shape.layers, shape.width, shape.key_width) == (NUM_LAYERS, WIDTH, MLP_WIDTH)
    assert shape.neurons == ((WIDTH, MLP_WIDTH), (WIDTH, MLP_WIDTH))
    assert shape.mlp_widths == 3 * (WIDTH + MLP_WIDTH)
    # Queries and outputs have 4 heads, keys and values 2.
    assert shape.linear_weights == 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * MLP_WIDTH
    assert shape.weights == {"float32": sum(parameter.nbytes for parameter in model.parameters())}
    assert shape.in_precision("bfloat16").weight_bytes * 2 == shape.weight_bytes


def test_sizes_of_fused_experts():
    shape = Shape.of(CONFIGS["mixtral"]())
    assert (shape.experts, shape.key_width, shape.neurons) == (4, 4 * MLP_WIDTH, ())
