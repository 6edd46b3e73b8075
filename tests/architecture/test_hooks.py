"""Reading and changing what flows through a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import (
    adding,
    adding_delta,
    adding_delta_by_row,
    evaluating,
    first_tensor,
    hidden_argument,
    reading_logits,
    recording,
    stop_forward,
    watching_gradients,
)
from models import TINY_CONFIGS, VOCAB_SIZE, WIDTH, tiny_model

every_architecture = pytest.mark.parametrize("name", TINY_CONFIGS)


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB_SIZE, (3, 7), generator=torch.Generator().manual_seed(0))


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@every_architecture
@torch.no_grad()
def test_logits_read_equal_those_of_a_whole_forward(name, ids):
    model = tiny_model(name)
    whole = model(input_ids=ids).logits
    rows, positions = torch.tensor([2, 0, 0, 1]), torch.tensor([6, 0, 3, 3])
    with reading_logits(model, rows, positions) as logits_of:
        read = logits_of(model(input_ids=ids))
    torch.testing.assert_close(read, whole[rows, positions])
    assert hook_count(model) == 0


@torch.no_grad()
def test_logits_are_read_where_the_head_is_not_known(ids):
    model = tiny_model("llama")
    whole = model(input_ids=ids).logits
    model.get_output_embeddings = lambda: None
    rows, positions = torch.tensor([1, 2]), torch.tensor([4, 5])
    with reading_logits(model, rows, positions) as logits_of:
        torch.testing.assert_close(logits_of(model(input_ids=ids)), whole[rows, positions])


@pytest.mark.parametrize("is_flat", [False, True])
@torch.no_grad()
def test_each_row_has_a_change_of_its_own(is_flat):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 4)
    inputs = torch.randn(3, 7, 5, generator=generator)
    first, second = [(torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(2)]
    before = linear(inputs)
    with adding_delta_by_row(linear, [first, None, second]):
        found = linear(inputs.flatten(0, 1)).view(3, 7, 4) if is_flat else linear(inputs)
    for row, factors in ((0, first), (2, second)):
        with adding_delta(linear, *factors):
            torch.testing.assert_close(found[row], linear(inputs)[row])
    assert torch.equal(found[1], before[1])
    assert hook_count(linear) == 0


@torch.no_grad()
def test_stop_ends_the_forward_at_once(ids):
    model = tiny_model("llama")
    ran = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    after = False
    with stop_forward() as stop:
        handles.append(model.model.layers[1].register_forward_hook(lambda *_: stop()))
        model(input_ids=ids)
        after = True
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert not after


def test_stop_forward_lets_errors_through():
    with pytest.raises(KeyError), stop_forward():
        raise KeyError


def test_evaluating_gives_each_module_its_own_mode_back():
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_evaluating_freezes_weights_and_gives_back_which_were_trained():
    model = tiny_model("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with evaluating(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


@every_architecture
@torch.no_grad()
def test_each_row_gets_its_vector_at_its_position_alone(name, ids):
    model = tiny_model(name)
    architecture = read_architecture(model)
    module = architecture.down_projection(model, 1)
    positions, vectors = torch.tensor([1, 4, 6]), torch.randn(3, WIDTH)
    with recording({"down": module}) as record:
        model(input_ids=ids)
    clean = record.outputs["down"].view(3, 7, WIDTH)
    with adding({module: (7 * torch.arange(3) + positions, vectors)}), recording({"down": module}) as record:
        model(input_ids=ids)
    expected = clean.clone()
    expected[torch.arange(3), positions] += vectors
    torch.testing.assert_close(record.outputs["down"].view(3, 7, WIDTH), expected)
    assert hook_count(model) == 0


def test_flattened_outputs_are_added_to_like_others():
    module = nn.Linear(5, 4)
    flat, vectors = torch.randn(6, 5), torch.randn(2, 4, requires_grad=True)
    with torch.no_grad():
        expected = module(flat).view(2, 3, 4).clone()
        expected[[0, 1], [2, 0]] += vectors
    with adding({module: (torch.tensor([2, 3]), vectors)}):
        output = module(flat)
    assert output.shape == (6, 4)
    torch.testing.assert_close(output.view(2, 3, 4), expected)
    (gradient,) = torch.autograd.grad(output.sum(), vectors)
    torch.testing.assert_close(gradient, torch.ones(2, 4))


def test_hooks_leave_with_an_exception(ids):
    model = tiny_model("llama")
    module = model.model.layers[0].mlp.down_proj
    rows = torch.tensor([0])
    with (
        pytest.raises(KeyError),
        adding({module: (torch.tensor([0]), torch.zeros(1, WIDTH))}),
        recording({"module": module}),
        reading_logits(model, rows, rows),
    ):
        raise KeyError
    assert hook_count(model) == 0


def test_outputs_are_recorded_as_they_were_before_later_changes_in_place():
    module = nn.Linear(3, 3)
    with recording({"module": module}) as record:
        output = module(torch.ones(1, 3)).detach()
        before = output.clone()
        output += 1.0
    assert torch.equal(record.outputs["module"], before)


def test_hidden_state_is_the_first_tensor():
    tensor = torch.zeros(1)
    assert first_tensor((None, tensor)) is tensor
    assert hidden_argument((), {"ids": torch.tensor([1]), "hidden_states": tensor}) is tensor
    with pytest.raises(TypeError):
        first_tensor({"hidden": tensor})
    with pytest.raises(TypeError, match="without a hidden state"):
        hidden_argument((None,), {})


@every_architecture
@torch.no_grad()
def test_a_delta_that_is_added_is_a_delta_in_the_weight(name, ids):
    model = tiny_model(name)
    architecture = read_architecture(model)
    module = architecture.down_projection(model, 1)
    d_out, d_in = architecture.shape(model, 1)
    A, B = torch.randn(2, d_in), torch.randn(d_out, 2)
    before = model(input_ids=ids).logits
    with adding_delta(module, A, B):
        added = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, before)
    architecture.weight(model, 1).add_(B @ A)
    torch.testing.assert_close(added, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (added - before).abs().max() > 1e-2


@every_architecture
def test_gradients_that_pass_by_are_those_of_autograd(name, ids):
    model = tiny_model(name).requires_grad_(False)
    architecture = read_architecture(model)
    modules = {architecture.down_projection(model, layer): layer for layer in architecture.down_projections}
    found = {}

    def take(module, inputs, gradient):
        found[modules[module]] = (inputs.view(-1, inputs.shape[-1]), gradient.view(-1, gradient.shape[-1]))

    hooks = hook_count(model)
    with watching_gradients(architecture.layer(model, 0), modules, take) as roots:
        loss = model(input_ids=ids).logits.log_softmax(-1)[..., 0].sum()
        torch.autograd.grad(loss, roots)
    assert hook_count(model) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    for module, layer in modules.items():
        module.weight.requires_grad_(True)
        loss = model(input_ids=ids).logits.log_softmax(-1)[..., 0].sum()
        (expected,) = torch.autograd.grad(loss, module.weight)
        module.weight.requires_grad_(False)
        inputs, gradient = found[layer]
        product = gradient.T @ inputs
        own = product.T if expected.shape != product.shape or type(module).__name__ == "Conv1D" else product
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)
