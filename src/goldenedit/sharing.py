"""What an EditModel shares on the Hub: edits, edited checkpoints, golden layers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase

from goldenedit.adapters import Adapters
from goldenedit.config import EditConfig
from goldenedit.layer_scores import HUB_LAYER, LayerSelection
from goldenedit.storage.atlas import GoldenLayers
from goldenedit.storage.card import render_card
from goldenedit.storage.checkpoint import WEIGHTS, write_checkpoint
from goldenedit.storage.folder import CARD, EDIT_FILES, BaseModel, EditFolder, write_edit_folder
from goldenedit.storage.hub import is_on_hub, make_repo, push_folder, push_golden_layers, root_files
from goldenedit.versions import library_versions

logger = logging.getLogger(__name__)


class SharingMixin:
    """The verbs of the Hub, for `EditModel`, as `transformers.utils.PushToHubMixin` has them for models."""

    adapters: Adapters
    base_info: BaseModel
    edit_config: EditConfig
    layer_selection: LayerSelection | None
    tokenizer: PreTrainedTokenizerBase
    _proxy_hash: str | None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the edits that are switched on."""
        raise NotImplementedError

    def _content(self, names: Sequence[str]) -> EditFolder:
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
        """Share the active edits: what `save_pretrained` writes, in one commit to a repository on the Hub.

        Args:
            repo_id: The repository, created where there is none.
            private: Whether a repository that is created is private.
            revision: Branch to commit to, created where there is none.
            commit_message: Message of the commit.
            create_pr: Open a pull request instead of committing.
            token: Token of the Hub; by default the one of `hf auth login`.

        Raises:
            ValueError: There is nothing to save.
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
        """
        _check_branch(revision, create_pr)
        content = self._content(self.active_adapters)
        self._check_base_name()
        repo_id = make_repo(repo_id, private, token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "edit"
            write_edit_folder(folder, content, render_card(content, repo_id))
            return push_folder(
                folder,
                repo_id,
                files=EDIT_FILES,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                token=token,
            )

    def push_merged_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload edited checkpoint",
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Share an edited checkpoint: weights with the active edits written into them, tokenizer, facts and card.

        `config.json` says which layers were edited, `golden_layers`. This model stays as it is. Arguments and errors
        are those of `push_to_hub`.
        """
        _check_branch(revision, create_pr)
        content = self._content(self.active_adapters)
        self._check_base_name()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            with self.adapters.merged() as model:
                write_checkpoint(folder, model, self.tokenizer, content)
            repo_id = make_repo(repo_id, private, token)
            (folder / CARD).write_text(render_card(content, repo_id, merged=True), encoding="utf-8")
            # An adapter left there would be loaded in place of the checkpoint.
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

    def push_golden_layers(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload golden layers",
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Share which layers the selector chose, with their scores: `EditConfig(layer="hub:repo_id")` reads them.

        The repository's file keeps what it says of other models, selectors and editors. Arguments and errors are those
        of `push_to_hub`.
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
        """Return what the layer selector found, with all that says where it comes from.

        Raises:
            ValueError: No selector has run, or the layers are those that someone else shared.
        """
        found = self.layer_selection
        if found is None:
            raise ValueError("No layer selector has run: call select_layer() first, with a selector in EditConfig.")
        if str(self.edit_config.layer).startswith(HUB_LAYER):
            raise ValueError(f"These golden layers are shared already, in {self.edit_config.layer!r}: run a selector.")
        return GoldenLayers(
            self.base_info.name_or_path,
            self.base_info.fingerprint,
            found.selector,
            found.layers,
            found.scores,
            self.edit_config.method,
            self.base_info.revision,
            self.base_info.architecture,
            found.facts,
            self._proxy_hash,
            found.cost.seconds,
            found.forward_equivalents,
            library_versions(),
            self.base_info.signs,
            self.base_info.dtype,
        )

    def _check_base_name(self) -> None:
        if not is_on_hub(self.base_info):
            logger.warning(
                "The base model is called %r, which is no name on the Hub: who loads what you share has to bring the "
                "base model. Load it by its name there before you edit.",
                self.base_info.name_or_path,
            )


def _check_branch(revision: str | None, create_pr: bool) -> None:
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request is always to main: leave revision={revision!r} or create_pr=True out.")
