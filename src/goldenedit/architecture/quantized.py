"""What editing needs of linear maps with quantized weights, told by their properties and not by whose they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def keeping_integers(model: nn.Module) -> list[nn.Module]:
    """Return the modules with parameters of integers, as quantized weights are kept."""
    return [
        module
        for module in model.modules()
        if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False))
    ]


def is_composite(weight: Tensor) -> bool:
    """Tell a tensor that only stands for others, such as integers and their scales, whatever dtype it claims."""
    return hasattr(weight, "__tensor_flatten__")  # what torch asks of such tensor classes


def _keeping_composites(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(map(is_composite, module.parameters(recurse=False)))]


@contextmanager
def reading_state(model: nn.Module) -> Iterator[None]:
    """Let `state_dict()` take quantized weights as they lie, inside this context.

    bitsandbytes' 4-bit maps that ran on a CPU otherwise put their weights back in the order of a file first, and lose
    their scales: PEFT asks for a state only to see its names.
    """
    plain: Any = getattr(nn.Module, "_save_to_state_dict", None)  # torch's name for those who override it, but private
    modules = [] if plain is None else keeping_integers(model)
    for module in modules:
        module._save_to_state_dict = MethodType(plain, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module._save_to_state_dict


class _Linear(torch.autograd.Function):
    """What a linear map has said, with the backward that it lacks."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, output: Tensor, matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.matrix.to(gradients[0]), None, None


@torch.no_grad()
def _matrix(linear: nn.Module, inputs: Tensor) -> Tensor:
    """Return the matrix of a linear map, `(d_out, d_in)`: what it makes of the unit vectors, in the dtype of inputs."""
    unit = torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
    # `forward` and not the module itself: hooks on it are for what the model says.
    return (linear.forward(unit) - linear.forward(torch.zeros_like(unit[:1]))).T


def _has_backward(linear: nn.Module, inputs: Tensor) -> bool:
    """Tell whether a gradient comes through a linear map, tried on one row: its outputs claim so in any case."""
    row = inputs.detach().reshape(-1, inputs.shape[-1])[:1].clone().requires_grad_()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is none, which the answer says
            (gradient,) = torch.autograd.grad(linear.forward(row).sum(), row, allow_unused=True)
    except (NotImplementedError, RuntimeError):
        return False
    return gradient is not None and bool(gradient.any())


@contextmanager
def giving_backward(model: nn.Module) -> Iterator[None]:
    """Give those quantized maps a backward that have none, inside this context.

    Kernels that only infer have none: bitsandbytes' for 4-bit maps that ran on a CPU before, torchao's with rounded
    inputs. Their matrices take the memory that they have unquantized, for the maps that gradients pass.
    """
    matrices: dict[nn.Module, Tensor | None] = {}  # kept until the context ends: making one takes many forwards' time

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
