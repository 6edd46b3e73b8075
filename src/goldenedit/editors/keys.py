"""Keys of one fact, as editors read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FactKeys:
    """Keys of one fact at one layer.

    Attributes:
        bare: `(d_in,)`, key at the bare prompt, `k`.
        mean: `(d_in,)`, key averaged over contexts, `k*`.
        contrast: `(d_in, c)`, keys of other subjects that end in the same token, scaled by their weight relative to
            other text; None without contrast keys.
        anchor_bare: Whether the edit must map `bare` to the same value as `mean`.
        every: `(d_in, n)`, the key in each text that teaches the fact; None means `mean` alone.
    """

    bare: Tensor
    mean: Tensor
    contrast: Tensor | None = None
    anchor_bare: bool = False
    every: Tensor | None = None
