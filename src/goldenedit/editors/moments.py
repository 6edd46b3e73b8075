"""Running mean and variance of features over a sequence of edits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean `(d,)` and summed squared deviations `(d,)` of features, in float64. Moments can be added."""

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
        """Return the moments of the rows of both sets (Chan et al. 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        squares = self.squares + other.squares + shift.square() * (self.count * other.count / count)
        return RunningMoments(count, self.mean + shift * (other.count / count), squares)

    def columns(self) -> Tensor:
        """Return the moments as a matrix `(d, 3)`."""
        return torch.stack([torch.full_like(self.mean, self.count), self.mean, self.squares], 1)

    @classmethod
    def from_columns(cls, columns: Tensor) -> RunningMoments:
        """Return the summed moments of m sets from their concatenated `columns`, `(d, 3 m)`."""
        moments = [cls(of_set[0, 0].item(), of_set[:, 1], of_set[:, 2]) for of_set in columns.double().split(3, 1)]
        return sum(moments[1:], moments[0])

    def normalized(self, features: Tensor) -> Tensor:
        """Return `(features - mean) / std`, `(n, d)`. A constant feature becomes 0."""
        std = (self.squares / max(self.count - 1, 1)).sqrt()
        return torch.where(std > 0, (features.double() - self.mean) / std.clamp_min(1e-30), 0.0)
