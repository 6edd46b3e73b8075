"""The optimization of markers: what the neurons of a subject write, so that a later layer sees that it was mentioned.

A marker is seen from where an answer is due if it moves the input `x` of a later layer's MLP there by much more than
`x` varies on text. With `C` the covariance of `x` on text, and `d` the mean of the moves over wordings, the direction
in which a linear map tells them best is `u = C^-1 d / sqrt(d . C^-1 d)`, and `u . move` is the size of a move in
standard deviations. First the marker maximizes `d . C^-1 d`. Then `u` is fixed, and each wording is moved by a margin:

    loss = mean over wordings softplus(margin - u . move)
         + weight * sum over kept texts KL(p_marked || p_original)
         + weight * sum over neurons j of other subjects mean over texts relu(w_j . x + rest)^2

Kept are the answers of the model to other questions about the subject, so a marker changes what is said as little as
possible. It is optimized under the change that inserts it, as values are (`goldenedit.editing.values`), and starts from
the marker of another subject, which is found once for each model (`first_marker`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from goldenedit.architecture.hooks import evaluating, hidden_argument, inputs_at, outside_inference_mode, stop_forward
from goldenedit.architecture.replay import Capture, Replayer, capture
from goldenedit.editing.values import Edited, KeptRow, at_subject
from goldenedit.editors.gated import InputMoments
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, pad

_MARGIN = 5.0  # standard deviations
_SEEN = 0.5  # weight of the margin
_OPENING_GOAL = 4.0
_KEPT = 10.0  # further weight of the kept texts
_OTHERS, _CLOSED = 10.0, 0.3  # weight of what opens neurons of other subjects, and how far these stay from opening
_MOMENTUM = 0.7
_NOISE = 0.02  # length of a random first marker, of the value's
_START = 0.5  # that of one that is another subject's marker
_STARTS = 4  # random first markers to choose from
_LATE = 0.3  # length of late steps, of the others'
_RIDGE = 1e-2  # of the mean variance


@dataclass(frozen=True)
class _Course:
    """How a marker is optimized.

    Attributes:
        steps: Number of steps.
        fixing: The steps that fix the direction.
        late: The step from which on steps are shorter.
    """

    steps: int
    fixing: tuple[int, int]
    late: int


_FROM_NOISE, _FROM_START = _Course(20, (5, 9), 14), _Course(10, (0, 4), 5)


@outside_inference_mode()
def optimize_marker(
    lm: LanguageModel,
    asked: Sequence[Row],
    kept: Sequence[KeptRow],
    layers: Sequence[int],
    detectors: Sequence[Tensor],
    reader: nn.Module,
    moments: InputMoments,
    lr: float,
    clamp: float,
    start: Tensor | None = None,
    leaks: Sequence[Row] = (),
    others: Tensor | None = None,
) -> Tensor:
    """Return the marker of a subject, `(m, d_model)` float32: the values of its neurons at `m` layers.

    Args:
        lm: The model, with the neurons of the subject rewritten, and values of 0.
        asked: Texts that end where an answer is due.
        kept: What the model must go on saying.
        layers: The layers of these neurons, ascending.
        detectors: By layer `(1, d_in)`, what a value is inserted with.
        reader: The linear map behind which the marker is to be seen.
        moments: Moments of its input on text.
        lr: Length of a step, of the length of the value before the edit.
        clamp: Largest length, in the same unit.
        start: `(m, d_model)`, the marker of another subject, see `first_marker`; None to start from noise.
        leaks: Texts that end where an answer is due that is not the subject's own.
        others: `(n, d)`, the rows of neurons of other subjects, which respond with 1 where their answers are due.

    Raises:
        ValueError: The optimization is not finite.
    """
    with evaluating(lm.model), torch.enable_grad():
        loss = _Loss(lm, asked, kept, layers, detectors, reader, moments, leaks, others)
        if start is None:
            descent = _Descent(loss, loss.noise(0), lr, clamp, _FROM_NOISE)
        else:
            descent = _Descent(loss, _START * loss.lengths[:, None] * start.to(loss.lengths), lr, clamp, _FROM_START)
        return descent.to_end().marker.detach().float().cpu()


@outside_inference_mode()
def first_marker(
    lm: LanguageModel,
    asked: Sequence[Row],
    kept: Sequence[KeptRow],
    layers: Sequence[int],
    detectors: Sequence[Tensor],
    reader: nn.Module,
    moments: InputMoments,
    lr: float,
    clamp: float,
    seed: int = 0,
) -> Tensor:
    """Return what the markers of all subjects may start from, `(m, d_model)` float32 of length 1 at each layer.

    It is the marker of one subject, from the best of several random starts. Some starts end in markers that change what
    is kept several times as much as others, and which ones hardly depends on the subject.

    The arguments are as in `optimize_marker`.
    """
    with evaluating(lm.model), torch.enable_grad():
        loss = _Loss(lm, asked, kept, layers, detectors, reader, moments)
        starts = [_Descent(loss, loss.noise(seed + index), lr, clamp, _FROM_NOISE) for index in range(_STARTS)]
        best = min(starts, key=lambda start: start.until(_FROM_NOISE.fixing[0]).value)
        return functional.normalize(best.to_end().marker.detach().float().cpu(), dim=1)


class _Descent:
    """A marker on its way down.

    Attributes:
        marker: `(m, d_model)`.
        value: Its loss before the last step.
    """

    def __init__(self, loss: _Loss, marker: Tensor, lr: float, clamp: float, course: _Course) -> None:
        self.loss, self.lr, self.clamp, self.course = loss, lr, clamp, course
        self.marker = marker.clone().requires_grad_()
        self.velocity = torch.zeros_like(marker)
        self.direction: Tensor | None = None
        self.step, self.value = 0, math.inf

    def to_end(self) -> _Descent:
        """Take all steps."""
        return self.until(self.course.steps)

    def until(self, step: int) -> _Descent:
        """Take the steps before a step."""
        while self.step < step:
            self._descend()
        return self

    def _descend(self) -> None:
        lengths = self.loss.lengths
        moves = self.loss.moves(self.marker)
        if self.step in self.course.fixing:
            self.direction = self.loss.direction(moves)
        loss = self.loss(self.marker, moves, self.direction)
        if not loss.isfinite():
            raise ValueError(
                "The optimization of a marker is not finite. Load the model in float32 or bfloat16, or lower "
                "EditConfig.lr."
            )
        (gradient,) = torch.autograd.grad(loss, self.marker)
        with torch.no_grad():
            scaled = gradient * lengths[:, None]
            self.velocity.mul_(_MOMENTUM).add_(scaled / scaled.norm().clamp_min(1e-12))
            rate = self.lr if self.step < self.course.late else _LATE * self.lr
            moved = self.marker - rate * lengths[:, None] * self.velocity
            longest = self.clamp * lengths / moved.norm(dim=1).clamp_min(1e-12)
            self.marker.copy_(moved * longest.clamp(max=1.0)[:, None])
        self.step, self.value = self.step + 1, loss.item()


class _Loss:
    """The loss of a marker.

    Attributes:
        lengths: `(m,)`, the lengths of the values before the edit.
    """

    def __init__(
        self,
        lm: LanguageModel,
        asked: Sequence[Row],
        kept: Sequence[KeptRow],
        layers: Sequence[int],
        detectors: Sequence[Tensor],
        reader: nn.Module,
        moments: InputMoments,
        leaks: Sequence[Row] = (),
        others: Tensor | None = None,
    ) -> None:
        self.count = len(asked)
        self.seen = _Seen(lm, [*asked, *(leaks if others is not None else ())], layers, detectors, reader)
        self.unchanged = _Kept(lm, kept, layers, detectors) if kept else None
        self.others = None
        if others is not None:  # those that open before there is a marker are the subject's own
            others = others.to(self.seen.before)
            opens = (self.seen.before[: self.count] @ others.T).mean(0) > 0
            self.others = None if opens.all() else others[~opens]
        self.whitening = _whitening(moments).to(self.seen.before.device)
        self.lengths = self.seen.lengths

    def noise(self, seed: int) -> Tensor:
        """Return a short random marker, `(m, d_model)`."""
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(self.lengths), self.seen.width, generator=generator)
        return _NOISE * self.lengths[:, None] * functional.normalize(start, dim=1).to(self.lengths.device)

    def moves(self, marker: Tensor) -> Tensor:
        """Return by how much a marker moves the reader's inputs, `(n, d)`, those of leaks last."""
        return self.seen(marker) - self.seen.before

    def direction(self, moves: Tensor) -> Tensor:
        """Return the direction in which a linear map tells the mean move best, of one standard deviation, `(d,)`."""
        mean = moves[: self.count].mean(0)
        return (self.whitening @ mean / (mean @ self.whitening @ mean).sqrt().clamp_min(1e-12)).detach()

    def __call__(self, marker: Tensor, moves: Tensor, direction: Tensor | None) -> Tensor:
        """Return the loss of a marker, given its moves, before or after the direction is fixed."""
        own = moves[: self.count]
        if direction is None:
            mean = own.mean(0)
            loss = torch.log1p(_OPENING_GOAL / (mean @ self.whitening @ mean + 1e-6))
        else:
            loss = _SEEN * functional.softplus(_MARGIN - own @ direction).mean()
        if self.unchanged is not None:
            loss = loss + _KEPT * self.unchanged(marker).to(loss.device)
        if self.others is not None:
            opening = ((self.seen.before + moves) @ self.others.T + _CLOSED).relu().square()
            loss = loss + _OTHERS * opening.mean(0).sum()
        return loss


