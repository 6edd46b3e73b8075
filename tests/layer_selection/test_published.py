"""The layers that the field edits, by the model's name and the editor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from goldenedit.config import EditConfig
from goldenedit.layer_selection import PUBLISHED_LAYERS, published_layers


def published(model: Any, method: str) -> list[int]:
    return published_layers(SimpleNamespace(model=model), [], EditConfig(method=method))


@pytest.mark.parametrize(
    ("name", "method", "layers"),
    [
        ("gpt2-xl", "r-rome", [17]),
        ("openai-community/gpt2-xl", "memit", [13, 14, 15, 16, 17]),
        ("EleutherAI/gpt-j-6B", "pmet", [3, 4, 5, 6, 7, 8]),
        ("meta-llama/Llama-2-7b-hf", "emmet", [5]),
        ("Qwen/Qwen2.5-7B", "ft-l", [27]),
        ("Qwen/Qwen2.5-7B-Instruct", "locft", [6]),
        ("meta-llama/Meta-Llama-3-8B", "locft", [22]),
        ("models/GPT2-Medium/", "rome", [8]),
    ],
)
def test_layers_are_found_by_the_last_part_of_the_name_and_the_editor(name, method, layers):
    assert published(SimpleNamespace(name_or_path=name), method) == layers


@pytest.mark.parametrize(
    ("name", "method"), [("me/unheard-of", "rome"), ("", "rome"), ("gpt2-medium", "memit"), ("gpt2-xl", "ultraedit")]
)
def test_what_nobody_published_is_told_what_else_to_do(name, method):
    with pytest.raises(ValueError, match="EditConfig\\(layer='lga'\\)"):
        published(SimpleNamespace(name_or_path=name), method)


def test_a_model_without_a_name_is_called_so():
    with pytest.raises(ValueError, match="a model without a name"):
        published(SimpleNamespace(), "rome")


def test_names_are_in_lower_case_and_layers_are_numbers():
    for name, kinds in PUBLISHED_LAYERS.items():
        assert name == name.lower()
        assert all(layer >= 0 for layers in kinds.values() for layer in layers)
        assert kinds["rome"]


def test_what_is_returned_is_not_the_table():
    model = SimpleNamespace(name_or_path="llama-2-7b")
    published(model, "memit").append(99)
    assert published(model, "memit") == [4, 5, 6, 7, 8]
