"""MEMIT: the least-squares update that stores many facts at once; and PMET, which asks it for other values.

MEMIT: Meng et al. 2023, Mass-Editing Memory in a Transformer (arXiv 2210.07229), equation 14. On several layers the
paper spreads one residual over them; here each layer has one of its own, optimized together with those of the others.

PMET: Li et al. 2024, PMET: Precise Model Editing in a Transformer (arXiv 2308.08742). The vectors on the outputs of
attention and MLP are optimized together, and only the MLP's is stored: `R` holds less than MEMIT's, which speaks for
the attention as well. Its square root of the layers that are left, in place of their number, concerns one residual
spread over several layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import relative
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor


@dataclass(kw_only=True)
class MemitOptions:
    """Constants of MEMIT and PMET."""

    covariance_weight: float | None = relative(
        1.0,
        published=15_000.0,
        unit="key energy per trace",
        least=0.0,
        help="MEMIT, PMET: weight of the covariance, lambda, in units of the facts' key energy over the covariance's "
        "trace; None for 1, or as published 15000 (their GPT-2 XL: 20000).",
    )


@editor(
    "memit",
    paper="arXiv 2210.07229, equation 14",
    options=MemitOptions,
    reads=("covariance", "ridge", "anchor", "contrast"),
    inserts_batches=True,
    published="memit",
)
def memit(problem: Problem) -> LowRankDelta:
    """Return `Delta = R K^T (lambda C + K K^T)^-1`, the minimum of `||Delta K - R||^2 + lambda tr(Delta C Delta^T)`.

    By the Woodbury identity `K^T (lambda C + K K^T)^-1 = (lambda I + K^T C^-1 K)^-1 K^T C^-1`: an N x N system.
    """
    K = problem.keys.double()
    CK = problem.statistics.solve(K)
    weight = problem.options.covariance_weight * torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    A = torch.linalg.solve(K.T @ CK + weight, CK.T)
    return LowRankDelta(A.float(), problem.residuals.float())


editor(
    "pmet",
    paper="arXiv 2308.08742",
    options=MemitOptions,
    reads=("covariance", "ridge", "anchor", "contrast"),
    vectors=("mlp", "attention"),
    inserts_batches=True,
    published="memit",
)(memit)
