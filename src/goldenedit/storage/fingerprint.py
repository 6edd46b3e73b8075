"""A fingerprint of a model's weights: it tells base models apart, whatever they are called."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits over the shape and up to 64 evenly spaced values of every parameter.

    Values are rounded to bfloat16 first, so that a checkpoint loaded in float32 and in bfloat16 is the same model.
    Parameters whose values are elsewhere (on the meta device, as with disk offload) count by name and shape.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.is_meta or parameter.numel() == 0:
            continue
        values = parameter.detach().reshape(-1)
        # Not linspace: its float32 steps would round indices of large tensors differently by device.
        count = min(_SAMPLES, len(values))
        index = [step * (len(values) - 1) // max(count - 1, 1) for step in range(count)]
        sampled = values[torch.tensor(index, device=values.device)].cpu()
        if sampled.is_floating_point():
            sampled = sampled.to(torch.bfloat16).view(torch.int16)
        digest.update(sampled.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
