"""Edits as adapters of a stock PeftModel: added in one step or not at all, beside whatever else the model carries."""

from __future__ import annotations

import copy
import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from goldenedit.adapters import layers as peft_layers
from goldenedit.adapters.layers import base_of, forget_configs, retrained_modules, switch, tuner_layers, unwrap_empty
from goldenedit.adapters.merging import Merge, merge_for_good, merged
from goldenedit.architecture.quantized import reading_state
from goldenedit.devices import execution_device
from goldenedit.editors import LowRankDelta
from goldenedit.storage.folder import Beside, adapter_key, adapter_tensors, edit_name, target_parameters

logger = logging.getLogger(__name__)

_MARK = "_goldenedit"  # attribute of a LoraConfig that says whose edit its adapter is


def _nobody() -> None:
    """Own an edit whose EditModel is gone, as a dead weak reference does."""


@dataclass(frozen=True)
class _Mark:
    """Whose edit an adapter is, and what is trainable again when no edit is left."""

    owner: Callable[[], Adapters | None]
    trainable: Sequence[nn.Parameter]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle a mark: a copy of the model alone has edits, but no EditModel."""
        return _Mark, (_nobody, self.trainable)


class Adapters:
    """The edits of one `EditModel` as LoRA adapters in its model.

    The model may carry other adapters: those that the user trained, which are a part of the model that is edited, and
    edits of other EditModels around the same base, which are switched off whenever this one runs.

    Args:
        model: A causal LM of transformers, or a PeftModel around one with LoRA adapters.

    Attributes:
        model: What runs: a PeftModel while there are edits, otherwise what was given.
        base: The transformers model in it.
        active: Names of the edits that are switched on, in the order they are applied.
        base_name: What the base model is called in the adapters' configs.
        by_parameter: Whether adapters name the weights that are changed, whatever PEFT makes of their modules.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.base = base_of(model)
        self.base_name = str(self.base.name_or_path)
        self.by_parameter = False
        self.active: list[str] = []
        self._given = model
        self._off = 0  # contexts of `disabled` that are open
        self._keys: dict[str, str] = {}  # PEFT's key of each edit
        self._loaded: list[str] = []  # keys of plain adapters that came in by `load`
        _check_lora(model)
        _drop_lost(self.base)
        self._restore_given()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        """Return a copy that owns the edits of its own model."""
        twin: Adapters = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        for key in twin._keys.values():
            config = _configs(twin.base)[key]
            setattr(config, _MARK, replace(getattr(config, _MARK), owner=weakref.ref(twin)))
        return twin

    # ------------------------------------------------------------------ what there is

    @property
    def names(self) -> list[str]:
        """Names of the edits, in the order they were added."""
        return list(self._keys)

    @property
    def configs(self) -> dict[str, LoraConfig]:
        """PEFT's config of each edit, and of each adapter of the user's own."""
        everything = _configs(self.base)
        others = {key: config for key, config in everything.items() if _mark(config) is None}
        return {**others, **{name: everything[key] for name, key in self._keys.items() if key in everything}}

    @property
    def others(self) -> list[str]:
        """Keys of the active adapters that are no edits: the user's own, a part of the model that is edited."""
        configs = _configs(self.base)
        for layer in tuner_layers(self.base).values():
            return [key for key in layer.active_adapters if key not in configs or _mark(configs[key]) is None]
        return []

    def beside(self) -> list[Beside]:
        """Return what identifies the user's active adapters: names, and hashes of their weights."""
        return [Beside(key, _hash_of(self.base, key)) for key in self.others]

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError where there is no edit of a name."""
        if unknown := [name for name in names if name not in self._keys]:
            raise ValueError(f"There is no edit {unknown[0]!r}; there are {self.names}.")

    @property
    def loaded(self) -> list[str]:
        """Keys of plain adapters that came in by `load`."""
        return list(self._loaded)

    def read(self, name: str) -> dict[str, LowRankDelta]:
        """Return the deltas of an edit, by the path of the module they change."""
        return peft_layers.read(self.base, self._keys[name])

    def targets_parameters(self, name: str) -> bool:
        """Tell whether an edit names the weights it changes (`target_parameters`) instead of their modules.

        PEFT takes a `down_proj` in models whose experts transformers 5 has fused, shared or dense as it may be, for the
        experts' own and puts the adapter there: such modules are named by their weights.
        """
        return bool(self.configs[name].target_parameters)

    # ------------------------------------------------------------------ on and off

    def activate(self, names: Sequence[str]) -> None:
        """Switch on exactly these edits; adapters of the user's own stay as they are, and are switched by their keys.

        Raises:
            ValueError: There is no edit of a name.
        """
        known = self.configs
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no edit {unknown[0]!r}; there are {list(known)}.")
        others = [name for name in names if name not in self._keys]
        self.active = [name for name in dict.fromkeys(names) if name in self._keys]
        with self._keeping() as before:
            self._apply(others or before)

    def ensure(self) -> None:
        """Switch on the active edits where something else has switched adapters since.

        Raises:
            ValueError: Someone else has disabled, merged or deleted the adapters of this model, and edits with them.
        """
        _check_in_effect(self.base)
        if lost := [name for name in self.active if name not in self.configs]:
            raise ValueError(
                f"The adapters of the edits {lost} are no longer in the model: PEFT's or transformers' own verbs have "
                "deleted or merged them. Call unload(), and make or load the edits again."
            )
        if self._current() != self._wanted(self.others) or any(one.requires_grad for one in self._factors()):
            self.activate(self.active)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch all edits off inside this context, those too that are made in it: the model is what was given."""
        _check_in_effect(self.base)
        self._off += 1
        self.activate(self.active)
        try:
            yield
        finally:
            self._off -= 1
            self.activate(self.active)

    def _wanted(self, others: Sequence[str]) -> list[str]:
        return [*others, *([] if self._off else (self._keys[name] for name in self.active))]

    def _current(self) -> list[str]:
        return next((list(layer.active_adapters) for layer in tuner_layers(self.base).values()), [])

    def _apply(self, others: Sequence[str]) -> None:
        keys = self._wanted(others)
        switch(self.base, keys)
        if isinstance(self.model, PeftModel):
            self.model.base_model.active_adapter = keys  # the tuner stacks, PeftModel has one name
            if keys or self.model.active_adapter not in self.model.peft_config:
                self.model.active_adapter = keys[0] if keys else next(iter(self.model.peft_config), "default")

    @contextmanager
    def _keeping(self) -> Iterator[list[str]]:
        """Yield the user's active adapters; what of the user's is trainable is so again behind this context."""
        others = self.others
        of_edits = {id(factor) for factor in self._factors()}
        trainable = self._trainable() if self._has_others() else []
        trainable = [parameter for parameter in trainable if id(parameter) not in of_edits]
        try:
            yield others
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _factors(self) -> Iterator[nn.Parameter]:
        """Yield the factors of the edits, those of other EditModels too."""
        keys = [key for key, config in _configs(self.base).items() if _mark(config) is not None]
        for layer in tuner_layers(self.base).values():
            for factors in (layer.lora_A, layer.lora_B):
                yield from (factors[key].weight for key in keys if key in factors)

    def _has_others(self) -> bool:
        return any(_mark(config) is None for config in _configs(self.base).values())

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.base.parameters() if parameter.requires_grad]

    # ------------------------------------------------------------------ in and out

    @contextmanager
    def adding(self, edits: Mapping[str, Mapping[str, LowRankDelta]], on: bool = True) -> Iterator[None]:
        """Add edits, by name the deltas of their modules; an error or an interrupt inside takes them away again.

        Inside this context they take effect, even where all edits are disabled.

        Args:
            on: Switch them on beside those that are active.

        Raises:
            ValueError: PEFT has no place for a factor.
        """
        active, off, self._off = self.active, self._off, 0
        try:
            for name, deltas in edits.items():
                self.add(name, deltas)
            self.activate([*active, *edits] if on else active)
            yield
        except BaseException:
            for name in edits:
                self.remove(name)
            self.active = active
            raise
        finally:
            self._off = off
            self.activate(self.active)

    def add(self, name: str, deltas: Mapping[str, LowRankDelta]) -> None:
        """Add an edit, not switched on.

        Raises:
            ValueError: PEFT has no place for a factor.
        """
        with self._keeping() as others:
            marks = [mark for config in _configs(self.base).values() if (mark := _mark(config)) is not None]
            mark = _Mark(weakref.ref(self), marks[0].trainable if marks else self._trainable())
            fused = any(delta.experts > 1 for delta in deltas.values())
            targeted = any(config.target_parameters for config in _configs(self.base).values())
            by_parameter = self.by_parameter or fused or targeted
            self._keys[name] = _free_key(self.base, name)
            lost = self._add(name, deltas, mark, by_parameter)
            if self.targets_parameters(name) and not by_parameter:
                self._take_out(name)
                lost = self._add(name, deltas, mark, by_parameter=True)
            self._apply(others)
        if lost:
            self.remove(name)
            raise ValueError(
                f"PEFT loads the factors of {sorted(deltas)[0]} as {lost[0]}, which is no module of this model: it "
                "renames weights as transformers does with checkpoints, and those of this architecture once too often. "
                "Name other linear maps by EditConfig.target_modules."
            )

    def _add(self, name: str, deltas: Mapping[str, LowRankDelta], mark: _Mark, by_parameter: bool) -> list[str]:
        key, rank = self._keys[name], max(delta.rank for delta in deltas.values())
        if isinstance(self.model, PeftModel):
            self.base.peft_config = self.model.peft_config  # which is gone with the last adapter
        lora = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[] if by_parameter else sorted(deltas),
            target_parameters=target_parameters(deltas) if by_parameter else None,
            fan_in_fan_out=peft_layers.is_conv1d(self.base, deltas),
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=self.base_name,
        )
        setattr(lora, _MARK, mark)
        with _hiding_others(self.base):
            # PEFT draws first values for the factors, which are replaced at once.
            with torch.random.fork_rng(devices=[]), _naming_targets_of(self.base, lora):
                if isinstance(self.model, PeftModel):
                    self.model.add_adapter(key, lora)
                else:
                    self.model = _wrapped(self.base, lora, key)
            return _put_factors(self.model, key, deltas, rank)

    def load(self, folder: Path, key: str) -> None:
        """Load a plain LoRA adapter, not switched on: it is no edit, and `activate` knows it by its key.

        Raises:
            ValueError: There is an adapter of that key, or the folder's is no LoRA of this model.
        """
        if key in self.configs:
            raise ValueError(f"There is an adapter {key!r} already: load this one by another adapter_name.")
        with self._keeping() as others:
            try:
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), key)
                else:
                    self.model = PeftModel.from_pretrained(self.base, str(folder), key)
                _check_lora(self.model)
            except BaseException as error:
                _delete(self.base, key)
                self._restore_given()
                if isinstance(error, (RuntimeError, KeyError)):
                    raise ValueError(f"The adapter in {folder} does not fit this model: {error}") from error
                raise
            finally:
                self._apply(others)
        self._loaded.append(key)

    def _restore_given(self) -> None:
        """Have what was given run again, where nothing of this object's is left in the model.

        A PeftModel whose adapters are all gone does not run: its base does.
        """
        if not self._keys and not self._loaded:
            self.model = self._given if _configs(self.base) else self.base

    def combine(self, names: Sequence[str], weights: Sequence[float], name: str, how: str, **kwargs: Any) -> None:
        """Combine edits into a new one as PEFT does, by the combination type `how`; it is not switched on.

        Raises:
            ValueError: PEFT cannot combine them so.
        """
        assert isinstance(self.model, PeftModel)
        key = _free_key(self.base, name)
        keys = [self._keys[part] for part in names]
        with self._keeping() as others:
            try:
                self.model.base_model.add_weighted_adapter(keys, list(weights), key, combination_type=how, **kwargs)
                setattr(self.model.peft_config[key], _MARK, _mark(self.model.peft_config[keys[0]]))
                self._keys[name] = key
            finally:
                self._apply(others)

    def remove(self, name: str) -> None:
        """Take an edit away, all or half added, or a plain adapter that was loaded; the others stay as they are."""
        if name not in self._keys and name not in self._loaded:
            return
        with self._keeping() as others:
            if name in self._keys:
                self._take_out(name)
                del self._keys[name]
                self.active = [other for other in self.active if other != name]
            else:
                _delete(self.base, name)
                self._loaded.remove(name)
            self._restore_given()
            self._apply([key for key in others if key != name])

    def clear(self) -> None:
        """Take all edits away: the model is what was given, and what was trainable is trainable again."""
        for name in self.names:
            self.remove(name)
        for key in list(self._loaded):
            self.remove(key)

    def _take_out(self, name: str) -> None:
        key, configs = self._keys[name], _configs(self.base)
        mark = _mark(configs[key]) if key in configs else None
        _delete(self.base, key)
        if mark is not None and not any(_mark(config) is not None for config in configs.values()):
            for parameter in mark.trainable:
                parameter.requires_grad_(True)

    # ------------------------------------------------------------------ written into the weights

    @contextmanager
    def merged(self) -> Iterator[PreTrainedModel]:
        """Yield the plain model with all active adapters in its weights; behind the context all is as it was.

        Raises:
            ValueError: A module's weights are quantized or offloaded: sums cannot be written into them.
        """
        self.ensure()
        with merged(self.base, self._merge()):
            yield self.base

    def merge(self) -> PreTrainedModel:
        """Write all active adapters into the weights, drop all adapters, and return the plain model.

        Raises:
            ValueError: An edited weight is quantized, a sum is not finite, or another EditModel has edits of this
                model; nothing has changed.
        """
        peft_layers.check_mergeable(self.base)
        self.ensure()
        _drop_lost(self.base)
        self._check_alone()
        marks = [mark for config in _configs(self.base).values() if (mark := _mark(config)) is not None]
        if tuner_layers(self.base):
            merge_for_good(self.base, self._merge())
            _configs(self.base).clear()
        forget_configs(self.base)
        for parameter in marks[0].trainable if marks else ():
            parameter.requires_grad_(True)
        self.model = self._given = self.base
        self.active, self._keys, self._loaded = [], {}, []
        return self.base

    def _check_alone(self) -> None:
        """Raise ValueError where another EditModel has edits around the same base, which a merge would take from it."""
        marks = {edit_name(key): _mark(config) for key, config in _configs(self.base).items()}
        if theirs := [name for name, mark in marks.items() if mark is not None and mark.owner() is not self]:
            raise ValueError(
                f"Another EditModel has edits of this model ({theirs[0]!r}), which would be lost: save and unload() "
                "them first, or merge a copy of the model."
            )

    def _merge(self) -> Merge:
        return Merge(self.others, [self._keys[name] for name in self.active])


