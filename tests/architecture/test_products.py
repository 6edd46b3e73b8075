"""Products by the faster kernels are torch's own, forward and backward, and are left alone where these do not apply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from goldenedit.architecture.hooks import evaluating
from goldenedit.architecture.products import faster_products
from goldenedit.cost import measuring
from models import tiny_model

WIDTH, OUT = 320, 288  # large enough for the faster kernels

fast = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the processor has no AVX-512",
)


def inputs() -> dict[str, Tensor]:
    return {
        "one token": torch.randn(WIDTH),
        "rows": torch.randn(5, WIDTH),
        "batches": torch.randn(2, 3, 5, WIDTH),
        "transposed": torch.randn(WIDTH, 5).T,
        "turned": torch.randn(5, 3, WIDTH).transpose(0, 1),
        "strided": torch.randn(3, 5, 2 * WIDTH)[..., ::2],
        "expanded": torch.randn(1, 1, WIDTH).expand(4, 3, WIDTH),
    }


def weights() -> dict[str, Tensor]:
    return {
        "plain": torch.randn(OUT, WIDTH),
        "transposed": torch.randn(WIDTH, OUT).T,
        "strided": torch.randn(2 * OUT, WIDTH)[::2],
    }


def name_of(output: Tensor) -> str:
    return type(output.grad_fn).__name__


@fast
@pytest.mark.parametrize("of_input", inputs())
@pytest.mark.parametrize("of_weight", weights())
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_their_gradients_are_torch_s(of_input, of_weight, with_bias):
    torch.manual_seed(0)
    x, weight = inputs()[of_input].requires_grad_(), weights()[of_weight]
    bias = torch.randn(OUT) if with_bias else None
    expected = functional.linear(x, weight, bias)
    slope = torch.randn(OUT, *expected.shape[:-1]).movedim(0, -1)
    (gradient,) = torch.autograd.grad(expected, x, slope)
    with faster_products(), measuring() as cost:
        output = functional.linear(x, weight, bias)
        assert name_of(output).startswith("_Product")
        (found,) = torch.autograd.grad(output, x, slope)
        with torch.no_grad():
            torch.testing.assert_close(functional.linear(x, weight, bias), output)
    assert cost().flops == 3 * 2 * x.numel() * OUT
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@fast
def test_products_are_exact_to_the_precision_of_float32():
    x, weight = torch.randn(64, 1536), torch.randn(576, 1536)
    exact = x.double() @ weight.double().T
    with faster_products():
        found = functional.linear(x, weight)
    assert (found - exact).norm() <= 8 * torch.finfo(torch.float32).eps * exact.norm()


@fast
def test_the_products_of_conv1d_are_taken_too():
    x, weight, bias = torch.randn(5, WIDTH, requires_grad=True), torch.randn(WIDTH, OUT), torch.randn(OUT)
    with faster_products():
        output = torch.addmm(bias, x, weight)
        assert name_of(output).startswith("_Product")
        assert not name_of(torch.addmm(torch.randn(5, OUT), x, weight)).startswith("_Product")
    torch.testing.assert_close(output, torch.addmm(bias, x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(5, WIDTH), torch.randn(OUT, WIDTH, requires_grad=True)),  # trained
        (torch.randn(5, 64), torch.randn(64, 64)),  # small
        (torch.randn(5, WIDTH).double(), torch.randn(OUT, WIDTH).double()),
        (torch.randn(5, WIDTH).bfloat16(), torch.randn(OUT, WIDTH).bfloat16()),
        (torch.randn(0, WIDTH), torch.randn(OUT, WIDTH)),  # empty
    ],
)
def test_other_products_are_left_to_torch(x, weight):
    x = x.clone().requires_grad_()
    with faster_products():
        output = functional.linear(x, weight)
    assert not name_of(output).startswith("_Product")
    assert torch.equal(output, functional.linear(x, weight))


def test_the_user_s_settings_are_respected(monkeypatch):
    x, weight = torch.randn(5, WIDTH, requires_grad=True), torch.randn(OUT, WIDTH)

    def taken() -> bool:
        with faster_products():
            return name_of(functional.linear(x, weight)).startswith("_Product")

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
def test_the_library_s_runs_use_them_and_nothing_else_does():
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, 4096, bias=False)
    ids = torch.randint(3, 200, (1, 5))

    def taken() -> bool:
        embedded = torch.randn(1, 5, 32, requires_grad=True)
        return "_Product" in name_of(model.lm_head(embedded))

    assert not taken()
    with evaluating(model):
        assert taken()
        model(input_ids=ids)
    assert not taken()
