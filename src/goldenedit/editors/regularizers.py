"""Regularizers of a finished update, which limit the damage of long sequences of edits.

RECT: Gu et al. 2024, Model Editing Harms General Abilities (arXiv 2401.04700), equation 2.
PRUNE: Ma et al. 2024, Perturbation-Restrained Sequential Model Editing (arXiv 2405.16821), equation 7.
SPHERE: Liu et al. 2025, Energy-Regularized Sequential Model Editing on Hyperspheres (arXiv 2510.01172).
NAS: Norm-Anchored Scaling (arXiv 2602.02543), which applies to values instead of the finished update.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta


def rect(dense: Tensor, weight: Tensor, share: float = 0.4) -> Tensor:
    """Return the update with only its largest entries relative to the weights; the others become 0.

    Args:
        dense: `(d_out, d_in)`, the update.
        weight: `(d_out, d_in)`, `W`.
        share: Share of the entries to keep.

    Returns:
        `(d_out, d_in)`, no longer of low rank.
    """
    # Of a weight of 0, a change is infinite, and no change is 0.
    change = (dense / weight.to(dense)).abs().nan_to_num(0.0, torch.inf)
    count = round(share * dense.numel())
    if count == 0:
        return torch.zeros_like(dense)
    least = change.flatten().kthvalue(dense.numel() - count + 1).values
    return torch.where(change >= least, dense, 0.0)


def prune(delta: LowRankDelta, weight: Tensor) -> LowRankDelta:
    """Return the update with each singular value `s` above the largest one of `W`, `s_W`, set to `ln s - ln s_W + s_W`.

    Args:
        weight: `(d_out, d_in)`, `W`.
    """
    U, s, V = delta.svd()
    limit = torch.linalg.matrix_norm(weight.double(), ord=2)
    restrained = torch.where(s > limit, s.clamp_min(1e-30).log() - limit.log() + limit, s)
    return LowRankDelta(V.float(), (U * restrained).float()).balanced()


def sphere(delta: LowRankDelta, weight: Tensor, eta: float = 0.5, alpha: float = 0.5) -> LowRankDelta:
    """Return `Delta (I - alpha U U^T)`: the update, with less in the input directions that most rows of `W` share.

    With `W^` the weight whose rows have length 1, `S = W^^T W^ / d_out` has a trace of 1. `U` has its eigenvectors of
    largest eigenvalues: the fewest whose eigenvalues sum to at least `eta`.

    Args:
        weight: `(d_out, d_in)`, `W`.
        eta: Share of the trace that the directions of `U` hold.
        alpha: Share of the update that is taken away in these directions.
    """
    rows = torch.nn.functional.normalize(weight.double(), dim=1)
    _, s, directions = torch.linalg.svd(rows, full_matrices=False)
    shares = s.square() / s.square().sum()
    count = int((shares.cumsum(0) < eta).sum()) + 1 if eta > 0 else 0
    U = directions[:count].T
    A = delta.A.double()
    return replace(delta, A=(A - alpha * (A @ U) @ U.T).to(delta.A))


def norm_preserving(value: Tensor, delta: Tensor) -> Tensor:
    """Return the change `delta` of values such that the new values have the norms of the old ones, `(..., d_out)`.

    Args:
        value: `(..., d_out)`, the values before the edit, `v_0`.
        delta: `(..., d_out)`.
    """
    new = value + delta
    return new * (value.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-12)) - value
