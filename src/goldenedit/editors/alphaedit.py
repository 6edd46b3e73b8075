"""AlphaEdit: an update in the null space of what the model knows, and of the edits made before.

Fang et al. 2025, AlphaEdit: Null-Space Constrained Knowledge Editing (arXiv 2410.02355), equation 14.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import relative
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor
from goldenedit.editors.statistics import KeyStatistics


@dataclass(kw_only=True)
class AlphaEditOptions:
    """Constants of AlphaEdit."""

    null_space_threshold: float | None = relative(
        3.0,
        published=0.02,
        unit="mean eigenvalue",
        help="AlphaEdit: largest eigenvalue of the null space, in units of the mean one; None for 3, or as published "
        "0.02.",
    )
    null_space_ridge: float | None = relative(
        0.2,
        published=10.0,
        unit="key energy",
        help="AlphaEdit: weight of the size of the update, in units of the facts' key energy; None for 0.2, or as "
        "published 10.",
    )


@editor(
    "alphaedit",
    paper="arXiv 2410.02355, equation 14",
    options=AlphaEditOptions,
    reads=("covariance", "anchor"),
    takes_identity=False,
    remembers_keys=True,
    inserts_batches=True,
    published="memit",
)
def alphaedit(problem: Problem) -> LowRankDelta:
    """Return `Delta = R K^T P ((K K^T + K_p K_p^T) P + ridge I)^-1` with `P = U U^T`; keys outside of `U` see nothing.

    In the coordinates of `U` the system is symmetric: `Delta = R K^T U (U^T (K K^T + K_p K_p^T) U + ridge I)^-1 U^T`,
    with `K_p` the keys of the edits made before.

    Raises:
        ValueError: There is no null space below the threshold.
    """
    U = null_space(problem.text_statistics, problem.options.null_space_threshold)
    K = U.T @ problem.keys.double()
    seen = K @ K.T + problem.options.null_space_ridge * torch.eye(len(K), dtype=K.dtype, device=K.device)
    if problem.previous is not None:
        P = U.T @ problem.previous.double()
        seen += P @ P.T
    A = torch.cholesky_solve(K, torch.linalg.cholesky(seen)).T @ U.T
    return LowRankDelta(A.float(), problem.residuals.float())


def null_space(statistics: KeyStatistics, threshold: float) -> Tensor:
    """Return an orthonormal basis `U`, `(d_in, n)`, of the directions along which keys have little energy.

    Args:
        statistics: Second moment of keys, `C`.
        threshold: Eigenvalues of `C` below it count as none.

    Raises:
        ValueError: No eigenvalue is below the threshold.
    """
    values, vectors = statistics.spectrum
    basis = vectors[:, values < threshold]
    if basis.shape[1] == 0:
        raise ValueError(
            f"The smallest eigenvalue of the key statistics is {values[0]:.2e}: there is no null space below "
            f"{threshold:.2e}. Raise EditConfig.null_space_threshold."
        )
    return basis
