"""FT-L and FT-M, which train the edited matrix and are the field's baselines, and LoRA, which trains two factors.

FT-L: Zhu et al. 2020, Modifying Memories in Transformer Models (arXiv 2012.00363), as ROME's authors ran it: each
weight stays within `epsilon` of its old value, and all answer tokens are predicted at the prompt's last token.
FT-M: Zhang et al. 2024, A Comprehensive Study of Knowledge Editing (arXiv 2401.01286): cross entropy of each token of
the answer after the tokens before it.
LoRA: Hu et al. 2021 (arXiv 2106.09685): the same loss, with a low-rank change that starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import TrainingOptions, option, relative
from goldenedit.editors.problem import TrainingProblem
from goldenedit.editors.record import editor


@dataclass(kw_only=True)
class ClippedOptions(TrainingOptions):
    """Constants of FT-L."""

    finetune_epsilon: float | None = relative(
        0.11,
        published=5e-4,
        unit="weight",
        help="Largest change of a weight, in units of the root mean square of the edited weights. None means 0.11 or, "
        "with relative_constants=False, the published 5e-4 without a unit.",
    )


@dataclass(kw_only=True)
class LoraOptions(TrainingOptions):
    """Constants of LoRA."""

    lora_rank: int = option(8, least=1, whole=True, help="Rank of the trained factors.")


@editor(
    "ft-l",
    paper="arXiv 2012.00363",
    options=ClippedOptions,
    learns="training",
    reads=("dense_tolerance",),
    loss="last",
    published="ft",
)
def ft_l(problem: TrainingProblem) -> DenseChange:
    """Return the change that FT-L trains: all entries, within `[-epsilon, epsilon]`."""
    return DenseChange(problem.d_in, problem.d_out, problem.options.finetune_epsilon)


@editor(
    "ft-m",
    paper="arXiv 2401.01286",
    options=TrainingOptions,
    learns="training",
    reads=("dense_tolerance",),
    published="ft",
)
def ft_m(problem: TrainingProblem) -> DenseChange:
    """Return the change that FT-M trains: all entries."""
    return DenseChange(problem.d_in, problem.d_out)


@editor("lora", paper="arXiv 2106.09685", options=LoraOptions, learns="training")
def lora(problem: TrainingProblem) -> LowRankChange:
    """Return the change that LoRA trains: two factors."""
    return LowRankChange(problem.d_in, problem.d_out, problem.options.lora_rank, problem.generator)


class DenseChange(nn.Module):
    """A change of all entries of a matrix.

    Args:
        epsilon: Largest size of an entry; None for no limit.
        cut: Largest share of the change, in the Frobenius norm, that is cut off at the end to keep its rank low; None
            to keep all entries.
    """

    def __init__(self, d_in: int, d_out: int, epsilon: float | None = None, cut: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))
        self.epsilon = epsilon
        self.cut = cut

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs Delta^T`."""
        return nn.functional.linear(inputs, self.weight)

    @torch.no_grad()
    def constrain(self) -> None:
        """Clamp all entries to `[-epsilon, epsilon]`."""
        if self.epsilon is not None:
            self.weight.clamp_(-self.epsilon, self.epsilon)

    def change(self) -> Tensor | LowRankDelta:
        """Return `Delta`, `(d_out, d_in)`, or the factors that are left of it."""
        dense = self.weight.detach().cpu()
        return dense if self.cut is None else LowRankDelta.from_dense(dense, self.cut)[0]


class LowRankChange(nn.Module):
    """A change `B A` of rank `r`, initialized as in PEFT: `A` at random, `B` with zeros."""

    def __init__(self, d_in: int, d_out: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = d_in**-0.5
        self.A = nn.Parameter(torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs A^T B^T`."""
        return nn.functional.linear(nn.functional.linear(inputs, self.A), self.B)

    def constrain(self) -> None:
        """Do nothing: the rank is the only constraint."""

    def change(self) -> LowRankDelta:
        """Return the factors."""
        return LowRankDelta(self.A.detach().cpu().clone(), self.B.detach().cpu().clone())
