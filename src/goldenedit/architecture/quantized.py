"""Support for linear maps with quantized weights, recognized by their properties and not by their library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def keeping_integers(model: nn.Module) -> list[nn.Module]:
    """Return the modules with integer parameters, as most quantized weights are stored."""
    return [
        module
        for module in model.modules()
        if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False))
    ]


def is_composite(weight: Tensor) -> bool:
    """Return whether a tensor wraps other tensors, such as integers and their scales, whatever its dtype says."""
    return hasattr(weight, "__tensor_flatten__")  # torch requires this of wrapper tensor classes


def _keeping_composites(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(map(is_composite, module.parameters(recurse=False)))]


@contextmanager
def reading_state(model: nn.Module) -> Iterator[None]:
    """Let `state_dict()` return quantized weights as they are in memory, inside this context.

    Otherwise, 4-bit layers of bitsandbytes that have run on a CPU convert their weights back to the order used in files
    and lose their scales, although PEFT only reads the names in the state.
    """
    plain: Any = getattr(nn.Module, "_save_to_state_dict", None)  # private, but meant to be overridden
    modules = [] if plain is None else keeping_integers(model)
    for module in modules:
        module._save_to_state_dict = MethodType(plain, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module._save_to_state_dict


class _Linear(torch.autograd.Function):
    """Passes on the output of a linear map and adds the missing backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, output: Tensor, matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.matrix.to(gradients[0]), None, None


@torch.no_grad()
def _matrix(linear: nn.Module, inputs: Tensor) -> Tensor:
    """Return the matrix of a linear map, `(d_out, d_in)`: its outputs for unit vectors, in the dtype of `inputs`."""
    unit = torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
    # `linear(...)` would run hooks meant for the model's own forwards.
    return (linear.forward(unit) - linear.forward(torch.zeros_like(unit[:1]))).T


def _has_backward(linear: nn.Module, inputs: Tensor) -> bool:
    """Return whether a gradient passes through a linear map, tested on one row; `requires_grad` of outputs may lie."""
    row = inputs.detach().reshape(-1, inputs.shape[-1])[:1].clone().requires_grad_()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about a missing backward
            (gradient,) = torch.autograd.grad(linear.forward(row).sum(), row, allow_unused=True)
    except (NotImplementedError, RuntimeError):
        return False
    return gradient is not None and bool(gradient.any())


@contextmanager
def giving_backward(model: nn.Module) -> Iterator[None]:
    """Give a backward to quantized linear maps without one, inside this context.

    Kernels made for inference have no backward: those of bitsandbytes for 4-bit layers that have run on a CPU, and
    those of torchao that round their inputs. Each such layer that gradients pass through is dequantized, which takes
    the memory of its unquantized matrix.
    """
    matrices: dict[nn.Module, Tensor | None] = {}  # until the context ends, as computing one costs many forwards

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad or not torch.is_grad_enabled():
            return None
        if module not in matrices:
            matrices[module] = None if _has_backward(module, args[0]) else _matrix(module, args[0])
        matrix = matrices[module]
        return None if matrix is None else _Linear.apply(args[0], output.detach(), matrix)

    quantized = [*keeping_integers(model), *_keeping_composites(model)]
    handles = [module.register_forward_hook(hook) for module in quantized if hasattr(module, "in_features")]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
