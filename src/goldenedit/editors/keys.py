"""Keys of one fact, as editors are given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactKeys:
    """Keys of one fact at one layer.

    Attributes:
        bare: `(d_in,)`, key at the bare prompt, `k`.
        mean: `(d_in,)`, key averaged over contexts, `k*`.
        contrast: `(d_in, c)`, keys of other subjects that end in the same token, scaled by the weight they have beside
            the other text; None where there are none.
        anchor_bare: Whether the edit must answer to `bare` as it does to `mean`.
    """

    bare: Tensor
    mean: Tensor
    contrast: Tensor | None = None
    anchor_bare: bool = False


def answered_keys(facts: Sequence[FactKeys]) -> Tensor:
    """Return the keys that an edit must answer to, `(d_in, M)`: each fact's mean, then the bare ones where anchored."""
    return torch.stack([*(fact.mean for fact in facts), *(fact.bare for fact in facts if fact.anchor_bare)], 1)
