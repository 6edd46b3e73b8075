"""Ridge insertion: the least-squares update that stores facts, with a penalty on its size and no key statistics.

It is MEMIT's update (arXiv 2210.07229, equation 14) with the identity in place of the keys' covariance, so it needs no
text. It does not read `problem.statistics`, so `reads` leaves out "covariance" and no statistics are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from goldenedit.editors import LowRankDelta, Problem, editor, relative


@dataclass
class RidgeOptions:
    """Options of ridge insertion."""

    ridge: float | None = relative(
        0.1, unit="key energy", help="Weight of the size of the update, in units of the keys' mean squared length."
    )


@editor("ridge-insert", options=RidgeOptions, reads=("anchor",), inserts_batches=True)
def ridge_insert(problem: Problem) -> LowRankDelta:
    """Return `Delta = R K^T (K K^T + ridge I)^-1`, the minimum of `||Delta K - R||^2 + ridge ||Delta||^2`.

    As `K^T (K K^T + ridge I)^-1 = (K^T K + ridge I)^-1 K^T`, an N x N system gives a delta of rank N.
    """
    K, R = problem.keys.double(), problem.residuals  # (d_in, N), (d_out, N)
    ridge = problem.options.ridge * torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    return LowRankDelta(A=torch.linalg.solve(K.T @ K + ridge, K.T), B=R)
