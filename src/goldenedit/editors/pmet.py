"""PMET: MEMIT's update for values that the attention has helped to find.

Li et al. 2024, PMET: Precise Model Editing in a Transformer (arXiv 2308.08742). The vectors on the outputs of attention
and MLP are optimised together (in `goldenedit.editing.values`), and only the MLP's is stored: `R` holds
less than MEMIT's, which speaks for the attention as well. Its square root of the layers that are left, in place of
their number, concerns one residual spread over several layers; here each layer has one of its own, as with MEMIT.
"""

from __future__ import annotations

from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.memit import memit
from goldenedit.editors.statistics import KeyStatistics


def pmet(keys: Tensor, residuals: Tensor, statistics: KeyStatistics, weight: float) -> LowRankDelta:
    """Return `Delta = R K^T (lambda C + K K^T)^-1` (MEMIT's); arguments as in `memit`."""
    return memit(keys, residuals, statistics, weight)
