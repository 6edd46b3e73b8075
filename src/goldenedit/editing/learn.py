"""Batches for editors that learn from gradients at the answers, or by training, instead of from values under keys."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.architecture.layers import weight_size
from goldenedit.config import EditConfig
from goldenedit.editing.prepared import Changes, check_shape, stored
from goldenedit.editing.rows import can_be_asked
from goldenedit.editing.training import Training, answer_gradients, train
from goldenedit.editors import GradientProblem, KeyStatistics, LowRankDelta, TrainingProblem
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.options import BatchTrainingOptions
from goldenedit.evaluation.likelihood import likelihoods
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
    deltas, errors = {}, []
    for layer, change in learned.items():
        check_shape(lm, change, config, layer)
        delta, error = stored(lm, change, layer, config)
        deltas[lm.architecture.down_projections[layer]] = delta
        errors.append(error)
    probabilities = [math.exp(-likelihood.nll) for likelihood in before]
    return Changes(deltas, probabilities, [steps] * len(requests), state, max(errors))


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
    generator = torch.Generator().manual_seed(config.seed)
    changes = {}
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
        problem = replace(problem, options=config.resolve(problem))
        changes[layer] = config.editor.function(problem)
    options = problem.options
    training = Training(
        loss=config.editor.loss,
        epochs=options.finetune_steps,
        lr=options.finetune_lr,
        stop_loss=options.finetune_stop_loss,
        seed=config.seed,
    )
    rehearsed: list[EditRequest] = []
    if isinstance(options, BatchTrainingOptions):
        training = replace(training, batch=options.finetune_batch, rehearsal=options.finetune_rehearsal or 0.0)
        most = math.ceil(training.rehearsal * len(requests)) * training.epochs
        drawn = random.Random(len(earlier)).sample(earlier, min(most, len(earlier)))
        rehearsed = [rendered(lm.tokenizer, request) for request in drawn if can_be_asked(lm, request)]
    steps = train(lm, requests, changes, training, earlier=rehearsed)
    return {layer: change.change() for layer, change in changes.items()}, steps, {}
