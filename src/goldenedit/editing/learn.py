"""Batches for editors that learn from gradients at the answers, or by training, instead of from values under keys."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.architecture.layers import weight_size
from goldenedit.config import EditConfig
from goldenedit.editing.prepared import Changes, check_shape, stored
from goldenedit.editing.rows import can_be_asked
from goldenedit.editing.training import Change, Training, answer_gradients, train, train_each
from goldenedit.editors import GradientProblem, KeyStatistics, LowRankDelta, TrainingProblem
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.options import BatchTrainingOptions
from goldenedit.evaluation.likelihood import Likelihood, likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.requests import EditRequest

_Learned = tuple[dict[int, LowRankDelta | Tensor], int, dict[str, Tensor]]  # changes by layer, steps and state


@dataclass(frozen=True)
class TextStatistics:
    """What an editor that trains reads of other text.

    Attributes:
        keys: Key statistics, by layer.
        output_gradients: `(d_out, d_out)`, second moments of the gradients at the outputs, by layer.
    """

    keys: Mapping[int, KeyStatistics] = field(default_factory=dict)
    output_gradients: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def read_by(cls, lm: LanguageModel, config: EditConfig) -> TextStatistics:
        """Return what the configured editor reads at its layers. For one that reads nothing, nothing is computed."""
        layers = config.target_layers
        keys = lm.statistics(config, layers) if config.editor.reads_statistics else {}
        return cls(keys, lm.output_gradients(config, layers))


@outside_inference_mode()
def learn_facts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    remembered: Mapping[str, Tensor],
    text: TextStatistics,
    earlier: Sequence[EditRequest] = (),
    active: Collection[Mapping[str, LowRankDelta]] = (),
) -> Changes:
    """Return the changes of an editor that learns from gradients or by training.

    Args:
        remembered: State of earlier edits.
        text: What the editor reads of other text, see `TextStatistics.read_by`.
        earlier: Facts of earlier edits, which editors that train on mini-batches rehearse.
        active: The deltas of the active edits, which a penalty is of together with the new change.

    Raises:
        ValueError: A request cannot be served, or the loss is not finite.
    """
    before = likelihoods(lm, [(request.text, request.target_new) for request in requests])
    if config.editor.learns == "gradients":
        learned, steps, state = _from_gradients(lm, requests, config, remembered)
    else:
        learned, steps, state = _by_training(lm, requests, config, text, earlier, active)
    return _as_changes(lm, config, learned, before, steps, state)


@outside_inference_mode()
def learn_each(
    lm: LanguageModel, requests: Sequence[EditRequest], config: EditConfig, text: TextStatistics, batch_size: int = 16
) -> list[Changes]:
    """Return the changes of requests that are each edited alone, as `learn_facts` makes them for one after the other.

    Requests that are trained share forwards.

    Args:
        text: What the editor reads of other text, see `TextStatistics.read_by`.
        batch_size: Requests that are trained side by side.

    Raises:
        ValueError: A request cannot be served, or a loss is not finite.
    """
    if config.editor.learns == "gradients" or not lm.architecture.takes_rows(
        lm.architecture.down_projections[layer] for layer in config.target_layers
    ):
        return [learn_facts(lm, [request], config, {}, text) for request in requests]
    before = likelihoods(lm, [(request.text, request.target_new) for request in requests])
    learned: list[Changes] = []
    for start in range(0, len(requests), batch_size):  # all entries of a matrix are trained for each request
        group = requests[start : start + batch_size]
        untrained = [_untrained(lm, config, text, ()) for _ in group]
        trained = [changes for changes, _ in untrained]
        steps = train_each(lm, group, trained, _training(config, untrained[0][1]), batch_size)
        for changes, likelihood, count in zip(trained, before[start:], steps, strict=False):
            of_layers = {layer: change.change() for layer, change in changes.items()}
            learned.append(_as_changes(lm, config, of_layers, [likelihood], count, {}))
    return learned


def _as_changes(
    lm: LanguageModel,
    config: EditConfig,
    learned: Mapping[int, LowRankDelta | Tensor],
    before: Sequence[Likelihood],
    steps: int,
    state: dict[str, Tensor],
) -> Changes:
    """Return what was learned as it is stored."""
    deltas, errors = {}, []
    for layer, change in learned.items():
        check_shape(lm, change, config, layer)
        delta, error = stored(lm, change, layer, config)
        deltas[lm.architecture.down_projections[layer]] = delta
        errors.append(error)
    probabilities = [math.exp(-likelihood.nll) for likelihood in before]
    return Changes(deltas, probabilities, [steps] * len(before), state, max(errors))


def _from_gradients(
    lm: LanguageModel, requests: Sequence[EditRequest], config: EditConfig, remembered: Mapping[str, Tensor]
) -> _Learned:
    answers = answer_gradients(lm, requests, config.target_layers)
    features: dict[str, list[Tensor]] = {}
    names = {layer: _moments_name(lm, layer) for layer in answers}
    for layer, (inputs, _, gradients) in answers.items():
        features.setdefault(names[layer], []).append(torch.cat([inputs, gradients], 1))
    batch_moments = {name: RunningMoments.of(torch.cat(rows)) for name, rows in features.items()}
    moments = {
        name: of_batch + RunningMoments.from_columns(remembered[name]) if name in remembered else of_batch
        for name, of_batch in batch_moments.items()
    }
    changes: dict[int, LowRankDelta | Tensor] = {}
    for layer, (inputs, outputs, gradients) in answers.items():
        problem = GradientProblem(inputs, outputs, gradients, moments[names[layer]])
        changes[layer] = config.editor.solve(replace(problem, options=config.resolve(problem)))
    return changes, 1, {name: of_batch.columns() for name, of_batch in batch_moments.items()}


def _moments_name(lm: LanguageModel, layer: int) -> str:
    """Return the name of a layer's moments in the state. Modules of equal shape share theirs."""
    d_out, d_in = lm.architecture.shape(lm.model, layer)
    return f"moments/{d_out}x{d_in}"


