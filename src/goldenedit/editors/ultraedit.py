"""UltraEdit: an update from one forward and one backward pass, without subjects, key statistics or optimization.

Gu et al. 2025, UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing (arXiv 2505.14679), equations 4 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import relative
from goldenedit.editors.problem import GradientProblem
from goldenedit.editors.record import editor


@dataclass(kw_only=True)
class UltraEditOptions:
    """Constants of UltraEdit."""

    ultraedit_lr: float | None = relative(
        1.0, published=1e-6, unit="output length", help="Size of the step, in units of the mean output length."
    )
    ultraedit_ridge: float | None = relative(
        0.1,
        published=1.0,
        unit="input energy",
        help="Penalty on the size of the update, in units of the mean squared input length.",
    )


@editor(
    "ultraedit",
    paper="arXiv 2505.14679, equations 4 to 8",
    options=UltraEditOptions,
    learns="gradients",
    inserts_batches=True,
)
def ultraedit(problem: GradientProblem) -> LowRankDelta:
    """Return the update of a linear map from its inputs and output gradients at the tokens of the answers.

        [h^; g^] = ([h; g] - mean) / std      v = -lr ||h^||^2 g^      Delta^T = (H^T H + ridge I)^-1 H^T V

    Because `(H^T H + ridge I)^-1 H^T = H^T (H H^T + ridge I)^-1`, an n x n system gives a delta of rank n.

    Raises:
        ValueError: All edits so far have only one token of answers.
    """
    if problem.moments.count < 2:
        raise ValueError(
            "UltraEdit got 1 answer token, but its first batch needs at least 2. Add a fact, or use a longer answer."
        )
    H = problem.inputs.double()
    hat = problem.moments.normalized(torch.cat([H, problem.gradients.double()], dim=1))
    h_hat, g_hat = hat[:, : H.shape[1]], hat[:, H.shape[1] :]
    V = -problem.options.ultraedit_lr * h_hat.square().sum(1, keepdim=True) * g_hat
    ridge = problem.options.ultraedit_ridge * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return LowRankDelta(torch.linalg.solve(H @ H.T + ridge, H).float(), V.T.float())