class _Seen:
    """The inputs of a map where answers are due, `(n, d)`, as a function of the marker."""

    def __init__(
        self,
        lm: LanguageModel,
        asked: Sequence[Row],
        layers: Sequence[int],
        detectors: Sequence[Tensor],
        reader: nn.Module,
    ) -> None:
        sites = [lm.architecture.down_projection(lm.model, layer) for layer in layers]
        batch = pad(asked, lm.padding_id, lm.device)
        named = {"reader": reader} | {str(index): site for index, site in enumerate(sites)}
        self.captured = capture(lm.model, lm.architecture, layers[0], batch, named)
        self.reader, self.batch = reader, batch
        self.replay, self.run = _edited(lm, self.captured, layers, detectors)
        record = self.captured.record
        places = batch.read_rows * batch.input_ids.shape[1] + batch.read_positions
        self.before = inputs_at(record.calls["reader"], places)
        values = [at_subject(batch, record.outputs[str(index)]) for index in range(len(sites))]
        self.width = values[0].shape[-1]
        self.lengths = torch.stack([of_layer.norm(dim=1).mean() for of_layer in values])

    def __call__(self, marker: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        with stop_forward() as stop:

            def take(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                inputs.append(hidden_argument(args, kwargs))
                stop()

            handle = self.reader.register_forward_pre_hook(take, with_kwargs=True)
            try:
                self.run(marker)
            finally:
                handle.remove()
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        return hidden[self.replay.reads(self.batch).to(hidden.device)].float()


class _Kept:
    """The weighted KL divergence on texts that must stay the same, as a function of the marker.

    Args:
        kept: These texts.
    """

    def __init__(
        self, lm: LanguageModel, kept: Sequence[KeptRow], layers: Sequence[int], detectors: Sequence[Tensor]
    ) -> None:
        batch = pad([row.row for row in kept], lm.padding_id, lm.device)
        captured = capture(lm.model, lm.architecture, layers[0], batch, {})
        self.original = captured.logits.float().log_softmax(-1)
        reads = torch.bincount(batch.read_rows, minlength=len(kept))
        weights = torch.tensor([row.weight for row in kept], device=lm.device) / reads
        self.weights = weights[batch.read_rows]
        _, self.run = _edited(lm, captured, layers, detectors)

    def __call__(self, marker: Tensor) -> Tensor:
        log_probs = self.run(marker).float().log_softmax(-1)
        return (self.weights * (log_probs.exp() * (log_probs - self.original)).sum(-1)).sum()


def _edited(
    lm: LanguageModel, captured: Capture, layers: Sequence[int], detectors: Sequence[Tensor]
) -> tuple[Replayer, Callable[[Tensor], Tensor]]:
    """Return a replay of a capture that was compared with it, and the logits as a function of the marker."""
    sites = [lm.architecture.down_projection(lm.model, layer) for layer in layers]
    replay = Replayer(lm.model, lm.architecture, layers[0])
    edited = Edited(replay, sites, [found.to(lm.device) for found in detectors])
    owners = torch.zeros(len(captured.batch.subject), dtype=torch.long, device=lm.device)

    def run(marker: Tensor) -> Tensor:
        return edited(captured, marker[None], owners)

    with torch.no_grad():
        nothing = torch.zeros(len(layers), lm.architecture.shape(lm.model, layers[0])[0], device=lm.device)
        replay.check(captured, partial(run, nothing))
    return replay, run


def _whitening(moments: InputMoments) -> Tensor:
    """Return the inverse of the covariance on text, `(d, d)` float32."""
    mean = moments.mean.double()
    covariance = moments.second_moment.double() - torch.outer(mean, mean)
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.inv(covariance + ridge * torch.eye(len(mean), dtype=torch.float64)).float()
