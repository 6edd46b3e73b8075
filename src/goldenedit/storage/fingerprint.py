"""Hashes of a model's weights: they tell base models apart, whatever they are called and in whatever precision."""

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
_ONE_FINGERPRINT = {"float32", "bfloat16"}  # a checkpoint has one fingerprint in all of these


class Hashed(Protocol):
    """Whatever carries the hashes of a model's weights."""

    @property
    def fingerprint(self) -> str:
        """Hash of the values, the same in float32 and in bfloat16."""

    @property
    def signs(self) -> str | None:
        """Hash of the signs, the same in every precision; None where nobody took it."""

    @property
    def dtype(self) -> str | None:
        """The precisions of the weights, such as `"float16"`; None where nobody took it."""


@dataclass(frozen=True)
class WeightHashes:
    """The hashes of a model's weights: see `Hashed`."""

    fingerprint: str
    signs: str | None = None
    dtype: str | None = None


def same_weights(one: Hashed, other: Hashed) -> bool:
    """Tell whether two models are one checkpoint, loaded in the same precision or in two.

    Equal fingerprints say so. float16 rounds to other values than bfloat16, so that between it and another precision
    the signs decide: no rounding changes them, and training or a merged edit changes some of the thousands.
    """
    if one.fingerprint == other.fingerprint:
        return True
    if None in (one.signs, other.signs, one.dtype, other.dtype) or one.dtype == other.dtype:
        return False
    if {*str(one.dtype).split("+"), *str(other.dtype).split("+")} <= _ONE_FINGERPRINT:
        return False
    return one.signs == other.signs


def fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits over the shape and up to 64 evenly spaced values of every parameter.

    Values are rounded to bfloat16 first, so that a checkpoint loaded in float32 and in bfloat16 is the same model.
    Offloaded parameters are read one after the other; those whose values nobody has count by name and shape, quantized
    ones by the tensors they are made of, integers by a sum over all of them.
    """
    return weight_hashes(model).fingerprint


def weight_hashes(model: nn.Module) -> WeightHashes:
    """Return the fingerprint, and the same over the signs of up to 4096 evenly spaced values of every parameter.

    A number that float16 rounds to zero keeps its sign there, and -0.0 counts as negative.
    """
    values, signs = hashlib.sha256(), hashlib.sha256()
    dtypes: set[torch.dtype] = set()
    tied = _tied_names(model)  # offloaded, they are no longer one tensor under two names
    for name, parameter in _tensors(model):
        if parameter.is_meta and name in tied:
            continue
        if not parameter.is_floating_point() and not parameter.is_meta:
            _update(f"{name}{parameter.nbytes}:{_halves(parameter)}".encode(), values, signs)
            continue
        _update(f"{name}{tuple(parameter.shape)}".encode(), values, signs)
        if parameter.is_floating_point():
            dtypes.add(parameter.dtype)
        everything = (onloaded_parameter(model, name) if parameter.is_meta else parameter).reshape(-1)
        if everything.is_meta or everything.numel() == 0:
            continue
        sampled = everything[_evenly_spaced(len(everything), _SIGNS).to(everything.device)].cpu()
        # 4095 steps are 65 times 63 steps: the values of the fingerprint are among those of the signs.
        few = sampled[_evenly_spaced(len(sampled), _SAMPLES)].to(torch.bfloat16).view(torch.int16)
        values.update(few.contiguous().numpy().tobytes())
        signs.update(sampled.float().signbit().numpy().tobytes())
    names = "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return WeightHashes(values.hexdigest()[:32], signs.hexdigest()[:32], names)


def _update(data: bytes, *digests: hashlib._Hash) -> None:
    for digest in digests:
        digest.update(data)


def _evenly_spaced(length: int, most: int) -> Tensor:
    """Return up to `most` evenly spaced indices, in integers.

    `linspace` would round those of large tensors to float32, differently by device.
    """
    count = min(most, length)
    return torch.arange(count) * (length - 1) // max(count - 1, 1)


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
    """Yield the parameters by name, quantized ones as the tensors they are made of."""
    for name, parameter in sorted(model.named_parameters()):
        yield from _parts(name, parameter.detach())


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or those that it stands for, by the names that its class has for them."""
    if not is_composite(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _parts(f"{name}.{part}", getattr(tensor, part))
