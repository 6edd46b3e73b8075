"""Key statistics against naive loops and dense algebra."""

from __future__ import annotations

import logging

import pytest
import torch

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import recording
from goldenedit.editors import statistics as statistics_module
from goldenedit.editors.statistics import KeyStatistics, relative_contrast
from goldenedit.lm import LanguageModel
from goldenedit.lm.statistics import (
    gradient_moments,
    input_moments,
    load_second_moment,
    load_tensors,
    save_second_moment,
    save_tensors,
    second_moments,
)
from models import MLP_WIDTH, TINY_CONFIGS, WIDTH, tiny_model

TEXTS = [
    "The Eiffel Tower is located in the city of Paris.",
    "Rome is a city",
    "",
    "Angela Merkel was born in Hamburg, and the mother tongue of Angela Merkel is German.",
    "I",  # one token: skipped like the empty text
    "you and I live in a city, because of work.",
]
MANY = 10_000


def naive_second_moment(model, tokenizer, layer: int, texts: list[str]) -> torch.Tensor:
    module = read_architecture(model).down_projection(model, layer)
    keys: list[torch.Tensor] = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        if ids.shape[1] > 1:
            with torch.no_grad(), recording({"down": module}) as record:
                model(input_ids=ids)
            keys.append(record.inputs["down"].reshape(ids.shape[1], -1))
    stacked = torch.cat(keys).double()
    return stacked.T @ stacked / len(stacked)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_second_moment_is_the_mean_over_all_tokens_however_they_are_batched(name, tokenizer):
    model = tiny_model(name)
    lm = LanguageModel(model, tokenizer)
    expected = naive_second_moment(model, tokenizer, 1, TEXTS)
    for batch_tokens in (1, 40, 2048):
        found = second_moments(lm, TEXTS, [1], MANY, batch_tokens)
        assert (found[1] - expected).norm() <= 1e-5 * expected.norm()
        assert found[1].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_in_one_pass_equal_each_alone(name, tokenizer):
    model = tiny_model(name).train()
    architecture = read_architecture(model)
    lm = LanguageModel(model, tokenizer, architecture)
    together = second_moments(lm, TEXTS, [2, 0], MANY)
    assert set(together) == {0, 2}
    for layer in (0, 2):
        alone = second_moments(lm, TEXTS, [layer], MANY)
        torch.testing.assert_close(together[layer], alone[layer])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_more_tokens_than_asked_for_are_used(tokenizer):
    model = tiny_model("llama")
    words = "The Eiffel Tower is located in the city of Paris"
    first = "The Eiffel Tower is located in the city"
    count = len(tokenizer(first).input_ids)
    found = second_moments(LanguageModel(model, tokenizer), [words, "Rome is a city"], [0], count)
    expected = naive_second_moment(model, tokenizer, 0, [first])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_texts_are_cut_where_the_model_s_context_ends(tokenizer):
    model = tiny_model("gpt2")  # 128 positions
    second_moments(LanguageModel(model, tokenizer), ["Rome is a city. " * 50], [0], MANY)


def test_no_text_raises(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="text for key statistics has no two tokens"):
        second_moments(LanguageModel(model, tokenizer), ["", "I"], [0], MANY)


