"""Key statistics as editors read them: the second moment `C = E[k k^T]` of the inputs of a down projection.

An edit is written along `C^-1 k*`, the direction that responds to the fact's key and as little as possible to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor

_BLOCK = 512  # rows


@dataclass(frozen=True)
class KeyStatistics:
    """Second moment of the keys of one layer, with a ridge that makes it invertible.

    Of text with fewer tokens than a key has dimensions, the keys themselves are held instead of the matrix. They are
    smaller, and `solve` is faster by the Woodbury identity, which is exact.

    Attributes:
        second_moment: `(d_in, d_in)`, uncentered `E[k k^T]`; None for the identity, or where keys are held.
        ridge: Added to the diagonal, in units of the mean eigenvalue `trace(C) / d_in`.
        contrast: `(d_in, c)`, contrast keys to add to the identity, as in `solve`; None without them.
        keys: `(n, d_in)`, divided by the square root of n, so that `C = keys^T keys`; None without them.
    """

    second_moment: Tensor | None
    ridge: float = 0.0
    contrast: Tensor | None = None
    keys: Tensor | None = None

    @classmethod
    def of(cls, moment: Tensor, ridge: float) -> KeyStatistics:
        """Return the statistics of a second moment, or of keys as in `keys`, which are fewer than they are wide."""
        is_square = moment.shape[0] == moment.shape[1]
        return cls(moment, ridge) if is_square else cls(None, ridge, keys=moment)

    @property
    def is_identity(self) -> bool:
        """Whether there is no text, and `C` is the identity."""
        return self.second_moment is None and self.keys is None

    @cached_property
    def _factor(self) -> Tensor:
        """The Cholesky factor of `C` with its ridge or, of keys, of their Gram matrix with it."""
        if self.keys is not None:
            system = _gram(self.keys)
        else:
            assert self.second_moment is not None
            system = self.second_moment.to(torch.float64, copy=True)
        system.diagonal().add_(self._ridge)
        if self.keys is None or self._ridge > 0:
            try:
                return torch.linalg.cholesky(system, out=system)
            except RuntimeError:
                pass
        raise ValueError(
            f"The key statistics cannot be inverted with ridge={self.ridge}. Raise EditConfig.ridge, or use more "
            "text (EditConfig.covariance_tokens)."
        )

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the second moment without its ridge, ascending, and its eigenvectors as columns, float64.

        Raises:
            ValueError: The statistics are the identity.
        """
        if self.is_identity:
            raise ValueError("EditConfig.covariance 'identity' has no spectrum. Set it to a source of text.")
        values, vectors = torch.linalg.eigh(self._dense())
        return values, vectors

    def strongest(self, threshold: float) -> Tensor:
        """Return the eigenvectors of `C`, without its ridge, whose eigenvalues are not below a positive threshold.

        They are columns, `(d_in, r)` float64.

        Raises:
            ValueError: The statistics are the identity.
        """
        if threshold not in self._strongest:
            self._strongest.clear()  # facts of one batch have the same threshold
            self._strongest[threshold] = self._vectors_from(threshold)
        return self._strongest[threshold]

    @cached_property
    def _strongest(self) -> dict[float, Tensor]:
        return {}

    def _vectors_from(self, threshold: float) -> Tensor:
        if self.keys is None:
            values, vectors = self.spectrum
            return vectors[:, values >= threshold]
        values, vectors = self._spectrum_of_gram
        is_strong = values >= threshold
        scaled = vectors[:, is_strong] / values[is_strong].sqrt()
        return torch.cat([block.double() @ scaled for block in _blocks(self.keys.T)]).cpu()

    @cached_property
    def _spectrum_of_gram(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues of `C` that are not 0, and the eigenvectors of `K K^T`, as columns."""
        assert self.keys is not None
        values, vectors = torch.linalg.eigh(_gram(self.keys))
        return values, vectors

    @cached_property
    def mean_eigenvalue(self) -> float:
        """The mean eigenvalue of `C`, `trace(C) / d_in`."""
        if self.keys is not None:
            return sum(block.double().square().sum().item() for block in _blocks(self.keys)) / self.keys.shape[1]
        return 1.0 if self.second_moment is None else self.second_moment.diagonal().double().mean().item()

    @property
    def _ridge(self) -> float:
        return self.ridge * self.mean_eigenvalue

    def _dense(self) -> Tensor:
        """Return a new `C`, `(d_in, d_in)` float64, on the CPU."""
        if self.keys is not None:
            return _gram(self.keys.T).cpu()
        assert self.second_moment is not None
        return self.second_moment.to("cpu", torch.float64, copy=True)

    def trace(self, width: int) -> float:
        """Return the trace of `C`, or `width` for the identity."""
        return self.mean_eigenvalue * width

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Return statistics with `trace(C) D D^T` added, which `solve` adds for the contrast keys `D` of one fact."""
        width = len(contrast)
        if self.is_identity:
            contrast = contrast if self.contrast is None else torch.cat([self.contrast, contrast], 1)
            if contrast.shape[1] < width:  # fused experts are too wide for a dense matrix
                return KeyStatistics(None, contrast=contrast)
            C = torch.eye(width, dtype=torch.float64)  # the identity needs no ridge
        else:
            C = self._dense()
            C.diagonal().add_(self._ridge)
        D = contrast.double().cpu()
        return KeyStatistics(C.addmm_(D, D.T, alpha=self.mean_eigenvalue * width))

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
        D = contrast.double() * (self.mean_eigenvalue * len(contrast)) ** 0.5
        # Woodbury, because c is small and all facts share the factor of C.
        CD = self._solve(D)
        inner = torch.eye(D.shape[1], dtype=D.dtype, device=D.device) + D.T @ CD
        return solved - CD @ torch.linalg.solve(inner, CD.T @ keys.to(CD))

    def times(self, keys: Tensor) -> Tensor:
        """Return `(C + ridge * mean eigenvalue * I) keys`, `(d_in, N)`, in float64, without contrast keys."""
        keys = keys.double()
        if self.is_identity:
            return keys
        scaled = self._ridge * keys
        if self.keys is None:
            assert self.second_moment is not None
            return self.second_moment.to(keys) @ keys + scaled
        held = self.keys.to(keys)
        return held.T @ (held @ keys) + scaled

    def _solve(self, keys: Tensor) -> Tensor:
        if self.is_identity:
            return keys.double()
        keys = keys.to(self._factor.device, torch.float64)
        if self.keys is None:
            return torch.cholesky_solve(keys, self._factor)
        # (K^T K + r I)^-1 x = (x - K^T (K K^T + r I)^-1 K x) / r
        inner = torch.cholesky_solve(torch.cat([block.double() @ keys for block in _blocks(self.keys)]), self._factor)
        solved = keys.clone()
        for block, of_block in zip(_blocks(self.keys), inner.split(_BLOCK), strict=True):
            solved.addmm_(block.double().T, of_block, alpha=-1)
        return solved / self._ridge


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return blocks of rows, of which one at a time is held in float64."""
    return matrix.split(_BLOCK)


def _gram(matrix: Tensor) -> Tensor:
    """Return `M M^T` of a matrix of float32, summed in float64."""
    total = matrix.new_zeros([len(matrix)] * 2, dtype=torch.float64)
    for block in _blocks(matrix.T):
        part = block.double()
        total.addmm_(part.T, part)
    return total


class UnreadStatistics(KeyStatistics):
    """Placeholder for editors that do not declare that they read key statistics. None are computed for them."""

    def __init__(self) -> None:
        super().__init__(None)

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "This editor does not declare that it reads key statistics. Add 'covariance' to reads= of its @editor(...)."
        )

    spectrum = property(_refuse)
    mean_eigenvalue = property(_refuse)

    def solve(self, keys: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Raise ValueError."""
        self._refuse()

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Raise ValueError."""
        self._refuse()


def relative_contrast(contrast: Tensor, weight: float) -> Tensor:
    """Scale contrast keys `D`, `(d_in, c)`, so that in `solve` they add `weight` times the trace of `C`."""
    return contrast.double() * (weight / contrast.double().square().sum()) ** 0.5
