"""The one place that talks to the Hub: it uploads folders in one commit, and downloads edits and golden layers."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelInfo, constants, hf_hub_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError  # type: ignore[import-untyped]

from goldenedit.packaged import packaged_name
from goldenedit.registry import meant
from goldenedit.storage.atlas import (
    GOLDEN_LAYERS,
    GoldenLayers,
    dump_golden_layers,
    read_golden_layers,
    with_record,
)
from goldenedit.storage.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, EDIT_CONFIG, BaseModel
from goldenedit.storage.reading import listed_files

logger = logging.getLogger(__name__)

TERMS = ("license", "license_name", "license_link", "datasets", "language")  # of a base model, for cards of its edits
TAG = "goldenedit"  # on the card of every edit, so that edits can be found


class DownloadOptions(TypedDict, total=False):
    """Options of a download, with the names that transformers uses."""

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


def make_repo(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a model repository if it does not exist, and return its full name, `owner/name`."""
    with _raising_connection_errors():
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def root_files(repo_id: str, suffixes: Sequence[str], revision: str | None, token: str | bool | None) -> list[str]:
    """Return the names of a repository's files that end with one of `suffixes` and are not in a folder."""
    with _raising_connection_errors(), suppress(RevisionNotFoundError):  # the branch does not exist yet
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
    """Upload a folder in one commit to an existing repository. Unchanged files are not uploaded again.

    Args:
        files: Names of the files to upload; None for all.
        stale: Names of files to delete from the repository if the folder does not have them; by default, the names in
            `files`.
        revision: Branch to commit to, created if it does not exist.
        parent_commit: The commit that must be the last one of the branch; otherwise the Hub rejects the upload.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request.
        ConnectionError: The Hub cannot be reached.
    """
    api = HfApi(token=token)
    with _raising_connection_errors():
        make_branch(repo_id, None if create_pr else revision, token)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=None if files is None else list(files),
            delete_patterns=list(files or ()) if stale is None else list(stale),  # uploaded files are not deleted
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            parent_commit=parent_commit,
        )


def make_branch(repo_id: str, revision: str | None, token: str | bool | None = None) -> None:
    """Create a branch if it does not exist; nothing is done for the reference of a pull request."""
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
    """Add new records to the golden layers of a repository, which is created if it does not exist.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request, or someone else pushed at the same time.
        GoldenLayersError: The repository's file of golden layers is damaged, or has another format.
    """
    repo_id = make_repo(repo_id, private, token)
    records: list[GoldenLayers] = []
    with _raising_connection_errors():
        make_branch(repo_id, None if create_pr else revision, token)
        parent = HfApi(token=token).repo_info(repo_id, revision=revision).sha
    with suppress(RemoteEntryNotFoundError):
        records = read_golden_layers(find_golden_layers(repo_id, revision=parent, token=token, force_download=True))
    for record in new:
        records = with_record(records, record)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / GOLDEN_LAYERS).write_text(dump_golden_layers(records), encoding="utf-8", newline="\n")
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
    """Return the local folder of an edit: `model_id` itself, or a Hub repository downloaded to the cache.

    All files come from one commit, also if someone pushes during the download.

    Raises:
        FileNotFoundError: `model_id` is not a folder and not a valid name of a repository.
        NotADirectoryError: It is a file.
        ValueError: `subfolder` is absolute or leads out of the folder.
        TypeError: An option is unknown.
        huggingface_hub.errors.HfHubHTTPError: The repository, revision or file does not exist or may not be read.
        huggingface_hub.errors.LocalEntryNotFoundError: The Hub cannot be reached, and the cache has no copy.
        ConnectionError: The connection was lost.
    """
    if unknown := sorted(set(download) - set(DownloadOptions.__annotations__)):
        raise TypeError(f"Unknown arguments {unknown}. Valid options are {sorted(DownloadOptions.__annotations__)}.")
    subfolders = Path(download.get("subfolder") or "").parts
    if Path(*subfolders).anchor or ".." in subfolders:
        raise ValueError(
            f"subfolder {download.get('subfolder')!r} leads out of the edit's folder. Give a path inside it."
        )
    if Path(model_id).is_dir():
        return Path(model_id, *subfolders)
    if Path(model_id).is_file():
        raise NotADirectoryError(f"{model_id} is a file. An edit is a folder: name the one that the file is in.")
    download = {**download, "subfolder": "/".join(subfolders) or None}
    _check_repo_id(str(model_id))
    with _raising_connection_errors(), _telling_of_folder(str(model_id)):
        folder = Path(hf_hub_download(str(model_id), EDIT_CONFIG, **_arguments(download))).parent
        _download_beside(folder, str(model_id), listed_files(folder), download)
    return folder


def find_adapter(model_id: str | Path, **download: Unpack[DownloadOptions]) -> Path:
    """Return the local folder of an edit or, if the repository has no edit, of its plain LoRA adapter.

    Raises:
        FileNotFoundError: `model_id` is not a folder and not a valid name of a repository. For other errors, see
            `find_folder`.
    """
    try:
        return find_folder(model_id, **download)
    except RemoteEntryNotFoundError:
        with suppress(RemoteEntryNotFoundError), _raising_connection_errors():
            folder = Path(hf_hub_download(str(model_id), ADAPTER_CONFIG, **_arguments(download))).parent
            _download_beside(folder, str(model_id), [ADAPTER_WEIGHTS], download)
            return folder
        raise


