"""Detectors: the direction in key space along which an editor adds the value of a fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.editing.keys import context_keys, fact_keys
from goldenedit.editors import FactKeys, KeyStatistics, Problem
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest


def detectors_by_layer(
    lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig, statistics: Mapping[int, KeyStatistics]
) -> dict[int, Tensor]:
    """Return the detectors of all facts by layer, `(N, d_in)`. The statistics are read one layer at a time.

    For editors that do not insert values, the detectors of R-ROME are returned.
    """
    layers, contexts = sorted(statistics), lm.contexts(config)
    if config.editor.learns != "values":
        config = replace(config, method="r-rome", options={})
    keys_by_fact = []
    for fact in facts:  # one fact at a time, because the keys of all facts in all contexts would be large
        keys = context_keys(lm, [fact], layers, contexts)
        keys_by_fact.append(fact_keys(lm, [fact], layers, [list(of_layer) for of_layer in keys], config))
    detectors = {}
    for layer in layers:
        of_layer = statistics[layer]
        detectors[layer] = torch.stack([detector(keys_of[layer][0], config, of_layer) for keys_of in keys_by_fact])
    return detectors


def detector(fact: FactKeys, config: EditConfig, statistics: KeyStatistics) -> Tensor:
    """Return `a`, `(d_in,)`: for each key `k` the configured editor adds `a . k` times the fact's value."""
    change = config.solve(Problem([fact], torch.ones(1, 1), statistics))
    return (change if isinstance(change, Tensor) else change.dense())[0]
