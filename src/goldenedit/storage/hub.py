"""The one place that speaks to the Hub: folders up in one commit, the files of the format down."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitInfo, HfApi, constants, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from goldenedit.storage.atlas import (
    GOLDEN_LAYERS,
    GoldenLayers,
    dump_golden_layers,
    read_golden_layers,
    with_record,
)
from goldenedit.storage.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, BaseModel
from goldenedit.storage.reading import listed_files


class DownloadOptions(TypedDict, total=False):
    """Where something is downloaded from and to, by the names that transformers has."""

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


def make_repo(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a model repository where there is none, and return its name with its owner."""
    with _telling_of_cut_connections():
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def root_files(repo_id: str, suffixes: Sequence[str], revision: str | None, token: str | bool | None) -> list[str]:
    """Return the files of a repository that end so and lie in no folder."""
    with _telling_of_cut_connections(), suppress(RevisionNotFoundError):  # of a branch that is still to be made
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
        return [name for name in names if "/" not in name and name.endswith(tuple(suffixes))]
    return []


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    files: Sequence[str] | None = None,
    stale: Sequence[str] | None = None,
    revision: str | None = None,
    commit_message: str = "Upload edit",
    create_pr: bool = False,
    token: str | bool | None = None,
    parent_commit: str | None = None,
) -> CommitInfo:
    """Upload a folder in one commit to a repository that is there; what is there unchanged is not uploaded again.

    Args:
        files: Names of the files to upload; None for all.
        stale: Names of files that are deleted in the repository where the folder does not have them; by
            default those of `files`.
        revision: Branch, created where there is none.
        parent_commit: Refuse unless this is the last commit of the branch.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
        ConnectionError: The Hub cannot be reached.
    """
    api = HfApi(token=token)
    with _telling_of_cut_connections():
        make_branch(repo_id, None if create_pr else revision, token)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=None if files is None else list(files),
            delete_patterns=list(files or ()) if stale is None else list(stale),  # those that are uploaded stay
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            parent_commit=parent_commit,
        )


def make_branch(repo_id: str, revision: str | None, token: str | bool | None = None) -> None:
    """Create a branch where there is none; pull requests have theirs."""
    if revision is not None and not revision.startswith("refs/pr/"):
        HfApi(token=token).create_branch(repo_id, branch=revision, exist_ok=True)


