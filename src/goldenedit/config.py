"""EditConfig: every choice of an edit in one place, with JSON both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from goldenedit.requests import EditRequest

METHODS = ("rome", "r-rome")
LAYER_SELECTORS = ("lga", "published")
LGA_LOSSES = ("sequence", "answer")


@dataclass
class EditConfig:
    """How facts are edited. Fields that end in "filled in" are set by `get_edit_model`.

    Raises:
        ValueError: An option has a value that means nothing; the message names it and the values it takes.

    Example:
        ```python
        >>> from goldenedit import EditConfig
        >>> EditConfig(layer=3).target_layer
        3
        ```
    """

    method: str = field(default="r-rome", metadata={"help": f"Editor, one of {METHODS}."})
    layer: int | list[int] | str = field(
        default="lga",
        metadata={"help": f"Layer to edit: a number, several numbers (edited together), or one of {LAYER_SELECTORS}."},
    )
    target_layer: int | list[int] | None = field(
        default=None, metadata={"help": "The layer that is edited; filled in."}
    )
    layer_scores: list[float | None] | None = field(
        default=None, metadata={"help": "Score of each layer by the selector, None where it has none; filled in."}
    )
    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Paths of the linear maps to edit, or one path with {} for the layer index, for models whose down "
            "projections cannot be found."
        },
    )

    proxy: str | list[EditRequest] | None = field(
        default=None,
        metadata={"help": "Facts for the layer selection: a file, or requests; None for the packaged set."},
    )
    proxy_size: int | None = field(default=100, metadata={"help": "Use the first so many proxy facts; None for all."})
    lga_loss: str = field(default="sequence", metadata={"help": f"Loss of LGA, one of {LGA_LOSSES}."})
    tukey_kappa: float = field(default=1.0, metadata={"help": "Width of LGA's outlier fence in interquartile ranges."})

    contexts: int = field(default=10, metadata={"help": "Number of prefixes to the prompt, the empty one included."})
    context_length: int = field(default=10, metadata={"help": "Tokens of each sampled prefix."})
    steps: int = field(default=25, metadata={"help": "Most steps of the value optimisation."})
    lr: float = field(default=0.5, metadata={"help": "Learning rate of the value optimisation (Adam)."})
    kl_factor: float = field(default=0.0625, metadata={"help": 'Weight of the KL term on "{subject} is a".'})
    weight_decay: float = field(default=0.5, metadata={"help": "Weight of ||delta|| / ||v0||^2."})
    clamp: float = field(default=4.0, metadata={"help": "Largest ||delta|| in units of ||v0||."})
    stop_loss: float = field(default=0.05, metadata={"help": "A fact is finished once its answer's NLL is lower."})
    batch_size: int = field(default=8, metadata={"help": "Facts whose values are optimised side by side."})

    covariance: str = field(
        default="sampled",
        metadata={
            "help": "Text for the key covariance: 'sampled' from the model itself, 'identity' for none (C = I), or a "
            "dataset: a text, JSON or JSON-lines file, or a name on the Hub."
        },
    )
    covariance_tokens: int = field(default=5_000, metadata={"help": "Tokens of text for the key covariance."})
    ridge: float = field(
        default=0.1, metadata={"help": "Added to the covariance's diagonal, in units of its mean eigenvalue."}
    )
    anchor_bare_prompt: bool = field(
        default=True,
        metadata={
            "help": "R-ROME: answer to the key of the bare prompt as to the averaged one; False as in the paper."
        },
    )
    contrast: int = field(
        default=16, metadata={"help": "Invented subjects with the same last token that an edit is kept silent on."}
    )
    contrast_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of these beside the covariance, relative to its trace; 0 as in the papers."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything that is sampled."})

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("lga_loss", self.lga_loss, LGA_LOSSES)
        if isinstance(self.layer, str):
            _check_choice("layer", self.layer, LAYER_SELECTORS, "a number or a list of numbers")
        else:
            self.layer = _layer_numbers(self.layer)
            self.target_layer = self.layer
        for name in ("contexts", "context_length", "steps", "batch_size", "covariance_tokens"):
            _check_number(name, getattr(self, name), 1, whole=True)
        for name in ("contrast", "seed"):
            _check_number(name, getattr(self, name), 0, whole=True)
        if self.proxy_size is not None:
            _check_number("proxy_size", self.proxy_size, 1, whole=True)
        for name in ("lr", "clamp"):
            _check_number(name, getattr(self, name), 0.0, exclusive=True)
        for name in ("kl_factor", "weight_decay", "stop_loss", "ridge", "contrast_weight"):
            _check_number(name, getattr(self, name), 0.0)
        _check_number("tukey_kappa", self.tukey_kappa, 0.0, infinite=True)
        if not isinstance(self.covariance, str) or not self.covariance:
            raise ValueError(f"EditConfig.covariance must be a source of text, got {self.covariance!r}.")
        _check_texts("target_modules", self.target_modules)
        if not isinstance(self.proxy, str | list | tuple | None):
            raise ValueError(f"EditConfig.proxy must be a file, a list of requests or None, got {self.proxy!r}.")
        if isinstance(self.proxy, Sequence) and not isinstance(self.proxy, str):
            self.proxy = [
                request if isinstance(request, EditRequest) else EditRequest.from_dict(request)
                for request in self.proxy
            ]

    @property
    def target_layers(self) -> list[int]:
        """The layers that are edited, ascending; empty until the selector has run."""
        if self.target_layer is None:
            return []
        return [self.target_layer] if isinstance(self.target_layer, int) else sorted(self.target_layer)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON has it."""
        record = asdict(self)
        if isinstance(self.proxy, list):
            record["proxy"] = [request.to_dict() for request in self.proxy]
        if math.isinf(self.tukey_kappa):
            record["tukey_kappa"] = "inf"
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditConfig:
        """Read what `to_dict` returned.

        Raises:
            ValueError: An option is unknown, or a value means nothing.
        """
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(record) - set(known)):
            raise ValueError(f"Unknown options {unknown} in EditConfig; it has {known}.")
        values = dict(record)
        if values.get("tukey_kappa") == "inf":
            values["tukey_kappa"] = math.inf
        return cls(**values)


def _check_choice(name: str, value: str, choices: Sequence[str], otherwise: str | None = None) -> None:
    if value not in choices:
        more = f", or {otherwise}" if otherwise else ""
        raise ValueError(f"Unknown {name} {value!r} in EditConfig: use one of {list(choices)}{more}.")


def _check_number(
    name: str, value: Any, least: float, whole: bool = False, exclusive: bool = False, infinite: bool = False
) -> None:
    kinds = (int,) if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    number = number and (math.isfinite(value) or (infinite and value == math.inf))
    if not number or value < least or (exclusive and value == least):
        kind = "a whole number" if whole else "a number"
        bound = "above" if exclusive else "of at least"
        raise ValueError(f"EditConfig.{name} must be {kind} {bound} {least}, got {value!r}.")


def _check_texts(name: str, value: Any) -> None:
    texts = value if isinstance(value, list | tuple) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"EditConfig.{name} must be a text or a list of texts, got {value!r}.")


def _layer_numbers(layer: Any) -> int | list[int]:
    numbers = list(layer) if isinstance(layer, list | tuple) else [layer]
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"EditConfig.layer must be a layer's number or a list of them, counted from 0, got {layer!r}.")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"EditConfig.layer names a layer twice: {layer!r}.")
    return numbers[0] if isinstance(layer, int) or len(numbers) == 1 else sorted(numbers)
