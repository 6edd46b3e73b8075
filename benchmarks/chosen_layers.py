"""Compare layers that selectors chose, on more facts than brute force has time for.

Edits are single edits by R-ROME with default settings. The measure is the mean of S over the datasets. The interval of
its difference from the first layer is bootstrapped over facts. Regret is relative to the best of these layers. For
facts 0 to 8 of each dataset, the results of golden_layers.py are reused.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean

from common import DATASETS, NEIGHBORS, RESULTS, load, parser, record, rounded_products

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.benchmark.golden_layers import usable_facts
from goldenedit.cache import cache_dir
from goldenedit.evaluation.intervals import quantile_interval
from goldenedit.evaluation.scores import token_match_scores
from goldenedit.layer_selection import CellStore, Outcome, SweepOptions, edit_score, sweep

CHUNK = 8  # facts whose values are optimized side by side
RESAMPLES = 500
Outcomes = dict[str, dict[int, list[Outcome]]]  # by dataset and layer


def main() -> None:
    """Measure some layers of one model; earlier measurements are read from the cache."""
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

    model = load(arguments.model, EditConfig(layer="random"))
    swept = (RESULTS / "golden-layers").glob("cells-*.jsonl")
    store = CellStore(cache_dir() / "benchmarks" / f"chosen-layers-{arguments.model}.jsonl", swept)
    parts: dict[str, Outcomes] = {text: {} for text in ranges}
    last = max(one.stop for one in ranges.values())
    for dataset in arguments.datasets:
        with rounded_products():
            found = usable_facts(model, load_requests(arguments.data / f"{dataset}.json"), last)
            for text, one in ranges.items():
                parts[text][dataset] = _measure(model, found[one], arguments.layers, store)
        for text, part in parts.items():
            print(dataset, text, {at: round(edit_score(of), 3) for at, of in part[dataset].items()}, flush=True)
    if len(parts) > 1:
        parts[", ".join(parts)] = {
            dataset: {
                layer: [one for part in parts.values() for one in part[dataset][layer]] for layer in arguments.layers
            }
            for dataset in arguments.datasets
        }
    record(
        f"chosen-layers-{arguments.model}",
        [{"facts": text, **row} for text, part in parts.items() for row in _rows(part, arguments.layers)],
    )


def _measure(
    model: EditModel, facts: Sequence[EditRequest], layers: Sequence[int], store: CellStore
) -> dict[int, list[Outcome]]:
    """Return the scores of each fact at each layer."""
    found: dict[int, list[Outcome]] = {layer: [] for layer in layers}
    options = SweepOptions(layers=layers, neighbors=NEIGHBORS)
    for start in range(0, len(facts), CHUNK):
        cells = sweep(model.lm, facts[start : start + CHUNK], EditConfig(), store, options)
        for (_, layer), cell in cells.items():
            found[layer] += cell.outcomes
    return found


def _rows(outcomes: Outcomes, layers: Sequence[int]) -> list[dict[str, object]]:
    """Return S of each layer by dataset, its mean, and the difference from the first layer with a 95% interval."""
    scores = {layer: {name: edit_score(of[layer]) for name, of in outcomes.items()} for layer in layers}
    best = {name: max(of_layer[name] for of_layer in scores.values()) for name in outcomes}
    draw = random.Random(0)
    sizes = {name: len(of[layers[0]]) for name, of in outcomes.items()}
    draws = [{name: draw.choices(range(n), k=n) for name, n in sizes.items()} for _ in range(RESAMPLES)]
    resampled = {layer: [_mean(outcomes, layer, facts) for facts in draws] for layer in layers}
    first, rows = layers[0], []
    for layer in layers:
        own = scores[layer]
        row: dict[str, object] = {
            "layer": layer,
            "S, mean": round(fmean(own.values()), 3),
            "regret, mean": round(fmean(1 - own[name] / best[name] for name in own), 3),
        }
        row |= {f"{name} (n={sizes[name]})": round(own[name], 3) for name in own}
        for name, of in outcomes.items():
            found = token_match_scores([one.matches for one in of[layer]])
            parts = (found.rewrite, found.rephrase, found.locality)
            row[f"{name}: rewrite, rephrase, locality"] = [None if part is None else round(part, 3) for part in parts]
        if layer != first:
            differences = [mean - other for mean, other in zip(resampled[layer], resampled[first], strict=True)]
            row[f"above layer {first}"] = round(fmean(own.values()) - fmean(scores[first].values()), 3)
            row["95%"] = [round(bound, 3) for bound in quantile_interval(differences)]
        rows.append(row)
    return rows


def _mean(outcomes: Outcomes, layer: int, facts: dict[str, list[int]]) -> float:
    return fmean(edit_score([of[layer][index] for index in facts[name]]) for name, of in outcomes.items())


if __name__ == "__main__":
    main()
