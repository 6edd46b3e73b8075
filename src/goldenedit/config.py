"""EditConfig: every choice of an edit in one place, with JSON both ways."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Number
from typing import Any

from goldenedit.requests import EditRequest, as_requests

TRAINED = ("ft-l", "ft-m", "lora", "ultraedit")  # these need no values and keys, but gradients
METHODS = ("rome", "r-rome", "memit", "emmet", "pmet", "alphaedit", *TRAINED)
REGULARIZERS = ("rect", "prune")
SCORED_SELECTORS = ("lga", "selectivity", "key_response", "causal_tracing", "sweep", "auto")  # a score per layer
LAYER_SELECTORS = (*SCORED_SELECTORS, "published", "random")
HUB_LAYER = "hub:"  # before the name of a repository with golden layers
LAYER_PATTERNS = ("golden", "window", "ends", "best")
LGA_LOSSES = ("sequence", "answer")

# What numbers may be: whole from 1 on, above 0, or from 0 on.
_COUNTS = ("contexts", "context_length", "steps", "covariance_tokens", "pattern_layers", "finetune_steps", "lora_rank")
_POSITIVE = ("lr", "clamp")
_NOT_NEGATIVE = (
    *("kl_factor", "weight_decay", "stop_loss", "ridge", "contrast_weight", "gram_ridge"),
    *("finetune_stop_loss", "dense_tolerance"),
)
# Defaults in units of the model at hand, for fine-tuning as they measured best on development facts; and the papers'.
_DEFAULT_CONSTANTS = {
    "covariance_weight": (1.0, 15_000.0),
    "null_space_threshold": (3.0, 0.02),
    "null_space_ridge": (0.2, 10.0),
    "finetune_lr": (5e-3, 5e-4),
    "finetune_epsilon": (0.02, 5e-4),
    "ultraedit_lr": (1.0, 1e-6),
    "ultraedit_ridge": (0.1, 1.0),
}


# What `EditConfig.relative_constants` measures against the model at hand.
RELATIVE_CONSTANTS = (
    *("covariance_weight", "null_space_threshold", "null_space_ridge", "ultraedit_lr", "ultraedit_ridge"),
)


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
        metadata={
            "help": f"Layer to edit: a number, several numbers (edited together), one of {LAYER_SELECTORS}, or "
            "'hub:repo' (or 'hub:repo@revision') for what a repository on the Hub says of these weights."
        },
    )
    layer_pattern: str = field(
        default="golden",
        metadata={
            "help": f"Layers that are edited together, given LGA's golden one, one of {LAYER_PATTERNS}: that one "
            "alone, the window that ends at it, first and last of this window, or the best scores within the fence."
        },
    )
    pattern_layers: int = field(default=3, metadata={"help": "Length of the window, or number of best layers."})
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
    batch_size: int | str = field(
        default="auto",
        metadata={"help": "Facts whose values are optimised side by side; 'auto' for as many as memory has room for."},
    )

    covariance: str = field(
        default="sampled",
        metadata={
            "help": "Text for the key covariance: 'sampled' from the model itself, 'identity' for none (C = I), or a "
            "dataset: a text, JSON or JSON-lines file, or a name on the Hub. Fused experts of large models need "
            "'identity'."
        },
    )
    covariance_tokens: int = field(default=5_000, metadata={"help": "Tokens of text for the key covariance."})
    ridge: float = field(
        default=0.1, metadata={"help": "Added to the covariance's diagonal, in units of its mean eigenvalue."}
    )
    anchor_bare_prompt: bool = field(
        default=True,
        metadata={"help": "Answer to the key of the bare prompt as to the averaged one; False as in the papers."},
    )
    contrast: int = field(
        default=16, metadata={"help": "Invented subjects with the same last token that an edit is kept silent on."}
    )
    contrast_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of these beside the covariance, relative to its trace; 0 as in the papers."},
    )
    relative_constants: bool = field(
        default=True,
        metadata={
            "help": "Measure covariance_weight, null_space_threshold, null_space_ridge, ultraedit_lr and "
            "ultraedit_ridge against the model at hand, so that they mean the same for every one; False takes them as "
            "they are. Constants without a value are then as published."
        },
    )
    covariance_weight: float | None = field(
        default=None,
        metadata={
            "help": "MEMIT, PMET: weight of the covariance, lambda, in units of the facts' key energy over the "
            "covariance's trace; None for 1, or as published 15000 (their GPT-2 XL: 20000)."
        },
    )
    gram_ridge: float = field(
        default=0.01, metadata={"help": "EMMET: ridge of K^T C^-1 K in units of its diagonal; 0 inserts exactly."}
    )
    null_space_threshold: float | None = field(
        default=None,
        metadata={
            "help": "AlphaEdit: largest eigenvalue of the null space, in units of the mean one; None for 3, or as "
            "published 0.02."
        },
    )
    null_space_ridge: float | None = field(
        default=None,
        metadata={
            "help": "AlphaEdit: weight of the update's size, in units of the facts' key energy; None for 0.2, or as "
            "published 10."
        },
    )
    finetune_steps: int = field(default=25, metadata={"help": "FT-L, FT-M, LoRA: most steps of Adam."})
    finetune_lr: float | None = field(
        default=None, metadata={"help": "FT-L, FT-M, LoRA: learning rate; None for 5e-3, or as published 5e-4."}
    )
    finetune_stop_loss: float = field(default=0.01, metadata={"help": "FT-L, FT-M, LoRA: loss to stop below."})
    finetune_epsilon: float | None = field(
        default=None, metadata={"help": "FT-L: largest change of a weight; None for 0.02, or as published 5e-4."}
    )
    lora_rank: int = field(default=8, metadata={"help": "LoRA: rank."})
    ultraedit_lr: float | None = field(
        default=None,
        metadata={
            "help": "UltraEdit: size of the step, in units of the length of the edited map's outputs; None for 1, or "
            "as published 1e-6."
        },
    )
    ultraedit_ridge: float | None = field(
        default=None,
        metadata={
            "help": "UltraEdit: weight of the update's size, in units of the keys' energy; None for 0.1, or as "
            "published 1."
        },
    )
    regularizer: str | None = field(
        default=None, metadata={"help": f"What is done to the finished update, one of {REGULARIZERS}, or None."}
    )
    dense_tolerance: float = field(
        default=0.01, metadata={"help": "Largest relative error of storing a dense update as one of low rank."}
    )
    max_perplexity_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Undo a batch after which perplexity on plain statements is more than so many times that of the "
            "base model; None to measure nothing."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything that is sampled."})

    def __post_init__(self) -> None:
        for entry in fields(self):
            setattr(self, entry.name, _plain(getattr(self, entry.name)))
        _check_choice("method", self.method, METHODS)
        _check_choice("lga_loss", self.lga_loss, LGA_LOSSES)
        _check_choice("layer_pattern", self.layer_pattern, LAYER_PATTERNS)
        self._check_layers()
        if self.regularizer is not None:
            _check_choice("regularizer", self.regularizer, REGULARIZERS, "None")
        if self.method == "alphaedit" and self.covariance == "identity":
            raise ValueError("AlphaEdit needs key statistics: EditConfig.covariance cannot be 'identity'.")
        if self.layer_pattern != "golden" and self.layer not in SCORED_SELECTORS:
            raise ValueError(
                f"EditConfig.layer_pattern {self.layer_pattern!r} needs layers with scores, by one of "
                f"{SCORED_SELECTORS}, got layer={self.layer!r}."
            )
        self._check_numbers()
        if not isinstance(self.covariance, str) or not self.covariance:
            raise ValueError(f"EditConfig.covariance must be a source of text, got {self.covariance!r}.")
        _check_texts("target_modules", self.target_modules)
        if not isinstance(self.proxy, str | list | tuple | None):
            raise ValueError(f"EditConfig.proxy must be a file, a list of requests or None, got {self.proxy!r}.")
        if isinstance(self.proxy, list | tuple):
            self.proxy = as_requests(self.proxy)

    def _check_layers(self) -> None:
        if isinstance(self.layer, str):
            if not self.layer.removeprefix(HUB_LAYER) or not self.layer.startswith(HUB_LAYER):
                _check_choice("layer", self.layer, LAYER_SELECTORS, "'hub:repo', a number or a list of numbers")
            if self.target_layer is not None:
                self.target_layer = _layer_numbers(self.target_layer, "target_layer")
        else:
            self.layer = _layer_numbers(self.layer)
            self.target_layer = self.layer
        for score in _scores(self.layer_scores):
            _check_number("layer_scores", score, -sys.float_info.max, optional=True)

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            _check_number(name, getattr(self, name), 1, whole=True)
        for name in ("contrast", "seed"):
            _check_number(name, getattr(self, name), 0, whole=True)
        if self.batch_size != "auto":
            _check_number("batch_size", self.batch_size, 1, whole=True)
        _check_number("proxy_size", self.proxy_size, 1, whole=True, optional=True)
        _check_number("max_perplexity_ratio", self.max_perplexity_ratio, 1.0, optional=True)
        for name in _POSITIVE:
            _check_number(name, getattr(self, name), 0.0, exclusive=True)
        for name in _DEFAULT_CONSTANTS:
            _check_number(name, getattr(self, name), 0.0, exclusive=name != "covariance_weight", optional=True)
        for name in _NOT_NEGATIVE:
            _check_number(name, getattr(self, name), 0.0)
        if self.dense_tolerance >= 1:
            raise ValueError(f"EditConfig.dense_tolerance must be below 1, got {self.dense_tolerance}.")
        _check_number("tukey_kappa", self.tukey_kappa, 0.0, infinite=True)

    @property
    def fence(self) -> float:
        """Width of the fence that layer scores must lie within: LGA's Tukey filter, none for other selectors."""
        return self.tukey_kappa if self.layer == "lga" else math.inf

    def constant(self, name: str) -> float:
        """Return a constant that depends on `relative_constants`: what is set, or the default in these units."""
        value: float | None = getattr(self, name)
        relative, published = _DEFAULT_CONSTANTS[name]
        return value if value is not None else relative if self.relative_constants else published

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


