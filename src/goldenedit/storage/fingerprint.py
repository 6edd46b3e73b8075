"""A fingerprint of a model's weights: it tells base models apart, whatever they are called."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from goldenedit.devices import onloaded_parameter

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits over the shape and up to 64 evenly spaced values of every parameter.

    Values are rounded to bfloat16 first, so that a checkpoint loaded in float32 and in bfloat16 is the same model.
    Offloaded parameters are read one after the other; those whose values nobody has count by name and shape.
    """
    digest = hashlib.sha256()
    tied = getattr(model, "all_tied_weights_keys", {})  # offloaded, they are no longer one tensor under two names
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta and name in tied:
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = onloaded_parameter(model, name).reshape(-1)
        if values.is_meta or values.numel() == 0:
            continue
        # Not linspace: its float32 steps would round indices of large tensors differently by device.
        count = min(_SAMPLES, len(values))
        index = [step * (len(values) - 1) // max(count - 1, 1) for step in range(count)]
        sampled = values[torch.tensor(index, device=values.device)].cpu()
        if sampled.is_floating_point():
            sampled = sampled.to(torch.bfloat16).view(torch.int16)
        digest.update(sampled.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
