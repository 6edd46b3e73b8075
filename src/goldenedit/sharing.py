"""The methods by which an EditModel shares edits, edited checkpoints and golden layers on the Hub."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase

from goldenedit import platforms
from goldenedit.adapters import Adapters
from goldenedit.config import EditConfig
from goldenedit.files import folder_at, naming
from goldenedit.layer_scores import HUB_LAYER, LayerSelection
from goldenedit.storage.atlas import GoldenLayers
from goldenedit.storage.atomic import check_new
from goldenedit.storage.card import render_card
from goldenedit.storage.checkpoint import WEIGHTS, write_checkpoint
from goldenedit.storage.folder import CARD, EDIT_FILES, BaseModel, EditFolder, write_edit_folder
from goldenedit.storage.hub import (
    is_on_hub,
    make_repo,
    public_name,
    push_folder,
    push_golden_layers,
    root_files,
    terms_of,
)
from goldenedit.threads import ModelLock, alone
from goldenedit.versions import library_versions

logger = logging.getLogger(__name__)


class SharingMixin:
    """The Hub methods of `EditModel`, like `transformers.utils.PushToHubMixin` for models."""

    adapters: Adapters
    base_info: BaseModel
    edit_config: EditConfig
    layer_selection: LayerSelection | None
    threads: ModelLock
    tokenizer: PreTrainedTokenizerBase
    _proxy_hash: str | None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active edits."""
        raise NotImplementedError

    def _content(self, names: str | Sequence[str]) -> EditFolder:
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload edit",
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Upload the active edits to a repository on the Hub in one commit, with the files of `save_pretrained`.

        Args:
            repo_id: The repository, created if it does not exist.
            private: Whether a newly created repository is private.
            revision: Branch to commit to, created if it does not exist.
            commit_message: Message of the commit.
            create_pr: Open a pull request instead of committing to the branch.
            token: Token for the Hub; by default the one saved by `hf auth login`.

        Raises:
            ValueError: No edit is active, or `revision` and `create_pr` exclude each other.
            huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request.
        """
        _check_branch(revision, create_pr)
        with self.threads.changing():
            content = self._content(self.active_adapters)
            self._check_base_name()
        terms = terms_of(content.base_model, token)
        repo_id = make_repo(repo_id, private, token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "edit"
            write_edit_folder(folder, content, render_card(content, repo_id, terms=terms))
            return push_folder(
                folder,
                repo_id,
                files=EDIT_FILES,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                token=token,
            )

    @alone
    def push_merged_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload edited checkpoint",
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Upload an edited checkpoint: weights with the active edits merged into them, tokenizer, facts and card.

        The entry `golden_layers` of `config.json` lists the edited layers. This model does not change. For arguments
        and errors, see `push_to_hub`.
        """
        _check_branch(revision, create_pr)
        content = self._content(self.active_adapters)
        self._check_base_name()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            with self.adapters.merged() as model, naming(folder):
                write_checkpoint(folder, model, self.tokenizer, content)
            repo_id = make_repo(repo_id, private, token)
            card = render_card(content, repo_id, True, terms_of(content.base_model, token))
            (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
            # If an adapter stayed in the repository, it would be loaded instead of the checkpoint.
            stale = [*EDIT_FILES, *root_files(repo_id, WEIGHTS, revision, token)]
            return push_folder(
                folder,
                repo_id,
                stale=stale,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                token=token,
            )

    @alone
    def save_merged(self, save_directory: str | os.PathLike[str]) -> None:
        """Save an edited checkpoint: weights with the active edits merged into them, tokenizer, facts and card.

        `AutoModelForCausalLM.from_pretrained(save_directory)` loads it. The entry `golden_layers` of `config.json`
        lists the edited layers. This model does not change.

        Args:
            save_directory: A folder that does not exist yet, or is empty.

        Raises:
            FileExistsError: There are files in the folder.
            ValueError: No edit is active, or an edited weight is quantized or offloaded.
        """
        folder = Path(os.path.realpath(folder_at(save_directory)))
        content = self._content(self.active_adapters)
        check_new(folder)
        is_new = not folder.exists()
        place = folder.parent if is_new else folder  # an empty folder stays the same one: it may be a mount point
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place) as scratch:
            staged = Path(scratch) / "checkpoint"
            with self.adapters.merged() as model, naming(folder):
                write_checkpoint(staged, model, self.tokenizer, content)
                card = render_card(content, os.fspath(save_directory), merged=True)
                (staged / CARD).write_text(card, encoding="utf-8", newline="\n")
            if is_new:
                platforms.HERE.patiently(staged.rename, folder)
            else:
                for path in sorted(
                    staged.iterdir(), key=lambda path: path.name == "config.json"
                ):  # which is read first
                    platforms.HERE.patiently(path.rename, folder / path.name)

    def push_golden_layers(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload golden layers",
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Upload the selected layers and their scores, which `EditConfig(layer="hub:repo_id")` reads.

        Records of other models, selectors and editors in the repository's file stay. For arguments and errors, see
        `push_to_hub`.
        """
        _check_branch(revision, create_pr)
        self._check_base_name()
        return push_golden_layers(
            [self.golden_layers()],
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            token=token,
        )

    def golden_layers(self) -> GoldenLayers:
        """Return the golden layers of this model, with their scores and provenance.

        Raises:
            ValueError: No selector has run, or the layers were read from the Hub.
        """
        base_info, selection = self.base_info, self.layer_selection  # in this order: new weights have no selection yet
        if selection is None:
            raise ValueError(
                "No layer selector has run. Choose one with EditConfig.layer, such as 'lga', and call select_layer()."
            )
        if str(self.edit_config.layer).startswith(HUB_LAYER):
            raise ValueError(
                f"These golden layers are shared already: they were read from {self.edit_config.layer!r}. Run a "
                "selector to share layers of your own."
            )
        return GoldenLayers(
            model=public_name(base_info),
            fingerprint=base_info.fingerprint,
            selector=selection.selector,
            layers=selection.layers,
            scores=selection.scores,
            method=self.edit_config.method,
            revision=base_info.revision,
            architecture=base_info.architecture,
            facts=selection.facts,
            proxy_hash=self._proxy_hash,
            seconds=selection.cost.seconds,
            forward_equivalents=selection.forward_equivalents,
            versions=library_versions(),
            plateau=selection.within_noise(),
            signs=base_info.signs,
            dtype=base_info.dtype,
        )

    def _check_base_name(self) -> None:
        if not is_on_hub(self.base_info):
            logger.warning(
                "The base model is called %r, which is not the name of a repository on the Hub. People who load what "
                "you share must provide the base model themselves. To avoid this, load it by its name on the Hub "
                "before you edit.",
                self.base_info.name_or_path,
            )


def _check_branch(revision: str | None, create_pr: bool) -> None:
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request always targets main. Omit either revision={revision!r} or create_pr=True.")
