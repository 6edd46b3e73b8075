"""Key statistics as editors read them: the second moment `C = E[k k^T]` of what enters a down projection.

An edit is written along `C^-1 k*`: the direction that answers to the fact's key and least to everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyStatistics:
    """Second moment of the keys of one layer, made invertible by a ridge relative to its spectrum.

    Attributes:
        second_moment: `(d_in, d_in)`, uncentered `E[k k^T]`; None for the identity.
        ridge: Added to the diagonal, in units of the mean eigenvalue `trace(C) / d_in`.
        contrast: `(d_in, c)`, keys that the identity holds as well, as `solve` takes them; None where there are none.
    """

    second_moment: Tensor | None
    ridge: float = 0.0
    contrast: Tensor | None = None

    @cached_property
    def _factor(self) -> Tensor:
        assert self.second_moment is not None
        C = self.second_moment.double()
        ridge = self.ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        try:
            return torch.linalg.cholesky(C + ridge)
        except RuntimeError as error:
            raise ValueError(
                f"The key statistics cannot be inverted with ridge={self.ridge}: raise EditConfig.ridge, or take "
                "more text (EditConfig.covariance_tokens)."
            ) from error

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the second moment without its ridge, ascending, and its eigenvectors as columns, float64.

        Raises:
            ValueError: There is none: the covariance is the identity.
        """
        if self.second_moment is None:
            raise ValueError("The identity has no null space: give EditConfig.covariance a source of text.")
        values, vectors = torch.linalg.eigh(self.second_moment.double())
        return values, vectors

    @property
    def _mean_eigenvalue(self) -> float:
        return 1.0 if self.second_moment is None else self.second_moment.diagonal().double().mean().item()

    def trace(self, width: int) -> float:
        """Return the trace of `C`, that of the identity of `width` where there is none."""
        return self._mean_eigenvalue * width

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Return statistics that hold `trace(C) D D^T` as well: what `solve` does with a contrast, for many facts."""
        width = len(contrast)
        if self.second_moment is None:
            contrast = contrast if self.contrast is None else torch.cat([self.contrast, contrast], 1)
            if contrast.shape[1] < width:  # as it is: the keys of fused experts are too wide for a matrix
                return KeyStatistics(None, contrast=contrast)
        eye = torch.eye(width, dtype=torch.float64)
        D = contrast.double().cpu()
        C = eye  # which needs no ridge
        if self.second_moment is not None:
            C = self.second_moment.double().cpu() + self.ridge * self._mean_eigenvalue * eye
        return KeyStatistics(C + self._mean_eigenvalue * width * D @ D.T)

    def solve(self, keys: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Return `(C + ridge * mean eigenvalue * I + trace(C) D D^T)^-1 keys`, `(d_in, N)`, in float64.

        Args:
            keys: `(d_in, N)`.
            contrast: `(d_in, c)` keys to stay silent on, in units of `trace(C)^0.5` (see `relative_contrast`): their
                weight beside the other text is then the same for every model.

        Raises:
            ValueError: The second moment is not positive definite, even with the ridge.
        """
        solved = self._solve(keys)
        contrasts = [found for found in (self.contrast, contrast) if found is not None]
        if not contrasts:
            return solved
        contrast = torch.cat(contrasts, 1)
        D = contrast.double() * (self._mean_eigenvalue * len(contrast)) ** 0.5
        # Woodbury: c is small, and the factor of C serves all facts.
        CD = self._solve(D)
        inner = torch.eye(D.shape[1], dtype=D.dtype, device=D.device) + D.T @ CD
        return solved - CD @ torch.linalg.solve(inner, CD.T @ keys.to(CD))

    def _solve(self, keys: Tensor) -> Tensor:
        if self.second_moment is None:
            return keys.double()
        return torch.cholesky_solve(keys.to(self._factor.device).double(), self._factor)


class UnreadStatistics(KeyStatistics):
    """What an editor is given that does not say that it reads key statistics: none are computed for it."""

    def __init__(self) -> None:
        super().__init__(None)

    def _refuse(self) -> NoReturn:
        raise ValueError("This editor does not read key statistics: add 'covariance' to reads= of its @editor(...).")

    spectrum = property(_refuse)
    _mean_eigenvalue = property(_refuse)

    def solve(self, keys: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Raise ValueError."""
        self._refuse()

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Raise ValueError."""
        self._refuse()


def relative_contrast(contrast: Tensor, weight: float) -> Tensor:
    """Scale `(d_in, c)` keys so that the mean of `D D^T` over them has `weight` times the trace of `C` in `solve`."""
    return contrast.double() * (weight / contrast.double().square().sum()) ** 0.5
