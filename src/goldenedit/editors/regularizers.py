"""What some papers do to a finished update, so that a long sequence of them does not add up to harm.

RECT: Gu et al. 2024, Model Editing Harms General Abilities (arXiv 2401.04700), equation 2.
PRUNE: Ma et al. 2024, Perturbation-Restrained Sequential Model Editing (arXiv 2405.16821), equation 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta


def rect(dense: Tensor, weight: Tensor, kept: float = 0.4) -> Tensor:
    """Return the update with only the share `kept` of its entries, those that change their weight most relatively.

    Args:
        dense: `(d_out, d_in)`, the update.
        weight: `(d_out, d_in)`, `W`.

    Returns:
        `(d_out, d_in)`, no longer of low rank.
    """
    change = (
        (dense / weight.to(dense)).abs().nan_to_num(0.0, torch.inf)
    )  # a change of 0 is infinite, none of it is none
    count = round(kept * dense.numel())
    if count == 0:
        return torch.zeros_like(dense)
    least = change.flatten().kthvalue(dense.numel() - count + 1).values
    return torch.where(change >= least, dense, 0.0)


def prune(delta: LowRankDelta, weight: Tensor) -> LowRankDelta:
    """Return the update with its singular values above the largest of `W`, `s_W`, made `ln s - ln s_W + s_W`.

    Args:
        weight: `(d_out, d_in)`, `W`.
    """
    U, s, V = delta.svd()
    limit = torch.linalg.matrix_norm(weight.double(), ord=2)
    restrained = torch.where(s > limit, s.clamp_min(1e-30).log() - limit.log() + limit, s)
    return LowRankDelta(V.float(), (U * restrained).float()).balanced()
