"""LocFT-BF: fine-tuning of one down projection over epochs of mini-batches.

Fine-tuning Done Right in Model Editing (arXiv 2509.22072). Each fact is seen once an epoch, so that no batch is trained
until it is learned and then forgotten. The end of the answer is learned with the answer. The paper trains all entries
of the matrix; here the change is two low-rank factors from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

from goldenedit.editors.finetune import LowRankChange
from goldenedit.editors.options import BatchTrainingOptions, option
from goldenedit.editors.problem import TrainingProblem
from goldenedit.editors.record import editor


@dataclass(kw_only=True)
class LocftOptions(BatchTrainingOptions):
    """Constants of LocFT-BF."""

    locft_rank: int = option(32, least=1, whole=True, help="Rank of the trained factors.")


@editor(
    "locft",
    paper="arXiv 2509.22072",
    options=LocftOptions,
    learns="training",
    inserts_batches=True,
    loss="ended",
)
def locft(problem: TrainingProblem) -> LowRankChange:
    """Return the change that LocFT-BF trains: two factors."""
    rank = min(problem.options.locft_rank, problem.d_in, problem.d_out)
    return LowRankChange(problem.d_in, problem.d_out, rank, problem.generator)
