"""AlphaEdit: an update in the null space of the keys of other text, which also preserves earlier edits.

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
        help="Largest eigenvalue of the null space, in units of the mean eigenvalue. None means 3 or, with "
        "relative_constants=False, the published 0.02.",
    )
    null_space_ridge: float | None = relative(
        0.2,
        published=10.0,
        unit="key energy",
        help="Penalty on the size of the update, in units of the facts' mean squared key length. None means 0.2 or, "
        "with relative_constants=False, the published 10.",
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
    """Return `Delta = R K^T P ((K K^T + K_p K_p^T) P + ridge I)^-1`, with the projection `P = U U^T`.

    `U` is a basis of the null space: outputs for keys orthogonal to it stay the same. `K_p` are the keys of earlier
    edits. In the coordinates of `U` the system is symmetric:
    `Delta = R K^T U (U^T (K K^T + K_p K_p^T) U + ridge I)^-1 U^T`.

    Raises:
        ValueError: No eigenvalue is below the threshold.
    """
    U = null_space(problem.text_statistics, problem.options.null_space_threshold)
    K = U.T @ problem.keys.double()
    gram = K @ K.T + problem.options.null_space_ridge * torch.eye(len(K), dtype=K.dtype, device=K.device)
    if problem.previous is not None:
        K_p = U.T @ problem.previous.double()
        gram += K_p @ K_p.T
    A = torch.cholesky_solve(K, torch.linalg.cholesky(gram)).T @ U.T
    return LowRankDelta(A.float(), problem.residuals.float())


def null_space(statistics: KeyStatistics, threshold: float) -> Tensor:
    """Return an orthonormal basis `U`, `(d_in, n)`, of the directions along which keys have little energy.

    Args:
        statistics: Second moment of keys, `C`.
        threshold: Eigenvectors of `C` whose eigenvalues are below this span the null space.

    Raises:
        ValueError: No eigenvalue is below the threshold.
    """
    values, vectors = statistics.spectrum
    basis = vectors[:, values < threshold]
    if basis.shape[1] == 0:
        raise ValueError(
            f"The key statistics have no eigenvalue below {threshold:.2e}, so there is no null space; the smallest is "
            f"{values[0]:.2e}. Raise EditConfig.null_space_threshold."
        )
    return basis
