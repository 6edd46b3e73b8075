"""MEMIT: the least-squares update that stores many facts at once.

Meng et al. 2023, Mass-Editing Memory in a Transformer (arXiv 2210.07229), equation 14.

On several layers the paper spreads one residual over them; here each layer has one of its own, optimised together
with those of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.statistics import KeyStatistics


def memit(keys: Tensor, residuals: Tensor, statistics: KeyStatistics, weight: float) -> LowRankDelta:
    """Return `Delta = R K^T (lambda C + K K^T)^-1`, the minimum of `||Delta K - R||^2 + lambda tr(Delta C Delta^T)`.

    By the Woodbury identity `K^T (lambda C + K K^T)^-1 = (lambda I + K^T C^-1 K)^-1 K^T C^-1`: an N x N system.

    Args:
        keys: `(d_in, N)`, `K`.
        residuals: `(d_out, N)`, `R`: what is missing to the wanted values.
        statistics: Second moment of keys, `C`.
        weight: `lambda`, the weight of what the model knows against the N facts.
    """
    K = keys.double()
    CK = statistics.solve(K)
    A = torch.linalg.solve(K.T @ CK + weight * torch.eye(K.shape[1], dtype=K.dtype, device=K.device), CK.T)
    return LowRankDelta(A.float(), residuals.float())
