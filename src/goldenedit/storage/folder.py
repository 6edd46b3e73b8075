"""The files of an edit folder: a plain LoRA adapter, and a sidecar with the information that an adapter cannot hold.

This is the one place that knows the format. Several edits share one adapter, and each edit owns a range of its ranks.
Stock PEFT loads the sum of the edits, and this library separates them again.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from goldenedit import html
from goldenedit.config import EditConfig
from goldenedit.editors.delta import LowRankDelta
from goldenedit.requests import EditRequest
from goldenedit.storage.atomic import finish_replacing, replace_files
from goldenedit.storage.fingerprint import Hashed, same_weights

if TYPE_CHECKING:
    from goldenedit.evaluation.verification import Verification

_SHOWN_FACTS = 10  # when an edit is printed
FORMAT_VERSION = 2
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EDIT_CONFIG = "edit_config.json"
EDITS = "edits.json"
EDIT_STATE = "edit_state.safetensors"
CARD = "README.md"
EDIT_FILES = (
    CARD,
    EDITS,
    EDIT_STATE,
    ADAPTER_WEIGHTS,
    ADAPTER_CONFIG,
    EDIT_CONFIG,
)  # in the order in which they are saved

PREFIX = "base_model.model."
_TAKEN_KEYS = frozenset(dir(nn.ModuleDict()))  # PEFT keeps adapters in an nn.ModuleDict
_LORA = "lora_"  # PEFT warns about keys that are substrings of it


T = TypeVar("T")


class EditFolderError(ValueError):
    """A folder is not an edit folder, or is damaged; the message names the file."""


@dataclass(frozen=True)
class BaseModel:
    """The model that an edit was made on.

    Attributes:
        name_or_path: Its name.
        fingerprint: Hash of its weights.
        revision: Its commit on the Hub.
        architecture: Its class.
        signs: Hash of the signs of its weights, see `same_weights`; None in older files.
        dtype: Precision of its weights, see `same_weights`; None in older files.
    """

    name_or_path: str
    fingerprint: str
    revision: str | None = None
    architecture: str = ""
    signs: str | None = None
    dtype: str | None = None

    def is_same(self, other: Hashed) -> bool:
        """Return whether another model has the same weights, loaded in the same precision or in another one."""
        return same_weights(self, other)


@dataclass(frozen=True)
class EditedFact:
    """One fact of an edit, with the result of the edit.

    Attributes:
        request: The fact.
        probability_before: Probability of the new answer before the edit (geometric mean over its tokens).
        probability_after: The same probability after the edit.
        steps: Steps of the value optimization.
        weakest_after: Probability of the least likely token of the new answer after the edit; None in older files.
    """

    request: EditRequest
    probability_before: float
    probability_after: float
    steps: int
    weakest_after: float | None = None

    @property
    def takes(self) -> bool:
        """Whether the edit succeeded: the new answer and each of its tokens have a probability of at least 0.5."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """Why the edit does not take, in words; None if it takes.

        Example:
            ```python
            >>> request = EditRequest("The Louvre is in", "The Louvre", "Rome")
            >>> EditedFact(request, probability_before=0.060, probability_after=0.027, steps=25).failure
            'less likely than before'
            >>> EditedFact(request, probability_before=0.060, probability_after=0.91, steps=25).takes
            True
            ```
        """
        weakest = self.probability_after if self.weakest_after is None else self.weakest_after
        if min(self.probability_after, weakest) >= 0.5:
            return None
        if self.probability_after < self.probability_before:
            return "less likely than before"
        return "still unlikely" if self.probability_after < 0.5 else "one token of the answer is unlikely"

    @property
    def weakest_note(self) -> str:
        """What is said behind the probability of an answer of several tokens, as in `", weakest 0.120"`."""
        is_known = self.weakest_after is not None and self.weakest_after < self.probability_after
        return f", weakest {self.weakest_after:.3f}" if is_known else ""

    @property
    def outcome(self) -> str:
        """The probability after the edit with that of its weakest token, and why the edit does not take.

        Example:
            ```python
            >>> request = EditRequest("The Louvre is in", "The Louvre", "New York")
            >>> EditedFact(request, 0.060, probability_after=0.71, steps=25, weakest_after=0.12).outcome
            '0.710, weakest 0.120 (one token of the answer is unlikely)'
            ```
        """
        reason = "" if self.failure is None else f" ({self.failure})"
        return f"{self.probability_after:.3f}{self.weakest_note}{reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON values."""
        record = {
            **self.request.to_dict(),
            "probability_before": self.probability_before,
            "probability_after": self.probability_after,
            "steps": self.steps,
        }
        return record if self.weakest_after is None else {**record, "weakest_after": self.weakest_after}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditedFact:
        """Read a record written by `to_dict`.

        Raises:
            ValueError: A field is missing or invalid.
        """
        results = {name: record[name] for name in ("probability_before", "probability_after", "steps")}
        if record.get("weakest_after") is not None:
            results["weakest_after"] = record["weakest_after"]
        for name, value in results.items():
            if not isinstance(value, int | float):
                raise ValueError(f"{name} is not a number")
            if name != "steps" and not 0 <= value <= 1 + 1e-6:  # a probability of 1 may be rounded up
                raise ValueError(f"{name} is not a probability: {value}")
        request = {name: value for name, value in record.items() if name not in (*results, "weakest_after")}
        return cls(EditRequest.from_dict(request), **results)


