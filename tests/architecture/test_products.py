"""Products by the faster kernels are torch's own, forward and backward, and are left alone where these do not apply."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, OlmoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goldenedit.architecture import products
from goldenedit.architecture.hooks import evaluating
from goldenedit.architecture.products import faster_products
from goldenedit.cost import measuring
from models import TINY_CONFIGS, VOCAB_SIZE, tiny_model

WIDTH, OUT = 320, 288  # large enough for the faster kernels

fast = pytest.mark.skipif(not products.usable(), reason="oneDNN is not the faster way here")

INPUTS: dict[str, Callable[[], Tensor]] = {
    "one token": lambda: torch.randn(WIDTH),
    "rows": lambda: torch.randn(5, WIDTH),
    "batches": lambda: torch.randn(2, 3, 5, WIDTH),
    "transposed": lambda: torch.randn(WIDTH, 5).T,
    "turned": lambda: torch.randn(5, 3, WIDTH).transpose(0, 1),
    "strided": lambda: torch.randn(3, 5, 2 * WIDTH)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, WIDTH).expand(4, 3, WIDTH),
}
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(OUT, WIDTH),
    "transposed": lambda: torch.randn(WIDTH, OUT).T,
    "strided": lambda: torch.randn(2 * OUT, WIDTH)[::2],
}


def linear(weight: Tensor, bias: Tensor | None = None, trained: bool = False) -> nn.Linear:
    module = nn.Linear(1, 1, bias=bias is not None)
    module.weight = nn.Parameter(weight, requires_grad=trained)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return module


def is_faster(output: Tensor) -> bool:
    return type(output.grad_fn).__name__.startswith("_Product")


@fast
@pytest.mark.parametrize("of_input", INPUTS)
@pytest.mark.parametrize("of_weight", WEIGHTS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_their_gradients_are_torch_s(of_input, of_weight, with_bias):
    torch.manual_seed(0)
    x, weight = INPUTS[of_input]().requires_grad_(), WEIGHTS[of_weight]()
    module = linear(weight, torch.randn(OUT) if with_bias else None)
    expected = module(x)
    slope = torch.randn(OUT, *expected.shape[:-1]).movedim(0, -1)
    (gradient,) = torch.autograd.grad(expected, x, slope)
    with faster_products(module), measuring() as cost:
        output = module(x)
        assert is_faster(output)
        (found,) = torch.autograd.grad(output, x, slope)
        with torch.no_grad():
            torch.testing.assert_close(module(x), output)
    assert cost().flops == 3 * 2 * x.numel() * OUT
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@fast
@pytest.mark.parametrize("of_input", INPUTS)
def test_outputs_may_be_changed_in_place(of_input):
    x, module = INPUTS[of_input]().requires_grad_(), linear(torch.randn(OUT, WIDTH))
    with faster_products(module):
        output = module(x)
        output.clamp_(-1, 1)
        (found,) = torch.autograd.grad(output.sum(), x)
    (gradient,) = torch.autograd.grad(module(x).clamp(-1, 1).sum(), x)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@fast
def test_a_second_derivative_is_refused():
    x, module = torch.randn(5, WIDTH, requires_grad=True), linear(torch.randn(OUT, WIDTH))
    with faster_products(module):
        (once,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):  # and not silently wrong
        torch.autograd.grad(once.sum(), x)


def clipping_olmo() -> PreTrainedModel:
    """Return a model that changes what its linear maps say in place."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OlmoConfig(vocab_size=VOCAB_SIZE, **sizes, clip_qkv=0.01)).eval()


@fast
@pytest.mark.parametrize("name", [*TINY_CONFIGS, "olmo"])
def test_whole_models_and_their_gradients_are_the_same(name, monkeypatch):
    monkeypatch.setattr(products, "_SMALLEST", 0)
    own, calls = products._linear, []
    monkeypatch.setattr(products, "_linear", lambda *args: calls.append(None) or own(*args))
    model = clipping_olmo() if name == "olmo" else tiny_model(name)
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = {}
    for faster in (True, False):
        calls.clear()
        setting = nullcontext() if faster else torch.backends.mkldnn.flags(enabled=False)
        with setting, evaluating(model):
            logits = model(inputs_embeds=embedded).logits
            assert bool(calls) == faster
            found[faster] = logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), embedded)[0]
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@fast
def test_products_are_exact_to_the_precision_of_float32():
    x, weight = torch.randn(64, 1536), torch.randn(576, 1536)
    exact = x.double() @ weight.double().T
    module = linear(weight)
    with faster_products(module):
        found = module(x)
    assert (found - exact).norm() <= 8 * torch.finfo(torch.float32).eps * exact.norm()