def push_golden_layers(
    new: Sequence[GoldenLayers],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload golden layers",
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Add what layer selectors found to the golden layers of a repository, which is created where there is none.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses, or someone else pushed at the same time.
        GoldenLayersError: What the repository has under that name is something else.
    """
    repo_id = make_repo(repo_id, private, token)
    records: list[GoldenLayers] = []
    with _telling_of_cut_connections():
        make_branch(repo_id, None if create_pr else revision, token)
        parent = HfApi(token=token).repo_info(repo_id, revision=revision).sha
    with suppress(RemoteEntryNotFoundError):
        records = read_golden_layers(find_golden_layers(repo_id, revision=parent, token=token, force_download=True))
    for record in new:
        records = with_record(records, record)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / GOLDEN_LAYERS).write_text(dump_golden_layers(records), encoding="utf-8")
        return push_folder(
            Path(scratch),
            repo_id,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            token=token,
            parent_commit=parent,
        )


def find_folder(model_id: str | Path, **download: Unpack[DownloadOptions]) -> Path:
    """Return the local folder of an edit: the folder itself, or the files of a Hub repository in the cache.

    All files are those of one commit, whatever is pushed meanwhile.

    Raises:
        FileNotFoundError: `model_id` is neither a folder nor can be the name of a repository.
        ValueError: `subfolder` leads out of the folder.
        huggingface_hub.errors.HfHubHTTPError: There is no such repository, revision or file, or it may not be read.
        huggingface_hub.errors.LocalEntryNotFoundError: The Hub cannot be reached, and the cache has no copy.
        ConnectionError: The connection was cut.
    """
    if unknown := sorted(set(download) - set(DownloadOptions.__annotations__)):
        raise TypeError(f"Unknown arguments {unknown}; a download takes {sorted(DownloadOptions.__annotations__)}.")
    parts = Path(download.get("subfolder") or "").parts
    if Path(*parts).is_absolute() or ".." in parts:
        raise ValueError(f"subfolder {download.get('subfolder')!r} leads out of the edit's folder.")
    if Path(model_id).is_dir():
        return Path(model_id, *parts)
    download = {**download, "subfolder": "/".join(parts) or None}
    _check_repo_id(str(model_id))
    with _telling_of_cut_connections():
        folder = Path(hf_hub_download(str(model_id), EDIT_CONFIG, **_arguments(download))).parent
        _download_beside(folder, str(model_id), listed_files(folder), download)
    return folder


def find_adapter(model_id: str | Path, **download: Unpack[DownloadOptions]) -> Path:
    """Return the local folder of an edit or, where a repository holds none, of its plain LoRA adapter.

    Raises:
        FileNotFoundError: As in `find_folder`, and so are the others.
    """
    try:
        return find_folder(model_id, **download)
    except RemoteEntryNotFoundError:
        with suppress(RemoteEntryNotFoundError), _telling_of_cut_connections():
            folder = Path(hf_hub_download(str(model_id), ADAPTER_CONFIG, **_arguments(download))).parent
            _download_beside(folder, str(model_id), [ADAPTER_WEIGHTS], download)
            return folder
        raise


def _download_beside(folder: Path, repo_id: str, names: Sequence[str], download: DownloadOptions) -> None:
    """Download the files that go with one that is in the cache, of the same commit."""
    parts = Path(download.get("subfolder") or "").parts
    # The cache keeps files in folders called after their commit.
    pinned: DownloadOptions = {**download, "revision": folder.parents[len(parts) - 1].name if parts else folder.name}
    for name in names:
        hf_hub_download(repo_id, name, **_arguments(pinned))


def find_golden_layers(repo_id: str, **download: Unpack[DownloadOptions]) -> Path:
    """Return the local copy of a repository's golden layers.

    Raises:
        FileNotFoundError: `repo_id` cannot be the name of a repository.
        huggingface_hub.errors.HfHubHTTPError: There is no such repository or file, or it may not be read.
    """
    _check_repo_id(repo_id)
    with _telling_of_cut_connections():
        return Path(hf_hub_download(repo_id, GOLDEN_LAYERS, **_arguments(download)))


def cached_commit(repo_id: str) -> str | None:
    """Return the commit of a model in the cache: None unless there is one commit only, as nothing says which it was."""
    if not is_repo_id(repo_id):
        return None
    folder = f"models--{repo_id.replace('/', '--')}"  # as huggingface_hub documents its cache
    snapshots = Path(constants.HF_HUB_CACHE, folder, "snapshots")
    commits = [path.parent.name for path in snapshots.glob("*/config.json")]
    return commits[0] if len(commits) == 1 else None


def is_on_hub(base_model: BaseModel) -> bool:
    """Tell whether a base model is called by what can be its name on the Hub."""
    name = base_model.name_or_path
    return is_repo_id(name) and name != base_model.architecture  # which models without a name are called by


def is_repo_id(name: str) -> bool:
    """Tell whether a model's name can be that of a repository, and is not a folder here."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return bool(name) and not Path(name).exists()


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise FileNotFoundError(f"There is no folder {repo_id}, and it is no name on the Hub.") from error


@contextmanager
def _telling_of_cut_connections() -> Iterator[None]:
    """Raise what is Python's own for the errors of the HTTP client, of which huggingface_hub has no classes."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(f"The Hub cannot be reached: {error}") from error


def _arguments(download: DownloadOptions) -> dict[str, Any]:
    return {name: value for name, value in download.items() if value is not None}
