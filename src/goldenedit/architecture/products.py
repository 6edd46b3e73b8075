"""Products with frozen float32 weights on CPUs, by the kernels that are fastest there.

torch gives them to MKL, which keeps its AVX-512 kernels for Intel's processors; oneDNN, which torch has with it too,
uses them wherever they are. On two cores of an EPYC, with SmolLM2's widths, it does 1.6 to 2.5 times as many operations
a second in the same precision. torch itself turns to oneDNN only for products that the user lets it round.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from goldenedit.precision import matmul_precision

_SMALLEST = 1 << 16  # entries of a weight from which on the faster kernel outweighs its longer call


def faster_products() -> AbstractContextManager[Any]:
    """Return a context inside which linear maps with frozen float32 weights on CPUs use oneDNN, where that is faster.

    It does nothing on processors without AVX-512, where oneDNN is switched off (`torch.backends.mkldnn.enabled`), and
    where the user lets products of float32 be rounded (`torch.set_float32_matmul_precision`).
    """
    usable = (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and matmul_precision() == "highest"
    )
    return _Products() if usable else nullcontext()


class _Products(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and len(args) in (2, 3):
            x, weight, bias = (*args, None)[:3]
            if _takes(x, weight, bias):
                return _product(x, weight, bias)
        elif func is torch.addmm and not kwargs and len(args) == 3:  # transformers' Conv1D, in GPT-2
            bias, x, weight = args
            if _takes(x, weight.T, bias) and bias.ndim == 1:
                return _product(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


def _takes(x: Any, weight: Any, bias: Any) -> bool:
    """Tell whether all are plain float32 tensors on a CPU and none but `x` is differentiated by."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(a) in (Tensor, nn.Parameter) and a.dtype == torch.float32 and a.device.type == "cpu" for a in given)
        and weight.ndim == 2
        and weight.numel() >= _SMALLEST
        and x.numel() > 0
        and not any(a.requires_grad for a in given[1:])
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias`, differentiated by `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(slope, weight.T, None), None, None
