"""Regularizers of a finished update, which limit the damage of long sequences of edits.

RECT: Gu et al. 2024, Model Editing Harms General Abilities (arXiv 2401.04700), equation 2.
PRUNE: Ma et al. 2024, Perturbation-Restrained Sequential Model Editing (arXiv 2405.16821), equation 7.
"""

from __future__ import annotations

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
