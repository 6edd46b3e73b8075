"""From a config to the layers it edits: run the selector it names, keep its scores, choose."""

from __future__ import annotations

import hashlib
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
from goldenedit.config import EditConfig
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
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.covariance import source_name
from goldenedit.lm.flops import forward_flops
from goldenedit.parallel import failing_together
from goldenedit.requests import EditRequest, load_requests, proxy_facts
from goldenedit.storage.atlas import read_golden_layers, record_for
from goldenedit.storage.fingerprint import Hashed
from goldenedit.storage.hub import find_golden_layers

logger = logging.getLogger(__name__)


def select_layer(lm: LanguageModel, config: EditConfig) -> LayerSelection | None:
    """Fill `config.target_layer`, and `config.layer_scores` where the selector has scores, and return its answer.

    None where the config has the layer's number.

    Raises:
        ValueError: The layer cannot be edited, or the selector cannot decide.
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

    Scores are cached by the model, the facts and the options they depend on, with what they cost.

    Raises:
        ValueError: The selector cannot decide.
    """
    name = str(config.layer)
    if config.selector is None:
        return _shared(name.removeprefix(HUB_LAYER), lm.weights, config.method)
    if not config.is_scored:
        return LayerSelection(name, None, config.selector.function(lm, [], config))
    scored = _scored(lm, config, config.selector)
    chosen = choose(replace(config, layer_scores=scored.scores))
    return replace(scored, selector=name, layers=[chosen] if isinstance(chosen, int) else chosen)


def _shared(source: str, weights: Hashed, method: str) -> LayerSelection:
    """Return what a repository on the Hub, or one revision of it, says of these weights."""
    repo_id, _, revision = source.partition("@")
    records = read_golden_layers(find_golden_layers(repo_id, revision=revision or None))
    record = record_for(records, weights, method, repo_id)
    cost = Cost(record.seconds)
    return LayerSelection(record.selector, record.scores, record.layers, record.facts, cost, record.forward_equivalents)


def _scored(lm: LanguageModel, config: EditConfig, used: Selector) -> LayerSelection:
    """Return a selector's scores, from the cache where they are there, without the layers that follow from them."""
    facts = [rendered(lm.tokenizer, fact) for fact in proxy_set(config)] if used.needs_facts else []
    key = lm.cache_key(
        used.version,
        selector=f"{used.function.__module__}.{used.function.__qualname__}",  # whatever names it has
        proxy=proxy_hash(facts),
        modules=[sorted(lm.architecture.down_projections.values()), sorted(lm.architecture.mlp_linears.values())],
        options={name: value for word in used.depends_on for name, value in _option(word, config).items()},
    )
    path = cache_dir() / "layer_scores" / f"{key}.json"
    cached = next((there for there in lm.processes.gather(_read(path)) if there is not None), None)
    if cached is not None:
        return cached
    if {"covariance", "edit"} & set(used.depends_on):  # kept for edits too, and so no cost of the selector
        lm.streamed_statistics(config)
        lm.contexts(config)
    with measuring() as spent:
        scores = used.function(lm, facts, config)
    cost = spent()
    if isinstance(scores, tuple):
        scores, cost = scores
    elif used.is_shared:
        cost = replace(cost, flops=sum(lm.processes.gather(cost.flops)))
    if not isinstance(scores, Tensor) or scores.shape != (lm.architecture.num_layers,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"The layer selector {used.name!r} returned {got}: return a tensor of shape "
            f"({lm.architecture.num_layers},), a score for each layer."
        )
    forwards = cost.flops / forward_flops(lm, facts) if facts else 0.0
    selection = LayerSelection(used.name, _as_list(scores, lm.architecture), [], len(facts), cost, forwards)
    keep(path, json.dumps(selection.to_dict()).encode())
    return selection


def _option(word: str, config: EditConfig) -> dict[str, Any]:
    """Return the values behind a word of `Selector.depends_on`, by name."""
    if word == "edit":
        return {"method": config.method, "constants": edit_constants(config)}
    if word == "covariance":
        text = [source_name(config.covariance), config.covariance_tokens, config.ridge, config.seed]
        return {"covariance": text}
    options = config.to_dict()
    if word not in options:
        raise ValueError(
            f"The layer selector {config.layer!r} depends on {word!r}, which is neither a field of EditConfig nor "
            "'covariance' or 'edit'."
        )
    return {word: options[word]}


def _as_list(scores: Tensor, architecture: Architecture) -> list[float | None]:
    """Return scores as JSON has them; layers that cannot be edited have none."""
    return [
        None if math.isnan(score) or layer not in architecture.down_projections else score
        for layer, score in enumerate(scores.tolist())
    ]


def choose(config: EditConfig) -> int | list[int]:
    """Return the golden layer of the config's scores, within the fence, or the layers around it by its pattern."""
    scores = score_tensor(config.layer_scores)
    golden = golden_layer(scores, config.fence)
    count = config.pattern_layers
    window = [layer for layer in range(golden - count + 1, golden + 1) if layer >= 0 and not scores[layer].isnan()]
    kept = scores.masked_fill(~tukey_filter(scores, config.fence), -torch.inf)
    layers = {
        "golden": [golden],
        "window": window,
        "ends": sorted({window[0], golden}),
        "best": sorted(layer for layer in kept.topk(min(count, len(kept))).indices.tolist() if kept[layer].isfinite()),
    }[config.layer_pattern]
    return layers[0] if len(layers) == 1 else layers


def proxy_set(config: EditConfig) -> list[EditRequest]:
    """Return the facts on which layers are compared.

    Raises:
        ValueError: `config.proxy` is neither a file nor a list of requests, or holds no facts.
    """
    if config.proxy is None:
        facts = proxy_facts()
    elif isinstance(config.proxy, str):
        if not Path(config.proxy).is_file():
            raise ValueError(f"EditConfig.proxy {config.proxy!r} is not a file; give a .json or .jsonl file of facts.")
        facts = load_requests(config.proxy)
    else:
        facts = config.proxy
    if not facts:
        raise ValueError("EditConfig.proxy holds no facts.")
    return facts[: config.proxy_size]


def proxy_hash(facts: list[EditRequest]) -> str:
    """Return a short name for this set of facts."""
    parts = [fact.to_dict() for fact in facts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> LayerSelection | None:
    if not is_kept(path):
        return None
    try:
        return LayerSelection.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        logger.warning("Ignoring the damaged cache file %s.", path)
        return None
