"""Which adapters of a model are edits, and of which EditModel: a mark on PEFT's config of each edit."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from goldenedit.adapters.layers import base_of, retrained_modules, tuner_layers, unwrap_empty
from goldenedit.storage.folder import adapter_key, edit_name

logger = logging.getLogger(__name__)

_MARK = "_goldenedit"  # attribute of a LoraConfig
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # PEFT's others subtract from the base weights


def _nobody() -> None:
    """Stand for an owner that is gone, as a dead weak reference does."""


@dataclass(frozen=True)
class Mark:
    """The owner of an edit's adapter.

    Attributes:
        owner: Returns the owner, None once it is gone.
        trainable: Parameters of the model that become trainable again when the last edit leaves it.
    """

    owner: Callable[[], object | None]
    trainable: Sequence[nn.Parameter]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle a mark without its owner: a copy of the model alone has edits, but no EditModel."""
        return Mark, (_nobody, self.trainable)


def mark(config: Any, owner: object, trainable: Sequence[nn.Parameter]) -> None:
    """Mark the adapter of a config as an edit of `owner`."""
    setattr(config, _MARK, Mark(weakref.ref(owner), trainable))


def hand_over(config: Any, owner: object) -> None:
    """Mark the adapter of a config as an edit of another owner."""
    setattr(config, _MARK, replace(getattr(config, _MARK), owner=weakref.ref(owner)))


def mark_of(config: Any) -> Mark | None:
    """Return the mark of a config, None if its adapter is not an edit."""
    return getattr(config, _MARK, None)


def marks_in(base: nn.Module) -> dict[str, Mark]:
    """Return the marks of all edits in a model, by PEFT's key."""
    return {key: found for key, config in configs_in(base).items() if (found := mark_of(config)) is not None}


def configs_in(base: nn.Module) -> dict[str, Any]:
    """Return PEFT's configs of all adapters in a model, by key. All wrappers around the model share them."""
    configs: dict[str, Any] = getattr(base, "peft_config", {})
    return configs


def has_others(base: nn.Module) -> bool:
    """Tell whether a model carries adapters that are not edits."""
    return any(mark_of(config) is None for config in configs_in(base).values())


def free_key(base: nn.Module, name: str) -> str:
    """Return a key for an edit that no other adapter in the model has."""
    taken, key = configs_in(base), adapter_key(name)
    number = 2
    while key in taken:
        key = f"{adapter_key(name)}%{number}"
        number += 1
    return key


def name_of(key: str) -> str:
    """Return the name of the edit of a key, without the number that `free_key` may have added."""
    return edit_name(re.sub(r"(?<=.)%\d+$", "", key))


def delete(base: nn.Module, key: str) -> None:
    """Remove an adapter from a model, even one that was only half added."""
    configs_in(base).pop(key, None)
    for layer in tuner_layers(base).values():
        # PEFT's own method would activate another adapter in place of this one.
        layer.set_adapter([other for other in layer.active_adapters if other != key], inference_mode=True)
        layer.delete_adapter(key)
    for wrapper in retrained_modules(base).values():
        wrapper.delete_adapter(key, new_active_adapters=[])
    unwrap_empty(base)


def delete_edit(base: nn.Module, key: str) -> None:
    """Remove an edit. With the last edit of a model, what was trainable before the first one is trainable again."""
    removed = marks_in(base).get(key)
    delete(base, key)
    if removed is not None and not marks_in(base):
        for parameter in removed.trainable:
            parameter.requires_grad_(True)


def delete_lost_edits(base: nn.Module) -> None:
    """Remove the edits of EditModels that are gone, which nobody could switch on or off anymore."""
    for key, lost in marks_in(base).items():
        if lost.owner() is None:
            logger.info("The edit %r is removed from the model: its EditModel is gone.", name_of(key))
            delete_edit(base, key)
    unwrap_empty(base)


def check_lora(model: PreTrainedModel | PeftModel) -> None:
    """Raise ValueError if a model carries adapters that edits cannot be put beside."""
    base = base_of(model)
    configs = [*configs_in(base).values(), *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs}
    if wrong := sorted(kinds - {"LORA"}):
        raise ValueError(
            f"The model carries adapters of the kind {wrong[0]}. Edits are LoRA adapters, and PEFT stacks them on LoRA "
            "adapters only. Merge the adapters first (merge_and_unload()), and edit the merged model."
        )
    if any(getattr(config, "trainable_token_indices", None) for config in configs):
        raise ValueError(
            "The model carries an adapter with trainable_token_indices, which edits cannot be put beside. Merge it "
            "first (merge_and_unload()), and edit the merged model."
        )
    check_in_effect(base)


def check_writes_nothing(config: Any, folder: Path) -> None:
    """Raise ValueError if PEFT changes the base model for good when it loads the adapter of a config."""
    init = getattr(config, "init_lora_weights", True)
    options = {
        "init_lora_weights": (init.lower() if isinstance(init, str) else init) not in _INITS,
        "bias": getattr(config, "bias", "none") != "none",
        "layer_replication": bool(getattr(config, "layer_replication", None)),
    }
    if option := next((option for option, writes in options.items() if writes), None):
        raise ValueError(
            f"The adapter in {folder} has {option}={getattr(config, option)!r}, with which PEFT changes the base model "
            "itself, even while the adapter is switched off. Load it with PEFT, merge it (merge_and_unload()), and "
            "edit the merged model."
        )


def check_in_effect(base: nn.Module) -> None:
    """Raise ValueError if PEFT's own methods have merged or disabled the adapters: edits cannot be switched then."""
    for path, layer in tuner_layers(base).items():
        if layer.merged:
            raise ValueError(
                f"An adapter is merged into {path}. Call unmerge_adapter() on the PeftModel, or merge_and_unload() to "
                "keep it merged, and then edit."
            )
        if layer.disable_adapters:
            raise ValueError(
                f"The adapters of {path} are disabled (by disable_adapter() or disable_adapter_layers() of PEFT, or by "
                "disable_adapters() of transformers), and so would be the edits. Leave that context, or call "
                "enable_adapter_layers() or enable_adapters(). To use edits without your own adapter, deactivate it "
                "by `peft_model.base_model.set_adapter([])`."
            )