@dataclass(frozen=True)
class Beside:
    """An adapter of the user that was active when an edit was made.

    Attributes:
        name: Its name.
        hash: Hash of its weights.
    """

    name: str
    hash: str


@dataclass(frozen=True, repr=False)
class Edit:
    """One batch of facts, and the change of weights that edits them.

    Attributes:
        name: Name of the edit and of its adapter.
        facts: The facts.
        deltas: Change of each edited module, by its path in the base model.
        layers: The layers that contain these modules, ascending.
        fan_in_fan_out: Whether the edited modules are Conv1D modules.
        by_parameter: Whether its adapter names weights (PEFT's `target_parameters`) instead of modules.
        state: Matrices that the editor keeps for later edits. Those of several edits are concatenated by columns.
        relative_error: Error of storing the change at low rank, relative in the Frobenius norm; 0 for most editors.
        contexts_hash: Hash of the sampled contexts that its keys were averaged over, None if there are none. With the
            same contexts, the rows of the edit's factors can be computed again.
        configs: The configs it was made with: one, or several different ones if it joins several edits.
        versions: Versions of the libraries that made it.
        beside: The user's own adapters that were active when it was made.
        lost: Facts of other active edits that took before this edit and no longer do, with their probabilities before
            and after it. It is not saved.
        verification: What the model writes before and after this edit, if it was verified. It is not saved.
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
    lost: tuple[EditedFact, ...] = ()
    verification: Verification | None = None

    def __repr__(self) -> str:
        count = f"{len(self.facts)} fact{'' if len(self.facts) == 1 else 's'}"
        return f"Edit({self.name!r}, {count}, layers={list(self.layers)}, rank={self.rank})"

    def __str__(self) -> str:
        """Return the facts with their probabilities, and what was verified."""
        lines = [repr(self)]
        for fact in self.facts[:_SHOWN_FACTS]:
            lines.append(
                f"{fact.request.shown!r} -> {fact.request.target_new!r}: probability {fact.probability_before:.3f} -> "
                f"{fact.outcome}"
            )
        if len(self.facts) > _SHOWN_FACTS:
            lines.append(f"and {len(self.facts) - _SHOWN_FACTS} more facts")
        return "\n".join(lines if self.verification is None else [*lines, str(self.verification)])

    def _repr_html_(self) -> str:
        """Return the facts as a table, for notebooks, and what was verified."""
        rows = [
            (fact.request.shown, fact.request.target_new, f"{fact.probability_before:.3f}", fact.outcome)
            for fact in self.facts[:_SHOWN_FACTS]
        ]
        if len(self.facts) > _SHOWN_FACTS:
            rows.append((f"and {len(self.facts) - _SHOWN_FACTS} more facts", "", "", ""))
        facts = html.table(("prompt", "new answer", "probability before", "after"), rows, repr(self))
        return facts if self.verification is None else facts + self.verification._repr_html_()

    @property
    def config(self) -> EditConfig | None:
        """The config it was made with; None if it joins edits with different configs."""
        return self.configs[0] if len(self.configs) == 1 else None

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(delta.rank for delta in self.deltas.values())

    @property
    def paying_rank(self) -> int:
        """The largest rank for which low-rank factors pay, smallest over the modules (`LowRankDelta.paying_rank`)."""
        return min(delta.paying_rank for delta in self.deltas.values())


@dataclass(frozen=True)
class EditFolder:
    """The content of an edit folder.

    Attributes:
        edits: The edits, in the order in which they were made.
        config: The config of the model at the time of saving; each edit has the config it was made with.
        base_model: The model they were made on.
        proxy_hash: Hash of the proxy facts that the layer selector used.
        evaluation: The results of `EditModel.evaluate` for these edits as JSON values; None if they were not evaluated.
    """

    edits: list[Edit]
    config: EditConfig
    base_model: BaseModel
    proxy_hash: str | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that made the edits; different versions are separated by commas."""
        return joined_versions(self.edits)

    @property
    def configs(self) -> list[EditConfig]:
        """The different configs that the edits were made with."""
        return list(_distinct(config for edit in self.edits for config in edit.configs)) or [self.config]

    @property
    def target_layers(self) -> list[int]:
        """The layers that the edits change, ascending."""
        config_layers = {layer for config in self.configs for layer in config.target_layers}
        return sorted({layer for edit in self.edits for layer in edit.layers} or config_layers)


