"""Layer selectors and what they return: scores, the chosen layers, and their cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from goldenedit import html
from goldenedit.cost import Cost
from goldenedit.registry import Registry

_DRAWS, _RARE = 1000, 0.05
HUB_LAYER = "hub:"  # prefix of the name of a repository with golden layers
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Selector:
    """A layer selector: its function, and what the library must know to call it.

    Attributes:
        name: The value of `EditConfig.layer` that selects it.
        function: Takes `(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig)` and returns the scores
            of all layers, `(num_layers,)`, with NaN for layers without a score; or `(facts, num_layers)`, scores of
            each fact, whose sum over facts is the score. With `is_scored=False` it returns a list of layers.
        paper: Paper and section.
        scores_of: Name of the selector whose cached scores it shares. By default it shares none.
        fence: Whether layers with outlier scores are never chosen (see `EditConfig.tukey_kappa`).
        depends_on: What the scores depend on beside model and facts, as part of their cache key. Words are fields of
            EditConfig, `"covariance"` for the options of the key statistics, or `"edit"` for the editor and all options
            of an edit.
        is_scored: Whether it returns a score for each layer.
        needs_facts: Whether it reads facts.
        is_shared: Whether the processes of a launcher share its work.
        version: Version of its algorithm. Scores cached by another version are not used.
    """

    name: str
    function: Callable[..., Any]
    paper: str = ""
    scores_of: str = ""
    fence: bool = False
    depends_on: tuple[str, ...] = ()
    is_scored: bool = True
    needs_facts: bool = True
    is_shared: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.depends_on, str):
            raise TypeError(
                f"depends_on of the layer selector {self.name!r} must be a tuple of words, got {self.depends_on!r}."
            )


SELECTORS: Registry[Selector] = Registry("layer selector", "goldenedit.layer_selection", "goldenedit.layer_selectors")


def selector(name: str, **record: Any) -> Callable[[Function], Function]:
    """Register a function as the layer selector `name`. The other keyword arguments are those of `Selector`.

    Example:
        ```python
        >>> import torch
        >>> from goldenedit.layer_selection import selector
        >>> @selector("last", depends_on=())
        ... def last(lm, facts, config):
        ...     return torch.arange(lm.architecture.num_layers, dtype=torch.float64)
        ```

    Raises:
        ValueError: Another layer selector has this name.
    """

    def register(function: Function) -> Function:
        SELECTORS.add(Selector(name, function, **record))
        return function

    return register


@dataclass(frozen=True)
class LayerSelection:
    """The result of a layer selector.

    Attributes:
        selector: The selector's name.
        scores: Score of each layer, None for a layer without a score; None for selectors without scores.
        layers: The layers to edit.
        facts: Number of facts that the selector read.
        cost: Seconds and floating-point operations of the computation of the scores. Key statistics do not count,
            because edits need them too.
        forward_equivalents: Number of plain forwards with the same cost in operations, per fact with its new answer.
        by_fact: Scores of each fact, whose sum is the score of a layer; None if the selector gives none.
        plateau: Layers that are within the noise, as somebody shared them; None if they are not known.
        kappa: `EditConfig.tukey_kappa`, with which the layers were selected.
        is_cached: Whether the scores come from the cache; the cost is then that of an earlier call.
    """

    selector: str
    scores: list[float | None] | None
    layers: list[int]
    facts: int = 0
    cost: Cost = field(default_factory=Cost)
    forward_equivalents: float = 0.0
    by_fact: list[list[float | None]] | None = field(default=None, repr=False, compare=False)
    plateau: list[int] | None = None
    kappa: float = field(default=1.0, repr=False, compare=False)
    is_cached: bool = field(default=False, repr=False, compare=False)

    def score_tensor(self) -> Tensor:
        """Return the scores, `(num_layers,)` float64, NaN for layers without a score."""
        return score_tensor(self.scores)

    def golden(self, kappa: float | None = None) -> int | None:
        """Return the layer with the highest score that may be chosen; None without finite scores.

        Editors that work at several layers place them by it (`EditConfig.layer_pattern`).

        Args:
            kappa: `EditConfig.tukey_kappa`; by default the one with which the layers were selected.
        """
        scores = self.score_tensor()
        return golden_layer(scores, self._fence(kappa)) if scores.isfinite().any() else None

    def within_fence(self, kappa: float | None = None) -> Tensor:
        """Return which layers may be chosen: for LGA those that pass the Tukey filter, else those with a score."""
        return tukey_filter(self.score_tensor(), self._fence(kappa))

    def _fence(self, kappa: float | None) -> float:
        """Return the width of the fence of this selector; infinity if it has none."""
        record, kappa = SELECTORS.find(self.selector), self.kappa if kappa is None else kappa
        return kappa if record is not None and record.fence else math.inf

    def within_noise(self) -> list[int] | None:
        """Return the layers that other facts of the same kind might have chosen; None if it is not known.

        The golden layer is chosen again on facts that are drawn with replacement, 1,000 times. Layers that are chosen
        in at least 5% of these draws are within the noise.
        """
        if self.by_fact is None:
            return self.plateau
        by_fact = torch.stack([score_tensor(of_fact) for of_fact in self.by_fact])
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(by_fact), (_DRAWS, len(by_fact)), generator=generator)
        fence = self._fence(None)
        chosen = Counter(golden_layer(by_fact[draw].sum(0), fence) for draw in draws)
        golden = self.golden()
        return sorted(layer for layer, count in chosen.items() if count >= _RARE * _DRAWS or layer == golden)

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as JSON values, without the scores of each fact, `kappa` and `is_cached`."""
        values = asdict(self)
        del values["by_fact"], values["kappa"], values["is_cached"]
        return values

    def __str__(self) -> str:
        """Return what was chosen, from how much, and at which cost."""
        layers = ", ".join(map(str, self.layers))
        plural = "s" if len(self.layers) > 1 else ""
        golden = self.golden() if len(self.layers) > 1 else None  # one layer is the golden one, whatever the fence
        highest = "" if golden is None else f", whose golden layer is {golden}"
        cached = ", from the cache" if self.is_cached else ""
        cost = f"; {self.facts} facts, {self.cost.seconds:.1f} s{cached}" if self.facts else ""
        return f"Layer{plural} {layers}, chosen by {self.selector}{highest}{self.noise}{cost}"

    @property
    def noise(self) -> str:
        """Which layers are within the noise, in words; empty if it is not known."""
        if (near := self.within_noise()) is None or (golden := self.golden()) is None:
            return ""
        if near == [golden]:
            return " (other facts would choose it too)"
        return f" (any of {in_words(near)} is within the noise)"

    def _repr_html_(self) -> str:
        """Return the scores as bars, for notebooks; the golden layer and those to edit are emphasized."""
        if self.scores is None:
            return html.table((), (), str(self))
        scores = self.score_tensor()
        low, high, outside = 0.0, 1.0, list[int]()
        if (golden := self.golden()) is not None:  # outliers would make all other bars short
            within, known = self.within_fence(), scores.isfinite()
            inside = scores[within & known]
            low, high = min(0.0, inside.min().item()), inside.max().item()
            outside = (~within & known).nonzero()[:, 0].tolist()
        emphasized = self.layers if golden is None or len(self.layers) < 2 else [*self.layers, golden]
        rows = [
            (
                layer,
                "-" if score is None else f"{score:.4g}",
                "outside the fence" if layer in outside else "" if score is None else _bar(score, low, high),
            )
            for layer, score in enumerate(self.scores)
        ]
        return html.table(("layer", "score", ""), rows, str(self), emphasized)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerSelection:
        """Read a selection from the record that `to_dict` returned."""
        return cls(**{**record, "cost": Cost(**record["cost"])})


