"""Where a model's weights are: on one device, on several, or offloaded by accelerate to memory or disk."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


def input_device(model: nn.Module) -> torch.device:
    """Return the device for a causal LM's input tokens: the one that its input embeddings compute on."""
    return execution_device(model.get_input_embeddings())  # type: ignore[operator]


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on, also if accelerate offloads its weights between forwards."""
    for submodule in module.modules():
        for hook in _hooks(submodule):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    for submodule in module.modules():  # offloaded, but accelerate's private name for its hooks has changed
        with onloaded(submodule):
            for parameter in submodule.parameters(recurse=False):
                if not parameter.is_meta:
                    return parameter.device
    return torch.device("cpu")


def return_free_memory() -> None:
    """Return memory that this process has freed to the system, where the C library keeps it (glibc).

    After many batches of different sizes it keeps gigabytes of it in pieces.
    """
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[nn.Module]:
    """Load a module's own offloaded weights inside this context; tensors read from it stay valid afterwards."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield module


def onloaded_parameter(model: nn.Module, name: str) -> Tensor:
    """Return a parameter with its values, also if it is offloaded; on the meta device if the values do not exist."""
    path, _, parameter = name.rpartition(".")
    with torch.no_grad(), onloaded(model.get_submodule(path)) as module:
        return getattr(module, parameter).detach()


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module that move tensors, found by accelerate's private name."""
    top_hook = getattr(module, "_hf_hook", None)
    return [hook for hook in getattr(top_hook, "hooks", [top_hook]) if hasattr(hook, "execution_device")]
