"""Golden layers as a small file to share: which layers to edit in which models, and how they were selected."""

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
    """A file of golden layers is damaged, or has no record of this model."""


@dataclass(frozen=True)
class GoldenLayers:
    """The golden layers that a selector found for one model.

    Attributes:
        model: Name of the model.
        fingerprint: Fingerprint of its weights. A record is used only for a model with the same weights.
        selector: Name of the layer selector.
        layers: The layers to edit.
        scores: Score of each layer, None for layers without one; None if the selector computes no scores.
        method: The editor for which the layers were selected.
        revision: Commit of the model.
        architecture: Class of the model.
        facts: Number of proxy facts that the scores were computed on.
        proxy_hash: Hash of these facts.
        seconds: Time to compute the scores.
        forward_equivalents: The same cost, as a number of forwards per fact.
        versions: Versions of the libraries that computed the scores.
        signs: Hash of the signs of the weights, see `same_weights`.
        dtype: Precision of the weights, see `same_weights`.
        plateau: Layers that are within the noise of the golden one; None if it is not known.
        intervals: 95% interval of each layer's score, None for layers without one; None if they are not known.
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
    plateau: list[int] | None = None
    intervals: list[list[float] | None] | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> GoldenLayers:
        """Read a record from parsed JSON.

        Raises:
            ValueError: A field is unknown, or its value is invalid.
        """
        if unknown := sorted(set(record) - {entry.name for entry in fields(cls)}):
            raise ValueError(f"unknown fields {unknown}")
        layers = cls(**record)
        checks = {
            _is_text: ("model", "fingerprint", "selector", "method", "architecture"),
            _is_text_or_none: ("revision", "proxy_hash", "signs", "dtype"),
            _is_number: ("facts", "seconds", "forward_equivalents"),
            _are_layers: ("layers",),
            _are_scores: ("scores",),
            _are_layers_or_none: ("plateau",),
            _are_intervals: ("intervals",),
            _are_versions: ("versions",),
        }
        for is_valid, names in checks.items():
            if invalid := [name for name in names if not is_valid(getattr(layers, name))]:
                raise ValueError(f"{invalid[0]} has the invalid value {getattr(layers, invalid[0])!r}")
        return layers

    @property
    def key(self) -> tuple[str, str, str]:
        """Weights, selector and editor: a file has one record for each combination."""
        return self.fingerprint, self.selector, self.method


def _are_layers(layers: Any) -> bool:
    return (
        isinstance(layers, list)
        and bool(layers)
        and all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    )


def _are_layers_or_none(layers: Any) -> bool:
    return layers is None or _are_layers(layers)


def _are_intervals(intervals: Any) -> bool:
    if not isinstance(intervals, list):
        return intervals is None
    return all(
        bounds is None or (isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds)))
        for bounds in intervals
    )


def _are_scores(scores: Any) -> bool:
    return scores is None or (isinstance(scores, list) and all(score is None or _is_number(score) for score in scores))


def _are_versions(versions: Any) -> bool:
    return isinstance(versions, dict) and all(_is_text(text) for text in versions.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def dump_golden_layers(records: Sequence[GoldenLayers]) -> str:
    """Return the text of a file with these records."""
    content = {"format_version": FORMAT_VERSION, "golden_layers": [asdict(record) for record in records]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_golden_layers(path: Path) -> list[GoldenLayers]:
    """Read a file of golden layers.

    Raises:
        GoldenLayersError: The file cannot be read, or has another format version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # raises ValueError for half of a surrogate pair
        version = content["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(f"format version {version!r} instead of {FORMAT_VERSION}")
        return [GoldenLayers.from_dict(record) for record in content["golden_layers"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GoldenLayersError(
            f"{path} is not a valid file of golden layers ({type(error).__name__}: {error})."
        ) from error


def with_record(records: Sequence[GoldenLayers], new: GoldenLayers) -> list[GoldenLayers]:
    """Return the records with a new one appended; it replaces the record of the same weights, selector and editor."""
    return [*(record for record in records if record.key != new.key), new]


def record_for(records: Sequence[GoldenLayers], weights: Hashed, method: str, source: str) -> GoldenLayers:
    """Return the last record for these weights, preferably one for this editor.

    If there is no record of the weights in this precision, records of the same weights in another precision are used.

    Args:
        source: Where the records come from, for the error message.

    Raises:
        GoldenLayersError: There is no record for these weights.
    """
    exact = [record for record in records if record.fingerprint == weights.fingerprint]
    matching = exact or [record for record in records if same_weights(record, weights)]
    if not matching:
        known = ", ".join(sorted({f"{record.model} ({record.fingerprint})" for record in records})) or "none"
        raise GoldenLayersError(
            f"{source} has no golden layers for this model (fingerprint {weights.fingerprint}). It has golden layers "
            f"for: {known}. Select a layer with another EditConfig.layer, such as 'lga'."
        )
    return ([record for record in matching if record.method == method] or matching)[-1]
