"""AlphaEdit: an update in the null space of what the model knows, and of the edits made before.

Fang et al. 2025, AlphaEdit: Null-Space Constrained Knowledge Editing (arXiv 2410.02355), equation 14.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.statistics import KeyStatistics


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


def alphaedit(keys: Tensor, residuals: Tensor, basis: Tensor, previous: Tensor | None, ridge: float) -> LowRankDelta:
    """Return `Delta = R K^T P ((K K^T + K_p K_p^T) P + ridge I)^-1` with `P = U U^T`; keys outside of `U` see nothing.

    In the coordinates of `U` the system is symmetric: `Delta = R K^T U (U^T (K K^T + K_p K_p^T) U + ridge I)^-1 U^T`.

    Args:
        keys: `(d_in, N)`, `K`.
        residuals: `(d_out, N)`, `R`: what is missing to the wanted values.
        basis: `(d_in, n)`, `U`, from `null_space`.
        previous: `(d_in, M)`, `K_p`, keys of the edits made before; None where there are none.
        ridge: Weight of the size of the update.
    """
    K = basis.T @ keys.double()
    seen = K @ K.T + ridge * torch.eye(len(K), dtype=K.dtype, device=K.device)
    if previous is not None:
        P = basis.T @ previous.double()
        seen += P @ P.T
    A = torch.cholesky_solve(K, torch.linalg.cholesky(seen)).T @ basis.T
    return LowRankDelta(A.float(), residuals.float())
