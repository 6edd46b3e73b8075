"""Linear response and LGA together: which layers are good, and which of them gradients single out.

On many models a whole range of layers is as good as the best one. Linear response finds that range, without late layers
that can no longer steer the answer and without unselective ones, but orders its members by differences that mean
nothing. LGA alone may pick any layer that its fence lets through; within the range it picks well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldenedit.layer_selection.lga import tukey_filter

PLATEAU = 0.01  # layers whose predicted S is less than so much below the best, relative to it, are as good


def auto_scores(response: Tensor, gradients: Tensor, kappa: float) -> Tensor:
    """Return predicted S, `(num_layers,)`, cut off at the plateau; on it, the more the larger LGA's score is.

    Args:
        response: Scores of the linear response.
        gradients: Scores of LGA; where no layer of the plateau passes its fence, the linear response decides.
        kappa: Width of the fence.
    """
    best = response[~response.isnan()].max()
    floor = (1 - PLATEAU) * best
    within = (response >= floor) & tukey_filter(gradients, kappa) & (gradients > 0)
    if not within.any():
        return response
    bonus = torch.where(within, gradients / gradients[within].max(), 0.0)
    return response.clamp(max=floor.item()) + PLATEAU * best * bonus
