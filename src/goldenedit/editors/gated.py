"""Gated insertion, the default: neurons that know the subject, and neurons that know what is asked about it.

A change `v d^T` of a down projection adds `(d . k) v` at every token, because no detector `d` is orthogonal to all
other keys. A neuron of the MLP has what a linear map lacks, a threshold:

    key_j = act(gate_j . x) (up_j . x)        at a token with the input x of the MLP

So an edit rewrites neurons that the model hardly uses, two kinds of them. Those of the target layers respond to the
subject alone, whatever is said about it. If they wrote the answer, it would fall out at every question about the
subject. So they write a *marker*: a value that changes what the model says as little as possible, and that a later
layer sees from where the answer is due. There, in a layer at about two thirds of the depth, each fact has a neuron that
responds where the marker is present and this fact is asked for, and nowhere else. It writes the answer. A subject has
one marker, which later edits about it use.

The rows of both kinds are ridge regressions, to 1 where the neuron is to respond, and to other values elsewhere:

    w = argmin  E_text (w . x - t)^2 + a mean_here (w . x - 1)^2 + sum_groups b mean_group (w . x - t_group)^2
                + ridge ||w||^2

They have a closed form in the mean and the second moment of the inputs on text. The row of the gate is `GATE w` with a
large `GATE`: the activation is zero for w . x < 0, but for rounding, and linear above.

- Of the subject: `here` is its last token in each wording. The others are the other tokens of the wordings, and the
  last tokens of other subjects that end alike. All of them have t = -1. The responses to `here` differ. So the row of
  the up projection is `(2 e - w) / GATE`, with `e` the same regression to 1 everywhere, and the neuron computes
  `s (2 - s)` at s = w . x: 1 at s = 1, and 0.75 at s = 0.5 and s = 1.5.
- Of an answer: `here` are the tokens before those of the answer, by kind of wording. Two things have to come together
  there, the marker and what is asked. So t = -1 where there is one of them: before answers to other questions about the
  subject, behind the new answer, and before answers to the same question about other subjects. Some of these have
  markers of their own. t = -2 where there is neither: at all other tokens, and on text. Then the responses add up, as
  those of a linear map do, and text that only reads as if the fact were asked for does not open the gate. The up
  projection adds what one threshold cannot: its row is `(2 u - w) / GATE`, and `u` responds to the marker, with t = 0.5
  where something else is asked, or another subject has a marker, and 0 where there is none. With m = u . x the neuron
  computes `s (2 m - s)`.

Biases are subtracted along `e`. The column of the down projection is the value.

Neurons as keys and values: Geva et al. 2021 (arXiv 2012.14913). One more neuron for each mistake: Huang et al. 2023
(arXiv 2301.09785). One in the place of another: Sutton et al. 2024 (arXiv 2406.12670), whose detector is the last token
of a prompt. Where an MLP has no neurons of this form, or none to spare, values are inserted as by `null-space`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from goldenedit.editors.alphaedit import AlphaEditOptions
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.null_space import null_space_insertion
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor

SUBJECT_WEIGHTS = (0.2, 0.5)  # of the subject's tokens and of those elsewhere, against 1 for other text
ANSWER_WEIGHTS = (6.0, 0.4)
_ONE_ALONE, _NEITHER = -1.0, -2.0  # responses of a gate where the marker is present or the fact is asked for, and else
_MARKED = 0.5  # response of its up projection to the marker where something else is asked
_RAISED = 4.0  # factor of this weight until the rows clearly respond to the subject; narrow models need it
_RAISES = 10
_CLEAR = 0.5
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


def gate_rows(
    here: Sequence[Tensor],
    elsewhere: Sequence[tuple[Sequence[Tensor], float]],
    text: InputMoments,
    weights: tuple[float, float],
    on_text: float = -1.0,
) -> tuple[Tensor, Tensor]:
    """Return `w` and `e`, `(d,)` float32: the rows that respond to some tokens, and with 1 to all tokens.

    Both respond with 1 in the mean of `here`.

    Args:
        here: Inputs of the MLP at the tokens to respond to, `(n, d)` for each group of them. The groups weigh alike.
        elsewhere: The same of tokens not to respond to, each time with the response there.
        text: Moments of the inputs on other text.
        weights: That of `here` as a whole, and that of each entry of `elsewhere`, against 1 for other text.
        on_text: The response to other text.
    """
    return _solved(
        _moments(here), [(_moments(groups), response) for groups, response in elsewhere], text, weights, on_text
    )


def answer_rows(
    here: Sequence[Tensor],
    not_asked: Tensor,
    not_marked: Sequence[Tensor],
    outside: Tensor,
    text: InputMoments,
    others_marked: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `w`, `u` and `e`, `(d,)` float32: the rows that respond to an answer, to the marker, and to all tokens.

    All of them respond with 1 in the mean of `here`.

    Args:
        here: Inputs of the MLP where the answer is due, `(n, d)` for each kind of wording. The kinds weigh alike.
        not_asked: The same where the subject has its marker, and something else is asked.
        not_marked: The same where the fact is asked for of other subjects, by kind of wording.
        outside: The same at all other tokens of these texts.
        text: Moments of the inputs on other text.
        others_marked: The same where the fact is asked for of other subjects that have markers, by kind of wording.
    """
    due, around, asked_else, unmarked, others = map(_moments, (here, [outside], [not_asked], not_marked, others_marked))
    alone = [(around, _NEITHER), (asked_else, _ONE_ALONE), (unmarked, _ONE_ALONE), (others, _ONE_ALONE)]
    w, e = _solved(due, alone, text, ANSWER_WEIGHTS, _NEITHER)
    marked = [(around, 0.0), (asked_else, _MARKED), (unmarked, 0.0), (others, _MARKED)]
    u, _ = _solved(due, marked, text, ANSWER_WEIGHTS, 0.0)
    return w, u, e