def check_edit_name(name: Any) -> None:
    """Raise ValueError unless a name is valid for an edit: letters and digits, with `_-.` and spaces between them."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r} cannot name an edit: it is not a string.")
    forbidden = "".join(dict.fromkeys(character for character in name if not _is_allowed(character)))
    reasons = {
        "it is empty": not name.strip(),
        "it begins or ends with whitespace": name != name.strip(),
        "it begins or ends with '.'": name.startswith(".") or name.endswith("."),
        "it contains '..'": ".." in name,
        f"it contains {forbidden!r}": bool(forbidden),
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        allowed = "".join(character if _is_allowed(character) else "-" for character in name)
        suggestion = re.sub(r"\.{2,}", ".", allowed).strip("-. ")
        raise ValueError(
            f"{name!r} cannot name an edit: {reason}. Use letters, digits, '_', '-', '.' and spaces, as in "
            f"{suggestion or 'edit 1'!r}."
        )


def _is_allowed(character: str) -> bool:
    return character.isalnum() or character in "_-. " or unicodedata.category(character)[0] == "M"


def is_edit_name(name: Any) -> bool:
    """Return whether a name is valid for an edit, see `check_edit_name`."""
    try:
        check_edit_name(name)
    except ValueError:
        return False
    return True


def adapter_key(name: str) -> str:
    """Return the key of an edit's adapter in PEFT: its name, with `%2E` instead of dots.

    PEFT keeps adapters in an `nn.ModuleDict`, whose keys must not contain dots or be names of its attributes, such as
    `update`. PEFT also warns about keys that are substrings of `lora_`. In both cases, the first letter is written as
    its character code too.
    """
    key = name.replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if key in _TAKEN_KEYS or key in _LORA else key


def edit_name(key: str) -> str:
    """Return the name of the edit whose adapter has this key in PEFT; the inverse of `adapter_key`."""
    return re.sub("%([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), key)


def fuse(edits: list[Edit]) -> tuple[int, dict[str, LowRankDelta]]:
    """Return the total rank, and for each module the sum of the edits' deltas, each edit in its own range of ranks.

    Deltas are padded with zeros to the same rank, because llama.cpp has one rank for all modules.
    """
    total = sum(edit.rank for edit in edits)
    modules: dict[str, LowRankDelta] = {}
    offset = 0
    for edit in edits:
        for path, delta in edit.deltas.items():
            padded = delta.padded(total, offset)
            total_delta = modules.get(path)
            if total_delta is not None:
                padded = replace(padded, A=total_delta.A + padded.A, B=total_delta.B + padded.B)
            modules[path] = padded
        offset += edit.rank
    return total, modules


def joined(
    name: str, edits: Sequence[Edit], weights: Sequence[float] | None = None, reduce: bool = False
) -> tuple[Edit, float]:
    """Return one edit with the same effect as several edits together, and the error of reducing its rank.

    Errors are relative to the sum of the norms of the edits, because the norm of their sum may be zero. The relative
    error of the joined edit is an upper bound for the errors of the edits and of the reduction together.

    Args:
        name: Name of the joined edit.
        edits: The edits.
        weights: Factor for each edit, 1 by default.
        reduce: Reduce the rank to the paying rank, by leaving out the smallest singular values.
    """
    weights = [1.0] * len(edits) if weights is None else weights
    deltas: dict[str, LowRankDelta] = {}
    inherited, sizes = dict.fromkeys(_paths(edits), 0.0), dict.fromkeys(_paths(edits), 0.0)
    for edit, weight in zip(edits, weights, strict=True):
        for path, delta in edit.deltas.items():
            weighted = replace(delta, B=delta.B * weight)
            joined_delta = deltas.get(path)
            deltas[path] = weighted if joined_delta is None else joined_delta.beside(weighted)
            sizes[path] += weighted.norm
            inherited[path] += edit.relative_error * weighted.norm
    reduction_error = 0.0
    if reduce:
        rank = min(delta.paying_rank for delta in deltas.values())  # all modules share one rank
        for path, delta in deltas.items():
            deltas[path], error = delta.reduced(rank)
            reduction_error = max(reduction_error, error * delta.norm / sizes[path] if sizes[path] else 0.0)
    error = reduction_error + max(inherited[path] / sizes[path] if sizes[path] else 0.0 for path in deltas)
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
    ), reduction_error


def joined_versions(edits: Sequence[Edit]) -> dict[str, str]:
    """Return the versions of the libraries that made edits; different versions are separated by commas."""
    names = _distinct(name for edit in edits for name in edit.versions)
    return {
        name: ", ".join(_distinct(edit.versions[name] for edit in edits if name in edit.versions)) for name in names
    }


def _distinct(values: Iterable[T]) -> list[T]:
    """Return the values without duplicates, in their order; they need not be hashable."""
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
    """Return the state of all edits, concatenated by columns.

    Of keys `K`, which are read as `K K^T` alone, there are at most as many columns as rows.
    """
    by_name: dict[str, list[Tensor]] = {}
    for edit in edits:
        for name, tensor in edit.state.items():
            by_name.setdefault(name, []).append(tensor)
    state = {name: torch.cat(tensors, 1) for name, tensors in sorted(by_name.items())}
    return {name: _as_few(matrix) if name.startswith("keys/") else matrix for name, matrix in state.items()}


def _as_few(keys: Tensor) -> Tensor:
    """Return keys with the same `K K^T`, at most as many as they are wide."""
    if keys.shape[1] <= keys.shape[0]:
        return keys
    return torch.linalg.qr(keys.T.double(), mode="r").R.T.to(keys.dtype)


def adapter_config(edits: list[Edit], base_model: BaseModel) -> dict[str, Any]:
    """Return the content of `adapter_config.json`, with only the keys that every program that loads LoRA reads."""
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
    """Return the paths of the parameters that deltas change: the fused parameter of experts, or a module's weight."""
    return [path if delta.experts > 1 else f"{path}.weight" for path, delta in sorted(modules.items())]


