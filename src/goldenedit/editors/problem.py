"""What an editor is asked: which keys must answer with which residuals, beside which other text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.keys import FactKeys
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.options import resolved
from goldenedit.editors.statistics import KeyStatistics


@dataclass(frozen=True)
class Problem:
    """What an editor that inserts values under keys is asked at one layer.

    A paper's `Delta K = R` is `problem.keys` and `problem.residuals`, of equal width. A fact whose edit must answer to
    more than one key has a column for each; whoever called the editor folds them back into one.

    Attributes:
        facts: Keys of the N facts, for editors that treat a fact's keys differently.
        fact_residuals: `(d_out, N)`, what is missing to the wanted value of each fact.
        text_statistics: Second moment of the keys of other text, without contrast keys.
        options: The editor's options, as its maths reads them: an instance of its options dataclass.
        previous: `(d_in, M)`, keys of earlier edits, for editors that spare them; None where there are none.
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
        """Return the problem of plain matrices, as a test of an editor poses it.

        Args:
            keys: `(d_in, N)`, a key for each fact.
            residuals: `(d_out, N)`.
            statistics: Second moment of other text; the identity by default.
            options: The editor's options as its maths reads them, without units; what is None is as published.
        """
        facts = [FactKeys(key, key) for key in keys.T]
        problem = cls(facts, residuals, KeyStatistics(None) if statistics is None else statistics, options, previous)
        return problem if options is None else replace(problem, options=resolved(options, False, problem.unit))

    @cached_property
    def owners(self) -> Tensor:
        """Index of the fact of each column of `keys`: every fact, then those that are anchored at their bare key."""
        anchored = [index for index, fact in enumerate(self.facts) if fact.anchor_bare]
        return torch.tensor([*range(len(self.facts)), *anchored])

    @cached_property
    def keys(self) -> Tensor:
        """`(d_in, M)`, the keys that must be answered to, `K`."""
        bare = [fact.bare for fact in self.facts if fact.anchor_bare]
        return torch.stack([*(fact.mean for fact in self.facts), *bare], 1)

    @cached_property
    def residuals(self) -> Tensor:
        """`(d_out, M)`, what each key must be answered with, `R`."""
        return self.fact_residuals[:, self.owners]

    @cached_property
    def statistics(self) -> KeyStatistics:
        """The second moment of other text, `C`, with the contrast keys of all facts among it, each weighed as alone.

        With many facts they outweigh the text. On SmolLM2 and 40 facts that is the better prior: NS 0.795 with the
        full weight of each, 0.765 with the weight of one fact's for all of them together.
        """
        contrasts = [fact.contrast for fact in self.facts if fact.contrast is not None]
        return self.text_statistics.with_contrast(torch.cat(contrasts, 1)) if contrasts else self.text_statistics

    def unit(self, name: str) -> float:
        """Return the size of a unit that options are measured in (see `relative`).

        - `"key energy"`: the mean squared length of the keys.
        - `"key energy per trace"`: the same, over the trace of `C`: weighs text against facts.
        - `"mean eigenvalue"`: the mean eigenvalue of `C`.

        Raises:
            ValueError: There is no such unit.
        """
        if name == "mean eigenvalue":
            return self.text_statistics.spectrum[0].mean().item()
        energy = self.keys.square().sum(0).mean().item()
        if name == "key energy":
            return energy
        if name == "key energy per trace":
            return energy / self.text_statistics.trace(len(self.keys))
        raise ValueError(f"Unknown unit {name!r}: use 'key energy', 'key energy per trace' or 'mean eigenvalue'.")

    def folded(self, delta: LowRankDelta | Tensor) -> LowRankDelta | Tensor:
        """Return the same delta of rank N, where it has rank M with a column of `B` for each key.

        The columns of one fact's keys are equal, so its rows of `A` add up. Other changes are returned as they are.
        """
        count = len(self.facts)
        if not isinstance(delta, LowRankDelta) or not torch.equal(delta.B, self.residuals.float()):
            return delta
        A = delta.A.new_zeros(count, delta.A.shape[1]).index_add(0, self.owners, delta.A)
        return replace(delta, A=A, B=self.fact_residuals.float())


@dataclass(frozen=True)
class GradientProblem:
    """What an editor that reads gradients is asked at one layer; a row for each token of each answer.

    Attributes:
        inputs: `(n, d_in)`, what enters the map.
        outputs: `(n, d_out)`, what leaves it.
        gradients: `(n, d_out)`, gradients of the answers' loss by the outputs.
        moments: Moments of `[inputs; gradients]` over all edits so far, these included.
        options: The editor's options, as its maths reads them.
    """

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor
    moments: RunningMoments
    options: Any = None

    def unit(self, name: str) -> float:
        """Return the size of a unit that options are measured in (see `relative`).

        - `"input energy"`: the mean squared length of the inputs.
        - `"output length"`: the mean length of the outputs, for steps along normalized features: those of a map are as
          long as the roots of its widths, and their product is divided out.

        Raises:
            ValueError: There is no such unit.
        """
        if name == "input energy":
            return self.inputs.square().sum(1).mean().item()
        if name == "output length":
            d_in, d_out = self.inputs.shape[1], self.outputs.shape[1]
            # ||h^||^2 is about d_in, and ||g^|| the root of d_out: the step is then as long as an output.
            return self.outputs.norm(dim=1).mean().item() / (d_in * d_out**0.5)
        raise ValueError(f"Unknown unit {name!r}: use 'input energy' or 'output length'.")


@dataclass(frozen=True)
class TrainingProblem:
    """What an editor that trains a change is asked at one layer.

    Attributes:
        d_in: Width of the map's inputs.
        d_out: Width of its outputs.
        generator: Draws first values, seeded by the config.
        options: The editor's options, as its maths reads them.
    """

    d_in: int
    d_out: int
    generator: torch.Generator
    options: Any = None

    def unit(self, name: str) -> float:
        """Raise ValueError: a trained change has no units of its own."""
        raise ValueError(f"Unknown unit {name!r}: options of an editor that trains are plain numbers.")
