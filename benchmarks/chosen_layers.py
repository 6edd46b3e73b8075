"""Layers that selectors chose, against each other on more facts than brute force has time for.

Single edits by R-ROME, default settings. What counts is the mean of S over the datasets; facts are drawn anew for the
interval of its difference from the first layer. Regret is against the best of these layers. Facts 0 to 8 of each
dataset are those that golden_layers.py tests: its cells are read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean

import torch
from common import NEIGHBORS, RESULTS, load, parser, record
from torch.nn.attention import SDPBackend, sdpa_kernel

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.benchmark.golden_layers import usable_facts
from goldenedit.cache import cache_dir
from goldenedit.evaluation.scores import quantile_interval, token_match_scores
from goldenedit.layer_selection import CellStore, Outcome, edit_score, sweep

DATASETS = ("counterfact", "zsre", "wiki_recent", "wiki_counterfact")
CHUNK = 8  # facts whose values are optimised side by side
RESAMPLES = 500
Outcomes = dict[str, dict[int, list[Outcome]]]  # by dataset and layer


def main() -> None:
    """Measure some layers of one model; what was measured before is taken from the cache."""
    options = parser(__doc__)
    options.add_argument("--layers", nargs="+", type=int, required=True, help="the first is the reference")
    options.add_argument(
        "--facts",
        nargs="+",
        default=["0:8", "16:32"],
        help="START:END among the usable ones; rows for each and for all",
    )
    options.add_argument("--datasets", nargs="+", default=DATASETS)
    arguments = options.parse_args()
    ranges = {text: slice(*map(int, text.split(":"))) for text in arguments.facts}

    torch.set_float32_matmul_precision("medium")  # as in golden_layers.py
    model = load(arguments.model, EditConfig(layer="random"))
    swept = (RESULTS / "golden-layers").glob("cells-*.jsonl")
    store = CellStore(cache_dir() / "benchmarks" / f"chosen-layers-{arguments.model}.jsonl", swept)
    parts: dict[str, Outcomes] = {text: {} for text in ranges}
    last = max(one.stop for one in ranges.values())
    for dataset in arguments.datasets:
        with sdpa_kernel(SDPBackend.MATH):  # so too, to the fact that is just known
            found = usable_facts(model, load_requests(arguments.data / f"{dataset}.json"), last)
            for text, one in ranges.items():
                parts[text][dataset] = _measure(model, found[one], arguments.layers, store)
        for text, part in parts.items():
            print(dataset, text, {at: round(edit_score(of), 3) for at, of in part[dataset].items()}, flush=True)
    if len(parts) > 1:
        everything = {
            dataset: {
                layer: [one for part in parts.values() for one in part[dataset][layer]] for layer in arguments.layers
            }
            for dataset in arguments.datasets
        }
        parts[", ".join(parts)] = everything
    record(
        f"chosen-layers-{arguments.model}",
        [
            {"facts": text, **_row(part, layer, arguments.layers[0])}
            for text, part in parts.items()
            for layer in arguments.layers
        ],
    )


def _measure(
    model: EditModel, facts: Sequence[EditRequest], layers: Sequence[int], store: CellStore
) -> dict[int, list[Outcome]]:
    """Return what became of each fact at each layer."""
    found: dict[int, list[Outcome]] = {layer: [] for layer in layers}
    base, config = model.get_base_model(), EditConfig()
    for start in range(0, len(facts), CHUNK):
        chunk = facts[start : start + CHUNK]
        cells = sweep(
            base,
            model.architecture,
            model.tokenizer,
            chunk,
            config,
            model.base_facts,
            store,
            layers=layers,
            neighbors=NEIGHBORS,
        )
        for (_, layer), cell in cells.items():
            found[layer] += cell.outcomes
    return found


def _row(outcomes: Outcomes, layer: int, against: int) -> dict[str, object]:
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
    return row


def _mean(outcomes: Outcomes, layer: int, chosen: dict[str, list[int]]) -> float:
    return fmean(edit_score([of[layer][index] for index in chosen[name]]) for name, of in outcomes.items())


if __name__ == "__main__":
    main()
