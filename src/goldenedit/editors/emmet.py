"""EMMET: ROME's exact insertion for many facts at once.

Gupta et al. 2024, A Unified Framework for Model Editing (arXiv 2403.14236), equation 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import option
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor


@dataclass(kw_only=True)
class EmmetOptions:
    """Constants of EMMET."""

    gram_ridge: float = option(
        0.01,
        least=0.0,
        help="Ridge on K^T C^-1 K, relative to its diagonal. 0 inserts every fact exactly.",
    )


@editor(
    "emmet",
    paper="arXiv 2403.14236, equation 10",
    options=EmmetOptions,
    reads=("covariance", "ridge", "anchor", "contrast"),
    inserts_batches=True,
    published="rome",
)
def emmet(problem: Problem) -> LowRankDelta:
    """Return `Delta = R (K^T C^-1 K)^-1 K^T C^-1`, the minimum of `tr(Delta C Delta^T)` subject to `Delta K = R`.

    The scale of `C` does not matter. The ridge is added to the diagonal of `K^T C^-1 K`, relative to each entry:
    without it, nearly equal keys with different residuals would make the update very large.
    """
    K = problem.keys.double()
    CK = problem.statistics.solve(K)
    gram = K.T @ CK
    A = torch.linalg.solve(gram + problem.options.gram_ridge * torch.diag(gram.diagonal()), CK.T)
    return LowRankDelta(A.float(), problem.residuals.float())
