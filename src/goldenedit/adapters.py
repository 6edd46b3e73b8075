"""The adapters of a model: deltas in and out of a stock PeftModel, made with the first, gone with the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from goldenedit.architecture.experts import expert_matrices, is_fused
from goldenedit.architecture.layers import is_linear, is_quantised, linear_shape, plain_weight
from goldenedit.architecture.quantised import reading_state
from goldenedit.devices import execution_device
from goldenedit.editing.delta import LowRankDelta
from goldenedit.storage.folder import adapter_key, adapter_tensors, edit_name, target_parameters


def carries_adapters(model: nn.Module) -> bool:
    """Tell whether PEFT has put adapters into the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, with the active adapters in effect."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def configs(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's config of each adapter, by the name of its edit."""
    return {edit_name(key): one for key, one in model.peft_config.items()} if isinstance(model, PeftModel) else {}


def active(model: nn.Module) -> list[str]:
    """Return the names of the adapters that are switched on."""
    return list(map(edit_name, model.base_model.active_adapters)) if isinstance(model, PeftModel) else []


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Switch on exactly these adapters, frozen.

    Raises:
        ValueError: There is no adapter of a name.
    """
    check_names(model, names)
    if isinstance(model, PeftModel):
        # The tuner stacks; PeftModel.set_adapter takes one name, and would switch gradients on.
        keys = list(dict.fromkeys(map(adapter_key, names)))
        model.base_model.set_adapter(keys, inference_mode=True)
        if keys or model.active_adapter not in model.peft_config:
            model.active_adapter = keys[0] if keys else next(iter(model.peft_config))


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError where there is no adapter of a name."""
    known = list(configs(model))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"There is no edit {unknown[0]!r}; there are {known}.")


def add(
    model: PreTrainedModel | PeftModel,
    name: str,
    deltas: Mapping[str, LowRankDelta],
    base_name: str,
    by_parameter: bool = False,
) -> PeftModel:
    """Add an adapter, not switched on unless it is the first, and return the PeftModel that has it.

    Args:
        by_parameter: Name the weights that are changed, whatever PEFT makes of their modules (`target_parameters`).

    Raises:
        ValueError: PEFT has no place for a factor.
    """
    before = active(model)
    fused = any(delta.experts > 1 for delta in deltas.values())
    known = by_parameter or fused or targets_parameters(model)
    try:
        changed, lost = _add(model, name, deltas, base_name, by_parameter=known)
        if targets_parameters(changed, name) and not known:
            changed, lost = _add(remove(changed, name), name, deltas, base_name, by_parameter=True)
    except BaseException:
        activate(model, before)  # whoever takes away what is half added finds on what was on
        raise
    if lost:
        remove(changed, name)
        raise ValueError(
            f"PEFT loads the factors of {sorted(deltas)[0]} as {lost[0]}, which is no module of this model: it renames "
            "weights as transformers does with checkpoints, and those of this architecture once too often. Name other "
            "linear maps by EditConfig.target_modules."
        )
    activate(changed, before or ([name] if len(changed.peft_config) == 1 else []))
    return changed


def _add(
    model: PreTrainedModel | PeftModel,
    name: str,
    deltas: Mapping[str, LowRankDelta],
    base_name: str,
    by_parameter: bool,
) -> tuple[PeftModel, list[str]]:
    rank = max(delta.rank for delta in deltas.values())
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[] if by_parameter else sorted(deltas),
        target_parameters=target_parameters(deltas) if by_parameter else None,
        fan_in_fan_out=is_conv1d(model, deltas),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
    )
    with _hiding_others(model):
        # PEFT draws first values for the factors, which are replaced at once.
        with torch.random.fork_rng(devices=[]), _naming_targets_of(model, lora):
            if isinstance(model, PeftModel):
                model.add_adapter(adapter_key(name), lora)
            else:
                model = get_peft_model(model, lora, adapter_name=adapter_key(name))
        return model, _put_factors(model, name, deltas, rank)