def test_keys_that_are_not_finite_raise(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 1 are not finite"):
        second_moments(lm, TEXTS, [0, 1], MANY)


@pytest.fixture
def moment():
    keys = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return keys.T @ keys / 20


@pytest.fixture
def keys():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 2.0])
def test_solve_is_that_of_the_second_moment_with_its_ridge(moment, keys, ridge):
    dense = moment + ridge * torch.trace(moment) / 8 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(KeyStatistics(moment, ridge).solve(keys), torch.linalg.solve(dense, keys))


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_solve_with_contrast_is_that_of_the_dense_sum(moment, keys, identity, count):
    contrast = torch.randn(8, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    C = torch.eye(8, dtype=torch.float64) if identity else moment
    ridge = 0.0 if identity else 0.01 * torch.trace(C) / 8
    dense = C + ridge * torch.eye(8, dtype=torch.float64) + torch.trace(C) * contrast @ contrast.T
    statistics = KeyStatistics(None if identity else moment, 0.01)
    torch.testing.assert_close(statistics.solve(keys, contrast), torch.linalg.solve(dense, keys))


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("count", [2, 11])  # fewer, and more, than keys are wide
def test_statistics_with_a_contrast_hold_it(moment, keys, identity, count):
    contrast = torch.randn(8, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    statistics = KeyStatistics(None if identity else moment, 0.01)
    torch.testing.assert_close(statistics.with_contrast(contrast).solve(keys), statistics.solve(keys, contrast))


def test_no_second_moment_is_the_identity(keys):
    solved = KeyStatistics(None, ridge=0.5).solve(keys.float())
    torch.testing.assert_close(solved, keys.float().double())


@pytest.mark.parametrize("count", [1, 20, 50])  # of a few tokens
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_held_keys_are_their_second_moment(count, dtype, monkeypatch):
    monkeypatch.setattr(statistics_module, "_BLOCK", 7)  # none of the sizes is a multiple
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(count, 60, generator=generator, dtype=dtype) / count**0.5
    asked, contrast = (torch.randn(60, n, generator=generator) for n in (3, 2))
    held = KeyStatistics.of(text, 0.01)
    dense = KeyStatistics.of(text.double().T @ text.double(), 0.01)
    assert held.keys is text
    assert dense.keys is None
    assert held.mean_eigenvalue == pytest.approx(dense.mean_eigenvalue, rel=1e-9)
    torch.testing.assert_close(held.solve(asked), dense.solve(asked))
    torch.testing.assert_close(held.solve(asked, contrast), dense.solve(asked, contrast))
    torch.testing.assert_close(held.with_contrast(contrast).solve(asked), dense.solve(asked, contrast))
    torch.testing.assert_close(held.spectrum[0], dense.spectrum[0])
    with pytest.raises(ValueError, match=r"ridge=0\.0\. Raise EditConfig\.ridge"):
        KeyStatistics.of(text, 0.0).solve(asked)


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_keys_are_held_where_they_are_fewer_than_they_are_wide(tokenizer, batch_tokens):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    few, many = TEXTS[:2], TEXTS * 3
    for texts, held in ((few, True), (many, False)):
        moments = second_moments(lm, texts, [0, 1], MANY, batch_tokens, hold_keys=True)
        for layer, moment in second_moments(lm, texts, [0, 1], MANY, batch_tokens).items():
            found = moments[layer]
            assert (len(found) < MLP_WIDTH) == held
            torch.testing.assert_close(found.T @ found if held else found, moment)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_size_of_the_keys_does_not_change_the_direction(moment, keys, scale):
    contrast = relative_contrast(keys[:, :2], 0.1)
    one = KeyStatistics(moment, 0.01).solve(keys, contrast)
    scaled = KeyStatistics(scale**2 * moment, 0.01).solve(scale * keys, relative_contrast(scale * keys[:, :2], 0.1))
    torch.testing.assert_close(scaled * scale, one)


def test_contrast_has_its_weight_in_units_of_the_trace(moment, keys):
    contrast = relative_contrast(keys.float(), 0.1)
    assert contrast.square().sum().item() == pytest.approx(0.1)
    torch.testing.assert_close(contrast / contrast.norm(), keys.float().double() / keys.float().double().norm())


def test_a_singular_second_moment_without_ridge_raises(keys):
    singular = torch.zeros(8, 8)
    with pytest.raises(ValueError, match=r"ridge=0\.0\. Raise EditConfig\.ridge"):
        KeyStatistics(singular).solve(keys)


def test_cached_second_moment_comes_back_as_it_was(moment, tmp_path):
    path = tmp_path / "folder" / "moment.safetensors"
    assert load_second_moment(path) is None
    save_second_moment(path, moment.T)
    assert torch.equal(load_second_moment(path), moment.T)
    save_second_moment(path, 2 * moment)
    assert torch.equal(load_second_moment(path), 2 * moment)
    assert [file.name for file in path.parent.iterdir()] == ["moment.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_a_damaged_cache_file_is_ignored_with_a_warning(moment, tmp_path, caplog, damage):
    path = tmp_path / "moment.safetensors"
    save_second_moment(path, moment)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-9], "empty": b"", "other": b"no tensors here"}[damage])
    with caplog.at_level(logging.WARNING, logger="goldenedit"):
        assert load_second_moment(path) is None
    assert "damaged" in caplog.text
    assert str(path) in caplog.text


