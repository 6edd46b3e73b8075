"""Read an edit folder from an untrusted source: damaged or inconsistent files raise an error that names the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from goldenedit import platforms
from goldenedit.config import EditConfig
from goldenedit.editors.delta import LowRankDelta
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EDIT_CONFIG,
    EDIT_STATE,
    EDITS,
    FORMAT_VERSION,
    PREFIX,
    BaseModel,
    Beside,
    Edit,
    EditedFact,
    EditFolder,
    EditFolderError,
    adapter_config,
    finish_saving,
    fuse,
    is_edit_name,
    sidecar_digest,
)
from goldenedit.storage.measured import checked_evaluation

_REQUIRED = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS}
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_RANK = 64  # in multiples of the smaller side of a matrix: far more than edits have, but not enough to fill memory


def read_edit_folder(folder: Path) -> EditFolder:
    """Read an edit folder; an interrupted save into it is finished first.

    Raises:
        EditFolderError: A file is missing or damaged, the format has another version, a factor is not finite, or the
            files do not belong together.
    """
    finish_saving(folder)
    version = _version(folder)
    try:
        return _read_whole(folder)
    except EditFolderError:
        finish_saving(folder)
        if _version(folder) == version:
            raise
        return _read_whole(folder)  # another process saved while the folder was read


def _version(folder: Path) -> tuple[int, int] | None:
    """Return the inode and time of `edit_config.json`, which change with each save; None if it cannot be read."""
    try:
        status = (folder / EDIT_CONFIG).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_whole(folder: Path) -> EditFolder:
    sidecar = _read_sidecar(folder)
    files = sidecar["files"]
    if (folder / EDIT_STATE).is_file() and EDIT_STATE not in files:
        raise EditFolderError(f"{folder / EDIT_STATE} does not belong to this edit: {EDIT_CONFIG} does not list it.")
    data = {name: _read(folder / name) for name in files}
    for (
        name,
        digest,
    ) in files.items():  # each file is read only once, so the bytes checked here are the bytes parsed below
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise EditFolderError(
                f"{folder / name} is not the file that was saved with {EDIT_CONFIG}: its digest differs. A save, copy "
                "or download was interrupted, or the file was changed. Save or download the edit again."
            )
    lora = _parse_json(folder / ADAPTER_CONFIG, data[ADAPTER_CONFIG])
    facts = _parse_json(folder / EDITS, data[EDITS])
    tensors = _parse_tensors(folder / ADAPTER_WEIGHTS, data[ADAPTER_WEIGHTS])
    state = _parse_tensors(folder / EDIT_STATE, data[EDIT_STATE]) if EDIT_STATE in files else {}
    modules = _read_factors(folder / ADAPTER_WEIGHTS, tensors, lora)
    try:
        by_name = _facts_by_name(facts)
        if [record["name"] for record in sidecar["edits"]] != list(by_name):
            raise ValueError(f"{EDIT_CONFIG} and {EDITS} list different edits")
        content = EditFolder(
            edits=_read_edits(sidecar, by_name, modules, state, lora),
            config=EditConfig.read(sidecar["config"]),
            base_model=_checked_base(BaseModel(**sidecar["base_model"])),
            proxy_hash=sidecar["proxy_hash"],
            evaluation=checked_evaluation(sidecar["evaluation"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EditFolderError(
            f"{folder / EDIT_CONFIG} is invalid or does not match the other files ({type(error).__name__}: {error})."
        ) from error
    _check_adapter(folder, lora, modules, content)
    return content


def _facts_by_name(records: Sequence[Mapping[str, Any]]) -> dict[str, list[EditedFact]]:
    if not records or len({record["name"] for record in records}) != len(records):
        raise ValueError(f"{EDITS} has no edits, or two edits with the same name")
    if empty := [record["name"] for record in records if not record["facts"]]:
        raise ValueError(f"{EDITS} has no facts for edit {empty[0]!r}")
    return {record["name"]: [EditedFact.from_dict(fact) for fact in record["facts"]] for record in records}


def _check_adapter(
    folder: Path, lora: Mapping[str, Any], modules: Mapping[str, LowRankDelta], content: EditFolder
) -> None:
    """Raise EditFolderError unless the LoRA adapter equals the sum of the edits."""
    edits = content.edits
    if not isinstance(lora["fan_in_fan_out"], bool) or lora != adapter_config(edits, content.base_model):
        raise EditFolderError(f"{folder / ADAPTER_CONFIG} contradicts {EDIT_CONFIG}.")
    fused = fuse(edits)[1]
    for path, delta in modules.items():
        if not (torch.equal(fused[path].A, delta.A) and torch.equal(fused[path].B, delta.B)):
            raise EditFolderError(
                f"{folder / ADAPTER_WEIGHTS} changes {path} by something else than the edits in {EDIT_CONFIG}."
            )


def _checked_base(base: BaseModel) -> BaseModel:
    if not all(isinstance(text, str) for text in (base.name_or_path, base.fingerprint, base.architecture)):
        raise ValueError(f"name_or_path, fingerprint and architecture of {base} must be strings")
    for name in ("revision", "signs", "dtype"):
        if not isinstance(getattr(base, name), str | None):
            raise ValueError(f"the base model's {name} must be a string or null, got {getattr(base, name)!r}")
    return base


def listed_files(folder: Path) -> list[str]:
    """Return the names of the other files that `edit_config.json` lists.

    Raises:
        EditFolderError: `edit_config.json` does not exist, is damaged, or has another format version.
    """
    return sorted(_read_sidecar(folder)["files"])


def saved_card_digest(folder: Path) -> tuple[bool, str | None]:
    """Return whether `edit_config.json` has an entry for the rendered card, and its digest.

    Folders of older versions have no entry. The digest is None if the card was not rendered.

    Raises:
        EditFolderError: As in `listed_files`, or an interrupted save cannot be finished.
    """
    finish_saving(folder)
    sidecar = _read_sidecar(folder)
    return "card" in sidecar, sidecar.get("card")


def _read_sidecar(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise EditFolderError(f"The edit folder {folder} does not exist.")
    path = folder / EDIT_CONFIG
    if not path.is_file():
        hint = " It contains a plain adapter: load it with PeftModel." if (folder / ADAPTER_CONFIG).is_file() else ""
        raise EditFolderError(f"{folder} is not an edit folder: it has no {EDIT_CONFIG}.{hint}")
    sidecar = _parse_json(path, _read(path))
    version = sidecar.get("format_version") if isinstance(sidecar, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise EditFolderError(
            f"{path} has format version {version!r}, but this version of goldenedit reads version {FORMAT_VERSION}. "
            "Install the version of goldenedit that saved it, or make the edit again."
        )
    if sidecar.get("digest") != sidecar_digest(sidecar):
        raise EditFolderError(
            f"{path} was changed or damaged after it was saved: its digest does not match its content."
        )
    files = sidecar.get("files")
    if not isinstance(files, dict) or not _REQUIRED <= set(files) <= {*_REQUIRED, EDIT_STATE}:
        raise EditFolderError(f"{path} is damaged: it lists unexpected files, {files!r}.")
    return sidecar


def _read(path: Path) -> bytes:
    """Return a file's bytes; a memory map would change when the file changes."""
    if not path.is_file():  # reading a pipe or a device may never end
        raise EditFolderError(f"{path} is missing, or is not a regular file.")
    try:
        return platforms.HERE.patiently(path.read_bytes)
    except OSError as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _read_edits(
    sidecar: Mapping[str, Any],
    facts: Mapping[str, list[EditedFact]],
    modules: Mapping[str, LowRankDelta],
    state: dict[str, Tensor],
    lora: Mapping[str, Any],
) -> list[Edit]:
    """Separate the edits that share an adapter, each with its range of ranks and its state."""
    edits = []
    used_ranks = 0
    for record in sidecar["edits"]:
        if not is_edit_name(record["name"]):
            raise ValueError(f"{record['name']!r} cannot name an edit")
        start, stop = record["ranks"]
        if start != used_ranks or stop <= start or not record["modules"]:
            raise ValueError(f"the ranks of edit {record['name']!r} are empty, or overlap or leave a gap")
        deltas = {path: modules[path].part(start, stop) for path in record["modules"]}
        prefix = f"{record['name']}/"
        edit_state = {name.removeprefix(prefix): state.pop(name) for name in sorted(state) if name.startswith(prefix)}
        for name, tensor in edit_state.items():
            if tensor.ndim != 2 or tensor.dtype not in _DTYPES or not tensor.isfinite().all():
                raise ValueError(f"{EDIT_STATE} has an invalid tensor {name!r} for {record['name']!r}")
        error = record["relative_error"]
        if not isinstance(error, int | float) or not 0 <= error <= 1:
            raise ValueError(f"the relative error of {record['name']!r} must be between 0 and 1, got {error!r}")
        # In older files, an edit has one config, which gives its layers.
        differences = record["configs"] if "configs" in record else [record["config"]]
        configs = [EditConfig.read({**sidecar["config"], **difference}) for difference in differences]
        layers = record.get("layers", sorted({layer for config in configs for layer in config.target_layers}))
        if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
            raise ValueError(f"the layers of {record['name']!r} must be layer indices, got {layers!r}")
        edits.append(
            Edit(
                name=record["name"],
                facts=facts[record["name"]],
                deltas=deltas,
                layers=tuple(layers),
                fan_in_fan_out=lora["fan_in_fan_out"],
                by_parameter="target_parameters" in lora,
                state=edit_state,
                relative_error=error,
                contexts_hash=record["contexts_hash"],
                configs=tuple(configs),
                # None if all edits have the same versions. Older files have no versions per edit.
                versions=_checked_texts(sidecar["versions"] if record.get("versions") is None else record["versions"]),
                beside=tuple(Beside(**_checked_texts(entry)) for entry in record.get("beside", ())),
            )
        )
        used_ranks = stop
    if used_ranks != lora["r"]:
        raise ValueError(f"{lora['r'] - used_ranks} ranks of the adapter do not belong to an edit")
    if state:
        raise ValueError(f"{EDIT_STATE} has tensors that do not belong to an edit: {sorted(state)[:3]}")
    return edits


