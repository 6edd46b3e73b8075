"""The one place that speaks to the Hub: an edit folder up, an edit folder down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from goldenedit.storage.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, EDIT_CONFIG, EDITS

_FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDITS, CARD]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload edit",
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload the files of an edit folder in one commit, creating the repository where there is none."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=_FILES,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )


def find_folder(model_id: str | Path, **download: Any) -> Path:
    """Return the local folder of an edit: the folder itself, or the files of a Hub repository in the cache.

    Raises:
        FileNotFoundError: `model_id` is neither a folder nor can be the name of a repository.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    try:
        validate_repo_id(str(model_id))
    except ValueError as error:
        raise FileNotFoundError(f"There is no edit folder {model_id}, and it is no name on the Hub.") from error
    return Path(snapshot_download(str(model_id), allow_patterns=_FILES, **download))