def _put_factors(model: PeftModel, name: str, deltas: Mapping[str, LowRankDelta], rank: int) -> list[str]:
    """Give an adapter its factors; return the names of those that PEFT has no place for."""
    key = adapter_key(name)
    for layer in _tuner_layers(base_of(model)):
        for factors in (layer.lora_A, layer.lora_B):
            # On no device, as the weight beside it that accelerate offloads; but nothing would move this one.
            if key in factors and factors[key].weight.is_meta:
                factors[key].to_empty(device=execution_device(layer.base_layer))
    padded = {path: delta.padded(rank) for path, delta in deltas.items()}
    with reading_state(model):
        loaded = set_peft_model_state_dict(model, adapter_tensors(padded), adapter_name=key)
    return list(loaded.unexpected_keys)


@contextmanager
def _hiding_others(model: nn.Module) -> Iterator[None]:
    """Take the factors of all adapters out of the model, and put them back beside what has come in by then.

    PEFT walks through all modules several times to add one adapter, and each adapter is modules too: beside a thousand
    others, one would take ten times as long.
    """
    with ExitStack() as stack:
        for layer in _tuner_layers(base_of(model)):
            for factors in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                others = dict(factors.items())
                for _ in range(2):  # should an interrupt come while they are put back
                    stack.callback(_put_before, factors, others)
                factors.clear()
        yield


def _put_before(factors: nn.ModuleDict, others: Mapping[str, nn.Module]) -> None:
    """Put modules back before those that have come in since, unless they are back."""
    if list(factors)[: len(others)] == list(others):
        return
    added = {name: module for name, module in factors.items() if name not in others}
    factors.clear()
    factors.update({**others, **added})


@contextmanager
def _naming_targets_of(model: nn.Module, lora: LoraConfig) -> Iterator[None]:
    """Let all adapters say that they target the parameters of `lora`.

    PEFT demands it where parameters are targeted, because several of one module are wrapped one in the other; here each
    module has its weight alone, and edits may change different ones.
    """
    others = {key: config.target_parameters for key, config in configs(model).items() if config.target_parameters}
    try:
        for key in others:
            configs(model)[key].target_parameters = lora.target_parameters
        yield
    finally:
        for key, own in others.items():
            configs(model)[key].target_parameters = own


def targets_parameters(model: nn.Module, name: str | None = None) -> bool:
    """Tell whether an adapter names the weights it changes (`target_parameters`) instead of their modules; or any does.

    PEFT takes a `down_proj` in models whose experts transformers 5 has fused, shared or dense as it may be, for the
    experts' own and puts the adapter there: such modules are named by their weights.
    """
    return any(config.target_parameters for key, config in configs(model).items() if name in (None, key))


def remove(model: PreTrainedModel | PeftModel, name: str) -> PreTrainedModel | PeftModel:
    """Take an adapter away, all or half added; the others stay switched on or off as they are."""
    base = base_of(model)
    if not isinstance(model, PeftModel) or list(configs(model)) == [name]:
        for layer in _tuner_layers(base):
            for other in list(layer.lora_A):
                layer.delete_adapter(other)
        _unwrap_empty(base)
        return base
    remaining = [other for other in active(model) if other != name]
    if name in configs(model):
        activate(model, [other for other in configs(model) if other != name])  # PEFT warns on deleting active ones
        model.delete_adapter(adapter_key(name))
    _unwrap_empty(base)
    activate(model, remaining)
    return model


def _tuner_layers(base: nn.Module) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, BaseTunerLayer)]


def _unwrap_empty(base: nn.Module) -> None:
    """Put the plain modules back where no adapter is left."""
    for path, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer) and not module.lora_A:
            _put(base, path, module.base_layer)
    if not _tuner_layers(base) and hasattr(base, "peft_config"):
        del base.peft_config


