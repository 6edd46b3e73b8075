"""Matrix products with frozen float32 weights on CPUs, by the fastest kernels available.

torch uses MKL for these products, and MKL uses its AVX-512 kernels on Intel processors only. oneDNN, which ships with
torch too, uses AVX-512 on all processors that have it. On two cores of an EPYC, with SmolLM2's widths, oneDNN is 1.7 to
3 times faster at the same precision. torch itself uses oneDNN only if the user allows products to be rounded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from goldenedit.precision import matmul_precision

logger = logging.getLogger(__name__)

_SMALLEST = 1 << 16  # entries of a weight: for smaller ones, the overhead of the call outweighs the faster kernel


@contextmanager
def faster_products(model: nn.Module) -> Iterator[None]:
    """Let linear maps with frozen float32 weights on CPUs use oneDNN inside this context.

    Nothing changes on processors without AVX-512, if oneDNN is disabled (`torch.backends.mkldnn.enabled`), if the user
    allows float32 products to be rounded (`torch.set_float32_matmul_precision`), or if torch's private operator for
    oneDNN is missing or gives other results than torch's own product.
    """
    if not usable():
        yield
        return
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            forward = _FORWARDS.get(_kind(module))
            if forward is not None and "forward" not in module.__dict__:  # accelerate puts one on the instance
                module.forward = forward(module)  # type: ignore[method-assign]
                changed.append(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def usable() -> bool:
    """Return whether oneDNN is faster here, gives correct results, and is allowed by the user's settings."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and matmul_precision() == "highest"
        and _is_proven(_operator())
    )


def _operator() -> Any:
    """Return torch's operator for products by oneDNN; None if this version of torch has none of that name."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _is_proven(operator: Any) -> bool:
    """Return whether products with this operator equal torch's own, tested on small random matrices."""
    if operator is None:
        logger.info("Products on this CPU use torch's slower kernels: torch has no mkldnn._linear_pointwise.")
        return False
    # A new thread ignores the caller's contexts: inference mode, autocast, default device and operator counters.
    with ThreadPoolExecutor(1) as thread:
        problem = thread.submit(_problem).result()
    if problem is not None:
        logger.info("Products on this CPU use torch's slower kernels: the self-test of oneDNN failed (%s).", problem)
    return problem is None


def _problem() -> str | None:
    """Return what is wrong with products by oneDNN, in the forward or backward; None if they are correct."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, slope = (
        torch.randn(shape, generator=generator, dtype=torch.float32)
        for shape in ((2, 3, 64), (48, 64), (48,), (2, 3, 48))
    )
    for matrix, offset in ((weight, bias), (weight.T.contiguous().T, None)):
        inputs = x.clone().requires_grad_()
        expected = functional.linear(inputs, matrix, offset)
        try:
            output = _Product.apply(inputs, matrix, offset)
            pairs = [
                (_linear(x, matrix, offset), expected),
                (output, expected),
                (torch.autograd.grad(output, inputs, slope)[0], torch.autograd.grad(expected, inputs, slope)[0]),
            ]
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        for product, reference in pairs:
            if product.shape != reference.shape or not torch.allclose(product, reference, rtol=1e-4, atol=1e-4):
                return "its results differ from torch's"
    return None


def _kind(module: nn.Module) -> str:
    """Return the full name of a module's exact class; a subclass may compute something else."""
    return f"{type(module).__module__}.{type(module).__name__}"


def _of_linear(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a forward for `nn.Linear`."""

    def forward(input: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        return _product(input, weight, bias) if _takes(input, weight, bias) else functional.linear(input, weight, bias)

    return forward


def _of_conv1d(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a forward for GPT-2's linear map in transformers, whose weight is `(d_in, d_out)`."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight.T, module.bias
        return _product(x, weight, bias) if _takes(x, weight, bias) else type(module).forward(module, x)

    return forward


_FORWARDS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "torch.nn.modules.linear.Linear": _of_linear,
    "transformers.pytorch_utils.Conv1D": _of_conv1d,
}


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether all are plain float32 tensors on a CPU, and only `x` may need a gradient."""
    return (
        _is_plain(x)
        and _is_plain(weight)
        and weight.numel() >= _SMALLEST
        and not weight.requires_grad
        and (bias is None or (_is_plain(bias) and not bias.requires_grad))
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _operator()(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias`, with a gradient with respect to `x` only, and no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        flat = _linear(x.reshape(-1, x.shape[-1]), weight, bias)
        # Not a view: models may change the output of a linear map in place (OLMo clamps it).
        return flat.resize_(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(slope, weight.T, None), None, None
