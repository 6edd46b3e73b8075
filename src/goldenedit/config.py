"""EditConfig: all options of an edit, which can be saved as JSON."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Number
from typing import Any, TypeVar

from torch import Tensor

from goldenedit.editors import EDITORS, Editor, LowRankDelta, Problem
from goldenedit.editors.alphaedit import AlphaEditOptions
from goldenedit.editors.crispedit import CrispEditOptions
from goldenedit.editors.emmet import EmmetOptions
from goldenedit.editors.finetune import ClippedOptions, LoraOptions
from goldenedit.editors.locft import LocftOptions
from goldenedit.editors.memit import MemitOptions
from goldenedit.editors.options import check_fields, check_number, default_of, is_relative, option
from goldenedit.editors.ultraedit import UltraEditOptions
from goldenedit.layer_scores import HUB_LAYER, SELECTORS, Selector, golden_layer, score_tensor
from goldenedit.registry import Registry, UnknownNameError, is_plain, meant
from goldenedit.requests import EditRequest, as_requests

Config = TypeVar("Config")
REGULARIZERS = ("rect", "prune", "sphere", "nas")
LAYER_PATTERNS = ("auto", "golden", "ladder", "upper", "window", "ends", "best")
LGA_LOSSES = ("sequence", "answer")
PHRASINGS = ("auto", "none")
OPTIMIZERS = ("normalized", "adam")
TOKENS_PER_DIMENSION = 3  # of a key, of text for its covariance
LEAST_TOKENS = 5_000  # of this text
ANSWER_DEPTH = 2 / 3  # of the layers: there a model has read what is asked, and has not yet decided what to say
_AS_PUBLISHED = {"phrasings": "none", "kept_questions": 0, "optimizer": "adam", "flat_directions": False}


def _described(cls: type[Config]) -> type[Config]:
    """Add the help of each option to the docstring of a config, which `help()` shows."""
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:"]
    for entry in fields(cls):  # type: ignore[arg-type]
        lines.append(f"    {entry.name}: {entry.metadata.get('help', '')} Default: {default_of(entry, True)!r}.")
    cls.__doc__ = "\n".join(lines) + "\n"
    return cls


@_described
@dataclass(repr=False)
class EditConfig(
    MemitOptions,
    EmmetOptions,
    AlphaEditOptions,
    ClippedOptions,
    LoraOptions,
    LocftOptions,
    CrispEditOptions,
    UltraEditOptions,
):
    """All options of an edit. Fields whose help ends in "filled in" are set by `get_edit_model`.

    The options of the built-in editors are keywords too; `goldenedit editors` lists which editor reads them. The
    options of other editors go into `options`.

    Raises:
        ValueError: An option has an invalid value. The message names the option and the allowed values.

    Example:
        ```python
        >>> from goldenedit import EditConfig
        >>> EditConfig(layer=3).target_layer
        3
        ```
    """

    method: str = field(default="gated", metadata={"help": "Name of the editor; `goldenedit editors` lists them."})
    layer: int | list[int] | str = field(
        default="lga",
        metadata={
            "help": "Layer to edit: a number, a list of numbers to edit together, a layer selector such as 'lga' or "
            "'auto', or 'hub:repo' (or 'hub:repo@revision') for the golden layers that a repository on the Hub has for "
            "these weights."
        },
    )
    layer_pattern: str = field(
        default="auto",
        metadata={
            "help": f"Which layers to edit together, one of {LAYER_PATTERNS}: what the editor is made for, only the "
            "golden layer, a ladder of layers from it upward, a tenth of the model apart, the upper two layers of a "
            "ladder of four, the window that ends at it, the first and the last layer of this window, or the layers "
            "with the best scores."
        },
    )
    pattern_layers: int = option(
        3, help="Number of layers of a ladder or window, or of the best layers.", least=1, whole=True
    )
    target_layer: int | list[int] | None = field(default=None, metadata={"help": "The layer to edit; filled in."})
    layer_scores: list[float | None] | None = field(
        default=None,
        metadata={"help": "Score of each layer by the selector, None for layers without a score; filled in."},
    )
    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Paths of the linear maps to edit, or one path with {} for the layer's number, for models whose "
            "down projections are not found automatically."
        },
    )

    proxy: str | list[EditRequest] | None = field(
        default=None,
        metadata={"help": "Facts for the layer selection: a file, or a list of requests; None for the packaged set."},
    )
    proxy_size: int | None = field(
        default=100, metadata={"help": "Number of proxy facts, from the first on; None for all."}
    )
    lga_loss: str = field(default="sequence", metadata={"help": f"Tokens in the loss of LGA, one of {LGA_LOSSES}."})
    tukey_kappa: float = field(default=1.0, metadata={"help": "Width of LGA's outlier fence in interquartile ranges."})

    answer_layer: int | None = field(
        default=None,
        metadata={
            "help": "Layer of the neurons that give the answers, behind the edited layers, for 'gated'; None for the "
            "one at two thirds of the depth, or the next one behind the edited layers."
        },
    )
    phrasings: str = field(
        default="auto",
        metadata={
            "help": "Wordings in which a fact is taught: 'auto' for its own text, as a question and in the chat "
            "template, or 'none' for its own text alone, as in the papers."
        },
    )
    kept_questions: int = option(
        12, help="Number of other questions about the subject whose answers an edit keeps.", least=0, whole=True
    )
    kept_factor: float = option(3.0, help="Weight of the KL divergence on these answers; 0 in the papers.", least=0.0)
    contexts: int = option(4, help="Number of prefixes of the prompt, including the empty one.", least=1, whole=True)
    context_length: int = option(10, help="Number of tokens of each sampled prefix.", least=1, whole=True)
    steps: int = option(40, help="Largest number of steps of the value optimization.", least=1, whole=True)
    optimizer: str = field(
        default="normalized",
        metadata={
            "help": "Optimizer of the values: 'normalized', steps along the gradient with momentum, or 'adam' as in "
            "the papers, which needs another lr (0.5)."
        },
    )
    lr: float = option(
        0.15, help="Learning rate of the value optimization; of 'normalized' in units of ||v0||.", above=0.0
    )
    flat_directions: bool = field(
        default=False,
        metadata={
            "help": "Whether values grow along directions that other text is not sensitive to, measured by gradients "
            "on the text of the key covariance."
        },
    )
    kl_factor: float = option(0.0625, help='Weight of the KL divergence on "{subject} is a".', least=0.0)
    weight_decay: float = option(0.5, help="Weight of the penalty ||delta|| / ||v0||^2.", least=0.0)
    clamp: float = option(4.0, help="Largest ||delta|| in units of ||v0||.", above=0.0)
    stop_loss: float = option(
        0.1,
        help="A subject is finished when the NLL of the least likely token of its new answers is below this in every "
        "wording; with 'adam' its mean over wordings.",
        least=0.0,
    )
    batch_size: int | str = field(
        default="auto",
        metadata={
            "help": "Number of facts whose values are optimized in one batch; 'auto' for as many as fit in memory."
        },
    )

    covariance: str = field(
        default="sampled",
        metadata={
            "help": "Text for the key covariance: 'sampled' from the model itself, 'identity' for no text (C = I), a "
            "text, JSON or JSON-lines file, or the name of a dataset on the Hub. Fused experts of large models need "
            "'identity'."
        },
    )
    covariance_tokens: int | None = option(
        None,
        help="Number of tokens of text for the key covariance; None for "
        f"{TOKENS_PER_DIMENSION} for each dimension of a key, but at least {LEAST_TOKENS:,}.",
        least=1,
        whole=True,
    )
    ridge: float = option(0.1, help="Ridge on the covariance's diagonal, in units of its mean eigenvalue.", least=0.0)
    anchor_bare_prompt: bool = field(
        default=True,
        metadata={
            "help": "Whether the edit must also hold at the key of the bare prompt, beside the averaged key; False "
            "in the papers."
        },
    )
    contrast: int = option(
        16,
        help="Number of invented subjects with the same last token that an edit should not affect.",
        least=0,
        whole=True,
    )
    contrast_weight: float = option(
        0.1, help="Weight of these subjects, relative to the trace of the covariance; 0 in the papers.", least=0.0
    )
    relative_constants: bool = field(
        default=True,
        metadata={
            "help": "Whether the editor's constants have units that are measured on the model, so that they mean the "
            "same for every model. With False they have no units, and their defaults are the published values."
        },
    )
    regularizer: str | None = field(
        default=None, metadata={"help": f"Regularizer of the finished update, one of {REGULARIZERS}, or None."}
    )
    dense_tolerance: float = option(
        0.01, help="Largest relative error of storing a dense update with low rank.", least=0.0
    )
    max_perplexity_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Undo a batch if the perplexity on plain statements, relative to the base model, is above this; "
            "None to skip this check."
        },
    )
    max_text_kl: float | None = field(
        default=None,
        metadata={
            "help": "Undo a batch if the KL divergence from the base model on plain statements, in nats a token, is "
            "above this; None to skip this check."
        },
    )
    seed: int = option(0, help="Seed of all sampling.", least=0, whole=True)
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options, by name, of editors from other packages."},
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            setattr(self, entry.name, _plain(getattr(self, entry.name)))
        _check_choice("lga_loss", self.lga_loss, LGA_LOSSES)
        _check_choice("layer_pattern", self.layer_pattern, LAYER_PATTERNS)
        _check_choice("phrasings", self.phrasings, PHRASINGS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        self._check_layers()
        if self.regularizer is not None:
            _check_choice("regularizer", self.regularizer, REGULARIZERS, "None")
        if self.layer_pattern not in ("auto", "golden") and not self.is_scored:
            scored = [record.name for record in SELECTORS.available() if record.is_scored]
            raise ValueError(
                f"EditConfig.layer_pattern {self.layer_pattern!r} needs scores of layers, but layer={self.layer!r} has "
                f"none. Use one of {scored}."
            )
        self._check_numbers()
        if not isinstance(self.covariance, str) or not self.covariance:
            raise ValueError(f"EditConfig.covariance must be a source of text, got {self.covariance!r}.")
        self._check_editor()
        if self.regularizer == "nas" and self.editor.learns != "values":
            raise ValueError(
                f"EditConfig.regularizer 'nas' rescales values, and the editor {self.method!r} inserts none. Set it to "
                "None."
            )
        _check_texts("target_modules", self.target_modules)
        self._check_proxy()

        self.__dict__["_is_checked"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option. An invalid value raises ValueError and leaves the config unchanged.

        A new `layer`, or another option that decides which layer the selector chooses, clears what the selector filled
        in, so that the next edit selects the layer again. `dataclasses.replace` clears nothing.
        """
        if not self.__dict__.get("_is_checked"):  # called by __init__
            object.__setattr__(self, name, value)
            return
        changed = copy.copy(self)
        values = changed.__dict__
        values["_is_checked"] = False
        if name == "target_layer" and value is not None and not isinstance(self.layer, str):
            values["layer"] = value  # a layer by its number is the target
        values[name] = value
        changed.__post_init__()
        if (self._decides_layer(name) or changed.pattern != self.pattern) and values[name] != getattr(self, name):
            values["layer_scores"] = None
            if isinstance(changed.layer, str):
                values["target_layer"] = None
        self.__dict__.update(values)

    def _decides_layer(self, name: str) -> bool:
        """Return whether the layer that the selector chooses depends on an option."""
        if name in ("layer", "layer_pattern", "pattern_layers", "tukey_kappa", "proxy", "proxy_size"):
            return True
        if not isinstance(self.layer, str):
            return False
        selector = SELECTORS.find(self.layer)
        words = ("method",) if selector is None else selector.depends_on  # golden layers from the Hub are by method
        return name in words or (name == "method" and "edit" in words)

    def __repr__(self) -> str:
        """Return the editor, the layer, and what differs from the defaults."""
        shown = {"method": self.method, "layer": self.layer}
        for entry in fields(self):
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            if getattr(self, entry.name) != default:
                shown[entry.name] = getattr(self, entry.name)
        return f"EditConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def _check_editor(self) -> None:
        if not isinstance(self.method, str):
            raise ValueError(f"EditConfig.method must be the name of an editor, got {self.method!r}.")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"EditConfig.options must map names to values, got {self.options!r}.")
        self.options = {name: _plain(value) for name, value in self.options.items()}
        if self.method not in EDITORS:
            raise UnknownNameError(
                f"Unknown method {self.method!r} in EditConfig.{meant(self.method, EDITORS.names())} Use one of "
                f"{EDITORS.names()}, or install the package that has it (entry point {EDITORS.group!r})."
            )
        self.editor.check_options(self.options)
        if isinstance(self, self.editor.options):  # built-in options are stored as keywords only
            entries = {entry.name: entry for entry in fields(self)}
            for name in list(self.options):
                value, keyword = self.options.pop(name), getattr(self, name)
                is_new = "_is_checked" not in self.__dict__
                if is_new and keyword not in (value, entries[name].default):
                    raise ValueError(
                        f"EditConfig.{name} is given twice, as {keyword!r} and in options as {value!r}. Give one."
                    )
                setattr(self, name, value)
        if self.covariance == "identity" and not self.editor.takes_identity:
            raise ValueError(
                f"The editor {self.method!r} needs key statistics, but EditConfig.covariance is 'identity'. Set it to "
                "a source of text."
            )

    def _check_proxy(self) -> None:
        if not isinstance(self.proxy, str | list | tuple | None):
            raise ValueError(f"EditConfig.proxy must be a file, a list of requests or None, got {self.proxy!r}.")
        if isinstance(self.proxy, list | tuple):
            self.proxy = as_requests(self.proxy)

    def _check_layers(self) -> None:
        if isinstance(self.layer, str):
            is_shared = self.layer.startswith(HUB_LAYER) and self.layer != HUB_LAYER
            if not is_shared and self.layer not in SELECTORS:
                raise UnknownNameError(
                    f"Unknown layer selector {self.layer!r} in EditConfig.{meant(self.layer, SELECTORS.names())} Use "
                    f"one of {SELECTORS.names()}, 'hub:repo', a layer number or a list of numbers, or install the "
                    f"package that has it (entry point {SELECTORS.group!r})."
                )
            if self.target_layer is not None:
                self.target_layer = _layer_numbers(self.target_layer, "target_layer")
        else:
            self.layer = self.target_layer = _layer_numbers(self.layer)
        for score in _scores(self.layer_scores):
            check_number("EditConfig.layer_scores", score, least=-sys.float_info.max, optional=True)

    def _check_numbers(self) -> None:
        bounded = {entry.name: entry for entry in fields(self) if "whole" in entry.metadata}
        check_fields("EditConfig", bounded, {name: getattr(self, name) for name in bounded})
        for entry in fields(self):
            if isinstance(entry.default, bool) and not isinstance(value := getattr(self, entry.name), bool):
                raise ValueError(f"EditConfig.{entry.name} must be True or False, got {value!r}.")
        if self.batch_size != "auto":
            check_number("EditConfig.batch_size", self.batch_size, least=1, whole=True)
        check_number("EditConfig.answer_layer", self.answer_layer, least=0, whole=True, optional=True)
        check_number("EditConfig.proxy_size", self.proxy_size, least=1, whole=True, optional=True)
        check_number("EditConfig.max_perplexity_ratio", self.max_perplexity_ratio, least=1.0, optional=True)
        check_number("EditConfig.max_text_kl", self.max_text_kl, least=0.0, optional=True)
        if self.dense_tolerance >= 1:
            raise ValueError(f"EditConfig.dense_tolerance must be below 1, got {self.dense_tolerance}.")
        check_number("EditConfig.tukey_kappa", self.tukey_kappa, least=0.0, infinite=True)

    @property
    def editor(self) -> Editor:
        """The editor that `method` names.

        Raises:
            ValueError: The package that has it is not installed.
        """
        return EDITORS.get(self.method)

    def text_tokens(self, width: int) -> int:
        """Return the number of tokens of text for the key covariance.

        Args:
            width: Dimensions of a key, of the layer with the widest ones.
        """
        if self.covariance_tokens is not None:
            return self.covariance_tokens
        return max(LEAST_TOKENS, TOKENS_PER_DIMENSION * width)

    @property
    def pattern(self) -> str:
        """The pattern of layers in use: `layer_pattern`, or the one that the editor is made for."""
        if self.layer_pattern != "auto":
            return self.layer_pattern
        return self.editor.pattern if self.is_scored and self.has_editor else "golden"

    @property
    def has_editor(self) -> bool:
        """Whether the package that has the editor is installed and can be loaded."""
        return EDITORS.find(self.method) is not None

    @property
    def selector(self) -> Selector | None:
        """The layer selector that `layer` names; None for numbers and for golden layers from the Hub."""
        if not isinstance(self.layer, str) or self.layer.startswith(HUB_LAYER):
            return None
        return SELECTORS.get(self.layer)

    @property
    def is_scored(self) -> bool:
        """Whether the layer selector returns a score for each layer."""
        return self.selector is not None and self.selector.is_scored

    @property
    def fence(self) -> float:
        """Width of the outlier fence of the layer scores: `tukey_kappa` for LGA, infinity for other selectors."""
        selector = SELECTORS.find(self.layer) if isinstance(self.layer, str) else None
        return self.tukey_kappa if selector is not None and selector.fence else math.inf

    @property
    def editor_options(self) -> dict[str, Any]:
        """The values of the editor's options, by name; None for a default that depends on the units in use."""
        options = self.editor.options
        if isinstance(self, options):
            return {name: getattr(self, name) for name in self.editor.fields}
        defaults = options()
        inherited = {entry.name for base in options.__mro__[1:] if is_dataclass(base) for entry in fields(base)}
        keywords = {
            entry.name: value
            for entry in fields(self)
            # An editor may have another default for an option it inherits, so only values that differ count.
            if entry.name in inherited and (value := getattr(self, entry.name)) != entry.default
        }
        return {**{name: getattr(defaults, name) for name in self.editor.fields}, **keywords, **self.options}

    def constant(self, name: str) -> Any:
        """Return the value of an editor's option, or its default in the units in use."""
        value = self.editor_options[name]
        return default_of(self.editor.fields[name], self.relative_constants) if value is None else value

    def resolve(self, problem: Any) -> Any:
        """Return the options of the editor as its maths reads them, with the units of a problem multiplied out."""
        return self.editor.resolve(self.editor_options, self.relative_constants, problem)

    def solve(self, problem: Problem) -> LowRankDelta | Tensor:
        """Return the editor's solution of a problem with the options of this config: factors, or a dense change."""
        problem = replace(problem, options=self.resolve(problem))
        return problem.folded(self.editor.solve(problem))

    @property
    def has_units(self) -> bool:
        """Whether an option of the editor has a unit that is measured on the model."""
        return any(is_relative(entry) and entry.metadata["unit"] for entry in self.editor.fields.values())

    @property
    def target_layers(self) -> list[int]:
        """The layers to edit, ascending; empty until the selector has run."""
        layers = self.target_layer if self.target_layer is not None else self.layer
        if isinstance(layers, str):
            return []
        return [layers] if isinstance(layers, int) else sorted(layers)

    @property
    def golden_layer(self) -> int | None:
        """The layer that the selector chose, by which `layer_pattern` places those to edit; None without scores."""
        scores = score_tensor(self.layer_scores)
        return golden_layer(scores, self.fence) if isinstance(self.layer, str) and scores.isfinite().any() else None

    @property
    def layers_in_words(self) -> str:
        """The layers to edit, and who chose them; empty until the selector has run."""
        layers = ", ".join(map(str, self.target_layers))
        if not layers or not isinstance(self.layer, str):
            return layers and f"{layers}, chosen by hand"
        selector = self.layer.replace(HUB_LAYER, "the golden layers in ")
        if self.golden_layer is None or self.target_layers == [self.golden_layer]:
            return f"{layers}, chosen by {selector}"
        return f"{layers}, placed by the golden layer {self.golden_layer}, which {selector} chose"

    def layer_of_answers(self, num_layers: int) -> int | None:
        """Return the layer of the neurons that give the answers; None if no layer comes behind the edited ones.

        Args:
            num_layers: Number of layers of the model.

        Raises:
            ValueError: `answer_layer` does not come behind the edited layers, or the model has no such layer.
        """
        last = self.target_layers[-1]
        if self.answer_layer is None:
            return max(round(ANSWER_DEPTH * num_layers), last + 1) if last + 1 < num_layers else None
        if not last < self.answer_layer < num_layers:
            raise ValueError(
                f"EditConfig.answer_layer {self.answer_layer} must come behind the edited layers {self.target_layers}, "
                f"and before layer {num_layers}, which the model does not have."
            )
        return self.answer_layer

    def without_sources(self) -> EditConfig:
        """Return a copy without names of files, datasets or repositories, so that a stranger's config reads none.

        The copy samples texts from the model, compares layers on the packaged facts, and has the numbers of golden
        layers that came from the Hub.
        """
        config = copy.deepcopy(self)
        values = vars(config)  # without the checks, which need the editor to be installed
        if self.covariance not in ("sampled", "identity"):
            values["covariance"] = "sampled"
        values["proxy"] = None
        if isinstance(self.layer, str) and self.layer.startswith(HUB_LAYER):
            values["layer"] = self.target_layer if self.target_layer is not None else "lga"
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values."""
        record = asdict(self)
        if isinstance(self.proxy, list):
            record["proxy"] = [request.to_dict() for request in self.proxy]
        if math.isinf(self.tukey_kappa):
            record["tukey_kappa"] = "inf"
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditConfig:
        """Read a config from the record that `to_dict` returned.

        Raises:
            ValueError: An option is unknown, or its value is invalid.
            UnknownNameError: The package that has the editor or the layer selector is not installed.
        """
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(record) - set(known)):
            raise ValueError(f"Unknown options {unknown} in EditConfig. Its options are {known}.")
        values = dict(record)
        if {"lr", "contexts", "method"} <= set(record) and "optimizer" not in record:  # saved before these options
            values = {**_AS_PUBLISHED, **values}
        if values.get("tukey_kappa") == "inf":
            values["tukey_kappa"] = math.inf
        return cls(**values)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> EditConfig:
        """Read a saved config, even if the package of its editor or layer selector is not installed.

        The saved values can be read. Only `editor` and `selector`, and what uses them, raise an error then.

        Raises:
            ValueError: An option is unknown, or its value is invalid.
        """
        registries: dict[str, Registry[Any]] = {"method": EDITORS, "layer": SELECTORS}
        missing: dict[str, Any] = {
            name: value
            for name, registry in registries.items()
            if isinstance(value := record.get(name), str) and is_plain(value) and registry.find(value) is None
        }
        if not missing:
            return cls.from_dict(record)
        if "layer" in missing and record.get("layer_pattern", "auto") not in ("auto", "golden"):
            missing["layer_pattern"] = record["layer_pattern"]
        if "method" in missing:
            if not isinstance(options := record.get("options", {}), Mapping):
                raise ValueError(f"EditConfig.options must map names to values, got {options!r}.")
            missing["options"] = dict(options)
        config = cls.from_dict({name: value for name, value in record.items() if name not in missing})
        vars(config).update(missing)
        return config


def _plain(value: Any) -> Any:
    """Return a path as a string and a NumPy number as a Python number, as JSON needs them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _check_choice(name: str, value: str, choices: Sequence[str], alternative: str | None = None) -> None:
    if value not in choices:
        more = f", or {alternative}" if alternative else ""
        raise ValueError(
            f"Unknown {name} {value!r} in EditConfig.{meant(value, choices)} Use one of {list(choices)}{more}."
        )