def in_words(places: Sequence[int], names: Sequence[int] | None = None) -> str:
    """Return ascending numbers in words.

    Args:
        places: The numbers.
        names: What the numbers are called, by number; themselves by default.

    Example:
        ```python
        >>> in_words([2, 3, 4, 8])
        '2 to 4, 8'
        ```
    """
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    ends = [[place if names is None else names[place] for place in (run[0], run[-1])] for run in runs]
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in ends)


def _bar(score: float, low: float, high: float) -> html.Bar | str:
    return html.Bar((score - low) / max(high - low, 1e-30)) if math.isfinite(score) else ""


def score_tensor(scores: Sequence[float | None] | None) -> Tensor:
    """Return a list of scores as a float64 tensor, with NaN for None."""
    return torch.tensor([math.nan if score is None else score for score in scores or []], dtype=torch.float64)


def tukey_filter(scores: Tensor, kappa: float = 1.0) -> Tensor:
    """Return which scores lie in `[Q1 - kappa * IQR, Q3 + kappa * IQR]`, with linear quantiles. NaN never does.

    Layers with massive activations have far higher scores than all others, but are never the best to edit.

    Args:
        scores: `(num_layers,)`.
        kappa: Width of the fence in interquartile ranges. Infinity keeps all layers with a score.
    """
    if kappa == float("inf"):
        return ~scores.isnan()
    known = scores[~scores.isnan()]
    q1, q3 = torch.quantile(known, torch.tensor([0.25, 0.75], dtype=known.dtype))
    fence = kappa * (q3 - q1)
    return (scores >= q1 - fence) & (scores <= q3 + fence)


def golden_layer(scores: Tensor, kappa: float = 1.0) -> int:
    """Return the layer with the largest finite score that passes the Tukey filter.

    Raises:
        ValueError: There is no such score.
    """
    is_eligible = tukey_filter(scores, kappa) & scores.isfinite()
    if not is_eligible.any():
        raise ValueError(
            "No layer has a finite score. Load the model in float32 or bfloat16, or set EditConfig.layer to a number."
        )
    return int(scores.masked_fill(~is_eligible, -torch.inf).argmax())