def _plain(value: Any) -> Any:
    """Return a path as a text and a number of numpy as Python's: what JSON has."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _check_choice(name: str, value: str, choices: Sequence[str], otherwise: str | None = None) -> None:
    if value not in choices:
        more = f", or {otherwise}" if otherwise else ""
        raise ValueError(f"Unknown {name} {value!r} in EditConfig: use one of {list(choices)}{more}.")


def _check_number(
    name: str,
    value: Any,
    least: float,
    whole: bool = False,
    exclusive: bool = False,
    infinite: bool = False,
    optional: bool = False,
) -> None:
    if optional and value is None:
        return
    kinds = (int,) if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    # Not math.isfinite, which raises OverflowError on large ints.
    number = number and (abs(value) <= sys.float_info.max or (infinite and value == math.inf))
    if not number or value < least or (exclusive and value == least):
        kind = "a whole number" if whole else "a number"
        bound = "above" if exclusive else "of at least"
        raise ValueError(f"EditConfig.{name} must be {kind} {bound} {least}, got {value!r}.")


def _check_texts(name: str, value: Any) -> None:
    texts = value if isinstance(value, list | tuple) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"EditConfig.{name} must be a text or a list of texts, got {value!r}.")


def _scores(scores: Any) -> list[Any]:
    if not isinstance(scores, list | None):
        raise ValueError(f"EditConfig.layer_scores must be a list of numbers, got {scores!r}.")
    return scores or []


def _layer_numbers(layer: Any, name: str = "layer") -> int | list[int]:
    given = layer.tolist() if hasattr(layer, "tolist") else layer  # an array, or one of its numbers
    numbers = [_whole(number) for number in (given if isinstance(given, list | tuple | range) else [given])]
    known = [number for number in numbers if number is not None and number >= 0]
    if not known or len(known) != len(numbers):
        raise ValueError(
            f"EditConfig.{name} must be a layer's number or a list of them, counted from 0, got {layer!r}."
        )
    if len(set(known)) != len(known):
        raise ValueError(f"EditConfig.{name} names a layer twice: {layer!r}.")
    return known[0] if len(known) == 1 else sorted(known)


def _whole(number: Any) -> int | None:
    """Return a whole number of any kind, such as numpy's, as Python's; None for all else."""
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None
