"""One batch of facts, from requests to deltas: the way of the data, nothing of it written into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.layers import Architecture
from goldenedit.config import EditConfig
from goldenedit.editing.delta import LowRankDelta
from goldenedit.editing.keys import FactKeys, contrast_keys
from goldenedit.editing.statistics import KeyStatistics, relative_contrast
from goldenedit.editing.values import ValueOptions, Values, optimise_values
from goldenedit.editors import EDITORS
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class ComputedEdit:
    """Deltas by module path, and what the value optimisation found."""

    deltas: dict[str, LowRankDelta]
    values: Values


def compute_edit(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    contexts: Sequence[str],
    statistics: dict[int, KeyStatistics],
) -> ComputedEdit:
    """Compute the change of weights that makes the model answer each request, at the config's target layers.

    Raises:
        ValueError: A request cannot be served, or a number is not finite; the message names the request.
    """
    layers = config.target_layers
    options = ValueOptions(
        config.steps, config.lr, config.kl_factor, config.weight_decay, config.clamp, config.stop_loss
    )
    values = optimise_values(
        model, architecture, tokenizer, requests, layers, contexts, options, batch_size=config.batch_size
    )
    count = config.contrast if config.contrast_weight > 0 else 0
    contrasts = contrast_keys(model, architecture, tokenizer, requests, layers, count, config.seed)
    deltas = {}
    for index, layer in enumerate(layers):
        facts = []
        for keys, contrast in zip(values.keys[:, index], contrasts, strict=True):
            weighed = None if contrast is None else relative_contrast(contrast[index], config.contrast_weight)
            facts.append(FactKeys(keys[0], keys.mean(0), weighed, config.anchor_bare_prompt))
        delta = EDITORS[config.method](facts, values.delta[:, index].T, statistics[layer])
        if not (delta.A.isfinite().all() and delta.B.isfinite().all()):
            bad = ~(delta.A.isfinite().all(1) & delta.B.isfinite().all(0))
            subject = requests[int(torch.argmax(bad.int()))].subject
            raise ValueError(
                f"The edit of {subject!r} at layer {layer} is not finite: raise EditConfig.ridge or change the layer."
            )
        deltas[architecture.down_projections[layer]] = delta
    return ComputedEdit(deltas, values)
