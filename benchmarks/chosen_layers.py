"""Layers that selectors chose, against each other on more facts than brute force has time for.

Single edits by R-ROME, default settings, of facts of each dataset behind those of golden_layers.py. What counts is the
mean of S over the datasets; facts are drawn anew for the interval of its difference from the first layer. Regret is
against the best of these layers.
"""

from __future__ import annotations

import random
from statistics import fmean

import torch
from common import load, parser, record
from torch.nn.attention import SDPBackend, sdpa_kernel

from goldenedit import EditConfig, load_requests
from goldenedit.benchmark.golden_layers import usable_facts
from goldenedit.cache import cache_dir
from goldenedit.evaluation.scores import quantile_interval, token_match_scores
from goldenedit.layer_selection import CellStore, Outcome, edit_score, sweep

DATASETS = ("counterfact", "zsre", "wiki_recent", "wiki_counterfact")
CHUNK = 8  # facts whose values are optimised side by side
RESAMPLES = 1000


def main() -> None:
    """Measure some layers of one model; what was measured before is taken from the cache."""
    options = parser(__doc__)
    options.add_argument("--layers", nargs="+", type=int, required=True, help="the first is the reference")
    options.add_argument("--facts", type=int, default=24)
    options.add_argument("--skip", type=int, default=16, help="facts at the front that other figures were taken on")
    options.add_argument("--datasets", nargs="+", default=DATASETS)
    arguments = options.parse_args()

    torch.set_float32_matmul_precision("medium")  # as in golden_layers.py
    model = load(arguments.model, EditConfig(layer="random"))
    base, config = model.get_base_model(), EditConfig()
    store = CellStore(cache_dir() / "benchmarks" / f"chosen-layers-{arguments.model}.jsonl")
    outcomes: dict[str, dict[int, list[Outcome]]] = {}
    for dataset in arguments.datasets:
        found = usable_facts(model, load_requests(arguments.data / f"{dataset}.json"), arguments.skip + arguments.facts)
        facts = found[arguments.skip :]
        outcomes[dataset] = {layer: [] for layer in arguments.layers}
        for start in range(0, len(facts), CHUNK):
            with sdpa_kernel(SDPBackend.MATH):
                cells = sweep(
                    base,
                    model.architecture,
                    model.tokenizer,
                    facts[start : start + CHUNK],
                    config,
                    model.base_facts,
                    store,
                    layers=arguments.layers,
                    neighbors=5,
                )
            for (_, layer), cell in cells.items():
                outcomes[dataset][layer] += cell.outcomes
        scores = {layer: round(edit_score(of_layer), 3) for layer, of_layer in outcomes[dataset].items()}
        print(dataset, len(facts), scores, flush=True)
    record(
        f"chosen-layers-{arguments.model}", [_row(outcomes, layer, arguments.layers[0]) for layer in arguments.layers]
    )


def _row(outcomes: dict[str, dict[int, list[Outcome]]], layer: int, against: int) -> dict[str, object]:
    """Return S by dataset, its mean, and how far the mean is from that of another layer, with a 95% interval."""
    draw = random.Random(0)
    differences = []
    for _ in range(RESAMPLES):
        chosen = {name: draw.choices(range(len(of[layer])), k=len(of[layer])) for name, of in outcomes.items()}
        differences.append(_mean(outcomes, layer, chosen) - _mean(outcomes, against, chosen))
    everything = {name: list(range(len(of[layer]))) for name, of in outcomes.items()}
    mean = _mean(outcomes, layer, everything)
    best = {name: max(edit_score(of_layer) for of_layer in of.values()) for name, of in outcomes.items()}
    regret = fmean(1 - edit_score(of[layer]) / best[name] for name, of in outcomes.items())
    row: dict[str, object] = {"layer": layer, "S, mean": round(mean, 3), "regret, mean": round(regret, 3)}
    row |= {f"{name} (n={len(of[layer])})": round(edit_score(of[layer]), 3) for name, of in outcomes.items()}
    for name, of in outcomes.items():
        matched = token_match_scores([one.matches for one in of[layer]])
        row[f"{name}: rewrite, rephrase, locality"] = [
            None if part is None else round(part, 3) for part in (matched.rewrite, matched.rephrase, matched.locality)
        ]
    if layer != against:
        row[f"above layer {against}"] = round(mean - _mean(outcomes, against, everything), 3)
        row["95%"] = [round(bound, 3) for bound in quantile_interval(differences)]
    print(row, flush=True)
    return row


def _mean(outcomes: dict[str, dict[int, list[Outcome]]], layer: int, chosen: dict[str, list[int]]) -> float:
    return fmean(edit_score([of[layer][index] for index in chosen[name]]) for name, of in outcomes.items())


if __name__ == "__main__":
    main()
