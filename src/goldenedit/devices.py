"""Where a model's weights are: on one device, on several, or offloaded by accelerate to memory or disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a causal LM takes its tokens on: the one that its embeddings compute on."""
    return execution_device(model.get_input_embeddings())  # type: ignore[operator]


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on, wherever accelerate keeps its weights between forwards."""
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    for part in module.modules():  # offloaded, by hooks that are not where they were: accelerate's own name for it
        with onloaded(part):
            for parameter in part.parameters(recurse=False):
                if not parameter.is_meta:
                    return parameter.device
    return torch.device("cpu")


@contextmanager
def onloaded(module: nn.Module) -> Iterator[nn.Module]:
    """Have a module's own offloaded weights at hand inside this context; tensors taken from it stay valid."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield module


def onloaded_parameter(model: nn.Module, name: str) -> Tensor:
    """Return a parameter with its values, also where it is offloaded; on the meta device where nobody has them."""
    path, _, own = name.rpartition(".")
    with torch.no_grad(), onloaded(model.get_submodule(path)) as module:
        return getattr(module, own).detach()


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module that move tensors, by its private name for them."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "execution_device")]