def _solved(
    here: tuple[Tensor, Tensor] | None,
    elsewhere: Sequence[tuple[tuple[Tensor, Tensor] | None, float]],
    text: InputMoments,
    weights: tuple[float, float],
    on_text: float,
) -> tuple[Tensor, Tensor]:
    """Return the rows of `gate_rows`, from the moments of the inputs instead of the inputs."""
    if here is None:
        raise ValueError("There are no tokens to respond to.")
    second, first = here
    mu = text.mean.double()
    other, silent, everywhere = text.second_moment.double(), on_text * mu, mu
    for moments, response in elsewhere:
        if moments is not None:
            moment, mean = moments
            other = other + weights[1] * moment
            silent = silent + weights[1] * response * mean
            everywhere = everywhere + weights[1] * mean
    other = other + _RIDGE * text.second_moment.diagonal().double().mean() * torch.eye(len(mu), dtype=mu.dtype)
    for raised in range(_RAISES):
        weight = weights[0] * _RAISED**raised
        targets = torch.stack([weight * first + silent, weight * first + everywhere], 1)
        w, e = torch.linalg.solve(other + weight * second, targets).T
        responses = first @ w, first @ e
        if min(responses) >= _CLEAR:
            break
    return (w / responses[0]).float(), (e / responses[1]).float()


def _moments(groups: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the second moment and the mean of inputs, `(d, d)` and `(d,)`, each the mean over groups; None of none."""
    if not any(map(len, groups)):
        return None
    of_groups = [(P.T @ P / len(P), P.mean(0)) for P in (group.double() for group in groups if len(group))]
    seconds, firsts = zip(*of_groups, strict=True)
    return torch.stack(seconds).mean(0), torch.stack(firsts).mean(0)


@editor(
    "gated",
    paper="this library; neurons as in arXiv 2406.12670",
    options=AlphaEditOptions,
    reads=("covariance",),
    inserts_batches=True,
    published="memit",
    pattern="upper",
    gates=True,
    version=4,  # since a subject has one marker
)
def gated_insertion(problem: Problem) -> LowRankDelta:
    """Return the change where no neuron can be rewritten: that of `null-space`."""
    return null_space_insertion(problem)