def _configs(base: nn.Module) -> dict[str, Any]:
    """Return PEFT's configs of all adapters in a model, by key; of all wrappers around it."""
    configs: dict[str, Any] = getattr(base, "peft_config", {})
    return configs


def _mark(config: Any) -> _Mark | None:
    return getattr(config, _MARK, None)


def _check_lora(model: PreTrainedModel | PeftModel) -> None:
    """Raise ValueError where a model carries adapters that no LoRA can be added to."""
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in _configs(base_of(model)).values()}
    if isinstance(model, PeftModel):
        kinds |= {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
    if wrong := sorted(kinds - {"LORA"}):
        raise ValueError(
            f"The model carries adapters of the kind {wrong[0]}, and PEFT adds edits, which are LoRA adapters, to LoRA "
            "adapters alone. Merge them first (merge_and_unload()), and edit the merged model."
        )
    if any(getattr(config, "trainable_token_indices", None) for config in _configs(base_of(model)).values()):
        raise ValueError(
            "The model carries an adapter with trainable_token_indices, which edits cannot be put beside. Merge it "
            "first (merge_and_unload()), and edit the merged model."
        )
    _check_in_effect(base_of(model))


def _check_in_effect(base: nn.Module) -> None:
    """Raise ValueError where adapters are merged or disabled by PEFT's own verbs: edits are not switched alone then."""
    for path, layer in tuner_layers(base).items():
        if layer.merged:
            raise ValueError(
                f"An adapter is merged into {path}: call unmerge_adapter() on the PeftModel, or merge_and_unload() for "
                "good, and edit then."
            )
        if layer.disable_adapters:
            raise ValueError(
                f"The adapters of {path} are disabled (PEFT's disable_adapter() or disable_adapter_layers(), or "
                "disable_adapters() of transformers), and edits would be with them: leave that context, or call "
                "enable_adapter_layers() or enable_adapters(). To have edits without your own adapter, switch it off "
                "by `peft_model.base_model.set_adapter([])`."
            )


def _drop_lost(base: nn.Module) -> None:
    """Take away the edits of EditModels that are gone, which nobody can switch on any more."""
    for key, config in list(_configs(base).items()):
        mark = _mark(config)
        if mark is not None and mark.owner() is None:
            logger.info("The edit %r is taken out of the model: its EditModel is gone.", edit_name(key))
            _delete(base, key)
            if not any(_mark(other) is not None for other in _configs(base).values()):
                for parameter in mark.trainable:
                    parameter.requires_grad_(True)
    unwrap_empty(base)


def _delete(base: nn.Module, key: str) -> None:
    """Take an adapter out of a model, all or half added."""
    _configs(base).pop(key, None)
    for layer in tuner_layers(base).values():
        # Not by PEFT's way: it switches another one on where this one was active.
        layer.set_adapter([other for other in layer.active_adapters if other != key], inference_mode=True)
        layer.delete_adapter(key)
    for wrapper in retrained_modules(base).values():
        wrapper.delete_adapter(key, new_active_adapters=[])
    unwrap_empty(base)


def _free_key(base: nn.Module, name: str) -> str:
    """Return a key for an edit that no other adapter in the model has."""
    taken, key = _configs(base), adapter_key(name)
    number = 2
    while key in taken:
        key = f"{adapter_key(name)}%{number}"
        number += 1
    return key


def _wrapped(base: PreTrainedModel, lora: LoraConfig, key: str) -> PeftModel:
    """Return a PeftModel with a first adapter around a model; those that the model carries stay."""
    import warnings

    with warnings.catch_warnings():
        # That the model carries adapters already, which is meant.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        return get_peft_model(base, lora, adapter_name=key)


def _put_factors(model: PeftModel, key: str, deltas: Mapping[str, LowRankDelta], rank: int) -> list[str]:
    """Give an adapter its factors; return the names of those that PEFT has no place for."""
    for layer in tuner_layers(base_of(model)).values():
        for factors in (layer.lora_A, layer.lora_B):
            # On no device, as the weight beside it that accelerate offloads; but nothing would move this one.
            if key in factors and factors[key].weight.is_meta:
                factors[key].to_empty(device=execution_device(layer.base_layer))
    padded = {path: delta.padded(rank) for path, delta in deltas.items()}
    with reading_state(model):
        loaded = set_peft_model_state_dict(model, adapter_tensors(padded), adapter_name=key)
    return list(loaded.unexpected_keys)


@contextmanager
def _hiding_others(base: nn.Module) -> Iterator[None]:
    """Take the factors of all adapters out of the model, and put them back beside what has come in by then.

    PEFT walks through all modules several times to add one adapter, and each adapter is modules too: beside a thousand
    others, one would take ten times as long.
    """
    with ExitStack() as stack:
        for layer in tuner_layers(base).values():
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
def _naming_targets_of(base: nn.Module, lora: LoraConfig) -> Iterator[None]:
    """Let all adapters say that they target the parameters of `lora`.

    PEFT demands it where parameters are targeted, because several of one module are wrapped one in the other; here each
    module has its weight alone, and edits may change different ones.
    """
    others = {key: config.target_parameters for key, config in _configs(base).items() if config.target_parameters}
    try:
        for key in others:
            _configs(base)[key].target_parameters = lora.target_parameters
        yield
    finally:
        for key, targets in others.items():
            _configs(base)[key].target_parameters = targets


def _hash_of(base: nn.Module, key: str) -> str:
    """Return a short hash of the weights of an adapter."""
    digest = hashlib.sha256()
    for path, layer in (tuner_layers(base) | retrained_modules(base)).items():
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute, {})
            if key in held:
                entry = held[key]
                tensors = [entry] if isinstance(entry, torch.Tensor) else list(entry.parameters())
                digest.update(f"{path}.{attribute} {getattr(layer, 'scaling', {}).get(key)}".encode())
                for tensor in tensors:
                    digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
