"""ROME and R-ROME: one rank-one update per fact, inserted as a key and a value.

ROME: Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262), equation 2.
R-ROME: Gupta et al. 2024, Rebuilding ROME (arXiv 2403.07175): the same averaged key in every place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor


@editor("rome", paper="arXiv 2202.05262, equation 2", reads=("covariance", "ridge", "contrast"), published="rome")
def rome(problem: Problem) -> LowRankDelta:
    """Return the update of ROME: direction from the key averaged over contexts, solved for the key of the bare prompt.

    u = C^-1 k* / ||C^-1 k*||        Delta = (v* - W k) u^T / (u . k)
    """
    detectors = []
    for fact in problem.facts:
        u = problem.text_statistics.solve(fact.mean[:, None], fact.contrast)[:, 0]
        detectors.append(u / (u @ fact.bare.double()))
    return insert(detectors, torch.stack([fact.bare for fact in problem.facts], 1), problem.fact_residuals)


@editor("r-rome", paper="arXiv 2403.07175", reads=("covariance", "ridge", "anchor", "contrast"), published="rome")
def r_rome(problem: Problem) -> LowRankDelta:
    """Return the update of R-ROME, which answers to the averaged key, and to the key of the bare prompt as well.

    R-ROME is `Delta = (v* - W k*) u^T / (u . k*)` with `u = C^-1 k*`: of all `w` with `w . k* = 1`, `u / (u . k*)` is
    the one that answers least to other text, `min w^T C w`. Where the facts come with `anchor_bare`, the same minimum
    is taken under two constraints, `w . k* = w . k = 1`: at the very start of a sequence a subject's key can be so
    unlike its average that R-ROME misses the bare prompt.
    """
    detectors = []
    for fact in problem.facts:
        anchors = torch.stack([fact.mean, fact.bare] if fact.anchor_bare else [fact.mean], 1).double()
        U = problem.text_statistics.solve(anchors, fact.contrast)
        detectors.append(U @ _least_squares(anchors.T @ U))
    return insert(detectors, torch.stack([fact.mean for fact in problem.facts], 1), problem.fact_residuals)


def _least_squares(gram: Tensor, ridge: float = 1e-4) -> Tensor:
    """Solve `gram c = 1`, with a ridge for anchors that are all but the same.

    The ridge is put on the gram matrix of unit diagonal: anchors of very different length count alike.
    """
    scale = gram.diagonal().rsqrt()
    unit = gram * scale[:, None] * scale + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = scale * torch.linalg.solve(unit, scale)
    return solution / (gram[0] @ solution)  # exact where it must be: at the averaged key


def insert(detectors: list[Tensor], keys: Tensor, residuals: Tensor) -> LowRankDelta:
    """Insert N facts one after the other, so that each is exact when its turn comes.

    With detectors `w_i . k_i = 1`, fact `i` sees what the facts before it did to its key:
    `b_i = r_i - sum_{j<i} b_j (w_j . k_i)`, the triangular system `B triu(A K) = R`. With one fact, `B = R`.

    Args:
        detectors: N vectors `w_i`, `(d_in,)`.
        keys: `(d_in, N)`.
        residuals: `(d_out, N)`.

    Returns:
        A delta of rank N in float32, solved in float64.
    """
    A = torch.stack(detectors)
    B = torch.linalg.solve_triangular((A @ keys.double()).triu(), residuals.double(), upper=True, left=False)
    return LowRankDelta(A.float(), B.float()).balanced()
