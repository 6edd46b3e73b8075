"""Adapters written into the weights, for good or inside a context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from goldenedit.adapters.layers import changed_parameter, put, retrained_modules, saving_whole, tuner_layers
from goldenedit.architecture.experts import is_fused
from goldenedit.architecture.layers import plain_weight

_MERGES = "_goldenedit_merges"  # attribute of a base model


def merges_in(base: nn.Module) -> int:
    """Return how often `merge_for_good` has written into the weights of a model."""
    return int(getattr(base, _MERGES, 0))


@dataclass(frozen=True)
class Merge:
    """The adapters to write into the weights.

    Attributes:
        others: Keys of the user's adapters, which PEFT's own method writes.
        edits: Keys of edits, which are summed in float32 and rounded once.
    """

    others: Sequence[str]
    edits: Sequence[str]


@contextmanager
def merged(base: nn.Module, merge: Merge) -> Iterator[None]:
    """Replace the model by the plain one with adapters in its weights inside this context; restore all afterwards.

    Raises:
        ValueError: The weights of a module are quantized or offloaded, so sums cannot be written into them.
    """
    layers, retrained = tuner_layers(base), retrained_modules(base)
    weights = _weights(base, layers)
    _check_biases(layers, merge)
    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(put, base, path, layer)
            stack.enter_context(_written(layer, weights[path], merge))
            put(base, path, layer.base_layer)
        for path, wrapper in retrained.items():
            stack.callback(put, base, path, wrapper)
            put(base, path, _in_effect(wrapper))
        stack.enter_context(saving_whole(base))
        yield


def merge_for_good(base: nn.Module, merge: Merge) -> None:
    """Write adapters into the weights and put the plain modules back. The parameters stay the same objects.

    Raises:
        ValueError: A sum is not finite, or cannot be written. Nothing has changed.
    """
    layers = tuner_layers(base)
    offloaded = {path: layer for path, layer in layers.items() if _is_offloaded(layer)}
    in_memory = {path: layer for path, layer in layers.items() if path not in offloaded}
    weights = _weights(base, in_memory)
    _check_biases(layers, merge)
    sums: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for path, layer in in_memory.items():
        with _written(layer, weights[path], merge):
            sums[path] = getattr(layer.base_layer, changed_parameter(layer)).data
            if getattr(layer.base_layer, "bias", None) is not None:
                biases[path] = layer.base_layer.bias.data
        _check_finite(path, sums[path])
    for path, layer in offloaded.items():  # read now and again later: together they may not fit into memory
        with onload_layer(layer), _written(layer, getattr(layer.base_layer, changed_parameter(layer)), merge):
            _check_finite(path, getattr(layer.base_layer, changed_parameter(layer)))
    if merge.others or merge.edits:
        setattr(base, _MERGES, merges_in(base) + 1)
    for path, layer in in_memory.items():
        weights[path].data = sums[path]
        if path in biases:
            layer.base_layer.bias.data = biases[path]
    for layer in offloaded.values():
        with onload_layer(layer):
            weight = getattr(layer.base_layer, changed_parameter(layer))
            with _written(layer, weight, merge):
                total = getattr(layer.base_layer, changed_parameter(layer)).data
            weight.data = total
    for path, layer in layers.items():
        put(base, path, layer.base_layer)
    for path, wrapper in retrained_modules(base).items():
        put(base, path, _in_effect(wrapper))


def _is_offloaded(layer: Any) -> bool:
    weight = getattr(layer.base_layer, changed_parameter(layer), None)
    return isinstance(weight, Tensor) and weight.is_meta and hasattr(layer.base_layer, "_hf_hook")


def _check_finite(path: str, total: Tensor) -> None:
    if not total.isfinite().all():
        raise ValueError(f"The weight of {path} would not be finite with the edits in it, so nothing was merged.")


@contextmanager
def _written(layer: Any, weight: nn.Parameter, merge: Merge) -> Iterator[None]:
    """Give the plain module of a layer a new weight inside this context, with the adapters in it."""
    bias = getattr(layer.base_layer, "bias", None)
    try:
        _write(layer, weight, merge)
        yield
    finally:
        setattr(layer.base_layer, changed_parameter(layer), weight)
        if bias is not None:
            layer.base_layer.bias = bias
        layer.merged_adapters.clear()


def _in_effect(wrapper: Any) -> nn.Module:
    """Return the module that runs in a wrapper of PEFT's `modules_to_save`."""
    module: nn.Module = next((wrapper.modules_to_save[key] for key in wrapper.active_adapters), wrapper.original_module)
    return module


def _weights(base: nn.Module, layers: dict[str, Any]) -> dict[str, nn.Parameter]:
    weights: dict[str, Any] = {
        path: getattr(layer.base_layer, changed_parameter(layer), None) for path, layer in layers.items()
    }
    for path, layer in layers.items():
        weight = weights[path]
        fused = is_fused(base, f"{path}.{changed_parameter(layer)}")
        if weight is None or weight.is_meta or (not fused and plain_weight(layer) is None):
            raise ValueError(
                f"The weights of {path} are quantized or offloaded, so an edit cannot be written into them. Share the "
                "edit itself (push_to_hub()), or load the base model into memory in full precision."
            )
    return weights


def _check_biases(layers: dict[str, Any], merge: Merge) -> None:
    for path, layer in layers.items():
        if getattr(layer.base_layer, "bias", None) is None and any(layer.lora_bias.get(key) for key in merge.others):
            raise ValueError(
                f"The adapters {list(merge.others)} have biases (lora_bias=True) and {path} has none, so they cannot "
                "be merged. Deactivate them, or share the edit and the adapter side by side."
            )


def _write(layer: Any, weight: nn.Parameter, merge: Merge) -> None:
    """Give the plain module of a layer a new weight, with the adapters in it."""
    name = changed_parameter(layer)
    linear = layer.base_layer
    setattr(linear, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    others = [key for key in merge.others if key in layer.lora_A or key in layer.lora_embedding_A]
    if others:
        if getattr(linear, "bias", None) is not None:
            linear.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        layer.merge(adapter_names=others)
    if edits := [key for key in merge.edits if key in layer.lora_A]:
        written = getattr(linear, name)
        total: Tensor = written.detach().float()  # summed in full precision, rounded once
        for key in edits:
            total = total + layer.get_delta_weight(key).to(total)
        with torch.no_grad():
            written.data = total.to(written.dtype)
