"""How an EditModel saves and loads edit folders, and loads plain adapters."""

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
from goldenedit.cost import phase
from goldenedit.editing.calls import facts_lost_together, warn_of_facts_lost_together
from goldenedit.editing.gates import moved
from goldenedit.editors import EDITORS, LowRankDelta
from goldenedit.files import folder_at
from goldenedit.lm import LanguageModel
from goldenedit.storage.card import own_card, render_card
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    CARD,
    EDIT_CONFIG,
    BaseModel,
    Edit,
    EditFolder,
    check_edit_name,
    joined,
    write_edit_folder,
)
from goldenedit.storage.hub import DownloadOptions, find_adapter, find_folder, is_on_hub
from goldenedit.storage.reading import is_plain_adapter, read_edit_folder
from goldenedit.threads import alone

logger = logging.getLogger(__name__)


class StoringMixin:
    """Saving and loading for `EditModel`, under the names that transformers and PEFT use."""

    adapters: Adapters
    base_info: BaseModel
    edit_config: EditConfig
    edits: dict[str, Edit]
    lm: LanguageModel
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

        def disable_adapter(self) -> AbstractContextManager[None]: ...  # noqa: D102

        def _see_model(self) -> None: ...

        def _adding(
            self, edits: Mapping[str, Mapping[str, LowRankDelta]], on: bool = True
        ) -> AbstractContextManager[None]: ...

        def _warn_of_missing_markers(self, edits: Sequence[Edit]) -> None: ...

        def _only(self, names: Sequence[str]) -> AbstractContextManager[None]: ...

    @alone
    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: str | list[str] | None = None
    ) -> None:
        """Save the active edits as one LoRA adapter with a sidecar and a model card.

        An edit that is in the folder already is replaced as a whole, or kept as a whole if saving fails. The next load
        or save completes a save that was killed. Other files in the folder stay, and so does a README.md that was
        written or changed by hand.

        Args:
            save_directory: The folder.
            selected_adapters: Name or names of the edits to save; by default the active ones.

        Raises:
            ValueError: There is nothing to save, or no folder is named.
        """
        content = self._content(self.active_adapters if selected_adapters is None else selected_adapters)
        names = [edit.name for edit in content.edits]
        if selected_adapters is None and (left_out := [name for name in self.edits if name not in names]):
            logger.warning("Saving the active edits; %s are switched off and not saved.", left_out)
        rank, pays = sum(edit.rank for edit in content.edits), min(edit.paying_rank for edit in content.edits)
        if rank > pays:
            logger.warning(
                "The saved edits have a total rank of %d. Above %d, factors are larger than the matrices they change, "
                "or than what vLLM loads. Share an edited checkpoint (push_merged_to_hub()), or fuse the edits by "
                "add_weighted_adapter(), which drops the smallest singular values.",
                rank,
                pays,
            )
        folder = folder_at(save_directory)
        custom_card = own_card(folder)
        if custom_card is None:
            write_edit_folder(folder, content, render_card(content))
        else:
            write_edit_folder(folder, content, custom_card, is_rendered=False)
            logger.warning(
                "%s was written or changed by hand, so it stays as it is. To get a card, move it and save again.",
                folder / CARD,
            )

    def _content(self, names: str | Sequence[str]) -> EditFolder:
        """Return the content of an edit folder with these edits. A name that occurs twice counts once."""
        names = list(dict.fromkeys([names] if isinstance(names, str) else names))
        if not names:
            raise ValueError("There is no active edit to save: call edit() first, or set_adapter().")
        edits = [self._edit(name) for name in names]
        self._warn_of_missing_markers(edits)
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

        New edits are made like the saved ones. Files, datasets and repositories that the folder names are not used: a
        stranger must not choose what is read on this machine.

        Args:
            model: The base model.
            model_id: The edit folder, or its repository on the Hub.
            adapter_name: Load everything as one edit of this name; by default each edit keeps its name.
            tokenizer: The model's tokenizer; by default the one at `model.name_or_path`.
            ignore_fingerprint: Load the edits even if they were made on other weights.
            **download: Options for the Hub, named as in transformers: `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`, `force_download`.

        Raises:
            ValueError: The folder is not an edit folder, is damaged, or was made on another base model.
            FileNotFoundError: There is no such folder, and this is not a valid repository name.
            huggingface_hub.errors.HfHubHTTPError: The repository, revision or file does not exist or may not be read.
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
            # The weights are the same; this is the name under which others find them.
            edit_model.base_info = replace(edit_model.base_info, name_or_path=name, revision=revision)
        edit_model._load(content, folder, adapter_name, ignore_fingerprint)
        edit_model.set_adapter(list(edit_model.edits))
        return edit_model

    @alone
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        ignore_fingerprint: bool = False,
        **download: Unpack[DownloadOptions],
    ) -> None:
        """Load the edits of another folder, not switched on; `set_adapter` does that.

        The folder or repository may also hold a plain LoRA adapter. It is not an edit: `set_adapter` switches it on
        where it is named, and off where it is not. New edits are made beside it, `delete_adapter` and `unload` remove
        it, and `save_pretrained` does not save it.

        Edits that were made apart may rewrite the same neurons. Where the folder's edits and those of the model do, the
        loaded ones are moved to free neurons, with the same effect. Their factors in this model, and in folders that it
        saves, then differ from those of their folder. A warning says so if they cannot be moved. Another one names the
        facts of these edits, or of those that the model has, which do not hold when all of them are switched on.

        Raises:
            ValueError: As in `from_pretrained`, or a name is taken.
        """
        folder = find_adapter(os.fspath(model_id), **download)
        if is_plain_adapter(folder):
            self.adapters.load(folder, adapter_name or "default")
            self.model = self.adapters.model
            return
        self._load(read_edit_folder(folder), folder, adapter_name, ignore_fingerprint)

    def _difference_to(self, made_on: BaseModel) -> str:
        """Say in which recorded properties another model differs from this one, or else how weights come to differ."""
        names = {"architecture": "class", "revision": "revision"}  # a precision is no difference
        pairs = {words: (getattr(made_on, name), getattr(self.base_info, name)) for name, words in names.items()}
        known = [
            f"{words} {theirs} and {ours}"
            for words, (theirs, ours) in pairs.items()
            if theirs and ours and theirs != ours
        ]
        if known:
            return f"They differ in {', '.join(known)}."
        rows = getattr(self.adapters.base.config, "vocab_size", None)
        added = "" if rows is None else f", or in added tokens (this one has embeddings of {rows})"
        return f"They differ in their weights: by another revision, by training, by a merge{added}."

    @outside_inference_mode()
    def _load(self, content: EditFolder, folder: Path, adapter_name: str | None, ignore_fingerprint: bool) -> None:
        made_on = content.base_model
        if not self.base_info.is_same(made_on) and not ignore_fingerprint:
            raise ValueError(
                f"The edits of {folder / EDIT_CONFIG} were made on {made_on.name_or_path} (fingerprint "
                f"{made_on.fingerprint}), but this model is {self.base_info.name_or_path} (fingerprint "
                f"{self.base_info.fingerprint}). {self._difference_to(made_on)} Load that model, or pass "
                "ignore_fingerprint=True to use the edits anyway."
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
        self._warn_of_missing_parts(edits, folder)
        edits = self._with_own_neurons(edits)
        present = list(self.edits.values())
        with self._adding({edit.name: edit.deltas for edit in edits}, on=False):
            self.edits |= {edit.name: edit for edit in edits}
            if present:
                with phase("check"):
                    warn_of_facts_lost_together(facts_lost_together(self.lm, [present, edits], self._only), folder)
        if content.evaluation is not None and self.base_info.is_same(made_on):
            self._evaluations[tuple(edit.name for edit in edits)] = content.evaluation

    def _with_own_neurons(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return edits that rewrite no neurons of the edits in this model; a warning names those that still do."""
        present = {name: edit.deltas for name, edit in self.edits.items()}
        if not present:
            return list(edits)
        self._see_model()
        given = self.edit_config
        covariance = "sampled" if given.covariance == "identity" else given.covariance
        config = EditConfig(covariance=covariance, covariance_tokens=given.covariance_tokens, seed=given.seed)
        occupied = [edit.deltas for edit in edits]
        placed = []
        with self.disable_adapter():
            for edit in edits:
                deltas, clashing = moved(self.lm, config, edit.deltas, present, occupied)
                occupied.append(deltas)
                if clashing:
                    logger.warning(
                        "Edit %r rewrites neurons that the edits %s rewrite too, and it cannot be moved to others. "
                        "Switch on only one of them at a time (set_adapter), or make this edit again in this model.",
                        edit.name,
                        clashing,
                    )
                placed.append(replace(edit, deltas=deltas))
        return placed

    def _warn_of_missing_parts(self, edits: Sequence[Edit], folder: Path) -> None:
        """Log a warning for editors that are not installed, and for adapters that edits need and are not active."""
        missing = {config.method for edit in edits for config in edit.configs if not config.has_editor}
        if missing:
            logger.warning(
                "The edits of %s were made by %s, which is not installed or cannot be loaded. They work, but new edits "
                "cannot be made this way, and these cannot be audited. Install the package that has the editor (entry "
                "point %r), or set model.edit_config.method.",
                folder,
                sorted(missing),
                EDITORS.group,
            )
        active = {entry.hash for entry in self.adapters.beside()}
        if inactive := {entry.name for edit in edits for entry in edit.beside if entry.hash not in active}:
            logger.warning(
                "The edits of %s were made beside the adapters %s, which are not active here. Load and activate them, "
                "or the edits may not take effect as measured.",
                folder,
                sorted(inactive),
            )

    def _edit(self, name: str) -> Edit:
        self.adapters.check([name])
        return self.edits[name]

    def _new_name(self, name: str | None) -> str:
        if name is None:
            number = 1
            while f"edit_{number}" in self.adapters.configs:
                number += 1
            return f"edit_{number}"
        check_edit_name(name)
        if name in self.edits or name in self.adapters.loaded:
            kind = "edit" if name in self.edits else "adapter"
            raise ValueError(
                f"There is an {kind} {name!r} already: choose another name, or delete_adapter({name!r}) first."
            )
        if name in self.adapters.configs:
            raise ValueError(f"The model carries an adapter {name!r} of your own: choose another name for the edit.")
        return name
