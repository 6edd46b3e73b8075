"""What an EditModel saves and loads: edit folders, and plain adapters beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.adapters import Adapters, check_fits
from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.config import EditConfig
from goldenedit.editors import EDITORS, LowRankDelta
from goldenedit.storage.card import render_card
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    EDIT_CONFIG,
    BaseModel,
    Edit,
    EditFolder,
    joined,
    write_edit_folder,
)
from goldenedit.storage.hub import DownloadOptions, find_adapter, find_folder, is_on_hub
from goldenedit.storage.reading import is_plain_adapter, read_edit_folder

logger = logging.getLogger(__name__)


class StoringMixin:
    """The verbs of folders, for `EditModel`, as transformers and PEFT have them."""

    adapters: Adapters
    base_info: BaseModel
    edit_config: EditConfig
    edits: dict[str, Edit]
    model: PreTrainedModel | PeftModel
    _evaluations: dict[tuple[str, ...], dict[str, Any]]
    _proxy_hash: str | None

    if TYPE_CHECKING:

        def __init__(
            self,
            model: PreTrainedModel | PeftModel,
            edit_config: EditConfig,
            tokenizer: PreTrainedTokenizerBase | None = None,
        ) -> None: ...

        @property
        def active_adapters(self) -> list[str]:  # noqa: D102
            ...

        def set_adapter(self, adapter_name: str | list[str]) -> None:  # noqa: D102
            ...

        def _adding(
            self, edits: Mapping[str, Mapping[str, LowRankDelta]], on: bool = True
        ) -> AbstractContextManager[None]: ...

        def _edit(self, name: str) -> Edit: ...

        def _new_name(self, name: str | None) -> str: ...

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: list[str] | None = None
    ) -> None:
        """Save the active edits as one LoRA adapter with a sidecar and a model card.

        An edit that was in the folder is replaced whole or, on an error, kept whole; a save that is killed half-way is
        finished by the next load or save. The folder itself stays, with its other files.

        Args:
            save_directory: The folder.
            selected_adapters: Names of the edits to save; those that are switched on by default.

        Raises:
            ValueError: There is nothing to save.
        """
        content = self._content(self.active_adapters if selected_adapters is None else selected_adapters)
        names = [edit.name for edit in content.edits]
        if selected_adapters is None and (left_out := [name for name in self.edits if name not in names]):
            logger.warning("Saving the active edits; %s are switched off and not saved.", left_out)
        rank, pays = sum(edit.rank for edit in content.edits), min(edit.paying_rank for edit in content.edits)
        if rank > pays:
            logger.warning(
                "The saved edits have rank %d together. Above %d their factors outgrow the matrices they change, or "
                "what vLLM loads: share an edited checkpoint (push_merged_to_hub()), or fuse them by "
                "add_weighted_adapter(), which leaves the smallest singular values out.",
                rank,
                pays,
            )
        write_edit_folder(Path(save_directory), content, render_card(content))

    def _content(self, names: Sequence[str]) -> EditFolder:
        """Return what is saved of some edits."""
        if not names:
            raise ValueError("There is no active edit to save: call edit() first, or set_adapter().")
        edits = [self._edit(name) for name in names]
        return EditFolder(
            edits, self.edit_config, self.base_info, self._proxy_hash, self._evaluations.get(tuple(names))
        )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | PeftModel,
        model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ignore_fingerprint: bool = False,
        **download: Unpack[DownloadOptions],
    ) -> Self:
        """Put saved edits on their base model and switch them on.

        New edits of the model are made as the saved ones were, but never from files, datasets or repositories that the
        folder names: its author is not to choose what is read here.

        Args:
            model: The base model.
            model_id: The edit folder, or its repository on the Hub.
            adapter_name: Name for what is loaded, as one edit; by default each edit has its own name back.
            tokenizer: The model's tokenizer; by default the one at `model.name_or_path`.
            ignore_fingerprint: Load the edits on a model with other weights than they were made on.
            **download: For the Hub, as transformers has them: `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`, `force_download`.

        Raises:
            ValueError: The folder is no edit folder, is damaged, or was made on another base model.
            FileNotFoundError: There is no such folder, and no repository can be called so.
            huggingface_hub.errors.HfHubHTTPError: The Hub has no such repository, revision or file, or refuses.
        """
        folder = find_folder(os.fspath(model_id), **download)
        content = read_edit_folder(folder)
        try:
            edit_model = cls(model, content.config.without_sources(), tokenizer)
        except ValueError as error:
            raise ValueError(f"{folder / EDIT_CONFIG} does not fit this model: {error}") from error
        edit_model._proxy_hash = content.proxy_hash
        if edit_model.base_info.is_same(content.base_model) and not is_on_hub(edit_model.base_info):
            name, revision = content.base_model.name_or_path, content.base_model.revision
            # The same weights, by the name that others find them by.
            edit_model.base_info = replace(edit_model.base_info, name_or_path=name, revision=revision)
        edit_model._load(content, folder, adapter_name, ignore_fingerprint)
        edit_model.set_adapter(list(edit_model.edits))
        return edit_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        ignore_fingerprint: bool = False,
        **download: Unpack[DownloadOptions],
    ) -> None:
        """Load the edits of another folder beside those that are there; `set_adapter` switches them on.

        A folder or repository with a plain LoRA adapter is loaded as that: it is no edit, but `set_adapter` switches
        it on and off, edits are made beside it, `delete_adapter` and `unload` take it away, and `save_pretrained`
        leaves it to the folder it came from.

        Raises:
            ValueError: As in `from_pretrained`, or a name is taken.
        """
        folder = find_adapter(os.fspath(model_id), **download)
        if is_plain_adapter(folder):
            self.adapters.load(folder, adapter_name or "default")
            self.model = self.adapters.model
            return
        self._load(read_edit_folder(folder), folder, adapter_name, ignore_fingerprint)

    @outside_inference_mode()
    def _load(self, content: EditFolder, folder: Path, adapter_name: str | None, ignore_fingerprint: bool) -> None:
        made_on = content.base_model
        if not self.base_info.is_same(made_on) and not ignore_fingerprint:
            raise ValueError(
                f"The edits of {folder / EDIT_CONFIG} were made on {made_on.name_or_path} (fingerprint "
                f"{made_on.fingerprint}), but this model is {self.base_info.name_or_path} (fingerprint "
                f"{self.base_info.fingerprint}). Load that model, or pass ignore_fingerprint=True to use the edits all "
                "the same."
            )
        edits = content.edits
        if adapter_name is not None:
            edits = [joined(adapter_name, edits)[0]]
        for edit in edits:
            self._new_name(edit.name)
            for path, delta in edit.deltas.items():
                try:
                    check_fits(self.adapters.base, path, delta)
                except ValueError as error:
                    raise ValueError(f"{folder / ADAPTER_CONFIG} does not fit this model: {error}") from error
        self._tell_what_is_missing(edits, folder)
        with self._adding({edit.name: edit.deltas for edit in edits}, on=False):
            self.edits |= {edit.name: edit for edit in edits}
        if content.evaluation is not None and self.base_info.is_same(made_on):
            self._evaluations[tuple(edit.name for edit in edits)] = content.evaluation

    def _tell_what_is_missing(self, edits: Sequence[Edit], folder: Path) -> None:
        """Warn of editors that are not installed, and of adapters that edits were made beside and that are not on."""
        missing = {config.method for edit in edits for config in edit.configs if not config.has_editor}
        if missing:
            logger.warning(
                "The edits of %s were made by %s, which is not installed or cannot be loaded: they work, but no edit "
                "can be made or audited in the same way. Install the package that has it (entry point %r), or set "
                "model.edit_config.method.",
                folder,
                sorted(missing),
                EDITORS.group,
            )
        here = {entry.hash for entry in self.adapters.beside()}
        beside = {entry.name for edit in edits for entry in edit.beside if entry.hash not in here}
        if beside:
            logger.warning(
                "The edits of %s were made beside the adapters %s, which are not active here: load them first, or "
                "the edits may not take.",
                folder,
                sorted(beside),
            )