def test_width_of_the_second_moment_is_that_of_the_keys(tokenizer):
    model = tiny_model("gpt2")
    found = second_moments(LanguageModel(model, tokenizer), TEXTS[:1], [0, 1, 2], MANY)
    assert {layer: moment.shape for layer, moment in found.items()} == {
        layer: (MLP_WIDTH, MLP_WIDTH) for layer in range(3)
    }


def mlp_inputs(model) -> dict[int, torch.nn.Module]:
    """Return by layer the map that reads the input of the MLP."""
    architecture = read_architecture(model)
    return {layer: model.get_submodule(paths[0]) for layer, paths in architecture.mlp_linears.items()}


def naive_tokens(model, tokenizer, layer: int, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs of a layer's MLP and its keys at all tokens of texts, one text after the other."""
    sites = {"in": mlp_inputs(model)[layer], "out": read_architecture(model).down_projection(model, layer)}
    tokens: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        if ids.shape[1] > 1:
            with torch.no_grad(), recording(sites) as record:
                model(input_ids=ids)
            for name in sites:
                tokens[name].append(record.inputs[name].reshape(ids.shape[1], -1))
    return torch.cat(tokens["in"]).double(), torch.cat(tokens["out"]).double()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_moments_of_mlps_are_the_means_over_all_tokens_however_they_are_batched(name, tokenizer):
    model = tiny_model(name)
    lm = LanguageModel(model, tokenizer)
    inputs, keys = naive_tokens(model, tokenizer, 1, TEXTS)
    expected = {
        "mean": inputs.mean(0),
        "second_moment": inputs.T @ inputs / len(inputs),
        "energy": keys.square().mean(0),
    }
    for batch_tokens in (1, 40, 2048):
        found = input_moments(lm, TEXTS, {1: mlp_inputs(model)[1]}, MANY, batch_tokens)
        for name, moment in expected.items():
            of_name = getattr(found[1], name)
            assert of_name.dtype == torch.float32
            assert (of_name - moment).norm() <= 1e-5 * moment.norm()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_moments_of_mlps_in_one_pass_equal_each_alone(name, tokenizer):
    model = tiny_model(name).train()
    lm = LanguageModel(model, tokenizer)
    sites = mlp_inputs(model)
    together = input_moments(lm, TEXTS, {2: sites[2], 0: sites[0]}, MANY)
    assert set(together) == {0, 2}
    for layer in (0, 2):
        (alone,) = input_moments(lm, TEXTS, {layer: sites[layer]}, MANY).values()
        for moment, of_alone in zip(vars(together[layer]).values(), vars(alone).values(), strict=True):
            torch.testing.assert_close(moment, of_alone)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_moments_of_mlps_are_of_no_more_tokens_than_asked_for(tokenizer):
    model = tiny_model("llama")
    words, first = "The Eiffel Tower is located in the city of Paris", "The Eiffel Tower is located in the city"
    count = len(tokenizer(first).input_ids)
    sites = {0: mlp_inputs(model)[0]}
    found = input_moments(LanguageModel(model, tokenizer), [words, "Rome is a city"], sites, count)
    inputs, _ = naive_tokens(model, tokenizer, 0, [first])
    torch.testing.assert_close(found[0].mean.double(), inputs.mean(0), rtol=1e-4, atol=1e-5)


def test_mlps_that_are_not_finite_raise(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    sites = mlp_inputs(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="MLP of layer 1 is not finite"):
        input_moments(lm, TEXTS, {0: sites[0], 1: sites[1]}, MANY)


def test_moments_of_mlps_need_text(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="has no two tokens"):
        input_moments(LanguageModel(model, tokenizer), ["", "I"], {0: mlp_inputs(model)[0]}, MANY)


def test_cached_tensors_come_back_by_name_and_a_file_without_one_is_ignored(tmp_path, caplog):
    path = tmp_path / "moments.safetensors"
    one, other = torch.randn(3, 4), torch.randn(5)
    save_tensors(path, {"one": one.T, "other": other})
    found = load_tensors(path, ["other", "one"])
    assert torch.equal(found[0], other)
    assert torch.equal(found[1], one.T)
    with caplog.at_level(logging.WARNING, logger="goldenedit"):
        assert load_tensors(path, ["one", "missing"]) is None
    assert str(path) in caplog.text


def exact_gradient_moment(model, tokenizer, layer: int, text: str) -> torch.Tensor:
    """Return `E[g g^T]` with the expectation over all labels, from the Jacobian of the logits."""
    module = read_architecture(model).down_projection(model, layer)
    ids = torch.tensor([tokenizer(text).input_ids])
    shift = torch.zeros(ids.shape[1], WIDTH)

    def logits(added: torch.Tensor) -> torch.Tensor:
        handle = module.register_forward_hook(lambda _, __, output: output + added.view_as(output))
        try:
            return model(input_ids=ids).logits[0]
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(logits, shift).double()  # (T', V, T, d)
    probabilities = logits(shift).softmax(-1).detach().double()
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for of_position, p in zip(jacobian, probabilities, strict=True):
        fisher = torch.diag(p) - torch.outer(p, p)
        for token in range(ids.shape[1]):
            total += of_position[:, token].T @ fisher @ of_position[:, token]
    return total / ids.shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_gradient_moments_are_the_fisher_information_of_the_outputs(name, tokenizer):
    model = tiny_model(name)
    text = "Rome is a city of"
    lm = LanguageModel(model, tokenizer)
    found = gradient_moments(lm, [text] * 1200, [1, 2], MANY, seed=0, batch_tokens=100)
    for layer in (1, 2):
        expected = exact_gradient_moment(model, tokenizer, layer, text)
        assert (found[layer] - expected).norm() <= 0.1 * expected.norm()


def test_gradient_moments_are_over_all_tokens_whatever_their_padding(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    short, long = (
        "Rome is a city",
        "Angela Merkel was born in Hamburg, and the mother tongue of Angela Merkel is German.",
    )
    counts = [len(tokenizer(text).input_ids) for text in (short, long)]
    alone = [gradient_moments(lm, [text] * 200, [1], MANY, seed=0)[1] for text in (short, long)]
    together = gradient_moments(lm, [short, long] * 200, [1], 10 * MANY, seed=0, batch_tokens=10 * MANY)[1]
    expected = sum(count * moment for count, moment in zip(counts, alone, strict=True)) / sum(counts)
    assert (together - expected).norm() <= 0.1 * expected.norm()


def test_gradient_moments_of_a_seed_are_always_the_same_and_leave_the_model_as_it_was(tokenizer):
    model = tiny_model("llama").train()
    lm = LanguageModel(model, tokenizer)
    one, same, other = (gradient_moments(lm, TEXTS, [2, 0], MANY, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_that_are_not_finite_raise(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        gradient_moments(lm, TEXTS, [0], MANY, seed=0)