@fast
@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH)])
def test_conv1d_is_a_linear_map_too(shape):
    x, module = torch.randn(shape, requires_grad=True), Conv1D(OUT, WIDTH).requires_grad_(False)
    with faster_products(module):
        output = module(x)
    assert is_faster(output)
    torch.testing.assert_close(output, module(x), rtol=1e-4, atol=1e-4)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * functional.linear(input, self.weight)


@pytest.mark.parametrize(
    ("x", "module"),
    [
        (torch.randn(5, WIDTH), linear(torch.randn(OUT, WIDTH), trained=True)),
        (torch.randn(5, 64), linear(torch.randn(64, 64))),  # small
        (torch.randn(5, WIDTH).double(), linear(torch.randn(OUT, WIDTH).double())),
        (torch.randn(5, WIDTH).bfloat16(), linear(torch.randn(OUT, WIDTH).bfloat16())),
        (torch.randn(0, WIDTH), linear(torch.randn(OUT, WIDTH))),  # empty
        (torch.randn(5, WIDTH), Doubling(WIDTH, OUT).requires_grad_(False)),
        (torch.randn(5, WIDTH), Conv1D(OUT, WIDTH)),  # trained
    ],
)
def test_other_products_are_left_to_torch(x, module):
    x = x.clone().requires_grad_()
    with faster_products(module):
        output = module(x)
    assert not is_faster(output)
    assert torch.equal(output, module(x))


def test_a_forward_put_on_the_instance_by_others_stays():
    module = linear(torch.randn(OUT, WIDTH))
    own = module.forward = lambda input: functional.linear(input, module.weight)
    with faster_products(module):
        assert module.__dict__["forward"] is own
    assert module.__dict__["forward"] is own


class Operators:
    """Stands for `torch.ops.mkldnn`, with another operator by the name of the private one, or none."""

    def __init__(self, operator: Callable[..., Tensor] | None) -> None:
        if operator is not None:
            self._linear_pointwise = operator


OWN_OPERATOR = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
CHANGED: dict[str, Callable[..., Tensor] | None] = {
    "missing": None,
    "other arguments": lambda x, weight: functional.linear(x, weight),
    "without the bias": lambda x, weight, bias, *_: OWN_OPERATOR(x, weight, None, *_),
    "the weight as it lies": lambda x, weight, bias, *_: x @ weight if x.shape[-1] == len(weight) else x @ weight.T,
    "rounded": lambda x, weight, bias, *_: functional.linear(x.bfloat16(), weight.bfloat16()).float() + (bias or 0),
    "flat": lambda x, weight, bias, *_: OWN_OPERATOR(x.flatten(0, -2), weight, bias, *_),
}


@fast
@pytest.mark.parametrize("operator", CHANGED.values(), ids=CHANGED.keys())
def test_an_operator_that_is_not_what_it_was_is_not_used(operator, monkeypatch):
    x, module = torch.randn(5, WIDTH, requires_grad=True), linear(torch.randn(OUT, WIDTH))
    expected = module(x)
    monkeypatch.setattr(torch.ops, "mkldnn", Operators(operator))
    assert not products.usable()
    with faster_products(module):
        assert torch.equal(module(x), expected)


@fast
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu")])
def test_the_proof_is_made_once_and_minds_no_context_of_the_caller(mode, monkeypatch):
    calls = []

    def operator(*args):
        calls.append(None)
        return OWN_OPERATOR(*args)

    monkeypatch.setattr(torch.ops, "mkldnn", Operators(operator))
    state = torch.get_rng_state()
    with mode(), measuring() as cost:
        assert products.usable()
        count = len(calls)
        assert products.usable()
    assert count == len(calls) > 0
    assert cost().flops == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_user_s_settings_are_respected(monkeypatch):
    x, module = torch.randn(5, WIDTH, requires_grad=True), linear(torch.randn(OUT, WIDTH))

    def taken() -> bool:
        with faster_products(module):
            return is_faster(module(x))

    assert taken() == products.usable()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not taken()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not taken()
    monkeypatch.undo()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not taken()
    finally:
        torch.set_float32_matmul_precision(precision)


@fast
def test_the_library_s_runs_use_them_and_nothing_stays():
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, 4096, bias=False)
    embedded = torch.randn(1, 5, 32, requires_grad=True)
    with evaluating(model):
        assert is_faster(model.lm_head(embedded))
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert not is_faster(model.lm_head(embedded))
    assert not any("forward" in module.__dict__ for module in model.modules())
