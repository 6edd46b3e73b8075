"""From a config to the layers it edits: run the selector it names, keep its scores, choose."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.layers import Architecture
from goldenedit.cache import cache_dir, cache_key, write_atomically
from goldenedit.chat import rendered
from goldenedit.config import HUB_LAYER, EditConfig
from goldenedit.cost import Cost, measuring
from goldenedit.editing.base_facts import BaseFacts
from goldenedit.editing.covariance import LazyStatistics, source_name
from goldenedit.editing.statistics import KeyStatistics
from goldenedit.layer_selection.brute_force import CellStore, edit_constants, edit_score, sweep, tells_locality
from goldenedit.layer_selection.causal_tracing import causal_tracing_scores
from goldenedit.layer_selection.key_response import key_response_scores
from goldenedit.layer_selection.lga import golden_layer, lga_scores, tukey_filter
from goldenedit.layer_selection.published import published_layers
from goldenedit.layer_selection.selection import LayerSelection, forward_flops, score_tensor
from goldenedit.layer_selection.selectivity import selectivity_scores
from goldenedit.parallel import processes_of
from goldenedit.precision import matmul_precision
from goldenedit.requests import EditRequest, load_requests, proxy_facts
from goldenedit.storage.atlas import read_golden_layers, record_for
from goldenedit.storage.hub import find_golden_layers

logger = logging.getLogger(__name__)

AUTO = "key_response"  # what "auto" is: the selector that loses least against brute force
_SWEEP_NEIGHBORS = 5


def select_layer(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    config: EditConfig,
    base_facts: BaseFacts,
) -> LayerSelection | None:
    """Fill `config.target_layer`, and `config.layer_scores` where the selector has scores, and return its answer.

    None where the config has the layer's number.

    Raises:
        ValueError: The layer cannot be edited, or the selector cannot decide.
    """
    selection = None
    if isinstance(config.layer, str):
        selection = find_layers(model, architecture, tokenizer, config, base_facts)
        config.layer_scores = selection.scores
        config.target_layer = selection.layers[0] if len(selection.layers) == 1 else selection.layers
    for layer in config.target_layers:
        architecture.check_layer(layer)
    return selection


def find_layers(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    config: EditConfig,
    base_facts: BaseFacts,
) -> LayerSelection:
    """Run the selector that `config.layer` names.

    Scores are cached by the model's fingerprint, the facts and the options they depend on, with what they cost.

    Raises:
        ValueError: The selector cannot decide.
    """
    name = str(config.layer)
    if name.startswith(HUB_LAYER):
        return _shared(name.removeprefix(HUB_LAYER), base_facts.fingerprint, config.method)
    if name == "published":
        return LayerSelection(name, None, published_layers(model, config.method))
    if name == "random":
        return LayerSelection(name, None, [random.Random(config.seed).choice(sorted(architecture.down_projections))])
    found = _scored(AUTO if name == "auto" else name, model, architecture, tokenizer, config, base_facts)
    chosen = choose(replace(config, layer_scores=found.scores))
    return replace(found, selector=name, layers=[chosen] if isinstance(chosen, int) else chosen)


def _shared(source: str, fingerprint: str, method: str) -> LayerSelection:
    """Return what a repository on the Hub, or one revision of it, says of these weights."""
    repo_id, _, revision = source.partition("@")
    records = read_golden_layers(find_golden_layers(repo_id, revision=revision or None))
    found = record_for(records, fingerprint, method, repo_id)
    cost = Cost(found.seconds)
    return LayerSelection(found.selector, found.scores, found.layers, found.facts, cost, found.forward_equivalents)


def _scored(
    selector: str,
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    config: EditConfig,
    base_facts: BaseFacts,
) -> LayerSelection:
    """Return a selector's scores, from the cache where they are there, without the layers that follow from them."""
    facts = [rendered(tokenizer, fact) for fact in proxy_set(config)]
    key = cache_key(
        selector=selector,
        fingerprint=base_facts.fingerprint,
        proxy=proxy_hash(facts),
        **_options(selector, architecture, config),
    )
    path = cache_dir() / "layer_scores" / f"{key}.json"
    processes = processes_of(model)
    kept = next((found for found in processes.gather(_read(path)) if found is not None), None)
    if kept is None:
        if selector == "sweep":
            found, cost = _sweep_scores(model, architecture, tokenizer, facts, config, base_facts, path)
        else:
            statistics: Mapping[int, KeyStatistics] = {}
            contexts = base_facts.contexts(model, config) if selector == "key_response" else []
            if selector in ("selectivity", "key_response"):
                layers = sorted(architecture.down_projections)
                statistics = LazyStatistics(model, architecture, tokenizer, layers, config, base_facts.fingerprint)
            with measuring() as spent:
                found = _scores(selector, model, architecture, tokenizer, facts, config, statistics, contexts)
            cost = spent()
            if selector == "lga":  # the others are not shared among processes
                cost = replace(cost, flops=sum(processes.gather(cost.flops)))
        forwards = cost.flops / forward_flops(model, tokenizer, facts)
        kept = LayerSelection(selector, _as_list(found, architecture), [], len(facts), cost, forwards)
        write_atomically(path, json.dumps(kept.to_dict()).encode())
    return kept


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
    elif isinstance(config.proxy, str | os.PathLike):
        if not Path(config.proxy).is_file():
            raise ValueError(
                f"EditConfig.proxy {os.fspath(config.proxy)!r} is not a file; give a .json or .jsonl file of facts."
            )
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


