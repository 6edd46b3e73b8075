"""Read an edit folder that anyone may have written: what is damaged, or fits nothing, is refused by its file's name."""

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

_NEEDED = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS}
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_RANKS = 64  # in units of the smaller side of a matrix: far more than edits have, and too few to fill the memory


def read_edit_folder(folder: Path) -> EditFolder:
    """Read an edit folder; a save into it that was interrupted is finished first.

    Raises:
        EditFolderError: A file is missing or damaged, the format is of another version, a factor is not finite, or the
            files do not fit together.
    """
    finish_saving(folder)
    before = _version(folder)
    try:
        return _read_whole(folder)
    except EditFolderError:
        finish_saving(folder)
        if _version(folder) == before:
            raise
        return _read_whole(folder)  # somebody saved while it was read


def _version(folder: Path) -> tuple[int, int] | None:
    """Return what tells one saved `edit_config.json` from the next."""
    try:
        status = (folder / EDIT_CONFIG).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_whole(folder: Path) -> EditFolder:
    sidecar = _read_sidecar(folder)
    files = sidecar["files"]
    if (folder / EDIT_STATE).is_file() and EDIT_STATE not in files:
        raise EditFolderError(f"{folder / EDIT_STATE} is not of this edit: {EDIT_CONFIG} does not list it.")
    data = {name: _read(folder / name) for name in files}
    for name, digest in files.items():  # what is parsed below is what is checked here: no file is read twice
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise EditFolderError(
                f"{folder / name} is not the file that was saved with {EDIT_CONFIG}: their digests differ. A "
                "save, copy or download was interrupted, or the file was changed: save or download the edit again."
            )
    lora = _parse_json(folder / ADAPTER_CONFIG, data[ADAPTER_CONFIG])
    facts = _parse_json(folder / EDITS, data[EDITS])
    tensors = _parse_tensors(folder / ADAPTER_WEIGHTS, data[ADAPTER_WEIGHTS])
    state = _parse_tensors(folder / EDIT_STATE, data[EDIT_STATE]) if EDIT_STATE in files else {}
    modules = _read_factors(folder / ADAPTER_WEIGHTS, tensors, lora)
    try:
        by_name = _facts_by_name(facts)
        if [record["name"] for record in sidecar["edits"]] != list(by_name):
            raise ValueError(f"{EDIT_CONFIG} and {EDITS} name different edits")
        edits = _read_edits(sidecar, by_name, modules, state, lora)
        content = EditFolder(
            edits,
            EditConfig.read(sidecar["config"]),
            _checked_base(BaseModel(**sidecar["base_model"])),
            sidecar["proxy_hash"],
            _checked_evaluation(sidecar["evaluation"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EditFolderError(
            f"{folder / EDIT_CONFIG} does not fit the files beside it ({type(error).__name__}: {error})."
        ) from error
    _check_adapter(folder, lora, modules, content)
    return content


def _facts_by_name(records: Sequence[Mapping[str, Any]]) -> dict[str, list[EditedFact]]:
    if not records or len({record["name"] for record in records}) != len(records):
        raise ValueError(f"{EDITS} holds no edits, or two of one name")
    if empty := [record["name"] for record in records if not record["facts"]]:
        raise ValueError(f"{EDITS} holds no fact of edit {empty[0]!r}")
    return {record["name"]: [EditedFact.from_dict(fact) for fact in record["facts"]] for record in records}


def _check_adapter(
    folder: Path, lora: Mapping[str, Any], modules: Mapping[str, LowRankDelta], content: EditFolder
) -> None:
    """Raise EditFolderError unless the adapter that others load is the sum of the edits."""
    edits = content.edits
    if not isinstance(lora["fan_in_fan_out"], bool) or lora != adapter_config(edits, content.base_model):
        raise EditFolderError(f"{folder / ADAPTER_CONFIG} says other things than {EDIT_CONFIG} of the same adapter.")
    fused = fuse(edits)[1]
    for path, delta in modules.items():
        if not (torch.equal(fused[path].A, delta.A) and torch.equal(fused[path].B, delta.B)):
            raise EditFolderError(
                f"{folder / ADAPTER_WEIGHTS} changes {path} by more than {EDIT_CONFIG} has edits for."
            )


def _checked_base(base: BaseModel) -> BaseModel:
    if not all(isinstance(text, str) for text in (base.name_or_path, base.fingerprint, base.architecture)):
        raise ValueError(f"the base model {base} is not named by texts")
    for name in ("revision", "signs", "dtype"):
        if not isinstance(getattr(base, name), str | None):
            raise ValueError(f"the base model's {name} is {getattr(base, name)!r}")
    return base


def _checked_evaluation(found: Any) -> dict[str, Any] | None:
    """Return what was measured of the edits; raise KeyError, TypeError or ValueError where a card could not say it."""
    if found is None:
        return None
    for family, scores in found["edited"].items():
        numbers = [scores["n"], *(scores[name] for name in scores["intervals"])]
        numbers += [bound for low, high in scores["intervals"].values() for bound in (low, high)]
        numbers += [found["base"][family][name] for name in scores["intervals"]]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"evaluation of {family!r} is not made of numbers")
    if not isinstance(found["facts"], int) or not isinstance(found["own_facts"], bool):
        raise ValueError("evaluation does not say of which facts it is")
    return dict(found)


def listed_files(folder: Path) -> list[str]:
    """Return the names of the files that an edit folder's `edit_config.json` goes with.

    Raises:
        EditFolderError: There is no such file, or it is damaged or of another version.
    """
    return sorted(_read_sidecar(folder)["files"])


def _read_sidecar(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise EditFolderError(f"There is no edit folder {folder}.")
    path = folder / EDIT_CONFIG
    if not path.is_file():
        hint = " It holds a plain adapter: load it with PeftModel." if (folder / ADAPTER_CONFIG).is_file() else ""
        raise EditFolderError(f"{folder} is not an edit folder: it has no {EDIT_CONFIG}.{hint}")
    sidecar = _parse_json(path, _read(path))
    version = sidecar.get("format_version") if isinstance(sidecar, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise EditFolderError(
            f"{path} is of format version {version!r}; this goldenedit reads version {FORMAT_VERSION}."
        )
    if sidecar.get("digest") != sidecar_digest(sidecar):
        raise EditFolderError(f"{path} is not the file that was saved: its digest is not that of what it says.")
    files = sidecar.get("files")
    if not isinstance(files, dict) or not _NEEDED <= set(files) <= {*_NEEDED, EDIT_STATE}:
        raise EditFolderError(f"{path} is damaged: it lists the files {files!r}.")
    return sidecar


def _read(path: Path) -> bytes:
    """Return a file's bytes; not its map in memory, which changes with the file."""
    if not path.is_file():  # a pipe or a device has no end
        raise EditFolderError(f"{path} is missing, or no plain file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _read_edits(
    sidecar: Mapping[str, Any],
    facts: Mapping[str, list[EditedFact]],
    modules: Mapping[str, LowRankDelta],
    state: dict[str, Tensor],
    lora: Mapping[str, Any],
) -> list[Edit]:
    """Take the edits apart that share an adapter, each with its range of ranks and what its editor remembers."""
    edits = []
    used = 0
    for record in sidecar["edits"]:
        if not is_edit_name(record["name"]):
            raise ValueError(f"{record['name']!r} cannot name an edit")
        start, stop = record["ranks"]
        if start != used or stop <= start or not record["modules"]:
            raise ValueError(f"edit {record['name']!r} has no ranks of its own")
        deltas = {path: modules[path].part(start, stop) for path in record["modules"]}
        prefix = f"{record['name']}/"
        own = {name.removeprefix(prefix): state.pop(name) for name in sorted(state) if name.startswith(prefix)}
        for name, held in own.items():
            if held.ndim != 2 or held.dtype not in _DTYPES or not held.isfinite().all():
                raise ValueError(f"{EDIT_STATE} holds no state of {record['name']!r} under {name!r}")
        error, contexts = record["relative_error"], record["contexts_hash"]
        if not isinstance(error, int | float) or not 0 <= error <= 1:
            raise ValueError(f"the relative error of {record['name']!r} is {error!r}")
        # Before there were several, an edit had one config, and its layers were those.
        ways = record["configs"] if "configs" in record else [record["config"]]
        configs = [EditConfig.read({**sidecar["config"], **way}) for way in ways]
        layers = record.get("layers", sorted({layer for config in configs for layer in config.target_layers}))
        if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
            raise ValueError(f"the layers of {record['name']!r} are {layers!r}")
        edits.append(
            Edit(
                record["name"],
                facts[record["name"]],
                deltas,
                layers=tuple(layers),
                fan_in_fan_out=lora["fan_in_fan_out"],
                by_parameter="target_parameters" in lora,
                state=own,
                relative_error=error,
                contexts_hash=contexts,
                configs=tuple(configs),
                # None where all edits are of the same ones, as they were before edits had their own.
                versions=_checked_texts(sidecar["versions"] if record.get("versions") is None else record["versions"]),
                beside=tuple(Beside(**_checked_texts(entry)) for entry in record.get("beside", ())),
            )
        )
        used = stop
    if used != lora["r"]:
        raise ValueError(f"{lora['r'] - used} ranks of the adapter belong to no edit")
    if state:
        raise ValueError(f"{EDIT_STATE} holds what belongs to no edit: {sorted(state)[:3]}")
    return edits


def _checked_texts(record: Mapping[str, Any]) -> dict[str, str]:
    if wrong := [name for name, value in record.items() if not isinstance(value, str)]:
        raise ValueError(f"{wrong[0]} is {record[wrong[0]]!r}, which is no text")
    return dict(record)


def is_plain_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter that is no edit."""
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
    named = [*targets, *("".join(parameter) for parameter in parameters)]
    if wrong := [target for target in named if not isinstance(target, str) or not _MODULE_PATH.fullmatch(target)]:
        raise EditFolderError(f"{config} names what can be no module: {wrong[0]!r}.")
    if alpha != rank:
        raise EditFolderError(f"{config} scales the edit: lora_alpha {alpha} is not r {rank}.")
    modules = {}
    expected = set()
    for target, parameter in [*((target, "") for target in targets), *((owner, name) for owner, _, name in parameters)]:
        names = [f"{PREFIX}{target}.lora_{factor}.weight" for factor in "AB"]
        expected |= set(names)
        try:
            A, B = (tensors[name] for name in names)
            if wrong_dtypes := [str(factor.dtype) for factor in (A, B) if factor.dtype not in _DTYPES]:
                raise ValueError(f"they are of {wrong_dtypes[0]}")
            # Only a fused parameter has more factors than ranks; it is called by its own name.
            delta = LowRankDelta.from_stored(A, B, rank) if parameter and len(A) != rank else LowRankDelta(A, B)
        except (KeyError, ValueError, TypeError) as error:
            raise EditFolderError(f"{path} does not hold the factors of {target}: {error}") from error
        if problem := _problem(delta, rank):
            raise EditFolderError(f"{path}: the factors of {target} {problem}.")
        modules[f"{target}.{parameter}" if delta.experts > 1 else target] = delta
    if extra := sorted(set(tensors) - expected):
        raise EditFolderError(f"{path} holds tensors that belong to no edit: {extra[:3]}.")
    return modules


def _problem(delta: LowRankDelta, rank: int) -> str | None:
    """Return what is wrong with the factors of a module, if anything."""
    if delta.rank != rank:
        return f"have rank {delta.rank}, not {rank}"
    if not 0 < rank <= _MOST_RANKS * min(delta.A.shape[1], delta.B.shape[0]):
        return f"have rank {rank}, which is no edit's for a matrix of {delta.B.shape[0]} x {delta.A.shape[1]}"
    if not (delta.A.isfinite().all() and delta.B.isfinite().all()):
        return "are not finite"
    return None


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
