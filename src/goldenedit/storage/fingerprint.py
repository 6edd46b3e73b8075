"""Hashes of a model's weights, which identify a base model independently of its name and precision."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from goldenedit.architecture.quantized import is_composite
from goldenedit.devices import onloaded_parameter

_SAMPLES = 64
_SIGNS = 4096
_GLANCES = 8
_ONE_FINGERPRINT = {"float32", "bfloat16"}  # a checkpoint has the same fingerprint in each of these


class Hashed(Protocol):
    """An object with the hashes of a model's weights."""

    @property
    def fingerprint(self) -> str:
        """Hash of the values; it is the same in float32 and in bfloat16."""

    @property
    def signs(self) -> str | None:
        """Hash of the signs; it is the same in every precision. None if it was not computed."""

    @property
    def dtype(self) -> str | None:
        """The precisions of the weights, such as `"float16"`; None if they were not recorded."""


@dataclass(frozen=True)
class WeightHashes:
    """The hashes of a model's weights: see `Hashed`."""

    fingerprint: str
    signs: str | None = None
    dtype: str | None = None


def same_weights(first: Hashed, second: Hashed) -> bool:
    """Return whether two models are the same checkpoint, loaded in the same precision or in different ones.

    Models with equal fingerprints are the same checkpoint. float16 and bfloat16 round to different values, so between
    float16 and another precision the signs decide. Rounding does not change signs, whereas training or a merged edit
    changes some of the thousands of signs.
    """
    if first.fingerprint == second.fingerprint:
        return True
    if None in (first.signs, second.signs, first.dtype, second.dtype) or first.dtype == second.dtype:
        return False
    if {*str(first.dtype).split("+"), *str(second.dtype).split("+")} <= _ONE_FINGERPRINT:
        return False
    return first.signs == second.signs


def fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits over the shape and up to 64 evenly spaced values of every parameter.

    Values are rounded to bfloat16 first, so a checkpoint has the same fingerprint in float32 and in bfloat16. Offloaded
    parameters are read one at a time. Parameters whose values are not available enter with name and shape, quantized
    ones with the tensors they consist of, and integers with a sum over all values.
    """
    return weight_hashes(model).fingerprint


def weight_hashes(model: nn.Module) -> WeightHashes:
    """Return the fingerprint, and a hash over the signs of up to 4096 evenly spaced values of every parameter.

    A number that float16 rounds to zero keeps its sign, since -0.0 counts as negative.
    """
    values, signs = hashlib.sha256(), hashlib.sha256()
    dtypes: set[torch.dtype] = set()
    tied = _tied_names(model)  # once offloaded, they are no longer the same tensor
    for name, parameter in _tensors(model):
        if parameter.is_meta and name in tied:
            continue
        if not parameter.is_floating_point() and not parameter.is_meta:
            _update(f"{name}{parameter.nbytes}:{_halves(parameter)}".encode(), values, signs)
            continue
        _update(f"{name}{tuple(parameter.shape)}".encode(), values, signs)
        if parameter.is_floating_point():
            dtypes.add(parameter.dtype)
        flat = (onloaded_parameter(model, name) if parameter.is_meta else parameter).reshape(-1)
        if flat.is_meta or flat.numel() == 0:
            continue
        sampled = flat[_evenly_spaced(len(flat), _SIGNS).to(flat.device)].cpu()
        # The 64 values of the fingerprint are a subset of the 4096 values for the signs, as 4095 = 65 * 63.
        rounded = sampled[_evenly_spaced(len(sampled), _SAMPLES)].to(torch.bfloat16).view(torch.int16)
        values.update(rounded.contiguous().numpy().tobytes())
        signs.update(sampled.float().signbit().numpy().tobytes())
    names = "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return WeightHashes(values.hexdigest()[:32], signs.hexdigest()[:32], names)


def weights_state(model: nn.Module) -> list[int]:
    """Return numbers that differ once parameters were replaced or written, far cheaper than hashes of all of them.

    Adapters of PEFT and offloaded parameters are left out. Fused optimizers do not count what they write, so a few
    values of each parameter are among the numbers.
    """
    state: list[int] = []
    values: dict[torch.device, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or ".lora_" in name or ".modules_to_save." in name:
            continue
        state += (id(parameter), parameter._version)
        if parameter.is_floating_point() and not is_composite(parameter):
            flat = parameter.detach().reshape(-1)
            values.setdefault(parameter.device, []).append(flat[:: max(len(flat) // _GLANCES, 1)].float())
    # Of bytes, because NaN does not equal itself.
    return state + [hash(torch.cat(of_device).cpu().numpy().tobytes()) for of_device in values.values()]


def _update(data: bytes, *digests: hashlib._Hash) -> None:
    for digest in digests:
        digest.update(data)


def _evenly_spaced(length: int, max_count: int) -> Tensor:
    """Return up to `max_count` evenly spaced indices, computed with integers.

    `linspace` would round the indices of large tensors to float32, in a way that depends on the device.
    """
    count = min(max_count, length)
    return torch.arange(count) * (length - 1) // max(count - 1, 1)


def _tied_names(model: nn.Module) -> Collection[str]:
    """Return the names of parameters that are tied to another parameter."""
    names: Collection[str] | None = getattr(model, "all_tied_weights_keys", None)  # undocumented
    if names is not None:
        return names
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return ()
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {f"{path}.weight" for path, module in model.named_modules() if module is head}


def _halves(tensor: Tensor) -> int:
    """Return the sum of all half bytes, which stays equal when bitsandbytes reorders them in the first forward."""
    values = tensor.contiguous().view(torch.uint8)
    return int((values & 15).sum(dtype=torch.int64) + (values >> 4).sum(dtype=torch.int64))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters, sorted by name; quantized ones as the tensors they consist of."""
    for name, parameter in sorted(model.named_parameters()):
        yield from _components(name, parameter.detach())


def _components(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a plain tensor itself, and a composite one as its components, by the names that its class gives them."""
    if not is_composite(tensor):
        yield name, tensor
        return
    for component in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _components(f"{name}.{component}", getattr(tensor, component))
