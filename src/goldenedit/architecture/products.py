"""Products with frozen float32 weights on CPUs, by the kernels that are fastest there.

torch gives them to MKL, which keeps its AVX-512 kernels for Intel's processors; oneDNN, which torch has with it too,
uses them wherever they are. On two cores of an EPYC, with SmolLM2's widths, it does 1.7 to 3 times as many operations a
second in the same precision. torch itself turns to oneDNN only for products that the user lets it round.
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

_SMALLEST = 1 << 16  # entries of a weight from which on the faster kernel outweighs its longer call


@contextmanager
def faster_products(model: nn.Module) -> Iterator[None]:
    """Let the linear maps of a model with frozen float32 weights on CPUs use oneDNN inside this context.

    It does nothing on processors without AVX-512, where oneDNN is switched off (`torch.backends.mkldnn.enabled`), where
    the user lets products of float32 be rounded (`torch.set_float32_matmul_precision`), and where torch's operator for
    it, which is private, is missing or says something else than torch's own product.
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
    """Tell whether oneDNN is the faster way, and the user's settings allow it."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and matmul_precision() == "highest"
        and _is_proven(_operator())
    )


def _operator() -> Any:
    """Return torch's operator for products by oneDNN; None where this version has none by this name."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _is_proven(operator: Any) -> bool:
    """Tell whether the products of this file, which use this operator, are torch's own, on a small random matrix."""
    if operator is None:
        logger.info("Products on this CPU are torch's own, which are slower: torch has no mkldnn._linear_pointwise.")
        return False
    # In a thread of its own no context of the caller counts: no inference mode, autocast, device or counter.
    with ThreadPoolExecutor(1) as thread:
        problem = thread.submit(_problem).result()
    if problem is not None:
        logger.info("Products on this CPU are torch's own, which are slower: those by oneDNN fail (%s).", problem)
    return problem is None


def _problem() -> str | None:
    """Return what is wrong with products by oneDNN, forward and backward; None where nothing is."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, slope = (
        torch.randn(shape, generator=generator, dtype=torch.float32)
        for shape in ((2, 3, 64), (48, 64), (48,), (2, 3, 48))
    )
    for matrix, offset in ((weight, bias), (weight.T.contiguous().T, None)):
        given = x.clone().requires_grad_()
        expected = functional.linear(given, matrix, offset)
        try:
            output = _Product.apply(given, matrix, offset)
            pairs = [
                (_linear(x, matrix, offset), expected),
                (output, expected),
                (torch.autograd.grad(output, given, slope)[0], torch.autograd.grad(expected, given, slope)[0]),
            ]
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        for one, other in pairs:
            if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
                return "they differ from torch's"
    return None


def _kind(module: nn.Module) -> str:
    """Return what a module is, no subclass of it: a subclass may compute something else."""
    return f"{type(module).__module__}.{type(module).__name__}"


def _of_linear(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        return _product(input, weight, bias) if _takes(input, weight, bias) else functional.linear(input, weight, bias)

    return forward


def _of_conv1d(module: Any) -> Callable[[Tensor], Tensor]:
    """Of GPT-2's linear map in transformers, whose weight is `(d_in, d_out)`."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight.T, module.bias
        return _product(x, weight, bias) if _takes(x, weight, bias) else type(module).forward(module, x)

    return forward


_FORWARDS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "torch.nn.modules.linear.Linear": _of_linear,
    "transformers.pytorch_utils.Conv1D": _of_conv1d,
}


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether all are plain float32 tensors on a CPU and none but `x` is differentiated by."""
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
    """`x @ weight.T + bias`, differentiated by `x` alone, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        flat = _linear(x.reshape(-1, x.shape[-1]), weight, bias)
        # Not as a view: models may change what a linear map gave them in place (OLMo clamps it).
        return flat.resize_(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(slope, weight.T, None), None, None
