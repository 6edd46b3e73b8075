"""UltraEdit: an update from one forward and one backward, without subjects, key statistics or optimisation.

Gu et al. 2025, UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing (arXiv 2505.14679), equations 4 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldenedit.editors.delta import LowRankDelta


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and summed squared deviations of the features seen, `(d,)` each, float64; those of parts add up."""

    count: float
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor) -> RunningMoments:
        """Return the moments of the rows of `features`, `(n, d)`."""
        rows = features.double()
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).square().sum(0))

    def __add__(self, other: RunningMoments) -> RunningMoments:
        """Return the moments of the rows of both (Chan et al. 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        squares = self.squares + other.squares + shift.square() * (self.count * other.count / count)
        return RunningMoments(count, self.mean + shift * (other.count / count), squares)

    def columns(self) -> Tensor:
        """Return the moments as a matrix `(d, 3)`."""
        return torch.stack([torch.full_like(self.mean, self.count), self.mean, self.squares], 1)

    @classmethod
    def from_columns(cls, columns: Tensor) -> RunningMoments:
        """Return the moments of all parts whose `columns` stand side by side, `(d, 3 m)`."""
        parts = [cls(part[0, 0].item(), part[:, 1], part[:, 2]) for part in columns.double().split(3, 1)]
        return sum(parts[1:], parts[0])

    def normalised(self, features: Tensor) -> Tensor:
        """Return `(features - mean) / std`, `(n, d)`; a feature that never changes becomes 0."""
        std = (self.squares / max(self.count - 1, 1)).sqrt()
        return torch.where(std > 0, (features.double() - self.mean) / std.clamp_min(1e-30), 0.0)


def ultraedit(
    inputs: Tensor, gradients: Tensor, moments: RunningMoments, lr: float, ridge: float = 1.0
) -> LowRankDelta:
    """Return the update of one linear map from its inputs and output gradients at the answers' tokens.

        [h^; g^] = ([h; g] - mean) / std      v = -lr ||h^||^2 g^      Delta^T = (H^T H + ridge I)^-1 H^T V

    As `(H^T H + ridge I)^-1 H^T = H^T (H H^T + ridge I)^-1`, an n x n system gives a delta of rank n.

    Args:
        inputs: `(n, d_in)`, `H`, a row a token.
        gradients: `(n, d_out)`, gradients of the loss by the map's output.
        moments: Mean and standard deviation of `[h; g]` over all edits so far, these included.
        lr: Size of the step.
        ridge: Weight of the size of the update; 1 in the paper.

    Raises:
        ValueError: There is but one token so far.
    """
    if moments.count < 2:
        raise ValueError("UltraEdit compares answer tokens with each other: its first batch needs two of them or more.")
    H = inputs.double()
    hat = moments.normalised(torch.cat([H, gradients.double()], dim=1))
    h_hat, g_hat = hat[:, : H.shape[1]], hat[:, H.shape[1] :]
    V = -lr * h_hat.square().sum(1, keepdim=True) * g_hat
    A = torch.linalg.solve(H @ H.T + ridge * torch.eye(len(H), dtype=H.dtype, device=H.device), H)
    return LowRankDelta(A.float(), V.T.float())