def _checked_texts(record: Mapping[str, Any]) -> dict[str, str]:
    if invalid := [name for name, value in record.items() if not isinstance(value, str)]:
        raise ValueError(f"{invalid[0]} must be a string, got {record[invalid[0]]!r}")
    return dict(record)


def is_plain_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter that is not an edit."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / EDIT_CONFIG).is_file()


def _parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _read_factors(path: Path, tensors: Mapping[str, Tensor], lora: Any) -> dict[str, LowRankDelta]:
    config = path.with_name(ADAPTER_CONFIG)
    try:
        rank, alpha, targets = lora["r"], lora["lora_alpha"], list(lora["target_modules"])
        parameters = [weight.rpartition(".") for weight in lora.get("target_parameters", [])]
    except (TypeError, KeyError, AttributeError) as error:
        raise EditFolderError(f"{config} is damaged ({type(error).__name__}: {error}).") from error
    paths = [*targets, *("".join(parameter) for parameter in parameters)]
    if invalid := [path for path in paths if not isinstance(path, str) or not _MODULE_PATH.fullmatch(path)]:
        raise EditFolderError(f"{config} has an invalid module path: {invalid[0]!r}.")
    if alpha != rank:
        raise EditFolderError(f"{config} scales the edit: lora_alpha must equal r, got {alpha} and {rank}.")
    modules = {}
    expected = set()
    for target, parameter in [*((target, "") for target in targets), *((owner, name) for owner, _, name in parameters)]:
        names = [f"{PREFIX}{target}.lora_{factor}.weight" for factor in "AB"]
        expected |= set(names)
        try:
            A, B = (tensors[name] for name in names)
            if invalid_dtypes := [str(factor.dtype) for factor in (A, B) if factor.dtype not in _DTYPES]:
                raise ValueError(f"their dtype is {invalid_dtypes[0]}")
            # Only a fused parameter has more rows in A than ranks; its delta is stored under the parameter's own name.
            delta = LowRankDelta.from_stored(A, B, rank) if parameter and len(A) != rank else LowRankDelta(A, B)
        except (KeyError, ValueError, TypeError) as error:
            raise EditFolderError(f"{path} has missing or invalid factors for {target}: {error}") from error
        if problem := _problem(delta, rank):
            raise EditFolderError(f"{path}: the factors of {target} {problem}.")
        modules[f"{target}.{parameter}" if delta.experts > 1 else target] = delta
    if extra := sorted(set(tensors) - expected):
        raise EditFolderError(f"{path} has tensors that do not belong to an edit: {extra[:3]}.")
    return modules


def _problem(delta: LowRankDelta, rank: int) -> str | None:
    """Return what is wrong with the factors of a module, or None if they are valid."""
    if delta.rank != rank:
        return f"have rank {delta.rank} instead of {rank}"
    if not 0 < rank <= _MAX_RANK * min(delta.A.shape[1], delta.B.shape[0]):
        return f"have rank {rank}, which is invalid for a matrix of {delta.B.shape[0]} x {delta.A.shape[1]}"
    if not (delta.A.isfinite().all() and delta.B.isfinite().all()):
        return "are not finite"
    return None


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        content = json.loads(data.decode(), parse_constant=_refuse_constant)
        json.dumps(content, ensure_ascii=False).encode()  # raises ValueError for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON")
