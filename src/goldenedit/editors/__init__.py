"""Editors: maths that turns keys, residuals and key statistics into a low-rank delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.editors.alphaedit import alphaedit, null_space
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.emmet import emmet
from goldenedit.editors.keys import FactKeys, answered_keys
from goldenedit.editors.memit import memit
from goldenedit.editors.pmet import pmet
from goldenedit.editors.rome import r_rome, rome
from goldenedit.editors.statistics import KeyStatistics


@dataclass(frozen=True)
class Problem:
    """What an editor is asked at one layer.

    Attributes:
        facts: Keys of the N facts.
        residuals: `(d_out, N)`, what is missing to the wanted values.
        statistics: Second moment of keys.
        config: The constants.
        previous: `(d_in, M)`, keys of earlier edits, for the editors that spare them; None where there are none.
    """

    facts: list[FactKeys]
    residuals: Tensor
    statistics: KeyStatistics
    config: EditConfig
    previous: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """`(d_in, M)`, the keys that must be answered to."""
        return answered_keys(self.facts)

    @property
    def contrasted(self) -> KeyStatistics:
        """The statistics with the contrast keys of all facts among the text, each with the weight it has alone.

        With many facts they outweigh the text. On SmolLM2 and 40 facts that is the better prior: NS 0.795 with the
        full weight of each, 0.765 with the weight of one fact's for all of them together.
        """
        contrasts = [fact.contrast for fact in self.facts if fact.contrast is not None]
        return self.statistics.with_contrast(torch.cat(contrasts, 1)) if contrasts else self.statistics

    def at_once(self, solve: Callable[[Tensor, Tensor], LowRankDelta]) -> LowRankDelta:
        """Solve for the keys of all facts, each anchor with its fact's residual, and return a delta of rank N."""
        anchored = [index for index, fact in enumerate(self.facts) if fact.anchor_bare]
        owners = torch.tensor([*range(len(self.facts)), *anchored])
        found = solve(self.keys, self.residuals[:, owners])
        # B has a column for each anchor, equal for those of one fact: their rows of A add up.
        A = found.A.new_zeros(len(self.facts), found.A.shape[1]).index_add(0, owners, found.A)
        return LowRankDelta(A, self.residuals.float())

    def relative(self, name: str) -> float:
        """Return a constant of the config, in units of the facts' mean key energy where it is relative."""
        constant = self.config.constant(name)
        return constant * self.keys.square().sum(0).mean().item() if self.config.relative_constants else constant


Editor = Callable[[Problem], LowRankDelta]


def _least_squares(
    problem: Problem, solve: Callable[[Tensor, Tensor, KeyStatistics, float], LowRankDelta]
) -> LowRankDelta:
    statistics = problem.contrasted
    weight = problem.relative("covariance_weight")
    if problem.config.relative_constants:
        weight /= problem.statistics.trace(len(problem.facts[0].mean))
    return problem.at_once(lambda K, R: solve(K, R, statistics, weight))


def _emmet(problem: Problem) -> LowRankDelta:
    statistics = problem.contrasted
    return problem.at_once(lambda K, R: emmet(K, R, statistics, problem.config.gram_ridge))


def _alphaedit(problem: Problem) -> LowRankDelta:
    threshold = problem.config.constant("null_space_threshold")
    if problem.config.relative_constants:
        threshold *= problem.statistics.spectrum[0].mean().item()
    basis = null_space(problem.statistics, threshold)
    ridge = problem.relative("null_space_ridge")
    return problem.at_once(lambda K, R: alphaedit(K, R, basis, problem.previous, ridge))


EDITORS: dict[str, Editor] = {
    "rome": lambda problem: rome(problem.facts, problem.residuals, problem.statistics),
    "r-rome": lambda problem: r_rome(problem.facts, problem.residuals, problem.statistics),
    "memit": lambda problem: _least_squares(problem, memit),
    "emmet": _emmet,
    "pmet": lambda problem: _least_squares(problem, pmet),
    "alphaedit": _alphaedit,
}

# Editors that remember the keys of their edits, and spare them in later ones.
SEQUENTIAL = ("alphaedit",)

__all__ = ["EDITORS", "SEQUENTIAL", "Editor", "Problem"]
