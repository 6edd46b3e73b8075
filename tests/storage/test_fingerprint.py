"""The hashes of weights tell checkpoints apart, and nothing else."""

import hashlib
from itertools import permutations

import pytest
import torch
from torch import nn

from goldenedit.storage.fingerprint import WeightHashes, fingerprint, same_weights, weight_hashes, weights_state
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


# ---------------------------------------------------------------------- one checkpoint in several precisions

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def plain_fingerprint(model):
    """The fingerprint as it always was: what saved edits carry must stay."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().reshape(-1)
        count = min(64, len(values))
        index = [step * (len(values) - 1) // max(count - 1, 1) for step in range(count)]
        digest.update(values[index].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_fingerprint_is_what_it_always_was(name, dtype):
    model = tiny_model(name).to(dtype)
    assert fingerprint(model) == plain_fingerprint(model)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 4095, 4096, 4097, 9999, 300_001])
def test_the_fingerprint_of_any_length_is_what_it_always_was(length):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(length, generator=torch.Generator().manual_seed(length)))
    assert fingerprint(module) == plain_fingerprint(module)


@pytest.mark.parametrize(("one", "other"), [*permutations(PRECISIONS, 2)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_is_the_same_in_any_two_precisions(name, one, other):
    assert same_weights(*(weight_hashes(tiny_model(name).to(dtype)) for dtype in (one, other)))


def test_numbers_that_float16_rounds_to_zero_or_infinity_keep_their_sign():
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([1e-12, -1e-12, 1e9, -1e9, 0.0, -0.0]))
    full = weight_hashes(module)
    half = weight_hashes(module.half())
    assert (full.dtype, half.dtype) == ("float32", "float16")
    assert full.signs == half.signs
    assert same_weights(full, half)


def test_a_checkpoint_that_is_part_in_float32_is_the_same():
    part = tiny_model("llama").half()
    part.model.norm.float()
    hashes = weight_hashes(part)
    assert hashes.dtype == "float16+float32"
    assert same_weights(hashes, weight_hashes(tiny_model("llama")))


def with_rank_one_change(model, size):
    """The model with one matrix changed by a random matrix of rank one, `size` times as large as it."""
    weight = model.model.layers[2].mlp.down_proj.weight.data
    generator = torch.Generator().manual_seed(0)
    change = torch.outer(*(torch.randn(length, generator=generator) for length in weight.shape))
    weight += size * weight.norm() / change.norm() * change
    return model


def lightly_trained(model):
    for parameter in model.parameters():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.01 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("one", "other"), [*permutations(PRECISIONS, 2), *zip(PRECISIONS, PRECISIONS, strict=True)])
@pytest.mark.parametrize("change", [lambda model: with_rank_one_change(model, 0.01), lightly_trained])
def test_a_merged_edit_and_light_training_are_told_in_every_pair_of_precisions(one, other, change):
    before, after = weight_hashes(tiny_model("llama").to(one)), weight_hashes(change(tiny_model("llama")).to(other))
    assert not same_weights(before, after)
    assert not same_weights(after, before)


def test_between_float32_and_bfloat16_the_fingerprint_decides_alone():
    full, brain = WeightHashes("1", "5", "float32"), WeightHashes("2", "5", "bfloat16")
    assert not same_weights(full, brain)
    assert not same_weights(full, WeightHashes("2", "5", "float32"))
    assert same_weights(full, WeightHashes("2", "5", "float16"))


@pytest.mark.parametrize("old", [WeightHashes("1"), WeightHashes("1", None, "float16"), WeightHashes("1", "5", None)])
def test_weights_without_a_hash_of_signs_are_known_by_their_fingerprint_alone(old):
    assert same_weights(old, WeightHashes("1", "5", "float32"))
    assert not same_weights(old, WeightHashes("2", "5", "float32"))


def test_weights_that_are_not_numbers_have_not_changed_when_they_are_looked_at_again():
    model = tiny_model("llama")
    model.lm_head.weight.data[:] = float("nan")
    before = weights_state(model)
    assert weights_state(model) == before
    model.lm_head.weight.data[:] = 0.0
    assert weights_state(model) != before
