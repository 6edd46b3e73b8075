"""The fingerprint tells weights apart, and nothing else."""

import pytest
import torch
from torch import nn

from goldenedit.storage.fingerprint import fingerprint
from models import tiny_model


def bfloat16_checkpoint(dtype):
    return tiny_model("llama").to(torch.bfloat16).to(dtype)


def test_a_checkpoint_is_the_same_in_every_dtype_it_is_loaded_in():
    assert fingerprint(bfloat16_checkpoint(torch.float32)) == fingerprint(bfloat16_checkpoint(torch.bfloat16))


def test_float32_weights_are_the_same_after_rounding():
    assert fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama").to(torch.bfloat16))


def test_a_fingerprint_is_32_hex_digits_and_repeats():
    found = fingerprint(tiny_model("gpt2"))
    assert len(found) == 32
    int(found, 16)
    assert found == fingerprint(tiny_model("gpt2"))
    assert found != fingerprint(tiny_model("gpt2", seed=1))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_one_other_matrix_makes_another_fingerprint(name):
    model = tiny_model("llama")
    before = fingerprint(model)
    model.get_parameter(name).data.add_(0.1)
    assert fingerprint(model) != before


def test_another_shape_makes_another_fingerprint():
    maps = [nn.Linear(size, 4, bias=False) for size in (2, 3)]
    for linear in maps:
        linear.weight.data.zero_()
    assert fingerprint(maps[0]) != fingerprint(maps[1])


def test_a_transposed_matrix_is_another():
    one, other = nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False)
    other.weight.data = one.weight.data.reshape(2, 4)
    assert fingerprint(one) != fingerprint(other)


def test_the_order_of_parameters_and_their_gradients_do_not_count():
    one, other = nn.Module(), nn.Module()
    parts = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 5)}
    for name, part in parts.items():
        one.add_module(name, part)
    for name, part in reversed(parts.items()):
        other.add_module(name, part)
    before = fingerprint(one)
    other.requires_grad_(False)
    assert fingerprint(other) == before


def test_tied_weights_count_once_and_change_together():
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = fingerprint(model)
    model.lm_head.weight.data.neg_()
    assert fingerprint(model) != before


def test_weights_that_are_elsewhere_count_by_shape():
    assert fingerprint(nn.Linear(3, 5, device="meta")) != fingerprint(nn.Linear(3, 4, device="meta"))


def test_empty_weights_are_fine():
    linear = nn.Linear(3, 2)
    linear.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    assert fingerprint(linear) != fingerprint(nn.Linear(3, 2))
