"""The files of an edit folder: a plain LoRA adapter that anyone loads, and a sidecar with what an adapter cannot say.

The one place that knows the format. Several edits share one adapter: each owns a range of its ranks, so that stock PEFT
loads their sum and this library takes them apart again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from goldenedit.config import EditConfig
from goldenedit.editing.delta import LowRankDelta
from goldenedit.requests import EditRequest
from goldenedit.storage.atomic import replacing_folder

FORMAT_VERSION = 2
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EDIT_CONFIG = "edit_config.json"
EDITS = "edits.json"
EDIT_STATE = "edit_state.safetensors"
CARD = "README.md"
EDIT_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDITS, EDIT_STATE, CARD)

_PREFIX = "base_model.model."
_NEEDED = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS}
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TAKEN_NAMES = frozenset(dir(nn.ModuleDict()))  # PEFT keeps adapters by their names in one
_MOST_RANKS = 64  # in units of the smaller side of a matrix: far more than edits have, and too few to fill the memory


T = TypeVar("T")


class EditFolderError(ValueError):
    """A folder that is no edit folder, or a damaged one; the message names the file."""


@dataclass(frozen=True)
class BaseModel:
    """Which model an edit was made on."""

    name_or_path: str
    fingerprint: str
    revision: str | None = None
    architecture: str = ""


@dataclass(frozen=True)
class EditedFact:
    """One fact of an edit and what became of it.

    Attributes:
        request: The fact.
        probability_before: Probability of the new answer before the edit (geometric mean over its tokens).
        probability_after: The same with the edit in place.
        steps: Steps of the value optimisation.
    """

    request: EditRequest
    probability_before: float
    probability_after: float
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON has it."""
        return {
            **self.request.to_dict(),
            "probability_before": self.probability_before,
            "probability_after": self.probability_after,
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditedFact:
        """Read what `to_dict` returned."""
        outcome = {name: record[name] for name in ("probability_before", "probability_after", "steps")}
        if wrong := [name for name, value in outcome.items() if not isinstance(value, int | float)]:
            raise ValueError(f"{wrong[0]} is no number")
        request = {name: value for name, value in record.items() if name not in outcome}
        return cls(EditRequest.from_dict(request), **outcome)


@dataclass(frozen=True)
class Edit:
    """One batch of facts and the change of weights that makes them so.

    Attributes:
        name: Name of the edit and of its adapter.
        facts: The facts.
        deltas: Change of each edited module, by its path in the base model.
        fan_in_fan_out: Whether the edited modules are of the Conv1D kind.
        state: What the editor remembers for later edits, matrices whose columns of several edits are put side by side.
        relative_error: What storing the change as low rank costs, in the Frobenius norm; 0 for most editors.
        contexts_hash: A short name for the sampled prefixes that its keys were averaged over, None where there are
            none: whoever samples the same ones can compute the rows of the edit's factors again.
        config: How it was made; None where edits of different making are one.
    """

    name: str
    facts: list[EditedFact]
    deltas: dict[str, LowRankDelta]
    fan_in_fan_out: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    relative_error: float = 0.0
    contexts_hash: str | None = None
    config: EditConfig | None = None

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(delta.rank for delta in self.deltas.values())

    @property
    def paying_rank(self) -> int:
        """The largest rank that pays, smallest over the modules."""
        return min(delta.paying_rank for delta in self.deltas.values())


@dataclass(frozen=True)
class EditFolder:
    """Everything an edit folder holds.

    Attributes:
        edits: The edits, in the order they were made.
        config: How the model edits that they were saved from; each edit knows how it was made itself.
        base_model: The model they were made on.
        versions: Versions of the libraries that made them.
        proxy_hash: A short name for the facts on which layers were compared.
        evaluation: What `EditModel.evaluate` measured of these edits, as JSON has it; None where nothing was.
    """

    edits: list[Edit]
    config: EditConfig
    base_model: BaseModel
    versions: dict[str, str] = field(default_factory=dict)
    proxy_hash: str | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def configs(self) -> list[EditConfig]:
        """How the edits were made, each way once."""
        ways: list[EditConfig] = []
        for edit in self.edits:
            if (way := edit.config or self.config) not in ways:
                ways.append(way)
        return ways

    @property
    def target_layers(self) -> list[int]:
        """The layers that the edits change, ascending."""
        return sorted({layer for config in self.configs for layer in config.target_layers})


def is_edit_name(name: Any) -> bool:
    """Tell whether a text can name an edit and its adapter: letters, digits, `_`, `-` and spaces."""
    return (
        isinstance(name, str) and name.replace("-", "_").replace(" ", "_").isidentifier() and name not in _TAKEN_NAMES
    )


def fuse(edits: list[Edit]) -> tuple[int, dict[str, LowRankDelta]]:
    """Return the total rank and, per module, the sum of the edits' deltas, each in its own range of ranks.

    All modules get the same rank, padded with zeros: llama.cpp knows one rank for all.
    """
    total = sum(edit.rank for edit in edits)
    modules: dict[str, LowRankDelta] = {}
    offset = 0
    for edit in edits:
        for path, delta in edit.deltas.items():
            padded = delta.padded(total, offset)
            before = modules.get(path)
            modules[path] = padded if before is None else LowRankDelta(before.A + padded.A, before.B + padded.B)
        offset += edit.rank
    return total, modules


def joined(
    name: str, edits: Sequence[Edit], weights: Sequence[float] | None = None, reduce: bool = False
) -> tuple[Edit, float]:
    """Return one edit that does what all of these do together, and the error of cutting its rank.

    Errors are relative to the parts' sizes, not to that of their sum, which may be nothing. The edit's own bounds those
    of the parts and the cut.

    Args:
        weights: What each edit is multiplied by, 1 by default.
        reduce: Cut the rank to the one that pays: the smallest singular values are left out.
    """
    weights = [1.0] * len(edits) if weights is None else weights
    deltas: dict[str, LowRankDelta] = {}
    inherited, sizes = dict.fromkeys(_paths(edits), 0.0), dict.fromkeys(_paths(edits), 0.0)
    for edit, weight in zip(edits, weights, strict=True):
        for path, delta in edit.deltas.items():
            weighed = LowRankDelta(delta.A, delta.B * weight)
            before = deltas.get(path)
            deltas[path] = weighed if before is None else before.beside(weighed)
            sizes[path] += weighed.norm
            inherited[path] += edit.relative_error * weighed.norm
    cut = 0.0
    if reduce:
        rank = min(delta.paying_rank for delta in deltas.values())  # all modules share one rank
        for path, delta in deltas.items():
            deltas[path], error = delta.reduced(rank)
            cut = max(cut, error * delta.norm / sizes[path] if sizes[path] else 0.0)
    error = cut + max(inherited[path] / sizes[path] if sizes[path] else 0.0 for path in deltas)
    facts = [fact for edit in edits for fact in edit.facts]
    state, error = joined_state(edits), min(error, 1.0)
    contexts, config = _common(edit.contexts_hash for edit in edits), _common(edit.config for edit in edits)
    return Edit(name, facts, deltas, edits[0].fan_in_fan_out, state, error, contexts, config), cut


def _common(values: Iterable[T]) -> T | None:
    first, *others = values
    return first if all(other == first for other in others) else None


def _paths(edits: Sequence[Edit]) -> list[str]:
    return [path for edit in edits for path in edit.deltas]


def joined_state(edits: Iterable[Edit]) -> dict[str, Tensor]:
    """Return what the editors of all edits remember."""
    found: dict[str, list[Tensor]] = {}
    for edit in edits:
        for name, tensor in edit.state.items():
            found.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors, 1) for name, tensors in sorted(found.items())}