def _check_texts(name: str, value: Any) -> None:
    texts = value if isinstance(value, list | tuple) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"EditConfig.{name} must be a text or a list of texts, got {value!r}.")


def _scores(scores: Any) -> list[Any]:
    if not isinstance(scores, list | None):
        raise ValueError(f"EditConfig.layer_scores must be a list of numbers, got {scores!r}.")
    return scores or []


def _layer_numbers(layer: Any, name: str = "layer") -> int | list[int]:
    plain = layer.tolist() if hasattr(layer, "tolist") else layer  # an array or a tensor
    numbers = [_whole(number) for number in (plain if isinstance(plain, list | tuple | range) else [plain])]
    valid = [number for number in numbers if number is not None and number >= 0]
    if not valid or len(valid) != len(numbers):
        raise ValueError(
            f"EditConfig.{name} must be the number of a layer, counted from 0, or a list of numbers, got {layer!r}."
        )
    if len(set(valid)) != len(valid):
        raise ValueError(f"EditConfig.{name} has a layer twice: {layer!r}. Give each layer once.")
    return valid[0] if len(valid) == 1 else sorted(valid)


def _whole(number: Any) -> int | None:
    """Return a whole number of any type, such as NumPy's, as an int, and None for anything else."""
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None


def __getattr__(name: str) -> Any:
    """Return what was a constant here, until the next version."""
    if name in ("METHODS", "TRAINED"):
        editors = EDITORS.available()
        values = [editor.name for editor in editors if name == "METHODS" or editor.learns != "values"]
    elif name in ("LAYER_SELECTORS", "SCORED_SELECTORS"):
        selectors = SELECTORS.available()
        values = [selector.name for selector in selectors if name == "LAYER_SELECTORS" or selector.is_scored]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"goldenedit.config.{name} is gone: use goldenedit.editors.EDITORS and goldenedit.layer_selection.SELECTORS.",
        FutureWarning,
        stacklevel=2,
    )
    return tuple(values)
