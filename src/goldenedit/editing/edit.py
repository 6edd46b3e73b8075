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
class PreparedFacts:
    """All that an editor needs of some facts, from which the deltas of any of them follow.

    Attributes:
        requests: The facts.
        values: What the value optimisation found.
        keys: Keys of each fact, by layer.
        paths: Path of the edited module, by layer.
    """

    requests: Sequence[EditRequest]
    values: Values
    keys: dict[int, list[FactKeys]]
    paths: dict[int, str]

    def deltas(
        self, method: str, statistics: dict[int, KeyStatistics], chosen: Sequence[int] | None = None
    ) -> dict[str, LowRankDelta]:
        """Return the change of each edited module that inserts the facts `chosen`, by default all of them.

        Raises:
            ValueError: A factor is not finite; the message names the fact.
        """
        chosen = range(len(self.requests)) if chosen is None else chosen
        deltas = {}
        for index, (layer, keys) in enumerate(self.keys.items()):
            residuals = self.values.delta[list(chosen), index].T
            delta = EDITORS[method]([keys[fact] for fact in chosen], residuals, statistics[layer])
            bad = ~(delta.A.isfinite().all(1) & delta.B.isfinite().all(0))
            if bad.any():
                subject = self.requests[chosen[int(torch.argmax(bad.int()))]].subject
                raise ValueError(f"The edit of {subject!r} at layer {layer} is not finite: raise EditConfig.ridge.")
            deltas[self.paths[layer]] = delta
        return deltas


def prepare_facts(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    contexts: Sequence[str],
) -> PreparedFacts:
    """Find the values that make the model answer each request, and the keys they are inserted under.

    Raises:
        ValueError: A request cannot be served; the message names it.
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
    found: dict[int, list[FactKeys]] = {}
    for index, layer in enumerate(layers):
        found[layer] = []
        for keys, contrast in zip(values.keys[:, index], contrasts, strict=True):
            weighed = None if contrast is None else relative_contrast(contrast[index], config.contrast_weight)
            found[layer].append(FactKeys(keys[0], keys.mean(0), weighed, config.anchor_bare_prompt))
    return PreparedFacts(requests, values, found, {layer: architecture.down_projections[layer] for layer in layers})
