"""PEFT's layers in a model: where they are, what they hold, and the plain modules underneath."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from goldenedit.architecture.experts import expert_matrices, is_fused
from goldenedit.architecture.layers import is_linear, is_quantized, linear_shape
from goldenedit.editors import LowRankDelta

# Attributes that transformers' `load_adapter` sets on a model. With them `save_pretrained` writes only adapters.
_NOTES_OF_ADAPTERS = {"_hf_peft_config_loaded": False, "_weight_conversions": None}


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, with the active adapters in effect."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def tuner_layers(base: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by path."""
    return {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}


def retrained_modules(base: nn.Module) -> dict[str, Any]:
    """Return PEFT's wrappers of modules that the user's adapters replace (`modules_to_save`), by path."""
    return {path: module for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def has_parts(base: nn.Module, key: str) -> bool:
    """Return whether an adapter changes or replaces any module."""
    layers, replaced = tuner_layers(base).values(), retrained_modules(base).values()
    return any(key in layer.lora_A or key in layer.lora_embedding_A for layer in layers) or any(
        key in wrapper.modules_to_save for wrapper in replaced
    )


def switch(base: nn.Module, keys: Sequence[str]) -> None:
    """Switch on exactly these adapters, without gradients.

    PEFT's own method does not take an empty list if a module is replaced.
    """
    for layer in tuner_layers(base).values():
        layer.set_adapter(list(keys), inference_mode=True)
    for wrapper in retrained_modules(base).values():
        wrapper.set_adapter([key for key in keys if key in wrapper.modules_to_save], inference_mode=True)


def put(base: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another one."""
    parent, _, child = path.rpartition(".")
    setattr(base.get_submodule(parent), child, module)


@contextmanager
def plain(base: nn.Module) -> Iterator[None]:
    """Put the plain modules in place of PEFT's inside this context: the model as it was before any adapter."""
    wrapped = {path: layer for path, layer in tuner_layers(base).items() if not _is_inside(base, path)}
    modules = {path: layer.get_base_layer() for path, layer in wrapped.items()}
    retrained = retrained_modules(base)
    modules |= {path: wrapper.original_module for path, wrapper in retrained.items()}
    try:
        for path, module in modules.items():
            put(base, path, module)
        yield
    finally:
        for path, module in (wrapped | retrained).items():
            put(base, path, module)


def _is_inside(base: nn.Module, path: str) -> bool:
    """Tell whether a layer of PEFT is wrapped in another one."""
    parent = path.rpartition(".")[0]
    return bool(parent) and isinstance(base.get_submodule(parent), LoraLayer)


def unwrap_empty(base: nn.Module) -> None:
    """Put the plain modules back wherever no adapter is left."""
    for path, layer in tuner_layers(base).items():
        if not any(getattr(layer, name, None) for name in layer.adapter_layer_names):
            put(base, path, layer.base_layer)
    for path, wrapper in retrained_modules(base).items():
        if not wrapper.modules_to_save:
            put(base, path, wrapper.original_module)
    if not tuner_layers(base) and hasattr(base, "peft_config") and not base.peft_config:
        forget_configs(base)


def forget_configs(base: nn.Module) -> None:
    """Tell PEFT and transformers that a model carries no adapter anymore."""
    if hasattr(base, "peft_config"):
        del base.peft_config
    vars(base).update(_plain_notes(base))


@contextmanager
def saving_whole(base: nn.Module) -> Iterator[None]:
    """Let `save_pretrained` of transformers write the whole model inside this context, and not only its adapters."""
    plain_notes = _plain_notes(base)
    before = {name: vars(base)[name] for name in plain_notes}
    try:
        vars(base).update(plain_notes)
        yield
    finally:
        vars(base).update(before)


def _plain_notes(base: nn.Module) -> dict[str, Any]:
    """Return the values that these attributes have on a model without adapters, if transformers has set them."""
    if not vars(base).get("_hf_peft_config_loaded", False):
        return {}
    return {name: value for name, value in _NOTES_OF_ADAPTERS.items() if name in vars(base)}


def read(base: nn.Module, key: str) -> dict[str, LowRankDelta]:
    """Return the deltas of an adapter, by the path of the module they change."""
    deltas = {}
    for path, layer in tuner_layers(base).items():
        if key in layer.lora_A:
            A = layer.lora_A[key].weight.detach() * layer.scaling[key]
            A, B = A.float().cpu().clone(), layer.lora_B[key].weight.detach().float().cpu().clone()
            delta = LowRankDelta.from_stored(A, B, layer.r[key])
            deltas[f"{path}.{layer.parameter_name}" if delta.experts > 1 else path] = delta
    return deltas


def changed_parameter(layer: LoraLayer) -> str:
    """Return the name of the parameter that adapters change: `weight`, unless PEFT's target_parameters name another."""
    return str(getattr(layer, "parameter_name", "weight"))


def check_mergeable(base: nn.Module) -> None:
    """Raise ValueError if an edited weight is quantized: PEFT would round the sum, and the edit with it."""
    for path, layer in tuner_layers(base).items():
        if is_fused(base, f"{path}.{changed_parameter(layer)}"):
            continue  # fused experts are never quantized
        if is_quantized(layer):
            raise ValueError(
                f"The weight of {path} is quantized, so an edit written into it would be rounded. Keep the edit beside "
                "the weights (save_pretrained(), push_to_hub()). Or load the base model in full precision, load the "
                "edit with ignore_fingerprint=True, and merge there."
            )


def is_conv1d(base: nn.Module, paths: Mapping[str, LowRankDelta]) -> bool:
    """Tell whether the modules store their weight as `(d_in, d_out)`, like Conv1D of GPT-2."""
    linear = [path for path, delta in paths.items() if delta.experts == 1]
    return any(type(_plain(base, path)).__name__ == "Conv1D" for path in linear)


def check_fits(base: nn.Module, path: str, delta: LowRankDelta) -> None:
    """Raise ValueError unless the model has a linear map, or fused experts, `path` of the delta's shape."""
    if is_fused(base, path):
        experts, d_out, d_in = expert_matrices(base, path).shape
        actual, asked = (experts, d_out, d_in), (delta.experts, delta.B.shape[0], delta.A.shape[1] // delta.experts)
        if actual != asked:
            raise ValueError(f"The edit changes {path} as experts of shape {asked}, but in this model it has {actual}.")
        return
    try:
        module = _plain(base, path)
    except AttributeError as error:
        raise ValueError(f"The edit changes {path}, but this model has no such module.") from error
    if not is_linear(module) or delta.experts > 1:
        raise ValueError(f"The edit changes {path}, which is not a linear map in this model.")
    shape = linear_shape(module)
    asked_shape = (delta.B.shape[0], delta.A.shape[1])
    if shape != asked_shape:
        raise ValueError(
            f"The edit changes {path} as a matrix of shape {asked_shape}, but in this model it has {shape}."
        )


def _plain(base: nn.Module, path: str) -> nn.Module:
    module = base.get_submodule(path)
    return getattr(module, "base_layer", module)
