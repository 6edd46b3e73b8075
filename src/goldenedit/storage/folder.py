"""The files of an edit folder: a plain LoRA adapter that anyone loads, and a sidecar with what an adapter cannot say.

The one place that knows the format. Several edits share one adapter: each owns a range of its ranks, so that stock PEFT
loads their sum and this library takes them apart again.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from goldenedit.config import EditConfig
from goldenedit.editors.delta import LowRankDelta
from goldenedit.requests import EditRequest
from goldenedit.storage.atomic import finish_replacing, replace_files
from goldenedit.storage.fingerprint import Hashed, same_weights

FORMAT_VERSION = 2
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EDIT_CONFIG = "edit_config.json"
EDITS = "edits.json"
EDIT_STATE = "edit_state.safetensors"
CARD = "README.md"
EDIT_FILES = (CARD, EDITS, EDIT_STATE, ADAPTER_WEIGHTS, ADAPTER_CONFIG, EDIT_CONFIG)  # in the order they are saved

PREFIX = "base_model.model."
_TAKEN_KEYS = frozenset(dir(nn.ModuleDict()))  # PEFT keeps adapters by their keys in one
_LORA = "lora_"  # PEFT warns of keys that are a part of it


T = TypeVar("T")


class EditFolderError(ValueError):
    """A folder that is no edit folder, or a damaged one; the message names the file."""


@dataclass(frozen=True)
class BaseModel:
    """Which model an edit was made on.

    Attributes:
        name_or_path: Its name.
        fingerprint: Hash of its weights.
        revision: Its commit on the Hub.
        architecture: Its class.
        signs: Hash of the signs of its weights, and `dtype` their precision (see `same_weights`); None in files from
            before there were any.
    """

    name_or_path: str
    fingerprint: str
    revision: str | None = None
    architecture: str = ""
    signs: str | None = None
    dtype: str | None = None

    def is_same(self, other: Hashed) -> bool:
        """Tell whether these are the same weights, loaded in the same precision or in two."""
        return same_weights(self, other)


@dataclass(frozen=True)
class EditedFact:
    """One fact of an edit and what became of it.

    Attributes:
        request: The fact.
        probability_before: Probability of the new answer before the edit (geometric mean over its tokens).
        probability_after: The same with the edit in place.
        steps: Steps of the value optimization.
    """

    request: EditRequest
    probability_before: float
    probability_after: float
    steps: int

    @property
    def takes(self) -> bool:
        """Whether the edited model finds the new answer likelier than not."""
        return self.probability_after >= 0.5

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
class Beside:
    """An adapter that is no edit, and that was active when an edit was made: a name, and a hash of its weights."""

    name: str
    hash: str


@dataclass(frozen=True)
class Edit:
    """One batch of facts and the change of weights that makes them so.

    Attributes:
        name: Name of the edit and of its adapter.
        facts: The facts.
        deltas: Change of each edited module, by its path in the base model.
        layers: The layers that these modules are in, ascending.
        fan_in_fan_out: Whether the edited modules are of the Conv1D kind.
        by_parameter: Whether its adapter names weights (PEFT's `target_parameters`) instead of modules.
        state: What the editor remembers for later edits, matrices whose columns of several edits are put side by side.
        relative_error: What storing the change as low rank costs, in the Frobenius norm; 0 for most editors.
        contexts_hash: A short name for the sampled prefixes that its keys were averaged over, None where there are
            none: whoever samples the same ones can compute the rows of the edit's factors again.
        configs: How it was made: each way once, where edits of different making are one.
        versions: Versions of the libraries that made it.
        beside: The user's own adapters that were active when it was made.
    """

    name: str
    facts: list[EditedFact]
    deltas: dict[str, LowRankDelta]
    layers: tuple[int, ...] = ()
    fan_in_fan_out: bool = False
    by_parameter: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    relative_error: float = 0.0
    contexts_hash: str | None = None
    configs: tuple[EditConfig, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[Beside, ...] = ()

    @property
    def config(self) -> EditConfig | None:
        """How it was made; None where edits of different making are one."""
        return self.configs[0] if len(self.configs) == 1 else None

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
        proxy_hash: A short name for the facts on which layers were compared.
        evaluation: What `EditModel.evaluate` measured of these edits, as JSON has it; None where nothing was.
    """

    edits: list[Edit]
    config: EditConfig
    base_model: BaseModel
    proxy_hash: str | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that made the edits, with commas where they differ."""
        return joined_versions(self.edits)

    @property
    def configs(self) -> list[EditConfig]:
        """How the edits were made, each way once."""
        return list(_distinct(config for edit in self.edits for config in edit.configs)) or [self.config]

    @property
    def target_layers(self) -> list[int]:
        """The layers that the edits change, ascending."""
        of_configs = {layer for config in self.configs for layer in config.target_layers}
        return sorted({layer for edit in self.edits for layer in edit.layers} or of_configs)


def check_edit_name(name: Any) -> None:
    """Raise ValueError unless a text can name an edit: letters and digits, with `_`, `-`, `.` and spaces between."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r} cannot name an edit: it is no text.")
    forbidden = "".join(dict.fromkeys(one for one in name if not _may_name(one)))
    reasons = {
        "it is empty": not name.strip(),
        "it begins or ends with whitespace": name != name.strip(),
        "it begins or ends with '.'": name.startswith(".") or name.endswith("."),
        "it holds '..'": ".." in name,
        f"it holds {forbidden!r}": bool(forbidden),
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        better = re.sub(r"\.{2,}", ".", "".join(one if _may_name(one) else "-" for one in name)).strip("-. ")
        raise ValueError(
            f"{name!r} cannot name an edit: {reason}. Use letters, digits, '_', '-', '.' and spaces, as in "
            f"{better or 'edit 1'!r}."
        )


def _may_name(character: str) -> bool:
    return character.isalnum() or character in "_-. " or unicodedata.category(character)[0] == "M"


def is_edit_name(name: Any) -> bool:
    """Tell whether a text can name an edit, see `check_edit_name`."""
    try:
        check_edit_name(name)
    except ValueError:
        return False
    return True


def adapter_key(name: str) -> str:
    """Return the key of an edit's adapter in PEFT: its name, with `%2E` for dots.

    PEFT keeps adapters in an `nn.ModuleDict`, whose keys hold no dot and are none of its attributes, such as `update`,
    and warns of keys that are a part of `lora_`: the first letter of those is written as its number too.
    """
    key = name.replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if key in _TAKEN_KEYS or key in _LORA else key


def edit_name(key: str) -> str:
    """Return the name of the edit whose adapter has this key in PEFT, see `adapter_key`."""
    return re.sub("%([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), key)


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
            modules[path] = padded if before is None else replace(padded, A=before.A + padded.A, B=before.B + padded.B)
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
            weighed = replace(delta, B=delta.B * weight)
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
    return Edit(
        name,
        facts,
        deltas,
        layers=tuple(sorted({layer for edit in edits for layer in edit.layers})),
        fan_in_fan_out=edits[0].fan_in_fan_out,
        by_parameter=edits[0].by_parameter,
        state=state,
        relative_error=error,
        contexts_hash=_common(edit.contexts_hash for edit in edits),
        configs=tuple(_distinct(config for edit in edits for config in edit.configs)),
        versions=joined_versions(edits),
        beside=tuple(_distinct(entry for edit in edits for entry in edit.beside)),
    ), cut


def joined_versions(edits: Sequence[Edit]) -> dict[str, str]:
    """Return the versions of the libraries that made edits, with commas where they differ."""
    names = _distinct(name for edit in edits for name in edit.versions)
    return {
        name: ", ".join(_distinct(edit.versions[name] for edit in edits if name in edit.versions)) for name in names
    }


def _distinct(values: Iterable[T]) -> list[T]:
    """Return values in their order, each once; they need no hash."""
    distinct: list[T] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


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
    by_parameter = any(edit.by_parameter for edit in edits)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model.name_or_path,
        "revision": base_model.revision,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [] if by_parameter else sorted(modules),
        **({"target_parameters": target_parameters(modules)} if by_parameter else {}),
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": edits[0].fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def target_parameters(modules: Mapping[str, LowRankDelta]) -> list[str]:
    """Return the paths of the parameters that deltas change: fused experts are one, of others it is the weight."""
    return [path if delta.experts > 1 else f"{path}.weight" for path, delta in sorted(modules.items())]


def adapter_tensors(modules: Mapping[str, LowRankDelta], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Return the factors under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, delta in sorted(modules.items()):
        module = path.rpartition(".")[0] if delta.experts > 1 else path
        for factor, values in zip("AB", delta.stored(), strict=True):
            tensors[f"{prefix}{module}.lora_{factor}.weight"] = values.detach().cpu().contiguous()
    return tensors


def facts_of(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return the facts of edits as `edits.json` has them."""
    return [{"name": edit.name, "facts": [fact.to_dict() for fact in edit.facts]} for edit in edits]


def write_edit_folder(folder: Path, content: EditFolder, card: str) -> None:
    """Write an edit folder: whatever stops it, the folder holds the old edits or, once loaded, the new ones.

    See `goldenedit.storage.atomic` for how.
    """
    offset = 0
    index = []
    config = _config_record(content.config)
    for edit in content.edits:
        modules = sorted(edit.deltas)
        versions = content.versions
        ranks = [offset, offset + edit.rank]
        index.append(
            {
                "name": edit.name,
                "ranks": ranks,
                "modules": modules,
                "relative_error": edit.relative_error,
                "contexts_hash": edit.contexts_hash,
                "layers": list(edit.layers),
                "configs": [_difference(_config_record(made), config) for made in edit.configs],
                "versions": None if edit.versions == versions else dict(edit.versions),
                "beside": [vars(entry) for entry in edit.beside],
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
    sidecar["digest"] = sidecar_digest(sidecar)
    files |= {EDIT_CONFIG: _json(sidecar), CARD: card.encode()}
    replace_files(folder, files, EDIT_FILES)


def finish_saving(folder: Path) -> None:
    """Put the files of a save in place that was stopped when all of them were written.

    Raises:
        EditFolderError: That cannot be done here.
    """
    try:
        finish_replacing(folder, EDIT_FILES)
    except OSError as error:
        raise EditFolderError(
            f"A save to {folder} was interrupted: {EDIT_CONFIG} and the files beside it are not all of one save, and "
            f"the rest cannot be put in place here ({error}). Load it once where it can be written, or save it again."
        ) from error


def _difference(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record has that another one has not."""
    return {name: value for name, value in record.items() if name not in other or value != other[name]}


def _config_record(config: EditConfig) -> dict[str, Any]:
    record = config.to_dict()
    if isinstance(record["proxy"], list):
        record["proxy"] = None  # the proxy's hash says which facts they were
    return record


def sidecar_digest(sidecar: Mapping[str, Any]) -> str:
    """Return the digest of an `edit_config.json` but for the entry that holds it, however it is spaced."""
    rest = {name: value for name, value in sidecar.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def folder_size(folder: Path) -> int:
    """Return the bytes that the files of an edit folder take."""
    return sum((folder / name).stat().st_size for name in EDIT_FILES if (folder / name).is_file())
