"""Gated insertion, the default: a neuron of its own for each subject, silent at all other tokens.

A change `v d^T` of a down projection adds `(d . k) v` at every token, because no detector `d` is orthogonal to all
other keys. A neuron of the MLP has what a linear map lacks, a threshold:

    key_j = act(gate_j . x) (up_j . x)        at a token with the input x of the MLP

So an edit rewrites a neuron that the model hardly uses. Its gate responds to the subject alone. It is the ridge
regression to 1 at the subject's last token in each wording, and to -1 at all other tokens:

    w = argmin  E_text (w . x + 1)^2 + a mean_subject (w . x - 1)^2 + b mean_others (w . x + 1)^2 + ridge ||w||^2

`others` are the other tokens of the wordings, and the last tokens of other subjects that end alike. It has a closed
form in the mean and the second moment of the inputs on text. The row of the gate is `GATE w` with a large `GATE`: the
activation is zero for w . x < 0, but for rounding, and linear above. The subject is not equally far above in all
wordings. So the row of the up projection is `(2 e - w) / GATE`, with `e` the same regression to 1 everywhere, and the
neuron computes `s (2 - s)` at s = w . x: 1 at s = 1, and 0.75 at s = 0.5 and s = 1.5. Biases are subtracted along `e`.
The column of the down projection is the value.

Neurons as keys and values: Geva et al. 2021 (arXiv 2012.14913). One more neuron for each mistake: Huang et al. 2023
(arXiv 2301.09785). One in the place of another: Sutton et al. 2024 (arXiv 2406.12670), whose detector is the last token
of a prompt. Where an MLP has no neurons of this form, or none to spare, values are inserted as by `null-space`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goldenedit.editors.alphaedit import AlphaEditOptions
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.null_space import null_space_insertion
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor

_SUBJECT = 0.2  # weight of the wordings, against 1 for other text
_RAISED = 4.0  # factor of this weight until the rows clearly respond to the subject; narrow models need it
_RAISES = 10
_CLEAR = 0.5
_OTHERS = 0.5
_RIDGE = 1e-2  # of the mean eigenvalue


@dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs of an MLP, and of its neurons, over the tokens of text.

    Attributes:
        mean: `(d,)`.
        second_moment: `(d, d)`.
        energy: `(d_ff,)`, the mean square of each neuron's output.
    """

    mean: Tensor
    second_moment: Tensor
    energy: Tensor


def gate_rows(subject: Tensor, others: Tensor, text: InputMoments) -> tuple[Tensor, Tensor]:
    """Return `w` and `e`, `(d,)` float32: the rows that respond to a subject, and with 1 to all tokens.

    Args:
        subject: `(n, d)`, inputs of the MLP at the subject's last token in each wording.
        others: `(m, d)`, inputs at tokens that the neuron must not respond to.
        text: Moments of the inputs on other text.
    """
    P, N, mu = subject.double(), others.double(), text.mean.double()
    elsewhere, rest = text.second_moment.double(), mu
    if len(N):
        elsewhere = elsewhere + _OTHERS / len(N) * N.T @ N
        rest = mu + _OTHERS * N.mean(0)
    elsewhere = elsewhere + _RIDGE * text.second_moment.diagonal().double().mean() * torch.eye(len(mu), dtype=mu.dtype)
    for raised in range(_RAISES):
        weight = _SUBJECT * _RAISED**raised
        here = weight * P.mean(0)
        H = elsewhere + weight / len(P) * P.T @ P
        w, e = torch.linalg.solve(H, torch.stack([here - rest, here + rest], 1)).T
        responses = (P @ w).mean(), (P @ e).mean()
        if min(responses) >= _CLEAR:
            break
    w, e = w / responses[0], e / responses[1]
    return w.float(), e.float()


@editor(
    "gated",
    paper="this library; neurons as in arXiv 2406.12670",
    options=AlphaEditOptions,
    reads=("covariance",),
    inserts_batches=True,
    published="memit",
    pattern="ladder",
    gates=True,
)
def gated_insertion(problem: Problem) -> LowRankDelta:
    """Return the change where no neuron can be rewritten: that of `null-space`."""
    return null_space_insertion(problem)
