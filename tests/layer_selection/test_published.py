"""The layers that the field edits, by the model's name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from goldenedit.layer_selection import PUBLISHED_LAYERS, published_layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gpt2-xl", 17),
        ("openai-community/gpt2-xl", 17),
        ("EleutherAI/gpt-j-6B", 5),
        ("meta-llama/Llama-2-7b-hf", 5),
        ("models/GPT2-Medium/", 8),
    ],
)
def test_layer_is_found_by_the_last_part_of_the_name(name, layer):
    assert published_layer(SimpleNamespace(name_or_path=name)) == layer


@pytest.mark.parametrize("model", [SimpleNamespace(name_or_path="me/unheard-of"), SimpleNamespace(name_or_path="")])
def test_an_unknown_model_is_told_what_else_to_do(model):
    with pytest.raises(ValueError, match="EditConfig\\(layer='lga'\\)"):
        published_layer(model)


def test_a_model_without_a_name_is_called_so():
    with pytest.raises(ValueError, match="a model without a name"):
        published_layer(SimpleNamespace())


def test_names_are_in_lower_case_and_layers_are_numbers():
    assert all(name == name.lower() and layer >= 0 for name, layer in PUBLISHED_LAYERS.items())
