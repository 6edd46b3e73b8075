"""The problem that an editor solves: keys, residuals, and statistics of the text that must not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.keys import FactKeys
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.options import resolved
from goldenedit.editors.statistics import KeyStatistics, UnreadStatistics


@dataclass(frozen=True)
class Problem:
    """The problem at one layer of an editor that inserts values under keys.

    In a paper's `Delta K = R`, `K` is `problem.keys` and `R` is `problem.residuals`, of equal width. A fact with two
    keys has a column for each. The library folds the columns of a fact back into one (see `folded`).

    Attributes:
        facts: Keys of the N facts, for editors that treat the keys of one fact differently.
        fact_residuals: `(d_out, N)`, the difference between the new value and the current value of each fact.
        text_statistics: Second moment of the keys of other text, without contrast keys.
        options: The editor's options as its maths reads them, an instance of its options dataclass.
        previous: `(d_in, P)`, keys of earlier edits, for editors that preserve them; None without earlier edits.
    """

    facts: Sequence[FactKeys]
    fact_residuals: Tensor
    text_statistics: KeyStatistics
    options: Any = None
    previous: Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Tensor,
        residuals: Tensor,
        statistics: KeyStatistics | None = None,
        options: Any = None,
        previous: Tensor | None = None,
    ) -> Problem:
        """Return a problem of plain matrices, for tests of editors.

        Args:
            keys: `(d_in, N)`, one key per fact.
            residuals: `(d_out, N)`.
            statistics: Second moment of other text. Defaults to the identity.
            options: The editor's options without units. Values that are None become the published ones.
            previous: `(d_in, P)`, keys of earlier edits.
        """
        facts = [FactKeys(key, key) for key in keys.T]
        problem = cls(facts, residuals, KeyStatistics(None) if statistics is None else statistics, options, previous)
        return problem if options is None else replace(problem, options=resolved(options, False, problem.unit))

    @cached_property
    def owners(self) -> Tensor:
        """`(M,)`, the fact of each column of `keys`: all facts, then those that are also anchored at their bare key."""
        anchored = [index for index, fact in enumerate(self.facts) if fact.anchor_bare]
        return torch.tensor([*range(len(self.facts)), *anchored])

    @cached_property
    def keys(self) -> Tensor:
        """`K`, `(d_in, M)`: the keys to insert residuals under."""
        bare = [fact.bare for fact in self.facts if fact.anchor_bare]
        return torch.stack([*(fact.mean for fact in self.facts), *bare], 1)

    @cached_property
    def residuals(self) -> Tensor:
        """`R`, `(d_out, M)`: the residual of each key."""
        return self.fact_residuals[:, self.owners]

    @cached_property
    def statistics(self) -> KeyStatistics:
        """`C`: the second moment of other text plus the contrast keys of all facts, each with its full weight.

        With many facts the contrast keys outweigh the text, and that works better: on SmolLM2 with 40 facts NS is 0.795
        with the full weight for each fact, and 0.765 if all facts share the weight of one.
        """
        contrasts = [fact.contrast for fact in self.facts if fact.contrast is not None]
        return self.text_statistics.with_contrast(torch.cat(contrasts, 1)) if contrasts else self.text_statistics

    def unit(self, name: str) -> float:
        """Return the size of a unit that options are measured in (see `relative`).

        - `"key energy"`: the mean squared length of the keys.
        - `"key energy per trace"`: the key energy divided by the trace of `C`, to weigh text against facts.
        - `"mean eigenvalue"`: the mean eigenvalue of `C`.

        Raises:
            ValueError: The unit is unknown.
        """
        if name == "mean eigenvalue":
            return self.text_statistics.mean_eigenvalue
        energy = self.keys.square().sum(0).mean().item()
        if name == "key energy":
            return energy
        if name == "key energy per trace":
            return energy / self.text_statistics.trace(len(self.keys))
        raise ValueError(f"Unknown unit {name!r}: use 'key energy', 'key energy per trace' or 'mean eigenvalue'.")

    def folded(self, delta: LowRankDelta | Tensor) -> LowRankDelta | Tensor:
        """Return a delta of rank N from one of rank M whose `B` is `residuals`. Other changes are returned unchanged.

        The keys of one fact have equal columns in `B`, so their rows of `A` are summed.
        """
        count = len(self.facts)
        if not isinstance(delta, LowRankDelta) or not torch.equal(delta.B, self.residuals.float()):
            return delta
        A = delta.A.new_zeros(count, delta.A.shape[1]).index_add(0, self.owners, delta.A)
        return replace(delta, A=A, B=self.fact_residuals.float())


@dataclass(frozen=True)
class GradientProblem:
    """The problem at one layer of an editor that reads gradients, with one row per token of each answer.

    Attributes:
        inputs: `(n, d_in)`, inputs of the edited matrix.
        outputs: `(n, d_out)`, its outputs.
        gradients: `(n, d_out)`, gradients of the answers' loss with respect to the outputs.
        moments: Moments of `[inputs; gradients]` over all edits so far, including this one.
        options: The editor's options as its maths reads them.
    """

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor
    moments: RunningMoments
    options: Any = None

    def unit(self, name: str) -> float:
        """Return the size of a unit that options are measured in (see `relative`).

        - `"input energy"`: the mean squared length of the inputs.
        - `"output length"`: the mean length of the outputs, divided by the length of a step along normalized inputs and
          gradients, which is about `d_in * d_out^0.5`.

        Raises:
            ValueError: The unit is unknown.
        """
        if name == "input energy":
            return self.inputs.square().sum(1).mean().item()
        if name == "output length":
            d_in, d_out = self.inputs.shape[1], self.outputs.shape[1]
            # ||h^||^2 is about d_in and ||g^|| about d_out^0.5, so that the step is as long as an output.
            return self.outputs.norm(dim=1).mean().item() / (d_in * d_out**0.5)
        raise ValueError(f"Unknown unit {name!r}: use 'input energy' or 'output length'.")


@dataclass(frozen=True)
class TrainingProblem:
    """The problem at one layer of an editor that trains a change.

    Attributes:
        d_in: Width of the inputs of the edited matrix.
        d_out: Width of its outputs.
        generator: Random generator for initial values, seeded by the config.
        options: The editor's options as its maths reads them.
        statistics: Second moment of the inputs on other text, with `reads=("covariance",)`.
        output_gradients: `(d_out, d_out)`, second moment `E[g g^T]` of the gradients of the loss on this text at the
            outputs, with `reads=("output_gradients",)`; else None.
        earlier: The changes of this map by the edits that are on.
        weight_size: Root mean square of the entries of the edited matrix.
    """

    d_in: int
    d_out: int
    generator: torch.Generator
    options: Any = None
    statistics: KeyStatistics = field(default_factory=UnreadStatistics)
    output_gradients: Tensor | None = None
    earlier: Sequence[LowRankDelta] = ()
    weight_size: float = 1.0

    def unit(self, name: str) -> float:
        """Return the size of a unit that options are measured in (see `relative`).

        - `"weight"`: the root mean square of the entries of the edited matrix. Models differ by a factor of ten, and a
          step of Adam has the size of its learning rate in each entry.

        Raises:
            ValueError: The unit is unknown.
        """
        if name != "weight":
            raise ValueError(f"Unknown unit {name!r}: use 'weight'.")
        return self.weight_size
