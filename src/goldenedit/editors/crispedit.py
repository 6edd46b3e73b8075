"""CrispEdit: fine-tuning along directions in which the loss on other text is flat.

Ikram et al. 2026, CrispEdit: Low-Curvature Projections for Scalable Non-Destructive LLM Editing (arXiv 2602.15823), as
reconstructed from the abstract and tables.

K-FAC approximates the curvature of the loss on other text, with respect to one weight matrix, from two second moments:
`A = E[k k^T]` of its inputs and `G = E[g g^T]` of the gradients at its outputs. In the eigenbases
`A = U_A diag(a) U_A^T` and `G = U_G diag(g) U_G^T`, the curvature along the entry `(i, j)` of `U_G^T Delta U_A` is
`g_i a_j`. AlphaEdit's null space, the columns with small `a_j`, lies within the entries of low curvature.

Of small changes `1/2 sum_ij g_i a_j S_ij^2` is the KL divergence on other text, where `S` is the change since the
unedited model. It may be put into the loss as well, as in Ritter et al. 2018, Online Structured Laplace Approximations
for Overcoming Catastrophic Forgetting (arXiv 1805.07810): then many batches together do not harm without limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import CUT, BatchTrainingOptions, option, relative
from goldenedit.editors.problem import TrainingProblem
from goldenedit.editors.record import editor


@dataclass(kw_only=True)
class CrispEditOptions(BatchTrainingOptions):
    """Constants of CrispEdit."""

    finetune_cut: float | None = relative(0.3, published=0.0, least=0.0, help=CUT)
    crispedit_share: float = option(
        0.3, least=0.0, help="Share of the total curvature that the entries which may change hold, the flattest first."
    )
    crispedit_penalty: float = option(
        0.0,
        least=0.0,
        help="Weight in the loss of the KL divergence on other text, in nats a token as the curvature estimates it.",
    )


@editor(
    "crispedit",
    paper="arXiv 2602.15823, as reconstructed from the abstract and tables",
    options=CrispEditOptions,
    learns="training",
    reads=("covariance", "output_gradients"),
    takes_identity=False,
    inserts_batches=True,
    loss="ended",
)
def crispedit(problem: TrainingProblem) -> FlatChange:
    """Return the change that CrispEdit trains: the entries of lowest curvature."""
    assert problem.output_gradients is not None  # the editor declares that it reads them
    a, U_A = problem.statistics.spectrum
    g, U_G = torch.linalg.eigh(problem.output_gradients.double())
    curvature = torch.outer(g, a).clamp_min(0.0)
    is_flat = flattest(curvature, problem.options.crispedit_share)
    if not problem.options.crispedit_penalty:
        return FlatChange(U_A, U_G, is_flat, problem.options.finetune_cut)
    before = torch.zeros_like(curvature)
    for delta in problem.earlier:
        before += (U_G.T @ delta.B.double()) @ (delta.A.double() @ U_A)
    weights = problem.options.crispedit_penalty * curvature
    return PenalizedChange(U_A, U_G, is_flat, problem.options.finetune_cut, weights, before)


def flattest(curvature: Tensor, share: float) -> Tensor:
    """Return which entries are the flattest ones that together hold at most `share` of the total curvature.

    Args:
        curvature: Curvature of each entry, of any shape.
    """
    values, order = curvature.flatten().sort()
    is_flat = torch.zeros_like(order, dtype=torch.bool)
    is_flat[order] = values.cumsum(0) <= share * values.sum()
    return is_flat.view_as(curvature)


class FlatChange(nn.Module):
    """A change `U_G S U_A^T` whose coordinates `S` may differ from zero only at flat entries.

    Adam runs on the coordinates, because it scales a gradient entry by entry: from a projected gradient of the weight
    itself, its steps would leave the flat entries.

    Args:
        U_A: `(d_in, d_in)`, the basis of the inputs, as columns.
        U_G: `(d_out, d_out)`, the basis of the outputs, as columns.
        is_flat: `(d_out, d_in)`, which coordinates may change.
        cut: Largest share of the change, in the Frobenius norm, that is cut off at the end to keep its rank low.
    """

    U_A: Tensor
    U_G: Tensor
    is_flat: Tensor

    def __init__(self, U_A: Tensor, U_G: Tensor, is_flat: Tensor, cut: float) -> None:
        super().__init__()
        self.cut = cut
        self.coordinates = nn.Parameter(torch.zeros(is_flat.shape))
        self.register_buffer("U_A", U_A.float())
        self.register_buffer("U_G", U_G.float())
        self.register_buffer("is_flat", is_flat)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs Delta^T`. For the few tokens of a batch it takes less than computing `Delta`."""
        return inputs @ self.U_A @ (self.coordinates * self.is_flat).T @ self.U_G.T

    def constrain(self) -> None:
        """Do nothing: entries that are not flat have no gradient."""

    def change(self) -> LowRankDelta:
        """Return the factors of the largest singular values, of which a little may lie at entries that are not flat."""
        flat = (self.coordinates.detach() * self.is_flat).cpu()
        delta, _ = LowRankDelta.from_dense(flat, self.cut)
        return LowRankDelta(delta.A @ self.U_A.cpu().T, self.U_G.cpu() @ delta.B)


class PenalizedChange(FlatChange):
    """A flat change with the curvature of all changes together in the loss.

    Args:
        weights: `(d_out, d_in)`, weights of the squares of the coordinates.
        before: `(d_out, d_in)`, coordinates of the changes before this one, which add to its own.
    """

    weights: Tensor
    before: Tensor

    def __init__(self, U_A: Tensor, U_G: Tensor, is_flat: Tensor, cut: float, weights: Tensor, before: Tensor) -> None:
        super().__init__(U_A, U_G, is_flat, cut)
        self.register_buffer("weights", weights.float())
        self.register_buffer("before", before.float())

    def penalty(self) -> Tensor:
        """Return `1/2 sum_ij w_ij S_ij^2` of the coordinates with those before."""
        return (self.weights * (self.before + self.coordinates * self.is_flat).square()).sum() / 2
