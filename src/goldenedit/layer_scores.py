"""What every layer selector is and returns: scores, the layers chosen, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from goldenedit.cost import Cost
from goldenedit.registry import Registry

HUB_LAYER = "hub:"  # before the name of a repository with golden layers
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Selector:
    """A layer selector: its function, and what the rest of the library must know of it.

    Attributes:
        name: Its name in `EditConfig.layer`.
        function: From `(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig)` to the scores of the
            layers, `(num_layers,)` with NaN where a layer has none; with `is_scored=False` to a list of layers.
        paper: Where it was published.
        fence: Whether layers whose scores are outliers are left out (`EditConfig.tukey_kappa`).
        depends_on: What the scores depend on beside model and facts, by which they are cached: names of fields of
            EditConfig, `"covariance"` for those of the key statistics, and `"edit"` for all that an edit depends on.
        is_scored: Whether it gives every layer a score.
        needs_facts: Whether it looks at facts.
        is_shared: Whether the processes of a launcher share its work.
        version: Version of its algorithm: scores that another version cached are not used.
    """

    name: str
    function: Callable[..., Any]
    paper: str = ""
    fence: bool = False
    depends_on: tuple[str, ...] = ()
    is_scored: bool = True
    needs_facts: bool = True
    is_shared: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.depends_on, str):
            raise TypeError(f"The layer selector {self.name!r} depends on a tuple of words, not {self.depends_on!r}.")


SELECTORS: Registry[Selector] = Registry("layer selector", "goldenedit.layer_selection", "goldenedit.layer_selectors")


def selector(name: str, **record: Any) -> Callable[[Function], Function]:
    """Register a function as the layer selector of a name; the other arguments are those of `Selector`.

    Example:
        ```python
        >>> import torch
        >>> from goldenedit.layer_selection import selector
        >>> @selector("last", depends_on=())
        ... def last(lm, facts, config):
        ...     return torch.arange(lm.architecture.num_layers, dtype=torch.float64)
        ```

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Function) -> Function:
        SELECTORS.add(Selector(name, function, **record))
        return function

    return register


@dataclass(frozen=True)
class LayerSelection:
    """A layer selector's answer.

    Attributes:
        selector: Its name.
        scores: Score of each layer, None where it has none; None for selectors without scores.
        layers: The layers to edit.
        facts: Number of facts that were looked at.
        cost: Seconds and floating-point operations that the scores took when they were computed, without key
            statistics, which are kept for edits too.
        forward_equivalents: The same operations in plain forwards of the model over the facts, each with its new
            answer: what a fact costs, in forwards.
    """

    selector: str
    scores: list[float | None] | None
    layers: list[int]
    facts: int = 0
    cost: Cost = field(default_factory=Cost)
    forward_equivalents: float = 0.0

    def score_tensor(self) -> Tensor:
        """Return the scores, `(num_layers,)` float64, NaN where a layer has none."""
        return score_tensor(self.scores)

    def within_fence(self, kappa: float) -> Tensor:
        """Return which layers may be chosen: with LGA those within the Tukey filter, else those with a score."""
        known = SELECTORS.find(self.selector)
        return tukey_filter(self.score_tensor(), kappa if known is not None and known.fence else math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerSelection:
        """Read what `to_dict` returned."""
        return cls(**{**record, "cost": Cost(**record["cost"])})


def score_tensor(scores: Sequence[float | None] | None) -> Tensor:
    """Return scores as JSON has them as a float64 tensor, NaN for None."""
    return torch.tensor([math.nan if score is None else score for score in scores or []], dtype=torch.float64)


def tukey_filter(scores: Tensor, kappa: float = 1.0) -> Tensor:
    """Return which scores lie in `[Q1 - kappa * IQR, Q3 + kappa * IQR]`, with linear quantiles; NaN never does.

    Layers with massive activations score far above all others and are never the best to edit: the filter drops them.

    Args:
        kappa: Width of the fence in interquartile ranges; infinity keeps every layer.
    """
    known = scores[~scores.isnan()]
    if kappa == float("inf"):
        return ~scores.isnan()
    q1, q3 = torch.quantile(known, torch.tensor([0.25, 0.75], dtype=known.dtype))
    fence = kappa * (q3 - q1)
    return (scores >= q1 - fence) & (scores <= q3 + fence)


def golden_layer(scores: Tensor, kappa: float = 1.0) -> int:
    """Return the layer of the largest score that passes the Tukey filter.

    Raises:
        ValueError: No score does: there is none, or none is finite.
    """
    passed = tukey_filter(scores, kappa) & scores.isfinite()
    if not passed.any():
        raise ValueError("No layer has a finite score: load the model in float32 or bfloat16, or name the layer.")
    return int(scores.masked_fill(~passed, -torch.inf).argmax())