def _options(selector: str, architecture: Architecture, config: EditConfig) -> dict[str, Any]:
    """Return what the scores depend on, beside model and facts."""
    rounded = {} if matmul_precision() == "highest" else {"matmul": matmul_precision()}
    if selector == "lga":
        modules = sorted(path for paths in architecture.mlp_linears.values() for path in paths)
        return {"loss": config.lga_loss, "modules": modules, **rounded}
    if selector == "causal_tracing":
        return {"seed": config.seed, **rounded}
    modules = sorted(architecture.down_projections.values())
    if selector == "selectivity":
        text = [source_name(config.covariance), config.covariance_tokens, config.ridge, config.seed]
        return {"covariance": text, "modules": modules, **rounded}
    return {"method": config.method, "constants": edit_constants(config), "modules": modules, **rounded}


def _scores(
    selector: str,
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditRequest],
    config: EditConfig,
    statistics: Mapping[int, KeyStatistics],
    contexts: Sequence[str],
) -> Tensor:
    if selector == "lga":
        return lga_scores(model, architecture, tokenizer, facts, loss=config.lga_loss)  # type: ignore[arg-type]
    if selector == "selectivity":
        return selectivity_scores(model, architecture, tokenizer, facts, statistics)
    if selector == "key_response":
        return key_response_scores(model, architecture, tokenizer, facts, config, statistics, contexts)
    return causal_tracing_scores(model, architecture, tokenizer, facts, seed=config.seed)


def _sweep_scores(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditRequest],
    config: EditConfig,
    base_facts: BaseFacts,
    path: Path,
) -> tuple[Tensor, Cost]:
    """Edit every fact at every layer; cells of a run that was stopped are at hand."""
    if not any(tells_locality(fact) for fact in facts):
        raise ValueError(
            "No proxy fact has prompts whose answers must stay (locality, or paraphrases and neighborhood with "
            "target_true): a sweep could not tell layers apart."
        )
    processes = processes_of(model)
    own = path.with_suffix(".cells.jsonl" if processes.is_first else f".cells-{processes.index}.jsonl")
    store = CellStore(own, path.parent.glob(f"{path.stem}.cells*.jsonl"))
    cells = sweep(model, architecture, tokenizer, facts, config, base_facts, store, neighbors=_SWEEP_NEIGHBORS)
    scores = torch.full((architecture.num_layers,), torch.nan, dtype=torch.float64)
    cost = Cost()
    for (_, layer), cell in cells.items():
        scores[layer] = edit_score(cell.outcomes)
        cost += cell.cost
    return scores, cost


def _read(path: Path) -> LayerSelection | None:
    if not path.is_file():
        return None
    try:
        return LayerSelection.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        logger.warning("Ignoring the damaged cache file %s.", path)
        return None
