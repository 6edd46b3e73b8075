"""Linear response against small real edits: what it predicts is the slope of what they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import adding_delta, recording
from goldenedit.config import EditConfig
from goldenedit.editing.keys import FactKeys, subject_keys
from goldenedit.editing.rows import encode
from goldenedit.editing.statistics import KeyStatistics
from goldenedit.editors.rome import r_rome
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.layer_selection import linear_response_scores
from goldenedit.layer_selection.lga import greedy_answer
from goldenedit.layer_selection.linear_response import (
    MARGIN,
    OVERSHOOT,
    detector,
    other_relations,
    predicted_margins,
)
from goldenedit.requests import EditRequest, proxy_facts
from models import MLP_WIDTH, NUM_LAYERS, TINY_CONFIGS, tiny_model

FACT = EditRequest(
    "The Eiffel Tower is in the city of",
    "The Eiffel Tower",
    "Rome",
    "Paris",
    paraphrases=("One finds The Eiffel Tower in", "It stands in"),
    neighborhood=("The Louvre is in", "Berlin is in the city of", "London is in"),
)
KEPT = [(prompt, "Paris") for prompt in FACT.neighborhood]
SELECTIVE = EditConfig(layer=0, contrast=0)
SMALL = EditConfig(layer=0, clamp=1e-3, contrast=0)  # rho is at the clamp: the edit is as small as that


def second_moment() -> torch.Tensor:
    X = torch.randn(200, MLP_WIDTH, generator=torch.Generator().manual_seed(0)).double()
    return X.T @ X / 200


def margins(model, tokenizer, fact) -> torch.Tensor:
    prompts = [fact.text, *fact.paraphrases, *fact.neighborhood]
    pairs = [(prompt, answer) for prompt in prompts for answer in (fact.target_new, fact.target_true)]
    nll = torch.tensor([found.nll for found in likelihoods(model, tokenizer, pairs)]).double()
    return nll[1::2] - nll[::2]


@pytest.mark.parametrize("name", sorted(set(TINY_CONFIGS) - {"bloom"}))  # whose MLP has another width
@pytest.mark.parametrize("identity", [True, False])
def test_predictions_are_the_slope_of_small_edits(name, identity, tokenizer):
    model = tiny_model(name).double()
    architecture = read_architecture(model)
    statistics = dict.fromkeys(range(NUM_LAYERS), KeyStatistics(None if identity else second_moment(), 0.1))
    before = margins(model, tokenizer, FACT)
    keys = [found[0] for found in subject_keys(model, architecture, tokenizer, [FACT], list(range(NUM_LAYERS)))]
    detectors = {layer: detector(keys[layer], None, SMALL, statistics[layer]) for layer in range(NUM_LAYERS)}
    predicted = predicted_margins(model, architecture, tokenizer, FACT, detectors, SMALL.clamp, KEPT)
    subject = encode(tokenizer, FACT.text, None, FACT.subject_end).subject
    ids = torch.tensor([tokenizer(FACT.text)["input_ids"]])
    for layer in range(NUM_LAYERS):
        module = architecture.down_projection(model, layer)
        with recording({"it": module}) as record, torch.no_grad():
            model(input_ids=ids)
        key = record.inputs["it"].view(-1, MLP_WIDTH)[subject].float()
        value = record.outputs["it"].view(ids.shape[1], -1)[subject]
        gradient = slope(model, tokenizer, module, subject)
        direction = gradient / gradient.norm().clamp_min(1e-30)
        residual = OVERSHOOT * SMALL.clamp * value.norm() * direction
        delta = r_rome([FactKeys(key, key)], residual[:, None], statistics[layer])
        with adding_delta(module, delta.A, delta.B):
            moved = margins(model, tokenizer, FACT) - before
        expected = predicted[layer].double() - before
        assert (moved - expected).abs().max() <= 0.02 * moved.abs().max() + 1e-5


def slope(model, tokenizer, module, subject: int) -> torch.Tensor:
    """The gradient of the margin at the edited prompt by the value, one answer after the other."""
    total = torch.zeros(())
    for sign, answer in ((1, FACT.target_new), (-1, FACT.target_true)):
        row = encode(tokenizer, FACT.text, answer)
        ids = torch.tensor([row.input_ids])
        moved: list[torch.Tensor] = []

        def add(module, args, output, moved=moved):
            moved.append(torch.zeros(output.shape[-1], dtype=output.dtype, requires_grad=True))
            onto = torch.zeros_like(output.view(-1, output.shape[-1])).index_put(
                (torch.tensor([subject]),), moved[0][None]
            )
            return output + onto.view_as(output)

        handle = module.register_forward_hook(add)
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
        chosen = torch.stack([log_probs[position - 1, row.input_ids[position]] for position in row.target]).mean()
        total = total + sign * torch.autograd.grad(chosen, moved[0], allow_unused=True, materialize_grads=True)[0]
    return total


def test_contrast_keys_and_other_editors_change_what_is_predicted(tokenizer):
    model = tiny_model("llama")
    statistics = dict.fromkeys(range(NUM_LAYERS), KeyStatistics(second_moment(), 0.1))

    def scores(**options):
        config = EditConfig(layer=0, **options)
        return linear_response_scores(model, read_architecture(model), tokenizer, [FACT], config, statistics)

    plain = scores(contrast=0)
    assert ((plain >= 0) & (plain <= 1)).all()
    assert not torch.equal(plain, scores())
    assert not torch.equal(plain, scores(contrast=0, method="alphaedit"))
    torch.testing.assert_close(plain, scores(contrast=0, method="ft-l"), rtol=0, atol=0)
    torch.testing.assert_close(plain, scores(contrast_weight=0.0), rtol=0, atol=0)


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny_model("llama")
    statistics = {1: KeyStatistics(None)}
    found = linear_response_scores(model, read_architecture(model), tokenizer, [FACT], EditConfig(layer=0), statistics)
    assert found.isnan().tolist() == [index != 1 for index in range(NUM_LAYERS)]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("without", ["paraphrases", "neighborhood"])
def test_facts_that_say_nothing_are_refused(without, tokenizer):
    model = tiny_model("llama")
    fact = replace(FACT, **{without: ()})
    with pytest.raises(ValueError, match="paraphrases, and with neighbours or locality"):
        linear_response_scores(
            model, read_architecture(model), tokenizer, [fact], EditConfig(layer=0), {0: KeyStatistics(None)}
        )


def test_what_facts_lack_is_what_the_model_says(tokenizer):
    model = tiny_model("llama")
    own, there = greedy_answer(model, tokenizer, FACT.text), greedy_answer(model, tokenizer, "Paris is the", 1)
    bare = replace(FACT, target_true=None, neighborhood=(), locality=(("Paris is the", "fox"),))
    given = replace(FACT, target_true=own, neighborhood=(), locality=())
    found, expected = (
        linear_response_scores(model, read_architecture(model), tokenizer, [fact], SELECTIVE, {1: KeyStatistics(None)})
        for fact in (bare, replace(given, locality=(("Paris is the", there),)))
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_answer_is_pushed_as_far_as_it_must_be(tokenizer):
    """Far from the clamp, the edited prompt moves by its NLL and the margin, times the overshoot, and no further."""
    model = tiny_model("llama").double()
    architecture = read_architecture(model)
    own = replace(FACT, paraphrases=(), neighborhood=())
    (keys,) = subject_keys(model, architecture, tokenizer, [own], [0])
    (margin,) = predicted_margins(
        model, architecture, tokenizer, own, {0: detector(keys[0], None, SMALL, KeyStatistics(None))}, 1e9, []
    )[0]
    (before,) = margins(model, tokenizer, own)
    nll = likelihoods(model, tokenizer, [(own.text, own.target_new)])[0].nll
    # Other tokens than the subject's last one answer to its key a little too.
    assert margin - before == pytest.approx(OVERSHOOT * (nll + MARGIN), rel=0.35)


def test_an_edit_that_moves_the_neighbours_scores_less(tokenizer):
    model = tiny_model("llama")
    statistics = {1: KeyStatistics(second_moment(), 0.1)}

    def score(neighbour: str) -> float:
        fact = replace(FACT, neighborhood=(neighbour,), target_true="London, or in the city of Berlin")
        found = linear_response_scores(model, read_architecture(model), tokenizer, [fact], SELECTIVE, statistics)
        return found[1].item()

    assert score("Berlin is a city in") > score(FACT.text)  # the edited prompt itself as a neighbour


def test_what_is_not_finite_is_told(tokenizer):
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data[5] = float("inf")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        linear_response_scores(
            model, read_architecture(model), tokenizer, [FACT], EditConfig(layer=0), {1: KeyStatistics(None)}
        )


def test_what_else_is_said_of_the_subject_comes_from_other_relations():
    facts = proxy_facts()
    prompts = other_relations(facts[0], facts)
    assert prompts == other_relations(facts[0], facts)
    assert len(set(prompts)) == 5
    assert all(facts[0].subject in prompt for prompt in prompts)
    own = {fact.text.replace(fact.subject, facts[0].subject) for fact in facts if fact.relation == facts[0].relation}
    assert not own & set(prompts)
    assert other_relations(FACT, [FACT]) == []