def _by_training(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    text: TextStatistics,
    earlier: Sequence[EditRequest],
    active: Collection[Mapping[str, LowRankDelta]],
) -> _Learned:
    changes, options = _untrained(lm, config, text, active)
    training = _training(config, options)
    rehearsed: list[EditRequest] = []
    if isinstance(options, BatchTrainingOptions):
        training = replace(training, batch=options.finetune_batch, rehearsal=options.finetune_rehearsal or 0.0)
        most = math.ceil(training.rehearsal * len(requests)) * training.epochs
        drawn = random.Random(len(earlier)).sample(earlier, min(most, len(earlier)))
        rehearsed = [rendered(lm.tokenizer, request) for request in drawn if can_be_asked(lm, request)]
    steps = train(lm, requests, changes, training, earlier=rehearsed)
    return {layer: change.change() for layer, change in changes.items()}, steps, {}


def _untrained(
    lm: LanguageModel, config: EditConfig, text: TextStatistics, active: Collection[Mapping[str, LowRankDelta]]
) -> tuple[dict[int, Change], Any]:
    """Return the changes that the editor trains, by layer, and its options in the units of the model."""
    generator = torch.Generator().manual_seed(config.seed)
    changes, options = {}, None
    for layer in config.target_layers:
        d_out, d_in = lm.architecture.shape(lm.model, layer)
        path = lm.architecture.down_projections[layer]
        problem = TrainingProblem(
            d_in,
            d_out,
            generator,
            output_gradients=text.output_gradients.get(layer),
            earlier=[deltas[path] for deltas in active if path in deltas],
            weight_size=weight_size(lm.model, path, d_in),
        )
        if config.editor.reads_statistics:
            problem = replace(problem, statistics=text.keys[layer])
        options = config.resolve(problem)
        changes[layer] = config.editor.function(replace(problem, options=options))
    return changes, options


def _training(config: EditConfig, options: Any) -> Training:
    return Training(
        loss=config.editor.loss,
        epochs=options.finetune_steps,
        lr=options.finetune_lr,
        stop_loss=options.finetune_stop_loss,
        seed=config.seed,
    )
