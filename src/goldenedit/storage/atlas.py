"""Golden layers as a small file that others read: which layer to edit in which model, who says so, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from goldenedit.storage.fingerprint import Hashed, same_weights

GOLDEN_LAYERS = "golden_layers.json"
FORMAT_VERSION = 1


class GoldenLayersError(ValueError):
    """A file of golden layers that is damaged, or says nothing of the model at hand."""


@dataclass(frozen=True)
class GoldenLayers:
    """What a layer selector found of one model.

    Attributes:
        model: Name of the model.
        fingerprint: That of its weights: what is read back is checked against it.
        selector: Name of the layer selector.
        layers: The layers to edit.
        scores: Score of each layer, None where it has none; None for selectors without scores.
        method: The editor that the selector was asked for.
        revision: Commit of the model.
        architecture: Class of the model.
        facts: Number of facts that were looked at, and `proxy_hash`, a short name for them.
        seconds: What the scores took, and `forward_equivalents`, the same in forwards a fact.
        versions: Versions of the libraries that found them.
        signs: Hash of the signs of the weights, and `dtype` their precision: see `same_weights`.
    """

    model: str
    fingerprint: str
    selector: str
    layers: list[int]
    scores: list[float | None] | None = None
    method: str = "r-rome"
    revision: str | None = None
    architecture: str = ""
    facts: int = 0
    proxy_hash: str | None = None
    seconds: float = 0.0
    forward_equivalents: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    signs: str | None = None
    dtype: str | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> GoldenLayers:
        """Read a record as JSON has it.

        Raises:
            ValueError: It has other fields, or values that mean nothing.
        """
        if unknown := sorted(set(record) - {entry.name for entry in fields(cls)}):
            raise ValueError(f"unknown fields {unknown}")
        found = cls(**record)
        checks = {
            _is_text: ("model", "fingerprint", "selector", "method", "architecture"),
            _is_text_or_none: ("revision", "proxy_hash", "signs", "dtype"),
            _is_number: ("facts", "seconds", "forward_equivalents"),
            _are_layers: ("layers",),
            _are_scores: ("scores",),
            _are_versions: ("versions",),
        }
        for is_right, names in checks.items():
            if wrong := [name for name in names if not is_right(getattr(found, name))]:
                raise ValueError(f"{wrong[0]} is {getattr(found, wrong[0])!r}")
        return found

    @property
    def key(self) -> tuple[str, str, str]:
        """What a file has one record of: weights, selector and editor."""
        return self.fingerprint, self.selector, self.method


def _are_layers(layers: Any) -> bool:
    return (
        isinstance(layers, list)
        and bool(layers)
        and all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    )


def _are_scores(scores: Any) -> bool:
    return scores is None or (isinstance(scores, list) and all(one is None or _is_number(one) for one in scores))


def _are_versions(versions: Any) -> bool:
    return isinstance(versions, dict) and all(_is_text(text) for text in versions.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def dump_golden_layers(records: Sequence[GoldenLayers]) -> str:
    """Return records as the text of a file."""
    content = {"format_version": FORMAT_VERSION, "golden_layers": [asdict(record) for record in records]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_golden_layers(path: Path) -> list[GoldenLayers]:
    """Read a file of golden layers.

    Raises:
        GoldenLayersError: The file cannot be read, or is of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(f"format version {version!r} instead of {FORMAT_VERSION}")
        return [GoldenLayers.from_dict(record) for record in content["golden_layers"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GoldenLayersError(f"{path} holds no golden layers ({type(error).__name__}: {error}).") from error


def with_record(records: Sequence[GoldenLayers], new: GoldenLayers) -> list[GoldenLayers]:
    """Return records with a new one last, in place of the one of the same weights, selector and editor."""
    return [*(record for record in records if record.key != new.key), new]


def record_for(records: Sequence[GoldenLayers], weights: Hashed, method: str, source: str) -> GoldenLayers:
    """Return the last record of these weights, of this editor if there is one.

    Records of the same weights in another precision count where there are none of this one.

    Raises:
        GoldenLayersError: The records are of other weights; `source` is where they come from.
    """
    exact = [record for record in records if record.fingerprint == weights.fingerprint]
    own = exact or [record for record in records if same_weights(record, weights)]
    if not own:
        known = ", ".join(sorted({f"{record.model} ({record.fingerprint})" for record in records})) or "none"
        raise GoldenLayersError(
            f"{source} knows no golden layer of this model (fingerprint {weights.fingerprint}). It has those of: "
            f"{known}."
        )
    return ([record for record in own if record.method == method] or own)[-1]
