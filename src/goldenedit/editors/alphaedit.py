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
    """Return `Delta = R K^T P ((K K^T + K_p K_p^T) P + ridge I)^-1`, with the projection `P` on the null space.

    Outputs for keys orthogonal to the null space stay the same. `K_p` are the keys of earlier edits. With
    `Z = P (K, K_p)`, by the push-through identity, `Delta^T = Z (Z^T Z + ridge I)^-1 (R, 0)^T`: a system of the size of
    the keys, whatever their width.

    Raises:
        ValueError: No eigenvalue is below the threshold.
    """
    options = problem.options
    keys = problem.keys if problem.previous is None else torch.cat([problem.keys, problem.previous.to(problem.keys)], 1)
    Z = in_null_space(keys, problem.text_statistics, options.null_space_threshold)
    gram = Z.T @ Z
    gram.diagonal().add_(options.null_space_ridge)
    new = torch.eye(len(gram), problem.keys.shape[1], dtype=gram.dtype, device=gram.device)
    A = Z @ torch.cholesky_solve(new, torch.linalg.cholesky(gram))
    return LowRankDelta(A.T.float(), problem.residuals.float())


def in_null_space(keys: Tensor, statistics: KeyStatistics, threshold: float) -> Tensor:
    """Return `P k` of keys, `(d_in, N)` float64: their part in the directions along which text has little energy.

    Args:
        keys: `(d_in, N)`.
        statistics: Second moment of the keys of text, `C`.
        threshold: Eigenvectors of `C` whose eigenvalues are below this span the null space.

    Raises:
        ValueError: No eigenvalue is below the threshold.
    """
    V = statistics.strongest(threshold)
    if V.shape[1] == len(V):
        raise ValueError(
            f"The key statistics have no eigenvalue below {threshold:.2e}, so there is no null space; the smallest is "
            f"{statistics.spectrum[0][0]:.2e}. Raise EditConfig.null_space_threshold."
        )
    keys = keys.to(V)
    return keys - V @ (V.T @ keys)
