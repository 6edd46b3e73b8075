"""A fingerprint of a model's weights: it tells base models apart, whatever they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from goldenedit.architecture.quantised import is_composite
from goldenedit.devices import onloaded_parameter

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits over the shape and up to 64 evenly spaced values of every parameter.

    Values are rounded to bfloat16 first, so that a checkpoint loaded in float32 and in bfloat16 is the same model.
    Offloaded parameters are read one after the other; those whose values nobody has count by name and shape, quantised
    ones by the tensors they are made of, integers by a sum over all of them.
    """
    digest = hashlib.sha256()
    tied = _tied_names(model)  # offloaded, they are no longer one tensor under two names
    for name, parameter in _tensors(model):
        if parameter.is_meta and name in tied:
            continue
        if not parameter.is_floating_point() and not parameter.is_meta:
            digest.update(f"{name}{parameter.nbytes}:{_halves(parameter)}".encode())
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = (onloaded_parameter(model, name) if parameter.is_meta else parameter).reshape(-1)
        if values.is_meta or values.numel() == 0:
            continue
        # Not linspace: its float32 steps would round indices of large tensors differently by device.
        count = min(_SAMPLES, len(values))
        index = [step * (len(values) - 1) // max(count - 1, 1) for step in range(count)]
        sampled = values[torch.tensor(index, device=values.device)].cpu().to(torch.bfloat16).view(torch.int16)
        digest.update(sampled.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _tied_names(model: nn.Module) -> Collection[str]:
    """Return the names of parameters that are another one as well."""
    names: Collection[str] | None = getattr(model, "all_tied_weights_keys", None)  # of transformers, undocumented
    if names is not None:
        return names
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return ()
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {f"{path}.weight" for path, module in model.named_modules() if module is head}


def _halves(tensor: Tensor) -> int:
    """Return the sum of all half bytes: bitsandbytes puts those of 4-bit weights in another order at the first run."""
    values = tensor.contiguous().view(torch.uint8)
    return int((values & 15).sum(dtype=torch.int64) + (values >> 4).sum(dtype=torch.int64))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters by name, quantised ones as the tensors they are made of."""
    for name, parameter in sorted(model.named_parameters()):
        yield from _parts(name, parameter.detach())


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or those that it stands for, by the names that its class has for them."""
    if not is_composite(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _parts(f"{name}.{part}", getattr(tensor, part))
