"""The factors of one adapter: how they get into a PeftModel, and a hash of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from goldenedit.adapters.layers import retrained_modules, tuner_layers
from goldenedit.adapters.ownership import configs_in
from goldenedit.architecture.quantized import reading_state
from goldenedit.devices import execution_device
from goldenedit.editors import LowRankDelta
from goldenedit.storage.folder import adapter_tensors


def insert(
    model: PreTrainedModel | PeftModel,
    base: PreTrainedModel,
    lora: LoraConfig,
    key: str,
    deltas: Mapping[str, LowRankDelta],
) -> tuple[PeftModel, list[str]]:
    """Add an adapter with given factors; return the PeftModel with it, and the factors that PEFT has no place for."""
    if isinstance(model, PeftModel):
        base.peft_config = model.peft_config  # the base loses it with its last adapter
    with _hiding_others(base):
        # PEFT draws first values for the factors, which are replaced at once.
        with torch.random.fork_rng(devices=[]), _naming_targets_of(base, lora):
            if isinstance(model, PeftModel):
                model.add_adapter(key, lora)
            else:
                model = _wrapped(base, lora, key)
        return model, _fill(model, base, key, deltas, lora.r)


def _wrapped(base: PreTrainedModel, lora: LoraConfig, key: str) -> PeftModel:
    """Return a PeftModel with a new adapter around a model, which may carry adapters already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT reads it
        return get_peft_model(base, lora, adapter_name=key)


def _fill(
    model: PeftModel, base: PreTrainedModel, key: str, deltas: Mapping[str, LowRankDelta], rank: int
) -> list[str]:
    """Set the factors of an adapter; return the names of those that PEFT has no place for."""
    for layer in tuner_layers(base).values():
        for factors in (layer.lora_A, layer.lora_B):
            # If accelerate offloads the weight, PEFT creates the factors on no device, and nothing would move them.
            if key in factors and factors[key].weight.is_meta:
                factors[key].to_empty(device=execution_device(layer.base_layer))
    padded = {path: delta.padded(rank) for path, delta in deltas.items()}
    with reading_state(model):
        loaded = set_peft_model_state_dict(model, adapter_tensors(padded), adapter_name=key)
    return list(loaded.unexpected_keys)


@contextmanager
def _hiding_others(base: nn.Module) -> Iterator[None]:
    """Take the factors of all adapters out of the model, and put them back beside those added inside this context.

    PEFT walks through all modules several times to add one adapter, and the factors are modules too. With a thousand
    adapters in the model, adding one more would take ten times as long.
    """
    with ExitStack() as stack:
        for layer in tuner_layers(base).values():
            for factors in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                others = dict(factors.items())
                for _ in range(2):  # an interrupt may come while they are put back
                    stack.callback(_put_before, factors, others)
                factors.clear()
        yield


def _put_before(factors: nn.ModuleDict, others: Mapping[str, nn.Module]) -> None:
    """Put modules back before those that were added meanwhile, unless they are back already."""
    if list(factors)[: len(others)] == list(others):
        return
    added = {name: module for name, module in factors.items() if name not in others}
    factors.clear()
    factors.update({**others, **added})


@contextmanager
def _naming_targets_of(base: nn.Module, lora: LoraConfig) -> Iterator[None]:
    """Let all adapters claim inside this context that they target the parameters of `lora`.

    PEFT demands equal targets if parameters are targeted, because it nests the wrappers of several parameters of one
    module. Here each module has one targeted parameter, so edits may change different ones.
    """
    others = {key: config.target_parameters for key, config in configs_in(base).items() if config.target_parameters}
    try:
        for key in others:
            configs_in(base)[key].target_parameters = lora.target_parameters
        yield
    finally:
        for key, targets in others.items():
            configs_in(base)[key].target_parameters = targets


def hash_of(base: nn.Module, key: str) -> str:
    """Return a short hash of the weights of an adapter."""
    digest = hashlib.sha256()
    for path, layer in (tuner_layers(base) | retrained_modules(base)).items():
        for attribute in layer.adapter_layer_names:
            entries = getattr(layer, attribute, {})
            if key not in entries:
                continue
            entry = entries[key]
            digest.update(f"{path}.{attribute} {getattr(layer, 'scaling', {}).get(key)}".encode())
            for tensor in [entry] if isinstance(entry, torch.Tensor) else list(entry.parameters()):
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
