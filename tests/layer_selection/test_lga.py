"""LGA's scores against plain gradients, and the choice of the golden layer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from goldenedit.architecture import read_architecture
from goldenedit.layer_scores import LayerSelection
from goldenedit.layer_selection import golden_layer, lga_scores, tukey_filter
from goldenedit.layer_selection.lga import gradient_products
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import greedy_answer
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest
from models import NUM_LAYERS, TINY_CONFIGS, tiny_model

FACTS = [
    EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("{} was born in the city of", "Angela Merkel", "Berlin", "Hamburg"),
    EditRequest("The mother tongue of {} is", "Angela Merkel", "the language of Cambodia", "German"),
    EditRequest("{} is in", "Paris", "London", "the city"),
    EditRequest("The headquarters of the company are in", "the company", "Rome", "London, or in the city of Berlin"),
]


def test_inside_inference_mode_the_scores_are_as_outside(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    expected = lga_scores(lm, FACTS)
    with torch.inference_mode():
        found = lga_scores(lm, FACTS)
    assert torch.equal(found, expected)


every_architecture = pytest.mark.parametrize("name", TINY_CONFIGS)
both_losses = pytest.mark.parametrize("loss", ["sequence", "answer"])


def gradients(model: nn.Module, weights: list[nn.Parameter], tokenizer, prompt: str, answer: str, loss: str):
    row = encode(tokenizer, prompt, answer)
    ids = torch.tensor([row.input_ids])
    token_loss = nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    answer_only = token_loss[[position - 1 for position in row.target]]
    return torch.autograd.grad((answer_only if loss == "answer" else token_loss).mean(), weights)


def plain_scores(model: nn.Module, tokenizer, facts: list[EditRequest], loss: str) -> torch.Tensor:
    """One backward a text through all weights of the MLPs, one dot product a layer."""
    paths = read_architecture(model).mlp_linears
    weights = [model.get_submodule(path).weight for index in paths for path in paths[index]]
    layers = [index for index in paths for _ in paths[index]]
    scores = torch.zeros(NUM_LAYERS, dtype=torch.float64)
    for fact in facts:
        old = gradients(model, weights, tokenizer, fact.text, fact.target_true, loss)
        new = gradients(model, weights, tokenizer, fact.text, fact.target_new, loss)
        for layer, one, other in zip(layers, old, new, strict=True):
            scores[layer] += (one.double() * other.double()).sum()
    return scores


def close(scores: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((scores - expected).abs() <= 1e-4 * expected.abs()).all())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@both_losses
def test_products_are_those_of_each_facts_gradients(name, loss, tokenizer):
    model = tiny_model(name).double()
    products = gradient_products(LanguageModel(model, tokenizer), FACTS, loss, batch_size=2, with_norms=True)
    paths = read_architecture(model).mlp_linears
    weights = [model.get_submodule(path).weight for layer in paths for path in paths[layer]]
    for fact, found in zip(FACTS, products, strict=True):
        old, new = (
            gradients(model, weights, tokenizer, fact.text, answer, loss)
            for answer in (fact.target_true, fact.target_new)
        )
        per_layer = len(weights) // NUM_LAYERS
        for layer in range(NUM_LAYERS):
            at = slice(layer * per_layer, (layer + 1) * per_layer)
            a, b = (torch.cat([g.flatten() for g in side[at]]) for side in (old, new))
            torch.testing.assert_close(found[layer], torch.stack([a @ b, a @ a, b @ b]), rtol=1e-4, atol=0)


@every_architecture
@both_losses
def test_scores_equal_dot_products_of_plain_gradients(name, loss, tokenizer):
    model = tiny_model(name).double()
    expected = plain_scores(model, tokenizer, FACTS, loss)
    scores = lga_scores(LanguageModel(model, tokenizer), FACTS, loss, batch_size=2)
    assert scores.dtype == torch.float64
    assert close(scores, expected), (scores, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gemma3"])
@pytest.mark.parametrize("trainable", [True, False])
def test_scores_do_not_depend_on_frozen_weights_and_leave_no_gradient(name, trainable, tokenizer):
    model = tiny_model(name)
    expected = plain_scores(model, tokenizer, FACTS[:2], "sequence")
    model.requires_grad_(trainable).train()
    scores = lga_scores(LanguageModel(model, tokenizer), FACTS[:2])
    assert close(scores, expected), (scores, expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad == trainable for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
@both_losses
def test_batch_size_does_not_matter(name, loss, tokenizer):
    model = tiny_model(name).double()
    lm = LanguageModel(model, tokenizer)
    alone, together = (lga_scores(lm, FACTS, loss, size) for size in (1, 5))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=0.0)


def test_scores_are_computed_where_gradients_are_switched_off(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    with torch.no_grad():
        off = lga_scores(lm, FACTS)
    torch.testing.assert_close(off, lga_scores(lm, FACTS))


def test_only_layers_with_an_mlp_are_scored(tokenizer):
    model = tiny_model("llama")
    architecture = read_architecture(model, ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"])
    assert lga_scores(LanguageModel(model, tokenizer, architecture), FACTS).isnan().tolist() == [False, True, False]


def test_facts_without_an_old_answer_are_scored_against_the_greedy_one(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    fact = FACTS[0]
    ids = tokenizer(fact.text, return_tensors="pt").input_ids
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    answer = tokenizer.decode(ids[0, -4:]).strip()
    assert greedy_answer(lm, fact.text) == answer
    without = EditRequest(fact.prompt, fact.subject, fact.target_new)
    given = EditRequest(fact.prompt, fact.subject, fact.target_new, answer)
    torch.testing.assert_close(lga_scores(lm, [without]), lga_scores(lm, [given]))


def test_a_model_without_an_answer_asks_for_the_old_one(tokenizer):
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()  # all logits equal: the greedy token is the first, a special one
    with pytest.raises(ValueError, match=r"no answer to 'The Eiffel Tower .*Set target_true"):
        greedy_answer(LanguageModel(model, tokenizer), FACTS[0].text)


def test_no_facts_raise(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="got no facts"):
        lga_scores(LanguageModel(model, tokenizer), [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_raise_and_leave_no_hook(value, tokenizer):
    model = tiny_model("llama")
    architecture = read_architecture(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        lga_scores(LanguageModel(model, tokenizer, architecture), FACTS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Of 1..8 and 40: Q1 = 3, Q3 = 7, IQR = 4.
SCORES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 40.0]


@pytest.mark.parametrize(
    ("kappa", "kept"),
    [
        (0.0, [3.0, 4.0, 5.0, 6.0, 7.0]),  # [3, 7]
        (0.25, [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),  # [2, 8]
        (1.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),  # [-1, 11]
        (8.25, SCORES),  # [-30, 40]
        (math.inf, SCORES),
    ],
)
def test_tukey_filter_keeps_what_lies_inside_the_fence(kappa, kept):
    scores = torch.tensor(SCORES, dtype=torch.float64)
    assert scores[tukey_filter(scores, kappa)].tolist() == kept


def test_tukey_filter_drops_what_lies_far_below():
    scores = torch.tensor([-40.0, 1.0, 2.0, 3.0, 4.0])
    assert tukey_filter(scores).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("kappa", [0.0, 1.0, math.inf])
def test_nan_never_passes_and_does_not_move_the_fence(kappa):
    scores = torch.tensor(SCORES, dtype=torch.float64)
    with_nan = torch.cat([torch.tensor([math.nan]), scores, torch.tensor([math.nan])])
    assert tukey_filter(with_nan, kappa).tolist() == [False, *tukey_filter(scores, kappa).tolist(), False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kappa", "layer"), [(0.0, 4), (1.0, 4), (100.0, 0), (math.inf, 0)])
def test_golden_layer_is_the_best_inside_the_fence(dtype, kappa, layer):
    # Without NaN: 5, 7, 7.5, 8, 90, so Q1 = 7, Q3 = 8 and the fence of kappa = 1 is [6, 9].
    scores = torch.tensor([90.0, math.nan, 7.5, 5.0, 8.0, 7.0], dtype=dtype)
    assert golden_layer(scores, kappa) == layer


def test_equal_scores_all_pass_and_the_first_is_golden():
    scores = torch.full((4,), 2.0)
    assert tukey_filter(scores).all()
    assert golden_layer(scores) == 0


def test_a_single_layer_is_golden():
    assert golden_layer(torch.tensor([math.nan, -3.0])) == 1


def of_facts(*by_fact: list[float]) -> LayerSelection:
    totals = torch.tensor(by_fact).sum(0).tolist()
    best = max(range(len(totals)), key=totals.__getitem__)
    return LayerSelection("lga", totals, [best], by_fact=list(by_fact), kappa=math.inf)


def test_layers_that_other_facts_might_have_chosen_are_within_the_noise():
    torn = of_facts(*[[1.0, 0.0, 0.2, 0.1], [0.0, 0.9, 0.2, 0.1]] * 10)
    assert torn.within_noise() == [0, 1]
    assert str(torn) == "Layer 0, chosen by lga (any of 0 to 1 is within the noise)"


def test_a_layer_that_all_facts_choose_is_told_so():
    sure = of_facts(*[[0.0, 1.0, 0.9]] * 20)
    assert sure.within_noise() == [1]
    assert str(sure) == "Layer 1, chosen by lga (other facts would choose it too)"


def test_the_noise_is_of_the_fence_that_chose_the_layer():
    by_fact = [[1.0, 1.1, 1.2, 1.1, 9.0]] * 20
    inside, everywhere = (replace(of_facts(*by_fact), kappa=kappa) for kappa in (1.0, math.inf))
    assert inside.within_noise() == [2]
    assert everywhere.within_noise() == [4]


def test_a_selection_without_scores_of_facts_says_nothing_of_noise():
    plain = LayerSelection("causal_tracing", [1.0, 2.0], [1])
    assert plain.within_noise() is None
    assert str(plain) == "Layer 1, chosen by causal_tracing"
