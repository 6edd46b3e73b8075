"""The change of a weight matrix as two low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

VLLM_RANK = 512  # the largest rank of an adapter that vLLM loads


@dataclass(frozen=True)
class LowRankDelta:
    """`Delta = B @ A`, in the orientation of nn.Linear: `(d_out, d_in)`.

    If the factors have different precisions, both become float32.

    Attributes:
        A: `(r, d_in)`, LoRA's `lora_A.weight`.
        B: `(d_out, r)`, LoRA's `lora_B.weight`.
        experts: Number of matrices of equal width that `A` spans side by side: the fused experts of a mixture; 1 for
            all other modules.
    """

    A: Tensor
    B: Tensor
    experts: int = 1

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"The factors B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not multiply. Give them one rank."
            )
        if self.A.shape[1] % self.experts:
            raise ValueError(
                f"The factor A {tuple(self.A.shape)} cannot be split among {self.experts} experts of equal width."
            )
        if self.A.dtype != self.B.dtype:
            object.__setattr__(self, "A", self.A.float())  # the dataclass is frozen
            object.__setattr__(self, "B", self.B.float())

    @property
    def rank(self) -> int:
        """The rank of the factors: the number of columns of B."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """Return `B @ A`."""
        return self.B @ self.A

    def padded(self, rank: int, offset: int = 0) -> LowRankDelta:
        """Return the same delta with factors of rank `rank`: its own factors start at `offset`, the rest is zeros."""
        A = self.A.new_zeros(rank, self.A.shape[1])
        B = self.B.new_zeros(self.B.shape[0], rank)
        A[offset : offset + self.rank] = self.A
        B[:, offset : offset + self.rank] = self.B
        return replace(self, A=A, B=B)

    def beside(self, other: LowRankDelta) -> LowRankDelta:
        """Return the sum of two deltas, with the factors of both side by side."""
        return replace(self, A=torch.cat([self.A, other.A]), B=torch.cat([self.B, other.B], 1))

    def part(self, start: int, stop: int) -> LowRankDelta:
        """Return the delta of the ranks `start:stop` only."""
        return replace(self, A=self.A[start:stop].contiguous(), B=self.B[:, start:stop].contiguous())

    def balanced(self) -> LowRankDelta:
        """Return the same delta with equal norms of each column of B and its row of A, best in half precision."""
        a, b = self.A.norm(dim=1), self.B.norm(dim=0)
        scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-30)).sqrt(), torch.ones_like(a))
        return replace(self, A=self.A * scale[:, None], B=self.B / scale)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `U (d_out, r)`, `s (r,)`, `V (r, d_in)` with `Delta = U diag(s) V`, in float64, largest `s` first."""
        Qb, Rb = torch.linalg.qr(self.B.double())
        Qa, Ra = torch.linalg.qr(self.A.double().T)
        U, s, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        return Qb @ U, s, V @ Qa.T

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        A, B = self.A.double(), self.B.double()
        return ((A @ A.T) * (B.T @ B)).sum().clamp_min(0).sqrt().item()

    @property
    def row_norms(self) -> Tensor:
        """The norm of each row, `(d_out,)` float64."""
        A, B = self.A.double(), self.B.double()
        return ((B @ (A @ A.T)) * B).sum(1).clamp_min(0).sqrt()

    @property
    def transposed(self) -> LowRankDelta:
        """The transposed delta."""
        return LowRankDelta(self.B.T, self.A.T)

    @property
    def paying_rank(self) -> int:
        """The largest rank at which the factors are no larger than the dense matrix and vLLM loads them."""
        d_out, d_in = self.B.shape[0], self.A.shape[1] // self.experts
        return max(1, min(d_out * d_in // (d_out + d_in), VLLM_RANK))

    def reduced(self, rank: int) -> tuple[LowRankDelta, float]:
        """Return the delta with at most `rank` ranks, and its relative error in the Frobenius norm.

        A delta of at most that rank keeps its factors. Otherwise the largest singular values are kept, with balanced
        factors.
        """
        if self.rank <= rank:
            return self, 0.0
        U, s, V = self.svd()
        error = (s[rank:].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)).sqrt().item()
        return replace(self, A=V[:rank].float(), B=(U[:, :rank] * s[:rank]).float()).balanced(), error

    def compact(self) -> LowRankDelta:
        """Return the same delta with at most as many ranks as the matrix has rows or columns.

        A delta of a larger rank becomes the dense change beside the identity, summed in float64 and rounded once.
        """
        d_out, d_in = len(self.B), self.A.shape[1]
        if self.rank <= min(d_out, d_in):
            return self
        dense = (self.B.double() @ self.A.double()).to(self.A.dtype)
        eye = torch.eye(min(d_out, d_in), dtype=self.A.dtype, device=self.A.device)
        return replace(self, A=dense, B=eye) if d_out <= d_in else replace(self, A=eye, B=dense)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return `lora_A.weight` and `lora_B.weight` in PEFT's layout.

        For fused experts they are `(experts * r, d_ff)`, ordered by expert and then rank, and `(d_out, r * experts)`,
        ordered by rank and then expert.
        """
        A = self.A.unflatten(1, (self.experts, -1)).transpose(0, 1).flatten(0, 1)
        return A, self.B.repeat_interleave(self.experts, 1)

    @classmethod
    def from_stored(cls, A: Tensor, B: Tensor, rank: int) -> LowRankDelta:
        """Return the delta of factors `A` and `B` in PEFT's layout.

        Raises:
            ValueError: The factors do not have this rank, or `B` differs between experts.
        """
        if A.ndim != 2 or B.ndim != 2 or rank < 1 or A.shape[0] % rank or len(A) < rank or A.shape[0] != B.shape[1]:
            raise ValueError(f"The factors B {tuple(B.shape)} and A {tuple(A.shape)} do not have rank {rank}.")
        experts = len(A) // rank
        of_experts = B.unflatten(1, (rank, experts))
        first = of_experts[..., :1].expand_as(of_experts)
        if not torch.allclose(of_experts, first, rtol=0, atol=0, equal_nan=True):
            raise ValueError("The factor B differs between experts. An edit needs one B for all experts.")
        A = A.unflatten(0, (experts, rank)).transpose(0, 1).flatten(1)
        return cls(A.contiguous(), of_experts[..., 0].contiguous(), experts)

    @classmethod
    def from_dense(cls, dense: Tensor, tolerance: float = 0.0) -> tuple[LowRankDelta, float]:
        """Return the delta of smallest rank within `tolerance` of a dense change, and its relative error.

        Args:
            dense: `(d_out, d_in)`.
            tolerance: Largest error in the Frobenius norm, relative to the norm of `dense`; 0 keeps all ranks.
        """
        U, s, V = torch.linalg.svd(dense.double(), full_matrices=False)
        tails = s.square().flip(0).cumsum(0).flip(0)  # energy of each singular value and all smaller ones
        total = tails[0].clamp_min(torch.finfo(tails.dtype).tiny)
        rank = max(1, int((tails > tolerance**2 * total).sum()))
        error = (tails[rank] / total).sqrt().item() if rank < len(s) else 0.0
        return cls(V[:rank].float(), (U[:, :rank] * s[:rank]).float()).balanced(), error
