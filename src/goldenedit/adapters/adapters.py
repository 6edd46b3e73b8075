"""Edits as adapters of a stock PeftModel: added in one step or not at all, beside whatever else the model carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from goldenedit.adapters import layers as peft_layers
from goldenedit.adapters import ownership
from goldenedit.adapters.factors import hash_of, insert
from goldenedit.adapters.layers import base_of, has_parts, tuner_layers
from goldenedit.adapters.merging import Merge, merge_for_good, merged, merges_in
from goldenedit.adapters.ownership import configs_in, has_others, mark_of, marks_in, name_of
from goldenedit.editors import LowRankDelta
from goldenedit.storage.fingerprint import weights_state
from goldenedit.storage.folder import Beside, target_parameters


class Adapters:
    """The edits of one `EditModel`, as LoRA adapters in its model.

    The model may carry other adapters. Those that the user trained are a part of the model that is edited. Edits of
    other EditModels around the same base are switched off whenever this one runs.

    Args:
        model: A causal LM of transformers, or a PeftModel around one with LoRA adapters.

    Attributes:
        model: What runs: a PeftModel while there are edits, otherwise the model passed in.
        base: The transformers model inside it.
        active: Names of the active edits, in the order they are applied.
        base_name: Name of the base model in the adapters' configs.
        by_parameter: Whether adapters name the weights they change (`target_parameters`) instead of the modules.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.base = base_of(model)
        self.base_name = str(self.base.name_or_path)
        self.by_parameter = False
        self.active: list[str] = []
        self._given = model
        self._disabled = 0  # open contexts of `disabled`
        self._keys: dict[str, str] = {}  # PEFT's key of each edit
        self._loaded: list[str] = []  # keys of the plain adapters added by `load`
        ownership.check_lora(model)
        ownership.delete_lost_edits(self.base)
        self._restore_given()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Own the edits in a copied or unpickled model: the copy of a model alone has edits that nobody owns."""
        vars(self).update(state)
        configs = configs_in(self.base)
        for key in self._keys.values():
            if key in configs:  # other code may have deleted it
                ownership.hand_over(configs[key], self)

    # ------------------------------------------------------------------ what there is

    @property
    def names(self) -> list[str]:
        """Names of the edits, in the order they were added."""
        return list(self._keys)

    @property
    def configs(self) -> dict[str, LoraConfig]:
        """PEFT's config of each edit by its name, and of each adapter that is not an edit by its key."""
        everything = configs_in(self.base)
        others = {key: config for key, config in everything.items() if mark_of(config) is None}
        return {**others, **{name: everything[key] for name, key in self._keys.items() if key in everything}}

    @property
    def others(self) -> list[str]:
        """Keys of the user's active adapters."""
        layer = next(iter(tuner_layers(self.base).values()), None)
        return [] if layer is None else self._others_of(layer)

    def _others_of(self, layer: Any) -> list[str]:
        configs = configs_in(self.base)
        return [key for key in layer.active_adapters if key not in configs or mark_of(configs[key]) is None]

    @property
    def is_disabled(self) -> bool:
        """Whether a context of `disabled` is open, so that no edit takes effect."""
        return self._disabled > 0

    def beside(self) -> list[Beside]:
        """Return name and hash of the user's active adapters."""
        return [Beside(key, hash_of(self.base, key)) for key in self.others]

    @property
    def weights_state(self) -> tuple[int, ...]:
        """Numbers that differ once the weights of the base have changed: by a merge, by training, or by loading."""
        return merges_in(self.base), *weights_state(self.base)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if there is no edit of one of the names."""
        if unknown := [name for name in names if name not in self._keys]:
            raise ValueError(f"There is no edit {unknown[0]!r}; there are {self.names}.")

    @property
    def loaded(self) -> list[str]:
        """Keys of the plain adapters that `load` added."""
        return list(self._loaded)

    def read(self, name: str) -> dict[str, LowRankDelta]:
        """Return the deltas of an edit, by the path of the module they change."""
        return peft_layers.read(self.base, self._keys[name])

    def targets_parameters(self, name: str) -> bool:
        """Tell whether an edit names the weights it changes (`target_parameters`) instead of the modules.

        In models whose experts transformers 5 has fused, PEFT takes every `down_proj`, even a shared or dense one, for
        the experts and puts the adapter there. Such modules are named by their weights.
        """
        return bool(self.configs[name].target_parameters)

    # ------------------------------------------------------------------ on and off

    def select(self, names: Sequence[str]) -> None:
        """Switch on exactly these edits and plain adapters of `load`, by name and by key.

        Adapters of the user stay as they are, unless some of their keys are given.

        Raises:
            ValueError: There is no edit of one of the names.
        """
        self._check_known(names)
        others = [name for name in names if name not in self._keys]
        if all(key in self._loaded for key in others):
            others = [*(key for key in self.others if key not in self._loaded), *others]
        self._activate([name for name in names if name in self._keys], others)

    def activate(self, names: Sequence[str]) -> None:
        """Switch on exactly these edits. All other adapters stay as they are.

        Raises:
            ValueError: There is no edit of one of the names.
        """
        self._check_known(names)
        self._activate(names)

    def _check_known(self, names: Sequence[str]) -> None:
        known = self.configs
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no edit {unknown[0]!r}; there are {list(known)}.")

    def _activate(self, names: Sequence[str], others: Sequence[str] | None = None) -> None:
        self.active = list(dict.fromkeys(names))
        with self._keeping_trainable() as active_others:
            self._apply(active_others if others is None else others)

    def ensure(self) -> None:
        """Switch on the active edits again if other code has switched adapters.

        Raises:
            ValueError: Other code has disabled, merged or deleted the adapters of this model, and the edits with them.
        """
        if not configs_in(self.base) and not self.active:
            return
        layer = self._edited_layer()
        if layer is not None and self._is_in_effect(layer):  # the usual case, without a walk through all modules
            return
        ownership.check_in_effect(self.base)
        if lost := [name for name in self.active if name not in self.configs]:
            remedy = "deleted them. Call unload(), and make or load the edits again."
            if not tuner_layers(self.base):  # no weight tells which of the two it was
                remedy = (
                    "merged or unloaded all adapters. After a merge the weights hold the edits: load the base model "
                    "again, and wrap it. Otherwise call unload(), and make or load the edits again."
                )
            raise ValueError(
                f"The adapters of the edits {lost} are no longer in the model: methods of PEFT or transformers have "
                + remedy
            )
        self.activate(self.active)

    def _edited_layer(self) -> Any:
        """Return PEFT's layer at the first module that an active edit changes, None if there is none."""
        configs = configs_in(self.base)
        for name in self.active:
            config = configs.get(self._keys[name])
            if config is None or not (paths := config.target_modules or config.target_parameters):
                return None
            path = min(paths)
            layer = self.base.get_submodule(path if config.target_modules else path.rpartition(".")[0])
            return layer if hasattr(layer, "active_adapters") else None
        return None

    def _is_in_effect(self, layer: Any) -> bool:
        configs, keys = configs_in(self.base), [self._keys[name] for name in self.active]
        factors = [factor[key].weight for key in keys for factor in (layer.lora_A, layer.lora_B) if key in factor]
        return (
            not layer.merged
            and not layer.disable_adapters
            and all(key in configs for key in keys)
            and layer.active_adapters == self._keys_to_apply(self._others_of(layer))
            and not any(factor.requires_grad for factor in factors)
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch all edits off inside this context, also those made in it: the model is the one passed in."""
        ownership.check_in_effect(self.base)
        self._disabled += 1
        try:
            self.activate(self.active)
            yield
        finally:
            self._disabled -= 1
            self.activate(self.active)

    def _keys_to_apply(self, others: Sequence[str]) -> list[str]:
        return [*others, *([] if self._disabled else (self._keys[name] for name in self.active))]

    def _apply(self, others: Sequence[str]) -> None:
        keys = self._keys_to_apply(others)
        peft_layers.switch(self.base, keys)
        if isinstance(self.model, PeftModel):
            self.model.base_model.active_adapter = keys  # the tuner takes several, the PeftModel one
            if keys or self.model.active_adapter not in self.model.peft_config:
                self.model.active_adapter = keys[0] if keys else next(iter(self.model.peft_config), "default")

    @contextmanager
    def _keeping_trainable(self, loading: bool = False) -> Iterator[list[str]]:
        """Yield the user's active adapters; what the user trains is trainable again after this context.

        Without an adapter of the user, edits freeze the model until the last of them is removed. Loading a plain
        adapter does not.
        """
        others, trainable = self.others, []
        if loading or has_others(self.base):
            factors_of_edits = {id(factor) for factor in self._factors_of_edits()}
            trainable = [parameter for parameter in self._trainable() if id(parameter) not in factors_of_edits]
        try:
            yield others
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _factors_of_edits(self) -> Iterator[nn.Parameter]:
        """Yield the factors of all edits, also those of other EditModels."""
        keys = marks_in(self.base)
        for layer in tuner_layers(self.base).values():
            for factors in (layer.lora_A, layer.lora_B):
                yield from (factors[key].weight for key in keys if key in factors)

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.base.parameters() if parameter.requires_grad]

    # ------------------------------------------------------------------ in and out

    @contextmanager
    def adding(self, edits: Mapping[str, Mapping[str, LowRankDelta]], on: bool = True) -> Iterator[None]:
        """Add edits; an error or an interrupt inside this context removes them again.

        Inside it they take effect, even if all edits are disabled.

        Args:
            edits: The deltas of each edit by module path, by the name of the edit.
            on: Switch them on beside the active edits.

        Raises:
            ValueError: PEFT has no place for a factor.
        """
        active, disabled, self._disabled = self.active, self._disabled, 0
        trainable = [] if marks_in(self.base) else self._trainable()
        try:
            for name, deltas in edits.items():
                self.add(name, deltas)
            self.activate([*active, *edits] if on else active)
            yield
        except BaseException:
            for parameter in trainable:  # PEFT freezes the model before the mark of the first edit is in it
                parameter.requires_grad_(True)
            for name in edits:
                self.remove(name)
            self.active = active
            raise
        finally:
            self._disabled = disabled
            self.activate(self.active)

    def add(self, name: str, deltas: Mapping[str, LowRankDelta]) -> None:
        """Add an edit, not switched on.

        Raises:
            ValueError: PEFT has no place for a factor.
        """
        with self._keeping_trainable() as others:
            marks = list(marks_in(self.base).values())
            trainable = marks[0].trainable if marks else self._trainable()
            fused = any(delta.experts > 1 for delta in deltas.values())
            targeted = any(config.target_parameters for config in configs_in(self.base).values())
            by_parameter = self.by_parameter or fused or targeted
            self._keys[name] = ownership.free_key(self.base, name)
            lost = self._insert(name, deltas, trainable, by_parameter)
            if self.targets_parameters(name) and not by_parameter:
                ownership.delete_edit(self.base, self._keys[name])
                lost = self._insert(name, deltas, trainable, by_parameter=True)
            self._apply(others)
        if lost:
            self.remove(name)
            raise ValueError(
                f"PEFT loads the factors of {sorted(deltas)[0]} as {lost[0]}, and this model has no such module: PEFT "
                "renames weights as transformers does when it loads a checkpoint, which is wrong for this "
                "architecture. Name other linear maps by EditConfig.target_modules."
            )

    def _insert(
        self, name: str, deltas: Mapping[str, LowRankDelta], trainable: Sequence[nn.Parameter], by_parameter: bool
    ) -> list[str]:
        rank = max(delta.rank for delta in deltas.values())
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
        ownership.mark(lora, self, trainable)
        self.model, lost = insert(self.model, self.base, lora, self._keys[name], deltas)
        return lost

    def load(self, folder: Path, key: str) -> None:
        """Load a plain LoRA adapter, not switched on. It is not an edit; `select` takes its key.

        Raises:
            ValueError: There is an adapter of that key, or the adapter in the folder is not a LoRA of this model, or
                PEFT would write into the base weights to load it.
        """
        if key in self.configs:
            raise ValueError(f"There is an adapter {key!r} already: load this one under another adapter_name.")
        config = PeftConfig.from_pretrained(str(folder))
        ownership.check_writes_nothing(config, folder)
        with self._keeping_trainable(loading=True) as others:
            try:
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), key)
                else:
                    self.model = PeftModel.from_pretrained(self.base, str(folder), key)
                ownership.check_lora(self.model)
                if not has_parts(self.base, key):  # an older PEFT adds an adapter of nothing to those that it has
                    raise RuntimeError(f"it is for {config.target_modules}, and the model has no such module")
            except BaseException as error:
                ownership.delete(self.base, key)
                self._restore_given()
                if isinstance(error, (RuntimeError, KeyError)):
                    raise ValueError(f"The adapter in {folder} does not fit this model: {error}") from error
                raise
            finally:
                self._apply(others)
        self._loaded.append(key)

    def _restore_given(self) -> None:
        """Run the model passed in again, once nothing that this object added is left in it.

        A PeftModel without any adapter does not run, so its base does.
        """
        if not self._keys and not self._loaded:
            self.model = self._given if configs_in(self.base) else self.base

    def combine(self, names: Sequence[str], weights: Sequence[float], name: str, how: str, **kwargs: Any) -> None:
        """Combine edits into a new one, not switched on, by PEFT's combination type `how`.

        Raises:
            ValueError: PEFT cannot combine them like this.
        """
        assert isinstance(self.model, PeftModel)
        key = ownership.free_key(self.base, name)
        keys = [self._keys[part] for part in names]
        trainable = marks_in(self.base)[keys[0]].trainable
        with self._keeping_trainable() as others:
            try:
                self.model.base_model.add_weighted_adapter(keys, list(weights), key, combination_type=how, **kwargs)
                ownership.mark(self.model.peft_config[key], self, trainable)
                self._keys[name] = key
            except BaseException:  # PEFT adds the adapter before it computes the factors
                self._keys.pop(name, None)
                ownership.delete(self.base, key)
                raise
            finally:
                self._apply(others)

    def remove(self, name: str) -> None:
        """Remove an edit, even one that was only half added, or a plain adapter that `load` added."""
        if name not in self._keys and name not in self._loaded:
            return
        with self._keeping_trainable() as others:
            if name in self._keys:
                ownership.delete_edit(self.base, self._keys.pop(name))
                self.active = [other for other in self.active if other != name]
            else:
                ownership.delete(self.base, name)
                self._loaded.remove(name)
            self._restore_given()
            self._apply([key for key in others if key != name])

    def fuse(self, into: str, part: str, deltas: Mapping[str, LowRankDelta]) -> None:
        """Replace two active edits by one with the name of the first. An error leaves both as they are.

        Args:
            into: The edit that takes the other one up.
            part: The other one.
            deltas: The change of both.

        Raises:
            ValueError: PEFT has no place for a factor.
        """
        key, active = self._keys.pop(into), self.active
        try:
            self.add(into, deltas)
        except BaseException:
            self.remove(into)
            self._keys[into] = key
            self.activate(active)
            raise
        self.activate([name for name in active if name != part])
        with self._keeping_trainable() as others:
            ownership.delete_edit(self.base, key)
            self._apply(others)
        self.remove(part)

    def clear(self) -> None:
        """Remove all edits. The model is the one passed in, and what was trainable is trainable again."""
        for name in [*self.names, *self._loaded]:
            self.remove(name)

    # ------------------------------------------------------------------ written into the weights

    @contextmanager
    def merged(self) -> Iterator[PreTrainedModel]:
        """Yield the plain model with all active adapters in its weights; the context restores the weights.

        Raises:
            ValueError: The weights of a module are quantized or offloaded, so sums cannot be written into them.
        """
        self.ensure()
        with merged(self.base, self._active_adapters()):
            yield self.base

    def merge(self) -> PreTrainedModel:
        """Write all active adapters into the weights, remove all adapters, and return the plain model.

        Raises:
            ValueError: An edited weight is quantized, a sum is not finite, or another EditModel has edits in this
                model. Nothing has changed.
        """
        peft_layers.check_mergeable(self.base)
        self.ensure()
        ownership.delete_lost_edits(self.base)
        marks = marks_in(self.base)
        if others := [name_of(key) for key, mark in marks.items() if mark.owner() is not self]:
            raise ValueError(
                f"Another EditModel has edits in this model ({others[0]!r}), which would be lost. Save and unload() "
                "them first, or merge a copy of the model."
            )
        if tuner_layers(self.base):
            merge_for_good(self.base, self._active_adapters())
            configs_in(self.base).clear()
        peft_layers.forget_configs(self.base)
        for parameter in next(iter(marks.values())).trainable if marks else ():
            parameter.requires_grad_(True)
        self.model = self._given = self.base
        self.active, self._keys, self._loaded = [], {}, []
        return self.base

    def _active_adapters(self) -> Merge:
        return Merge(self.others, [self._keys[name] for name in self.active])