def adapter_tensors(modules: Mapping[str, LowRankDelta], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Return the factors, with the names that PEFT gives them."""
    tensors: dict[str, Tensor] = {}
    for path, delta in sorted(modules.items()):
        module = path.rpartition(".")[0] if delta.experts > 1 else path
        for factor, values in zip("AB", delta.stored(), strict=True):
            tensors[f"{prefix}{module}.lora_{factor}.weight"] = values.detach().cpu().contiguous()
    return tensors


def facts_of(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return the content of `edits.json`: the facts of edits."""
    return [{"name": edit.name, "facts": [fact.to_dict() for fact in edit.facts]} for edit in edits]


def write_edit_folder(folder: Path, content: EditFolder, card: str, is_rendered: bool = True) -> None:
    """Write an edit folder in one step.

    If the save is interrupted, the next load gives either all old edits or all new ones, see
    `goldenedit.storage.atomic`.

    Args:
        folder: The folder.
        content: The edits.
        card: The text of `README.md`.
        is_rendered: Whether the card was rendered from the edits, so that a later save may replace it.
    """
    offset = 0
    records = []
    config = _config_record(content.config)
    for edit in content.edits:
        records.append(
            {
                "name": edit.name,
                "ranks": [offset, offset + edit.rank],
                "modules": sorted(edit.deltas),
                "relative_error": edit.relative_error,
                "contexts_hash": edit.contexts_hash,
                "layers": list(edit.layers),
                "configs": [_difference(_config_record(edit_config), config) for edit_config in edit.configs],
                "versions": None if edit.versions == content.versions else dict(edit.versions),
                "beside": [vars(entry) for entry in edit.beside],
            }
        )
        offset += edit.rank
    files = {
        ADAPTER_WEIGHTS: save(adapter_tensors(fuse(content.edits)[1]), {"format": "pt"}),
        ADAPTER_CONFIG: _json(adapter_config(content.edits, content.base_model)),
        EDITS: _json(facts_of(content.edits)),
    }
    state = {
        f"{edit.name}/{name}": tensor.contiguous() for edit in content.edits for name, tensor in edit.state.items()
    }
    if state:
        files[EDIT_STATE] = save(state, {"format": "pt"})
    sidecar = {
        "format_version": FORMAT_VERSION,
        "base_model": vars(content.base_model),
        "edits": records,
        "config": config,
        "proxy_hash": content.proxy_hash,
        "evaluation": content.evaluation,
        "versions": content.versions,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "card": card_digest(card) if is_rendered else None,  # not in "files": users may change their cards
    }
    sidecar["digest"] = sidecar_digest(sidecar)
    files |= {EDIT_CONFIG: _json(sidecar), CARD: card.encode()}
    replace_files(folder, files, EDIT_FILES)


def finish_saving(folder: Path) -> None:
    """Finish a save that was interrupted after all of its files were written.

    Raises:
        EditFolderError: A file cannot be moved to its place.
    """
    try:
        finish_replacing(folder, EDIT_FILES)
    except OSError as error:
        raise EditFolderError(
            f"A save to {folder} was interrupted: {EDIT_CONFIG} and the other files are a mixture of two saves. The "
            f"save cannot be finished ({error}). Make the folder writable and load it again, or save the edit again."
        ) from error


def _difference(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that are missing or different in another one."""
    return {name: value for name, value in record.items() if name not in other or value != other[name]}


def _config_record(config: EditConfig) -> dict[str, Any]:
    record = config.to_dict()
    if isinstance(record["proxy"], list):
        record["proxy"] = None  # the sidecar has the hash of these facts
    return record


def sidecar_digest(sidecar: Mapping[str, Any]) -> str:
    """Return the digest of the content of `edit_config.json`, except its entry `digest`; independent of whitespace."""
    rest = {name: value for name, value in sidecar.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def card_digest(card: str) -> str:
    """Return the digest of the text of a card."""
    return hashlib.sha256(card.encode()).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def folder_size(folder: Path) -> int:
    """Return the total size of the files of an edit folder in bytes."""
    return sum((folder / name).stat().st_size for name in EDIT_FILES if (folder / name).is_file())
