"""From a config to the layers to edit: run the selector, cache its scores, choose the layers."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldenedit.architecture import Architecture
from goldenedit.cache import cache_dir, is_kept, keep
from goldenedit.config import ANSWER_DEPTH, EditConfig
from goldenedit.cost import Cost, measuring
from goldenedit.layer_scores import (
    HUB_LAYER,
    LayerSelection,
    Selector,
    golden_layer,
    score_tensor,
    tukey_filter,
)
from goldenedit.layer_selection.brute_force import edit_constants
from goldenedit.layer_selection.proxies import proxy_hash, proxy_set
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.covariance import source_name
from goldenedit.lm.flops import forward_flops
from goldenedit.parallel import failing_together
from goldenedit.requests import EditRequest
from goldenedit.storage.atlas import read_golden_layers, record_for
from goldenedit.storage.fingerprint import Hashed
from goldenedit.storage.hub import find_golden_layers

logger = logging.getLogger(__name__)


def select_layer(lm: LanguageModel, config: EditConfig) -> LayerSelection | None:
    """Set `config.target_layer` and `config.layer_scores`, and return the selection.

    Returns:
        The selection; None if the config names layers by number.

    Raises:
        ValueError: A layer cannot be edited, or the selector cannot choose.
    """
    selection = None
    if isinstance(config.layer, str):
        selection = find_layers(lm, config)
        config.layer_scores = selection.scores
        config.target_layer = selection.layers[0] if len(selection.layers) == 1 else selection.layers
    for layer in config.target_layers:
        lm.architecture.check_layer(layer)
    return selection


@failing_together
def find_layers(lm: LanguageModel, config: EditConfig) -> LayerSelection:
    """Run the selector that `config.layer` names.

    Scores are cached with their cost, by the model, the facts and the options they depend on.

    Raises:
        ValueError: The selector cannot choose.
    """
    name = str(config.layer)
    if config.selector is None:
        return _shared(name.removeprefix(HUB_LAYER), lm.weights, config.method)
    if not config.is_scored:
        facts = _facts(lm, config, config.selector)
        layers = config.selector.function(lm, facts, config)
        if not isinstance(layers, list | tuple) or not layers or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"The layer selector {name!r} returned {layers!r}. Return a list of numbers of layers.")
        return LayerSelection(name, None, sorted(layers), len(facts))
    scored = _scored(lm, config, config.selector)
    chosen = choose(replace(config, layer_scores=scored.scores))
    layers = [chosen] if isinstance(chosen, int) else chosen
    return replace(scored, selector=name, layers=layers, kappa=config.tukey_kappa)


def _shared(source: str, weights: Hashed, method: str) -> LayerSelection:
    """Return the golden layers that a repository on the Hub, or one of its revisions, has for these weights."""
    repo_id, _, revision = source.partition("@")
    records = read_golden_layers(find_golden_layers(repo_id, revision=revision or None))
    record = record_for(records, weights, method, repo_id)
    cost = Cost(record.seconds)
    return LayerSelection(
        record.selector,
        record.scores,
        record.layers,
        record.facts,
        cost,
        record.forward_equivalents,
        plateau=record.plateau,
    )


def _scored(lm: LanguageModel, config: EditConfig, selector: Selector) -> LayerSelection:
    """Return the scores of a selector, from the cache if possible. No layers are chosen yet."""
    facts = _facts(lm, config, selector)
    key = lm.cache_key(
        selector.version,
        selector=[selector.scores_of or selector.name, getattr(selector.function, "__module__", None)],
        proxy=proxy_hash(facts),
        tokens=lm.tokens_of(facts),
        modules=[sorted(lm.architecture.down_projections.values()), sorted(lm.architecture.mlp_linears.values())],
        options={name: value for word in selector.depends_on for name, value in _option(word, config, lm).items()},
    )
    path = cache_dir() / "layer_scores" / f"{key}.json"
    cached = next((selection for selection in lm.processes.gather(_read(path)) if selection is not None), None)
    if cached is not None:
        return replace(cached, is_cached=True)
    words = set(selector.depends_on)
    is_edited = "edit" in words and config.editor.learns == "values"
    # Edits need statistics and contexts too, so they are no cost of the selector.
    if "covariance" in words or is_edited:
        lm.streamed_statistics(config, for_editor="edit" in words)
    if words >= {"covariance", "edit"} or is_edited:
        lm.contexts(config)
    with measuring() as spent:
        scores = selector.function(lm, facts, config)
    cost = spent()
    if isinstance(scores, tuple):
        scores, cost = scores
    elif selector.is_shared:
        cost = replace(cost, flops=sum(lm.processes.gather(cost.flops)))
    by_fact = (
        scores if isinstance(scores, Tensor) and scores.shape == (len(facts), lm.architecture.num_layers) else None
    )
    if by_fact is not None:
        scores = by_fact.sum(0)
    if not isinstance(scores, Tensor) or scores.shape != (lm.architecture.num_layers,):
        result = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"The layer selector {selector.name!r} returned {result}. Return a tensor of shape "
            f"({lm.architecture.num_layers},) with a score for each layer, or with one for each of the "
            f"{len(facts)} facts and each layer."
        )
    forwards = cost.flops / forward_flops(lm, facts) if facts else 0.0
    of_facts = None if by_fact is None else [_as_list(of_fact, lm.architecture) for of_fact in by_fact]
    scored = _as_list(scores, lm.architecture)
    selection = LayerSelection(selector.name, scored, [], len(facts), cost, forwards, of_facts)
    keep(path, json.dumps({**selection.to_dict(), "by_fact": of_facts}).encode())
    return selection


def _facts(lm: LanguageModel, config: EditConfig, selector: Selector) -> list[EditRequest]:
    return [rendered(lm.tokenizer, fact) for fact in proxy_set(config)] if selector.needs_facts else []


def _option(word: str, config: EditConfig, lm: LanguageModel) -> dict[str, Any]:
    """Return the values that a word of `Selector.depends_on` stands for, by name."""
    if word == "edit":
        return {"method": [config.method, config.editor.version], "constants": edit_constants(config)}
    if word == "covariance":
        text = [source_name(config.covariance), lm.text_tokens(config), config.ridge, config.seed]
        return {"covariance": text}
    options = config.to_dict()
    if word not in options:
        raise ValueError(
            f"depends_on of the layer selector {config.layer!r} has the unknown word {word!r}. Use fields of "
            "EditConfig, 'covariance' or 'edit'."
        )
    return {word: options[word]}


def _as_list(scores: Tensor, architecture: Architecture) -> list[float | None]:
    """Return scores as a list for JSON, with None for layers without a score or that cannot be edited."""
    return [
        None if math.isnan(score) or layer not in architecture.down_projections else score
        for layer, score in enumerate(scores.tolist())
    ]


def choose(config: EditConfig) -> int | list[int]:
    """Return the golden layer by the config's scores, or the layers that the config's pattern takes with it."""
    scores = score_tensor(config.layer_scores)
    golden = golden_layer(scores, config.fence)
    count = config.pattern_layers
    window = [layer for layer in range(golden - count + 1, golden + 1) if layer >= 0 and not scores[layer].isnan()]
    within_fence = scores.masked_fill(~tukey_filter(scores, config.fence), -torch.inf)
    stride = max(1, round(len(scores) / 10))
    ladder = [layer for layer in range(golden, len(scores), stride) if not scores[layer].isnan()][:count]
    upper = [layer for layer in (golden + 2 * stride, golden + 3 * stride) if layer < ANSWER_DEPTH * len(scores)]
    best = within_fence.topk(min(count, len(within_fence))).indices.tolist()
    layers = {
        "golden": [golden],
        "ladder": ladder,
        "upper": [layer for layer in upper if not scores[layer].isnan()] or [golden],
        "window": window,
        "ends": sorted({window[0], golden}),
        "best": sorted(layer for layer in best if within_fence[layer].isfinite()),
    }[config.pattern]
    return layers[0] if len(layers) == 1 else layers


def _read(path: Path) -> LayerSelection | None:
    if not is_kept(path):
        return None
    try:
        return LayerSelection.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        logger.warning("Ignoring the damaged cache file %s.", path)
        return None
