"""Training beside frozen weights against plain autograd on the weights themselves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from goldenedit import EditConfig
from goldenedit.architecture import read_architecture
from goldenedit.editing.learn import TextStatistics, learn_each, learn_facts
from goldenedit.editing.training import Training, answer_gradients, answer_nll, answer_rows, train, train_each
from goldenedit.editors import LowRankDelta
from goldenedit.editors.finetune import DenseChange, LowRankChange
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest
from models import MLP_WIDTH, WIDTH, tiny_model

REQUESTS = [
    EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of {} is", "Angela Merkel", "the language of Cambodia"),
]
MASKED = Training("masked", epochs=4, lr=1e-2, stop_loss=0.0)


def plain_nll(model, tokenizer, request, loss):
    row = encode(tokenizer, request.text, request.target_new)
    log_probs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    at = [(row.target[0] if loss == "last" else position) - 1 for position in row.target]
    return -torch.stack([log_probs[p, token] for p, token in zip(at, row.target_ids, strict=True)]).mean()


@pytest.mark.parametrize("loss", ["masked", "last"])
def test_the_loss_is_the_mean_over_an_answer_s_tokens(loss, tokenizer):
    model = tiny_model("llama")
    rows = [encode(tokenizer, request.text, request.target_new) for request in REQUESTS]
    expected = torch.stack([plain_nll(model, tokenizer, request, loss) for request in REQUESTS])
    torch.testing.assert_close(answer_nll(LanguageModel(model, tokenizer), rows, loss), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("loss", ["masked", "last"])
def test_a_dense_change_is_what_adam_would_do_to_the_weight(name, loss, tokenizer):
    model = tiny_model(name)
    architecture = read_architecture(model)
    change = DenseChange(MLP_WIDTH, WIDTH)
    lm = LanguageModel(model, tokenizer, architecture)
    options = replace(MASKED, loss=loss)
    assert train(lm, REQUESTS, {1: change}, options, batch_size=1) == 4

    twin = copy.deepcopy(model)
    weight = architecture.down_projection(twin, 1).weight
    before = weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=options.lr)
    for _ in range(options.epochs):
        optimizer.zero_grad()
        torch.stack([plain_nll(twin, tokenizer, request, loss) for request in REQUESTS]).mean().backward()
        optimizer.step()
    moved = (weight.detach() - before).T if name == "gpt2" else weight.detach() - before
    assert (change.weight.detach() - moved).norm() <= 1e-2 * moved.norm()


def test_an_epsilon_bounds_every_entry(tokenizer):
    model = tiny_model("llama")
    change = DenseChange(MLP_WIDTH, WIDTH, epsilon=5e-4)
    train(LanguageModel(model, tokenizer), REQUESTS, {1: change}, replace(MASKED, loss="last"))
    assert change.weight.detach().abs().max() == pytest.approx(5e-4)


def test_training_stops_below_the_loss_it_is_given(tokenizer):
    model = tiny_model("llama")
    change = LowRankChange(MLP_WIDTH, WIDTH, 2, torch.Generator().manual_seed(0))
    assert train(LanguageModel(model, tokenizer), REQUESTS, {1: change}, replace(MASKED, stop_loss=1e6)) == 0
    assert not change.B.any()


def test_the_token_that_ends_an_answer_is_its_last_token(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    for plain, ended in zip(*(answer_rows(lm, REQUESTS, loss) for loss in ("masked", "ended")), strict=True):
        assert ended.input_ids == (*plain.input_ids, tokenizer.eos_token_id)
        assert ended.target_ids == [*plain.target_ids, tokenizer.eos_token_id]
        assert (ended.subject, ended.last) == (plain.subject, plain.last)


def test_an_end_that_the_tokenizer_adds_is_not_added_again(tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    model = tiny_model("llama")
    plain, added = (answer_rows(LanguageModel(model, each), REQUESTS, "ended") for each in (tokenizer, adding))
    assert [(row.input_ids, row.target) for row in added] == [(row.input_ids, row.target) for row in plain]


def test_an_answer_whose_end_does_not_fit_is_refused(tokenizer):
    model = tiny_model("llama")
    (row,) = answer_rows(LanguageModel(model, tokenizer), REQUESTS[:1], "masked")
    model.config.max_position_embeddings = len(row.input_ids)
    with pytest.raises(ValueError, match=f"token that ends it have {len(row.input_ids) + 1} tokens"):
        answer_rows(LanguageModel(model, tokenizer), REQUESTS[:1], "ended")


THREE = [*REQUESTS, EditRequest("Berlin is in the city of", "Berlin", "London")]


@pytest.mark.parametrize("stop_loss", [0.0, 5.0])
def test_mini_batches_are_what_adam_would_do_to_the_weight_batch_by_batch(stop_loss, tokenizer):
    """With a stop loss, batches below it take no step, and the first pass whose mean is below it is the last."""
    model = tiny_model("llama")
    change = DenseChange(MLP_WIDTH, WIDTH)
    options = replace(MASKED, epochs=6, batch=2, seed=3, stop_loss=stop_loss)
    taken = train(LanguageModel(model, tokenizer), THREE, {1: change}, options, batch_size=1)

    twin = copy.deepcopy(model)
    weight = read_architecture(model).down_projection(twin, 1).weight
    before = weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=options.lr)
    generator = torch.Generator().manual_seed(3)
    steps = skipped = 0
    for _ in range(6):
        order, losses = torch.randperm(3, generator=generator).tolist(), []
        for batch in (order[:2], order[2:]):
            of_facts = [plain_nll(twin, tokenizer, THREE[index], "masked") for index in batch]
            losses += [loss.item() for loss in of_facts]
            if sum(losses[-len(batch) :]) / len(batch) < stop_loss:
                skipped += 1
                continue
            optimizer.zero_grad()
            torch.stack(of_facts).mean().backward()
            optimizer.step()
            steps += 1
        if sum(losses) / 3 < stop_loss:
            break
    assert taken == steps
    assert steps == 12 if stop_loss == 0.0 else skipped > 0
    moved = weight.detach() - before
    assert (change.weight.detach() - moved).norm() <= 1e-2 * moved.norm()


def test_each_pass_rehearses_other_earlier_facts_which_do_not_count_for_the_stopping_rule(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    change = DenseChange(MLP_WIDTH, WIDTH)
    options = replace(MASKED, epochs=3, batch=8, seed=5, rehearsal=0.5)
    assert train(lm, REQUESTS, {1: change}, options, batch_size=1, earlier=THREE) == 3

    twin = copy.deepcopy(model)
    weight = read_architecture(model).down_projection(twin, 1).weight
    before = weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=options.lr)
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for _ in range(3):
        drawn.append(int(torch.randperm(3, generator=generator)[0]))
        torch.randperm(3, generator=generator)  # the order of the batch
        optimizer.zero_grad()
        facts = [*REQUESTS, THREE[drawn[-1]]]
        torch.stack([plain_nll(twin, tokenizer, fact, "masked") for fact in facts]).mean().backward()
        optimizer.step()
    assert len(set(drawn)) > 1
    moved = weight.detach() - before
    assert (change.weight.detach() - moved).norm() <= 1e-2 * moved.norm()
    of_new, of_all = (DenseChange(MLP_WIDTH, WIDTH) for _ in range(2))
    short = replace(options, stop_loss=5.0, epochs=40)
    assert 0 < train(lm, REQUESTS[:1], {1: of_new}, short, earlier=THREE) < 40
    train(lm, REQUESTS[:1], {1: of_all}, replace(short, rehearsal=0.0), earlier=THREE)
    assert not torch.equal(of_new.weight, of_all.weight)


class Shrinking(DenseChange):
    """A change whose squares are a part of the loss."""

    def penalty(self) -> torch.Tensor:
        return 0.05 * self.weight.square().sum()


def test_a_penalty_takes_back_what_the_answers_do_not_need(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    norms, losses = [], []
    rows = answer_rows(lm, REQUESTS, "masked")
    for made in (DenseChange, Shrinking):
        change = made(MLP_WIDTH, WIDTH)
        options = replace(MASKED, epochs=40, batch=1, stop_loss=2.0)
        steps = train(lm, REQUESTS, {1: change}, options)
        assert (steps == 80) is (made is Shrinking)  # the other one ends where the answers are likely
        norms.append(change.weight.norm().item())
        with lm.architecture.adding_deltas(lm.model, {lm.architecture.down_projections[1]: delta_of(change)}):
            losses.append(answer_nll(lm, rows, "masked").mean().item())
    assert norms[1] < 0.8 * norms[0]
    assert losses[1] < 3.0


def delta_of(change: DenseChange) -> LowRankDelta:
    return LowRankDelta.from_dense(change.weight.detach())[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_facts_that_are_trained_side_by_side_are_trained_as_if_alone(name, layer, tokenizer):
    lm = LanguageModel(tiny_model(name), tokenizer)
    d_out, d_in = lm.architecture.shape(lm.model, layer)
    requests = [*REQUESTS, EditRequest("Paris is in", "Paris", "London")]
    losses = answer_nll(lm, answer_rows(lm, requests, "masked"), "masked")
    options = replace(MASKED, stop_loss=losses.median().item())  # the facts stop at different steps
    together = [{layer: DenseChange(d_in, d_out)} for _ in requests]
    steps = train_each(lm, requests, together, options, batch_size=2)
    assert len(set(steps)) > 1
    for request, of_request, count in zip(requests, together, steps, strict=True):
        alone = {layer: DenseChange(d_in, d_out)}
        assert train(lm, [request], alone, options) == count
        torch.testing.assert_close(of_request[layer].weight, alone[layer].weight, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method", ["ft-m", "locft", "lora", "crispedit"])
def test_edits_that_are_learned_side_by_side_are_those_of_one_after_the_other(method, tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    config = EditConfig(method, layer=1, covariance_tokens=300, contexts=2, finetune_steps=5)
    text = TextStatistics.read_by(lm, config)
    path = lm.architecture.down_projections[1]
    for request, found in zip(REQUESTS, learn_each(lm, REQUESTS, config, text), strict=True):
        alone = learn_facts(lm, [request], config, {}, text)
        expected = alone.deltas[path].B @ alone.deltas[path].A
        torch.testing.assert_close(found.deltas[path].B @ found.deltas[path].A, expected, rtol=1e-3, atol=1e-5)
        assert found.steps == alone.steps
        assert found.probability_before == pytest.approx(alone.probability_before)


def test_a_loss_that_is_not_finite_is_told_of_facts_side_by_side(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    changes = [{1: DenseChange(MLP_WIDTH, WIDTH)} for _ in REQUESTS]
    with pytest.raises(ValueError, match=r"not finite at step 1\. Lower EditConfig\.finetune_lr"):
        train_each(lm, REQUESTS, changes, replace(MASKED, lr=float("inf")))


def test_weights_gradients_and_hooks_are_as_before(tokenizer):
    model = tiny_model("gpt2").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lm = LanguageModel(model, tokenizer)
    train(lm, REQUESTS, {1: DenseChange(MLP_WIDTH, WIDTH)}, MASKED)
    answer_gradients(lm, REQUESTS, [0, 1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon"])
def test_gradients_are_those_of_the_weight(name, tokenizer):
    """The gradient of a weight is the sum over tokens of output gradient times input; the answer's tokens are some."""
    model = tiny_model(name).requires_grad_(False)
    architecture = read_architecture(model)
    layers = [0, 2]
    found = answer_gradients(LanguageModel(model, tokenizer, architecture), REQUESTS, layers, batch_size=1)
    tokens = sum(len(encode(tokenizer, request.text, request.target_new).target) for request in REQUESTS)
    last = architecture.weight(model, 2)
    for layer in layers:
        inputs, outputs, gradients = found[layer]
        assert inputs.shape == (tokens, MLP_WIDTH)
        assert gradients.shape == outputs.shape == (tokens, WIDTH)
    # Behind the last layer only the positions that are read count, so their sum is the whole gradient.
    weight = architecture.down_projection(model, 2).weight.requires_grad_()
    loss = sum(plain_nll(model, tokenizer, request, "masked") for request in REQUESTS)
    (expected,) = torch.autograd.grad(loss, weight)
    expected = expected.T if name == "gpt2" else expected
    assert last.shape == expected.shape
    inputs, outputs, gradients = found[2]
    bias = getattr(architecture.down_projection(model, 2), "bias", None)
    torch.testing.assert_close(outputs, inputs @ last.T + (0 if bias is None else bias), rtol=1e-4, atol=1e-5)
    assert (gradients.T @ inputs - expected).norm() <= 1e-3 * expected.norm()


def test_a_low_rank_change_is_its_factors(tokenizer):
    change = LowRankChange(MLP_WIDTH, WIDTH, 3, torch.Generator().manual_seed(0))
    change.B.data.normal_()
    delta = change.change()
    inputs = torch.randn(2, MLP_WIDTH)
    torch.testing.assert_close(change(inputs), inputs @ delta.dense().T)
