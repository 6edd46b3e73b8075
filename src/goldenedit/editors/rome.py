"""ROME and R-ROME: one rank-one update per fact, inserted as a key and a value.

ROME: Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262), equation 2.
R-ROME: Gupta et al. 2024, Rebuilding ROME (arXiv 2403.07175), which uses the averaged key everywhere in the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor


@editor("rome", paper="arXiv 2202.05262, equation 2", reads=("covariance", "ridge", "contrast"), published="rome")
def rome(problem: Problem) -> LowRankDelta:
    """Return the update of ROME: its direction is from the key averaged over contexts, its scale from the bare key.

    u = C^-1 k* / ||C^-1 k*||        Delta = (v* - W k) u^T / (u . k)
    """
    detectors = []
    for fact in problem.facts:
        u = problem.text_statistics.solve(fact.mean[:, None], fact.contrast)[:, 0]
        detectors.append(u / (u @ fact.bare.double()))
    return insert(detectors, torch.stack([fact.bare for fact in problem.facts], 1), problem.fact_residuals)


@editor("r-rome", paper="arXiv 2403.07175", reads=("covariance", "ridge", "anchor", "contrast"), published="rome")
def r_rome(problem: Problem) -> LowRankDelta:
    """Return the update of R-ROME, which holds for the averaged key and, if anchored, for the key of the bare prompt.

    R-ROME is `Delta = (v* - W k*) u^T / (u . k*)` with `u = C^-1 k*`. Of all `w` with `w . k* = 1`, `u / (u . k*)` has
    the smallest response to other text, `min w^T C w`. With `anchor_bare` this minimum has two constraints,
    `w . k* = w . k = 1`, because at the very start of a sequence the key of a subject can be so far from its average
    that R-ROME misses the bare prompt.
    """
    detectors = []
    for fact in problem.facts:
        anchors = torch.stack([fact.mean, fact.bare] if fact.anchor_bare else [fact.mean], 1).double()
        U = problem.text_statistics.solve(anchors, fact.contrast)
        detectors.append(U @ _least_squares(anchors.T @ U))
    return insert(detectors, torch.stack([fact.mean for fact in problem.facts], 1), problem.fact_residuals)


def _least_squares(gram: Tensor, ridge: float = 1e-4) -> Tensor:
    """Solve `gram c = 1`, with a ridge for anchors that are nearly equal.

    The ridge is added to the Gram matrix scaled to a unit diagonal, so that the lengths of the anchors do not matter.
    """
    scale = gram.diagonal().rsqrt()
    unit = gram * scale[:, None] * scale + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = scale * torch.linalg.solve(unit, scale)
    return solution / (gram[0] @ solution)  # exact at the averaged key


def insert(detectors: list[Tensor], keys: Tensor, residuals: Tensor) -> LowRankDelta:
    """Insert N facts one after the other, each exactly at the time of its insertion.

    With detectors `w_i . k_i = 1`, the residual of fact `i` is reduced by what the facts before it add at its key:
    `b_i = r_i - sum_{j<i} b_j (w_j . k_i)`, which is the triangular system `B triu(A K) = R`. With one fact, `B = R`.

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
