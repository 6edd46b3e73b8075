"""EMMET: ROME's exact insertion for many facts at once.

Gupta et al. 2024, A Unified Framework for Model Editing (arXiv 2403.14236), equation 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.statistics import KeyStatistics


def emmet(keys: Tensor, residuals: Tensor, statistics: KeyStatistics, ridge: float = 0.0) -> LowRankDelta:
    """Return `Delta = R (K^T C^-1 K)^-1 K^T C^-1`, the least `tr(Delta C Delta^T)` of all with `Delta K = R`.

    Args:
        keys: `(d_in, N)`, `K`.
        residuals: `(d_out, N)`, `R`: what is missing to the wanted values.
        statistics: Second moment of keys, `C`. A factor before it changes nothing.
        ridge: Added to the diagonal of `K^T C^-1 K`, in units of each of its entries: keys that are all but the same
            ask for more than the model can give.
    """
    K = keys.double()
    CK = statistics.solve(K)
    gram = K.T @ CK
    A = torch.linalg.solve(gram + ridge * torch.diag(gram.diagonal()), CK.T)
    return LowRankDelta(A.float(), residuals.float())
