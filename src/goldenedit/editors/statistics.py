"""Key statistics as editors read them: the second moment `C = E[k k^T]` of the inputs of a down projection.

An edit is written along `C^-1 k*`, the direction that responds to the fact's key and as little as possible to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyStatistics:
    """Second moment of the keys of one layer, with a ridge that makes it invertible.

    Attributes:
        second_moment: `(d_in, d_in)`, uncentered `E[k k^T]`; None for the identity.
        ridge: Added to the diagonal, in units of the mean eigenvalue `trace(C) / d_in`.
        contrast: `(d_in, c)`, contrast keys to add to the identity, as in `solve`; None without them.
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
                f"The key statistics cannot be inverted with ridge={self.ridge}. Raise EditConfig.ridge, or use more "
                "text (EditConfig.covariance_tokens)."
            ) from error

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the second moment without its ridge, ascending, and its eigenvectors as columns, float64.

        Raises:
            ValueError: The statistics are the identity.
        """
        if self.second_moment is None:
            raise ValueError("EditConfig.covariance 'identity' has no spectrum. Set it to a source of text.")
        values, vectors = torch.linalg.eigh(self.second_moment.double())
        return values, vectors

    @property
    def _mean_eigenvalue(self) -> float:
        return 1.0 if self.second_moment is None else self.second_moment.diagonal().double().mean().item()

    def trace(self, width: int) -> float:
        """Return the trace of `C`, or `width` for the identity."""
        return self._mean_eigenvalue * width

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Return statistics with `trace(C) D D^T` added, which `solve` adds for the contrast keys `D` of one fact."""
        width = len(contrast)
        if self.second_moment is None:
            contrast = contrast if self.contrast is None else torch.cat([self.contrast, contrast], 1)
            if contrast.shape[1] < width:  # fused experts are too wide for a dense matrix
                return KeyStatistics(None, contrast=contrast)
        eye = torch.eye(width, dtype=torch.float64)
        D = contrast.double().cpu()
        C = eye  # the identity needs no ridge
        if self.second_moment is not None:
            C = self.second_moment.double().cpu() + self.ridge * self._mean_eigenvalue * eye
        return KeyStatistics(C + self._mean_eigenvalue * width * D @ D.T)

    def solve(self, keys: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Return `(C + ridge * mean eigenvalue * I + trace(C) D D^T)^-1 keys`, `(d_in, N)`, in float64.

        Args:
            keys: `(d_in, N)`.
            contrast: `(d_in, c)`, keys the edit should not respond to, in units of `trace(C)^0.5` (see
                `relative_contrast`), so that their weight relative to other text is the same for every model.

        Raises:
            ValueError: The second moment is not positive definite, even with the ridge.
        """
        solved = self._solve(keys)
        contrasts = [keys_to_add for keys_to_add in (self.contrast, contrast) if keys_to_add is not None]
        if not contrasts:
            return solved
        contrast = torch.cat(contrasts, 1)
        D = contrast.double() * (self._mean_eigenvalue * len(contrast)) ** 0.5
        # Woodbury, because c is small and all facts share the factor of C.
        CD = self._solve(D)
        inner = torch.eye(D.shape[1], dtype=D.dtype, device=D.device) + D.T @ CD
        return solved - CD @ torch.linalg.solve(inner, CD.T @ keys.to(CD))

    def _solve(self, keys: Tensor) -> Tensor:
        if self.second_moment is None:
            return keys.double()
        return torch.cholesky_solve(keys.to(self._factor.device).double(), self._factor)


class UnreadStatistics(KeyStatistics):
    """Placeholder for editors that do not declare that they read key statistics. None are computed for them."""

    def __init__(self) -> None:
        super().__init__(None)

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "This editor does not declare that it reads key statistics. Add 'covariance' to reads= of its @editor(...)."
        )

    spectrum = property(_refuse)
    _mean_eigenvalue = property(_refuse)

    def solve(self, keys: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Raise ValueError."""
        self._refuse()

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Raise ValueError."""
        self._refuse()


def relative_contrast(contrast: Tensor, weight: float) -> Tensor:
    """Scale contrast keys `D`, `(d_in, c)`, so that in `solve` they add `weight` times the trace of `C`."""
    return contrast.double() * (weight / contrast.double().square().sum()) ** 0.5