def adapter_config(edits: list[Edit], base_model: BaseModel) -> dict[str, Any]:
    """Return `adapter_config.json`: what every program that loads LoRA reads, and not one key more."""
    rank, modules = fuse(edits)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model.name_or_path,
        "revision": base_model.revision,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": edits[0].fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def adapter_tensors(modules: Mapping[str, LowRankDelta], prefix: str = _PREFIX) -> dict[str, Tensor]:
    """Return the factors under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, delta in sorted(modules.items()):
        tensors[f"{prefix}{path}.lora_A.weight"] = delta.A.detach().cpu().contiguous()
        tensors[f"{prefix}{path}.lora_B.weight"] = delta.B.detach().cpu().contiguous()
    return tensors


def facts_of(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return the facts of edits as `edits.json` has them."""
    return [{"name": edit.name, "facts": [fact.to_dict() for fact in edit.facts]} for edit in edits]


def write_edit_folder(folder: Path, content: EditFolder, card: str) -> None:
    """Write an edit folder in one step: a crash, or a full disk, leaves what was there."""
    offset = 0
    index = []
    config = _config_record(content.config)
    for edit in content.edits:
        modules = sorted(edit.deltas)
        own = config if edit.config is None else _config_record(edit.config)
        ranks = [offset, offset + edit.rank]
        index.append(
            {
                "name": edit.name,
                "ranks": ranks,
                "modules": modules,
                "relative_error": edit.relative_error,
                "contexts_hash": edit.contexts_hash,
                "config": {name: value for name, value in own.items() if value != config[name]},
            }
        )
        offset += edit.rank
    files = {
        ADAPTER_WEIGHTS: save(adapter_tensors(fuse(content.edits)[1]), {"format": "pt"}),
        ADAPTER_CONFIG: _json(adapter_config(content.edits, content.base_model)),
        EDITS: _json(facts_of(content.edits)),
    }
    state = {f"{edit.name}/{name}": held.contiguous() for edit in content.edits for name, held in edit.state.items()}
    if state:
        files[EDIT_STATE] = save(state, {"format": "pt"})
    sidecar = {
        "format_version": FORMAT_VERSION,
        "base_model": vars(content.base_model),
        "edits": index,
        "config": config,
        "proxy_hash": content.proxy_hash,
        "evaluation": content.evaluation,
        "versions": content.versions,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    sidecar["digest"] = _sidecar_digest(sidecar)
    files |= {EDIT_CONFIG: _json(sidecar), CARD: card.encode()}
    with replacing_folder(folder, but=EDIT_FILES) as new:
        for name, data in files.items():
            (new / name).write_bytes(data)


def _config_record(config: EditConfig) -> dict[str, Any]:
    record = config.to_dict()
    if isinstance(record["proxy"], list):
        record["proxy"] = None  # the proxy's hash says which facts they were
    return record


def read_edit_folder(folder: Path) -> EditFolder:
    """Read an edit folder.

    Raises:
        EditFolderError: A file is missing or damaged, the format is of another version, a factor is not finite, or the
            files do not fit together.
    """
    sidecar = _read_sidecar(folder)
    files = sidecar["files"]
    if (folder / EDIT_STATE).is_file() and EDIT_STATE not in files:
        raise EditFolderError(f"{folder / EDIT_STATE} is not of this edit: {EDIT_CONFIG} does not list it.")
    data = {name: _read(folder / name) for name in files}
    for name, digest in files.items():  # what is parsed below is what is checked here: no file is read twice
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise EditFolderError(
                f"{folder / name} is not the file that was saved with {EDIT_CONFIG}: their digests differ."
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
        edits = _read_edits(sidecar["edits"], sidecar["config"], by_name, modules, state, lora)
        content = EditFolder(
            edits,
            EditConfig.from_dict(sidecar["config"]),
            _checked_base(BaseModel(**sidecar["base_model"])),
            dict(sidecar["versions"]),
            sidecar["proxy_hash"],
            _checked_evaluation(sidecar["evaluation"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EditFolderError(
            f"The files of {folder} do not fit together ({type(error).__name__}: {error})."
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
    if not isinstance(base.revision, str | None):
        raise ValueError(f"the base model's revision is {base.revision!r}")
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
    if sidecar.get("digest") != _sidecar_digest(sidecar):
        raise EditFolderError(f"{path} is not the file that was saved: its digest is not that of what it says.")
    files = sidecar.get("files")
    if not isinstance(files, dict) or not _NEEDED <= set(files) <= {*_NEEDED, EDIT_STATE}:
        raise EditFolderError(f"{path} is damaged: it lists the files {files!r}.")
    return sidecar


def _sidecar_digest(sidecar: Mapping[str, Any]) -> str:
    """Return the digest of an `edit_config.json` but for the entry that holds it, however it is spaced."""
    rest = {name: value for name, value in sidecar.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    """Return a file's bytes; not its map in memory, which changes with the file."""
    if not path.is_file():  # a pipe or a device has no end
        raise EditFolderError(f"{path} is missing, or no plain file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _read_edits(
    records: list[dict[str, Any]],
    config: Mapping[str, Any],
    facts: Mapping[str, list[EditedFact]],
    modules: Mapping[str, LowRankDelta],
    state: dict[str, Tensor],
    lora: Mapping[str, Any],
) -> list[Edit]:
    """Take the edits apart that share an adapter, each with its range of ranks and what its editor remembers."""
    edits = []
    used = 0
    for record in records:
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
        made = EditConfig.from_dict({**config, **record["config"]})
        conv1d, of_edit = lora["fan_in_fan_out"], facts[record["name"]]
        edits.append(Edit(record["name"], of_edit, deltas, conv1d, own, error, contexts, made))
        used = stop
    if used != lora["r"]:
        raise ValueError(f"{lora['r'] - used} ranks of the adapter belong to no edit")
    if state:
        raise ValueError(f"{EDIT_STATE} holds what belongs to no edit: {sorted(state)[:3]}")
    return edits


def _parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _read_factors(path: Path, tensors: Mapping[str, Tensor], lora: Any) -> dict[str, LowRankDelta]:
    config = path.with_name(ADAPTER_CONFIG)
    try:
        rank, alpha, targets = lora["r"], lora["lora_alpha"], list(lora["target_modules"])
    except (TypeError, KeyError) as error:
        raise EditFolderError(f"{config} is damaged ({type(error).__name__}: {error}).") from error
    if wrong := [target for target in targets if not isinstance(target, str) or not _MODULE_PATH.fullmatch(target)]:
        raise EditFolderError(f"{config} names what can be no module: {wrong[0]!r}.")
    if alpha != rank:
        raise EditFolderError(f"{config} scales the edit: lora_alpha {alpha} is not r {rank}.")
    modules = {}
    expected = set()
    for target in targets:
        names = [f"{_PREFIX}{target}.lora_{factor}.weight" for factor in "AB"]
        expected |= set(names)
        try:
            delta = LowRankDelta(tensors[names[0]], tensors[names[1]])
        except (KeyError, ValueError) as error:
            raise EditFolderError(f"{path} does not hold the factors of {target}: {error}") from error
        if problem := _problem(delta, rank):
            raise EditFolderError(f"{path}: the factors of {target} {problem}.")
        modules[target] = delta
    if extra := sorted(set(tensors) - expected):
        raise EditFolderError(f"{path} holds tensors that belong to no edit: {extra[:3]}.")
    return modules


def _problem(delta: LowRankDelta, rank: int) -> str | None:
    """Return what is wrong with the factors of a module, if anything."""
    if delta.rank != rank:
        return f"have rank {delta.rank}, not {rank}"
    if delta.A.dtype not in _DTYPES or delta.B.dtype not in _DTYPES:
        return f"are of {delta.A.dtype} and {delta.B.dtype}"
    if not 0 < rank <= _MOST_RANKS * min(delta.A.shape[1], delta.B.shape[0]):
        return f"have rank {rank}, which is no edit's for a matrix of {delta.B.shape[0]} x {delta.A.shape[1]}"
    if not (delta.A.isfinite().all() and delta.B.isfinite().all()):
        return "are not finite"
    return None


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EditFolderError(f"{path} cannot be read: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def folder_size(folder: Path) -> int:
    """Return the bytes that the files of an edit folder take."""
    return sum((folder / name).stat().st_size for name in EDIT_FILES if (folder / name).is_file())
