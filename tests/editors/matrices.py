"""Random matrices with the spectrum of key statistics: a few directions hold most of the energy."""

from __future__ import annotations

import torch


def second_moment(width: int, seed: int = 0) -> torch.Tensor:
    """Return a positive definite `(width, width)` matrix whose eigenvalues fall from 1 to 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return (Q * torch.logspace(0, -3, width, dtype=torch.float64)) @ Q.T
