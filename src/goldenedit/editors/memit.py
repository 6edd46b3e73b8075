"""MEMIT: the least-squares update that stores many facts at once. PMET: the same update with other values.

MEMIT: Meng et al. 2023, Mass-Editing Memory in a Transformer (arXiv 2210.07229), equation 14. With several layers, the
paper spreads one residual over them. Here each layer has its own residual, and all are optimized together.

PMET: Li et al. 2024, PMET: Precise Model Editing in a Transformer (arXiv 2308.08742). Vectors on the outputs of
attention and MLP are optimized together, and only the MLP's vector is stored. So `R` holds less than in MEMIT, where
the MLP's vector also contributes attention's part of the answer. PMET's other change, which divides a residual by the
square root of the number of remaining layers, does not apply here.
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
        help="Weight of the covariance, lambda. At 1, text and facts count alike. None means 1 or, with "
        "relative_constants=False, the published 15000 (for GPT-2 XL they used 20000).",
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

    By the Woodbury identity `K^T (lambda C + K K^T)^-1 = (lambda I + K^T C^-1 K)^-1 K^T C^-1`, an N x N system.
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
