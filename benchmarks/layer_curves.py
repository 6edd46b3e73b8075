"""Brute force layer by layer, from the results of golden_layers.py: S on every dataset, and the regret of each layer.

The output is a Markdown table for one model and editor. *Regret* is `1 - S(layer) / S(best layer)`, averaged over the
datasets that were measured at every layer.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from statistics import fmean

from common import RESULTS

from goldenedit.layer_selection.cells import Cell, Outcome, edit_score


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2")
    options.add_argument("--method", default="r-rome")
    arguments = options.parse_args()

    outcomes: dict[str, dict[int, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for line in (RESULTS / "golden-layers" / "cells-0.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if (record["model"], record["method"]) == (arguments.model, arguments.method):
            cell = Cell.from_dict(record)
            outcomes[record["dataset"]][cell.layer] += cell.outcomes
    scores = {
        dataset: {layer: edit_score(of_facts) for layer, of_facts in of_layers.items()}
        for dataset, of_layers in outcomes.items()
    }
    layers = sorted({layer for of_layers in scores.values() for layer in of_layers})
    whole = [name for name, found in scores.items() if len(found) == len(layers) and name != "packaged"]
    print(f"| layer | {' | '.join(scores)} | mean regret over {', '.join(whole)} |")
    print("|---" * (len(scores) + 2) + "|")
    for layer in layers:
        row = [_text(found, layer) for found in scores.values()]
        regret = fmean(1 - scores[name][layer] / max(scores[name].values()) for name in whole)
        print(f"| {layer} | {' | '.join(row)} | {regret:.3f} |")


def _text(scores: dict[int, float], layer: int) -> str:
    if layer not in scores:
        return ""
    return f"**{scores[layer]:.3f}**" if scores[layer] == max(scores.values()) else f"{scores[layer]:.3f}"


if __name__ == "__main__":
    main()
