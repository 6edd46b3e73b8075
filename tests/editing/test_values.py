"""The batched, replayed optimization against one fact at a time and against plain loops over whole models."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from goldenedit.architecture import read_architecture, replay
from goldenedit.architecture.hooks import recording
from goldenedit.editing import values
from goldenedit.editing.values import ValueOptions, optimize_values
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest
from models import MLP_WIDTH, WIDTH, tiny_model

REQUESTS = [
    EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of {} is", "Angela Merkel", "the language of Cambodia"),
    EditRequest("{} is in", "Paris", "London"),
]
CONTEXTS = ["", "You and I live in a city. ", "Therefore. "]
# Values of tiny models are short: with the defaults the decay would outweigh all else.
OPTIONS = ValueOptions(steps=5, lr=0.5, kl_factor=0.25, weight_decay=0.02, clamp=4.0, stop_loss=0.0)

models = pytest.mark.parametrize("name", ["llama", "gpt2"])
layer_sets = pytest.mark.parametrize("layers", [[1], [0, 2]], ids=["one layer", "two layers"])


def optimize(model, tokenizer, requests, layers=(1,), options=OPTIONS, contexts=CONTEXTS, **kwargs):
    return optimize_values(LanguageModel(model, tokenizer), requests, list(layers), contexts, options, **kwargs)


def vectors(attention: bool) -> tuple[str, ...]:
    return ("mlp", "attention") if attention else ("mlp",)


def at_subject(model: nn.Module, modules: dict[str, nn.Module], ids: torch.Tensor, subject: int, deltas=None):
    """Run the whole model on one text with `deltas` added; return logits, and keys and values at the subject."""
    mask = torch.zeros(ids.shape[1], 1)
    mask[subject] = 1.0
    handles = [
        module.register_forward_hook(lambda _, args, output, index=index: output + mask * deltas[index])
        for index, module in enumerate(modules.values())
        if deltas is not None
    ]
    with recording(modules) as record:
        logits = model(input_ids=ids).logits[0]
    for handle in handles:
        handle.remove()
    return (
        logits,
        [record.inputs[name][0, subject] for name in modules],
        torch.stack([record.outputs[name][0, subject] for name in modules]),
    )


class Reference:
    """Equation 4 of ROME for one request: one text at a time, the whole model at every step."""

    def __init__(self, model, tokenizer, request, layers, options, contexts=CONTEXTS, attention=False):
        architecture = read_architecture(model)
        self.modules = {str(layer): architecture.down_projection(model, layer) for layer in layers}
        if attention:
            self.modules |= {f"attention {layer}": architecture.attention_output(model, layer) for layer in layers}
        self.model, self.options = model, options
        self.rows = [
            encode(tokenizer, context + request.text, request.target_new, len(context) + request.subject_end)
            for context in contexts
        ]
        self.essence = encode(tokenizer, f"{request.subject} is a", None, len(request.subject))
        with torch.no_grad():
            norms = [self.run(row)[2].norm(dim=-1) for row in self.rows]
            self.original = self.run(self.essence)[0][-1].log_softmax(-1)
        self.v0_norm = torch.stack(norms).mean(0)

    def run(self, row, deltas=None):
        return at_subject(self.model, self.modules, torch.tensor([row.input_ids]), row.subject, deltas)

    def nll(self, row, deltas=None):
        log_probs = self.run(row, deltas)[0].log_softmax(-1)
        return -torch.stack([log_probs[position - 1, row.input_ids[position]] for position in row.target]).mean()

    def loss(self, deltas):
        nll = torch.stack([self.nll(row, deltas) for row in self.rows]).mean()
        now = self.run(self.essence, deltas)[0][-1].log_softmax(-1)
        kl = nn.functional.kl_div(self.original, now, log_target=True, reduction="sum")
        decay = sum(delta.norm() / norm**2 for delta, norm in zip(deltas, self.v0_norm, strict=True))
        return nll + self.options.kl_factor * kl + self.options.weight_decay * decay

    def deltas(self):
        delta = torch.zeros(len(self.modules), WIDTH, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.options.lr)
        for _ in range(self.options.steps):
            optimizer.zero_grad()
            self.loss(delta).backward(inputs=[delta])
            optimizer.step()
            with torch.no_grad():
                limit = self.options.clamp * self.v0_norm
                delta *= (limit / delta.norm(dim=-1)).clamp(max=1.0)[:, None]
        return delta.detach()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


@models
@layer_sets
@pytest.mark.parametrize(("clamp", "attention"), [(4.0, False), (0.3, False), (4.0, True)])
def test_deltas_equal_those_of_a_plain_optimization(name, layers, clamp, attention, tokenizer):
    model = tiny_model(name)
    options = replace(OPTIONS, clamp=clamp)
    values = optimize(model, tokenizer, REQUESTS, layers, replace(options, vectors=vectors(attention)))
    assert [keys.shape for keys in values.keys] == [(3, len(CONTEXTS), MLP_WIDTH)] * len(layers)
    for index, request in enumerate(REQUESTS[:2]):
        reference = Reference(model, tokenizer, request, layers, options, attention=attention)
        expected = reference.deltas()[: len(layers)]
        assert_close(values.delta[index], expected)
        with torch.no_grad():
            bare = (-reference.nll(reference.rows[0])).exp().item()
        assert values.target_probability[index] == pytest.approx(bare, rel=1e-3)


@models
@layer_sets
def test_requests_together_equal_each_alone(name, layers, tokenizer):
    model = tiny_model(name)
    together = optimize(model, tokenizer, REQUESTS, layers)
    by_two = optimize(model, tokenizer, REQUESTS, layers, batch_size=2)
    assert together.delta.shape == (3, len(layers), WIDTH)
    assert [keys.shape for keys in together.keys] == [(3, len(CONTEXTS), MLP_WIDTH)] * len(layers)
    assert {tensor.dtype for tensor in (together.delta, *together.keys)} == {torch.float32}
    for index, request in enumerate(REQUESTS):
        alone = optimize(model, tokenizer, [request], layers)
        for many in (together, by_two):
            assert_close(many.delta[index], alone.delta[0])
            for keys, own in zip(many.keys, alone.keys, strict=True):
                assert_close(keys[index], own[0])
            assert many.steps[index] == alone.steps[0]


@models
def test_a_finished_request_stops_and_the_others_go_on(name, tokenizer):
    model = tiny_model(name)
    options = replace(OPTIONS, steps=12, kl_factor=0.0, stop_loss=5.7)  # between their losses
    together = optimize(model, tokenizer, REQUESTS, options=options)
    assert len(set(together.steps)) > 1
    for index, request in enumerate(REQUESTS):
        alone = optimize(model, tokenizer, [request], options=options)
        assert alone.steps == [together.steps[index]]
        assert_close(together.delta[index], alone.delta[0])


@models
@layer_sets
@pytest.mark.parametrize("attention", [False, True])
def test_keys_are_those_of_each_context_with_the_deltas_in_place(name, layers, attention, tokenizer):
    """Those of the MLPs alone: what the attention was given is not stored, so keys must not see it."""
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, layers, replace(OPTIONS, vectors=vectors(attention)))
    for index, request in enumerate(REQUESTS):
        reference = Reference(model, tokenizer, request, layers, OPTIONS)
        with torch.no_grad():
            keys = [torch.stack(reference.run(row, values.delta[index])[1]) for row in reference.rows]
        assert_close(torch.stack([of_layer[index] for of_layer in values.keys]), torch.stack(keys, 1))


@models
@layer_sets
def test_every_way_of_replay_gives_the_same_deltas(name, layers, tokenizer, monkeypatch):
    model = tiny_model(name)
    packed = optimize(model, tokenizer, REQUESTS, layers)
    assert packed.replay == "packed"
    with monkeypatch.context() as patch:
        patch.setattr(replay, "may_pack", lambda _: False)
        by_suffix = optimize(model, tokenizer, REQUESTS, layers)
    assert by_suffix.replay == "suffix"
    handle = model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    by_layers = optimize(model, tokenizer, REQUESTS, layers)
    handle.remove()
    assert by_layers.replay == "layers"
    for other in (by_suffix, packed):
        assert_close(by_layers.delta, other.delta)
        for keys, expected in zip(by_layers.keys, other.keys, strict=True):
            assert_close(keys, expected)


def test_facts_thought_to_be_packed_are_grouped_anew_once_they_are_not(tokenizer, monkeypatch):
    model = tiny_model("gptj")  # does not attend by torch's function
    expected = optimize(model, tokenizer, REQUESTS, [1])
    asked: list[tuple[int, bool]] = []

    def groups(lengths, rows, most, device, padded):
        asked.append((len(lengths), padded))
        return [slice(index, index + 1) for index in range(len(lengths))]

    monkeypatch.setattr(values, "may_pack", lambda _: True)
    monkeypatch.setattr(values, "groups_by_length", groups)
    found = optimize(model, tokenizer, REQUESTS, [1])
    assert asked == [(len(REQUESTS), False), (len(REQUESTS) - 1, True)]
    assert found.replay == "suffix"
    assert_close(found.delta, expected.delta)
    assert found.steps == expected.steps


@models
@pytest.mark.parametrize("clamp", [0.1, 0.5])
def test_no_delta_is_longer_than_its_clamp(name, clamp, tokenizer):
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, [0, 2], replace(OPTIONS, clamp=clamp, lr=3.0))
    for delta, request in zip(values.delta, REQUESTS, strict=True):
        reference = Reference(model, tokenizer, request, [0, 2], OPTIONS)
        assert (delta.norm(dim=-1) <= clamp * reference.v0_norm * (1 + 1e-4)).all()


@models
def test_the_new_answer_becomes_likelier(name, tokenizer):
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, options=replace(OPTIONS, steps=12))
    for index, request in enumerate(REQUESTS):
        reference = Reference(model, tokenizer, request, [1], OPTIONS)
        with torch.no_grad():
            before, after = (
                torch.stack([reference.nll(row, deltas) for row in reference.rows]).mean().item()
                for deltas in (None, values.delta[index])
            )
        assert after < before - 0.1


def test_a_request_whose_loss_is_low_from_the_start_is_not_moved(tokenizer):
    values = optimize(tiny_model("llama"), tokenizer, REQUESTS, options=replace(OPTIONS, stop_loss=1e6))
    assert values.steps == [0, 0, 0]
    assert not values.delta.any()


def test_weights_modes_and_hooks_are_as_before(tokenizer):
    model = tiny_model("gpt2").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimize(model, tokenizer, REQUESTS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules()
    )


def test_frozen_weights_give_the_same_deltas(tokenizer):
    model = tiny_model("llama")
    trainable = optimize(model, tokenizer, REQUESTS)
    assert_close(optimize(model.requires_grad_(False), tokenizer, REQUESTS).delta, trainable.delta)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (EditRequest("The Eiffel Tower is " + "in the city " * 50, "The Eiffel Tower", "Rome"), "but the model takes"),
        (EditRequest("Paris is in", "Paris", "Rome " * 150), "but the model takes"),
    ],
)
def test_a_request_that_cannot_be_tokenized_raises_before_any_forward(bad, message, tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message):
        optimize_values(lm, [*REQUESTS, bad], [1], CONTEXTS, OPTIONS, batch_size=1)
    assert ran == []


@models
def test_weights_that_are_not_finite_raise_with_the_subject_s_name(name, tokenizer, caplog):
    model = tiny_model(name)
    architecture = read_architecture(model)
    architecture.down_projection(model, 2).weight.data[0, 0] = torch.nan
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ValueError, match=r"'Paris' -> 'London' is not finite at step 0\. Load the model in"),
    ):
        optimize_values(LanguageModel(model, tokenizer, architecture), REQUESTS, [1], CONTEXTS, OPTIONS)