def _download_beside(folder: Path, repo_id: str, names: Sequence[str], download: DownloadOptions) -> None:
    """Download more files to a folder in the cache, from the same commit as the files in it."""
    depth = len(Path(download.get("subfolder") or "").parts)
    commit = folder.parents[depth - 1].name if depth else folder.name  # the cache names folders after commits
    pinned: DownloadOptions = {**download, "revision": commit}
    for name in names:
        hf_hub_download(repo_id, name, **_arguments(pinned))


def find_golden_layers(repo_id: str, **download: Unpack[DownloadOptions]) -> Path:
    """Return the local copy of a repository's golden layers.

    Raises:
        FileNotFoundError: `repo_id` is not a valid name of a repository.
        huggingface_hub.errors.HfHubHTTPError: The repository or file does not exist or may not be read.
        ConnectionError: The connection was lost.
    """
    _check_repo_id(repo_id)
    with _raising_connection_errors():
        return Path(hf_hub_download(repo_id, GOLDEN_LAYERS, **_arguments(download)))


def search_edits(
    query: str | None = None, base_model: str | None = None, limit: int = 20, token: str | bool | None = None
) -> list[ModelInfo]:
    """Return repositories of edits on the Hub, those that are downloaded most first.

    Args:
        query: A part of their names.
        base_model: Name of the model that they edit.
        limit: Largest number of repositories.
        token: Token of the user, whose private repositories count.

    Raises:
        ConnectionError: The Hub cannot be reached.
    """
    filters = [TAG] if base_model is None else [TAG, f"base_model:{base_model}"]
    with _raising_connection_errors():
        found = HfApi(token=token).list_models(filter=filters, search=query, sort="downloads", limit=limit)
        return list(found)


def cached_commit(repo_id: str) -> str | None:
    """Return the commit of a model in the cache, or None if the cache has no commit or several of them.

    With several commits, nothing records which one was loaded.
    """
    if not is_repo_id(repo_id):
        return None
    folder = f"models--{repo_id.replace('/', '--')}"  # the cache layout that huggingface_hub documents
    snapshots = Path(constants.HF_HUB_CACHE, folder, "snapshots")
    commits = [path.parent.name for path in snapshots.glob("*/config.json")]
    return commits[0] if len(commits) == 1 else None


def terms_of(base_model: BaseModel, token: str | bool | None = None) -> dict[str, Any]:
    """Return what the card of a base model says about its licence, data and languages; nothing if it is not known.

    An edit is bound by the licence of its base model, so its card repeats these entries.
    """
    if not is_on_hub(base_model):
        return {}
    try:
        path = hf_hub_download(base_model.name_or_path, CARD, revision=base_model.revision, token=token)
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, YAMLError) as error:
        logger.info("The licence of %s is not known: %s", base_model.name_or_path, error)
        return {}
    return {name: data[name] for name in TERMS if data.get(name)}


def is_on_hub(base_model: BaseModel) -> bool:
    """Return whether a base model's name can be the name of a repository on the Hub."""
    name = base_model.name_or_path
    return is_repo_id(name) and name != base_model.architecture  # models without a name are called by their class


def public_name(base_model: BaseModel) -> str:
    """Return a base model's name for others: on the Hub, that of a packaged model, or the last part of a local path."""
    if is_on_hub(base_model):
        return base_model.name_or_path
    return packaged_name(base_model.fingerprint) or last_part(base_model.name_or_path)


def last_part(path: str) -> str:
    """Return the last part of a path of any operating system, or of a repository's name."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def is_repo_id(name: str) -> bool:
    """Return whether a model's name is a valid name of a repository, and not a local folder."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return bool(name) and name.isascii() and not Path(name).exists()  # huggingface_hub 1 lets all letters pass


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise FileNotFoundError(
            f"{repo_id} is not a local folder, and not a valid name of a repository on the Hub.{_meant_folder(repo_id)}"
        ) from error


@contextmanager
def _raising_connection_errors() -> Iterator[None]:
    """Raise a ConnectionError for errors of the HTTP client, which huggingface_hub has no exceptions for."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(f"The Hub cannot be reached: {error}") from error


@contextmanager
def _telling_of_folder(name: str) -> Iterator[None]:
    """Add to errors of the Hub that there is no folder of this name either, and which edit may be meant."""
    try:
        yield
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        error.args = (f"There is no folder {name!r} here.{_meant_folder(name)} The Hub: {error}", *error.args[1:])
        raise


def _meant_folder(name: str) -> str:
    """Return a sentence on the edit beside a missing folder that may be meant; or nothing."""
    return meant(name, (str(path.parent) for path in Path(name).parent.glob(f"*/{EDIT_CONFIG}")))


def _arguments(download: DownloadOptions) -> dict[str, Any]:
    return {name: value for name, value in download.items() if value is not None}