def read(model: PreTrainedModel | PeftModel, name: str) -> dict[str, LowRankDelta]:
    """Return the deltas of an adapter, by the path of the module they change."""
    key, deltas = adapter_key(name), {}
    for path, module in base_of(model).named_modules():
        if isinstance(module, BaseTunerLayer) and key in module.lora_A:
            A = module.lora_A[key].weight.detach() * module.scaling[key]
            A, B = A.float().cpu().clone(), module.lora_B[key].weight.detach().float().cpu().clone()
            delta = LowRankDelta.from_stored(A, B, module.r[key])
            deltas[f"{path}.{module.parameter_name}" if delta.experts > 1 else path] = delta
    return deltas


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off inside this context."""
    if not isinstance(model, PeftModel):
        yield
        return
    with model.disable_adapter():
        yield


def check_mergeable(model: PreTrainedModel | PeftModel) -> None:
    """Raise ValueError where an edited weight is quantised: PEFT would round the sum, and the edit with it."""
    base = base_of(model)
    for path, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer) or is_fused(base, f"{path}.{_changed_parameter(module)}"):
            continue  # fused experts are only found where they are plain
        if is_quantised(module):
            raise ValueError(
                f"The weight of {path} is quantised: an edit written into it would be rounded with it. Keep the edit "
                "beside it (save_pretrained(), push_to_hub()), or load the base model in full precision, load the edit "
                "with ignore_fingerprint=True, and merge there."
            )


@contextmanager
def merged(model: PreTrainedModel | PeftModel, names: Sequence[str]) -> Iterator[PreTrainedModel]:
    """Yield the plain model with these adapters written into its weights; behind the context all is as it was.

    Raises:
        ValueError: A module's weights are quantised or offloaded: sums cannot be written into them.
    """
    base = base_of(model)
    layers = {path: module for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    names_of = {path: _changed_parameter(module) for path, module in layers.items()}
    kept: dict[str, Any] = {path: getattr(module.base_layer, names_of[path], None) for path, module in layers.items()}
    fused = {path for path in layers if is_fused(base, f"{path}.{names_of[path]}")}
    if wrong := [
        path
        for path, module in layers.items()
        if kept[path] is None or kept[path].is_meta or (path not in fused and plain_weight(module) is None)
    ]:
        raise ValueError(
            f"The weights of {wrong[0]} are quantised or offloaded: an edit cannot be written into them. Share the "
            "edit itself (push_to_hub()), or load the base model in full precision and memory."
        )
    try:
        for path, module in layers.items():
            weight = kept[path]
            changed = weight.detach().float()  # summed in full precision, rounded once
            for key in map(adapter_key, names):
                if key in module.lora_A:
                    changed = changed + module.get_delta_weight(key).to(changed)
            changed = changed.to(weight.dtype)
            setattr(module.base_layer, names_of[path], nn.Parameter(changed, requires_grad=weight.requires_grad))
            _put(base, path, module.base_layer)
        yield base
    finally:
        for path, module in layers.items():
            setattr(module.base_layer, names_of[path], kept[path])
            _put(base, path, module)


def _changed_parameter(module: BaseTunerLayer) -> str:
    """Return the name of the parameter that adapters change: that of PEFT's target_parameters, or a linear map's."""
    return str(getattr(module, "parameter_name", "weight"))


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(base.get_submodule(parent), child, module)


def is_conv1d(model: PreTrainedModel | PeftModel, paths: Mapping[str, LowRankDelta]) -> bool:
    """Tell whether the modules keep their weight as `(d_in, d_out)`, as Conv1D of GPT-2 does."""
    linear = [path for path, delta in paths.items() if delta.experts == 1]
    return any(type(_plain(model, path)).__name__ == "Conv1D" for path in linear)


def check_fits(model: PreTrainedModel | PeftModel, path: str, delta: LowRankDelta) -> None:
    """Raise ValueError unless the model has a linear map, or fused experts, `path` of the delta's shape."""
    if is_fused(base_of(model), path):
        experts, d_out, d_in = expert_matrices(base_of(model), path).shape
        found, asked = (experts, d_out, d_in), (delta.experts, delta.B.shape[0], delta.A.shape[1] // delta.experts)
        if found != asked:
            raise ValueError(f"The edit changes {path} as experts of shape {asked}, but in this model it has {found}.")
        return
    try:
        module = _plain(model, path)
    except AttributeError as error:
        raise ValueError(f"{path}, which the edit changes, is no module of this model.") from error
    if not is_linear(module) or delta.experts > 1:
        raise ValueError(f"{path}, which the edit changes, is no linear map of this model.")
    shape = linear_shape(module)
    wanted = (delta.B.shape[0], delta.A.shape[1])
    if shape != wanted:
        raise ValueError(f"The edit changes {path} as a matrix of shape {wanted}, but in this model it has {shape}.")


def _plain(model: PreTrainedModel | PeftModel, path: str) -> nn.Module:
    module = base_of(model).get_submodule(path)
    return getattr(module, "base_layer", module)
