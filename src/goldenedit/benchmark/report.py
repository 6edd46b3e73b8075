"""Reports of golden-layer measurements: a summary in JSON, and a report in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from goldenedit.benchmark.criteria import CRITERIA, LayerCurve, draws, quantiles, rank_correlation
from goldenedit.benchmark.golden_layers import PACKAGED, Choice, Curve, Measurement
from goldenedit.layer_scores import in_words
from goldenedit.layer_selection import Outcome

Summary = dict[str, Any]
SUMMARY_VERSION = 2
_HARMS = ("says", "unchanged", "kl", "agreement", "fluency")


def summarize(measurement: Measurement) -> Summary:
    """Return curves by layer, what any choice of a layer costs, and what each selector loses, as JSON values."""
    curves: dict[tuple[str, str], dict[str, LayerCurve]] = {
        key: _by_criterion(curve) for key, curve in measurement.curves.items()
    }
    return {
        "version": SUMMARY_VERSION,
        "model": measurement.model,
        "num_layers": measurement.num_layers,
        "curves": [
            _curve(dataset, method, name, curve, of_key, measurement.grid)
            for (dataset, method), of_key in curves.items()
            for name, curve in of_key.items()
        ],
        "seen": [_seen(dataset, method, curve) for (dataset, method), curve in measurement.curves.items()],
        "selections": [_selection(choice, curves) for choice in measurement.choices],
        "costs": [
            {
                "dataset": dataset,
                "method": method,
                "n": curve.facts,
                "layers": len(curve.outcomes),
                "seconds": curve.cost.seconds,
                "forward_equivalents": curve.forward_equivalents,
            }
            for (dataset, method), curve in measurement.curves.items()
        ],
    }


def _by_criterion(curve: Curve) -> dict[str, LayerCurve]:
    found = {name: LayerCurve.of(criterion, curve.outcomes) for name, criterion in CRITERIA.items()}
    return {name: of_criterion for name, of_criterion in found.items() if of_criterion is not None}


def _curve(
    dataset: str,
    method: str,
    name: str,
    curve: LayerCurve,
    of_key: Mapping[str, LayerCurve],
    grid: Sequence[int],
) -> Summary:
    """Return a curve over layers, and what is lost at layers that are chosen in different ways."""
    chance, chance_interval = curve.held_out
    per_fact, per_fact_interval = curve.per_fact()
    others = {other: curve.chosen_by(of_other) for other, of_other in of_key.items() if other != name}
    of_grid = [layer for layer in curve.layers if layer in grid] or curve.layers
    return {
        "dataset": dataset,
        "method": method,
        "criterion": name,
        "n": curve.facts,
        "layers": list(curve.layers),
        "scores": curve.scores.tolist(),
        "intervals": curve.intervals(),
        "best": curve.best,
        "plateau": curve.plateau(),
        "chance": {"lost": chance, "interval": chance_interval},
        "any_layer": fmean(curve.lost_at(layer)[0] for layer in of_grid),
        "per_fact": {"score": per_fact, "interval": per_fact_interval},
        "per_fact_by": {other: {"lost": lost, "interval": interval} for other, (lost, interval) in others.items()},
    }


def _seen(dataset: str, method: str, curve: Curve) -> Summary:
    """Return success and harm by layer, with intervals over facts; empty where they were not measured."""
    found: Summary = {"dataset": dataset, "method": method, "n": curve.facts, "layers": sorted(curve.outcomes)}
    for name in _HARMS:
        values = [[_of_sight(outcome, name) for outcome in curve.outcomes[layer]] for layer in found["layers"]]
        if any(value is None for of_layer in values for value in of_layer):
            return found
        of_facts = torch.tensor(values, dtype=torch.float64)
        found[name] = of_facts.mean(1).tolist()
        found[f"{name}_intervals"] = [quantiles(of_layer[draws(curve.facts)].mean(1)) for of_layer in of_facts]
    return found


def _of_sight(outcome: Outcome, name: str) -> float | None:
    if outcome.sight is None:
        return None
    value = getattr(outcome.sight, name)
    return fmean(value.values()) if isinstance(value, Mapping) else value


def _selection(choice: Choice, curves: Mapping[tuple[str, str], Mapping[str, LayerCurve]]) -> Summary:
    """Return what a selector chose, and what its layer loses wherever its proxy facts are not of another dataset."""
    selection = choice.selection
    (layer,) = selection.layers[-1:]
    tests = []
    for (dataset, method), of_key in curves.items():
        if choice.proxy not in (PACKAGED, dataset) or (choice.methods and method not in choice.methods):
            continue
        for name, curve in of_key.items():
            test: Summary = {"dataset": dataset, "method": method, "criterion": name}
            if layer in curve.layers:
                test["regret"], test["interval"] = curve.lost_at(layer)
                test["above_chance"] = test["regret"] - curve.held_out[0]
                test["is_in_plateau"] = layer in curve.plateau()
            test["rank_correlation"] = _correlation(choice, curve)
            tests.append(test)
    return {
        "selector": choice.name,
        "proxy": choice.proxy,
        "methods": list(choice.methods),
        "layer": layer,
        "scores": selection.scores,
        "facts": selection.facts,
        "seconds": selection.cost.seconds,
        "forward_equivalents": selection.forward_equivalents,
        "tests": tests,
    }


def _correlation(choice: Choice, curve: LayerCurve) -> float | None:
    scores = choice.selection.scores
    if scores is None:
        return None
    pairs = [
        (score, own)
        for layer, own in zip(curve.layers, curve.scores.tolist(), strict=True)
        if (score := scores[layer]) is not None
    ]
    return rank_correlation(*zip(*pairs, strict=True)) if len(pairs) > 2 else None  # type: ignore[arg-type]


def render(summaries: Sequence[Summary], figures: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a report of all summaries in Markdown.

    Args:
        figures: File names of figures, by model.
    """
    lines = ["# Golden layers", ""]
    lines += [f"- **{name}**: {criterion.help}." for name, criterion in CRITERIA.items()]
    lines += [
        "- **lost** and **regret**: `1 - score / score of the best layer`, over the same facts. Intervals are "
        "those of the difference from this layer.",
        "- **plateau**: layers that cannot be told from the best one: the 95% interval of the difference reaches 0.",
        "- **by chance**: what is lost if each fact is edited at the layer that is best for all others.",
        "- **its own layer**: what is lost if each fact has the layer that is best for it by another criterion, "
        "relative to the best fixed layer by that criterion. Below 0, a layer for each fact is better.",
        "",
    ]
    for summary in summaries:
        lines += [f"## {summary['model']}", ""]
        lines += [f"![{name}]({name})" for name in (figures or {}).get(summary["model"], ())]
        lines += ["", "### Is there a golden layer?", "", *_curve_table(summary), ""]
        lines += ["### Success and harm by layer", "", *_seen_tables(summary)]
        lines += ["### Which selector finds it?", "", *_selector_tables(summary)]
        lines += ["### Cost", "", *_cost_table(summary), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _share(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _curve_table(summary: Summary) -> Iterator[str]:
    head = ["dataset", "editor", "by", "n", "best layer", "its score", "plateau", "lost by chance", "lost at any layer"]
    rows = []
    for curve in summary["curves"]:
        best = curve["layers"].index(curve["best"])
        own = [f"{by}: {_share(lost['lost'], lost['interval'])}" for by, lost in curve["per_fact_by"].items()]
        rows.append(
            [
                *(curve[name] for name in ("dataset", "method", "criterion", "n", "best")),
                _share(curve["scores"][best], curve["intervals"][best]),
                _measured(curve["plateau"], curve["layers"]),
                _share(curve["chance"]["lost"], curve["chance"]["interval"]),
                f"{curve['any_layer']:.3f}",
                _share(curve["per_fact"]["score"], curve["per_fact"]["interval"]),
                "; ".join(own),
            ]
        )
    yield from _table([*head, "each fact at its best layer", "lost at its own layer, chosen by"], rows)


def _measured(plateau: Sequence[int], layers: Sequence[int]) -> str:
    """Return the plateau in words, as runs of the layers that were measured."""
    places = [layers.index(layer) for layer in plateau]
    return in_words(places, layers)


def _seen_tables(summary: Summary) -> Iterator[str]:
    for seen in summary["seen"]:
        if _HARMS[-1] not in seen:
            continue
        yield f"{seen['dataset']}, {seen['method']} (n = {seen['n']}):"
        yield ""
        head = ["layer", "says it", "others unchanged", "KL on text", "first choices kept", "fluency"]
        rows = [
            [layer, *(_share(seen[name][place], seen[f"{name}_intervals"][place]) for name in _HARMS)]
            for place, layer in enumerate(seen["layers"])
        ]
        yield from _table(head, rows)
        yield ""


def _selector_tables(summary: Summary) -> Iterator[str]:
    """Yield one table for each editor: regret by dataset and criterion, the best selector first."""
    for method in dict.fromkeys(curve["method"] for curve in summary["curves"]):
        columns = [(curve["dataset"], curve["criterion"]) for curve in summary["curves"] if curve["method"] == method]
        chances = {
            (curve["dataset"], curve["criterion"]): curve["chance"]["lost"]
            for curve in summary["curves"]
            if curve["method"] == method
        }
        rows = [row for one in summary["selections"] if (row := _selector_row(one, method, columns)) is not None]
        rows.sort(key=lambda row: (row[0] is None, row[0] or 0.0))
        any_layer = [curve["any_layer"] for curve in summary["curves"] if curve["method"] == method]
        yield f"{method}:"
        yield ""
        head = ["selector", "proxy facts", "layer", "mean regret", *(f"{dataset}, {name}" for dataset, name in columns)]
        by_chance = ["**by chance**", "", "", f"{fmean(chances.values()):.3f}", *(f"{chances[c]:.3f}" for c in columns)]
        at_random = ["any layer, mean", "", "", f"{fmean(any_layer):.3f}", *(f"{lost:.3f}" for lost in any_layer)]
        ends = ["in the plateau", "rank correlation", "seconds"]
        yield from _table(
            [*head, *ends],
            [*(row[1] for row in rows), [*by_chance, "", "", ""], [*at_random, "", "", ""]],
        )
        yield ""


def _selector_row(
    selection: Summary, method: str, columns: Sequence[tuple[str, str]]
) -> tuple[float | None, list[object]] | None:
    tests = {(one["dataset"], one["criterion"]): one for one in selection["tests"] if one["method"] == method}
    regrets = [one["regret"] for one in tests.values() if "regret" in one]
    if not regrets:
        return None
    cells = [
        _share(tests[column]["regret"], tests[column]["interval"]) if "regret" in tests.get(column, {}) else ""
        for column in columns
    ]
    inside = [one["is_in_plateau"] for one in tests.values() if "regret" in one]
    ranks = [one["rank_correlation"] for one in tests.values() if one["rank_correlation"] is not None]
    mean = fmean(regrets) if len(regrets) == len(columns) else None  # means of other columns cannot be compared
    row = [
        selection["selector"],
        selection["proxy"],
        selection["layer"],
        "" if mean is None else f"{mean:.3f}",
        *cells,
        f"{sum(inside)} of {len(inside)}",
        f"{fmean(ranks):.2f}" if ranks else "",
        f"{selection['seconds']:.1f}",
    ]
    return mean, row


def _cost_table(summary: Summary) -> Iterator[str]:
    lga = next((one for one in summary["selections"] if one["selector"] == "lga sequence"), None)
    rows = []
    for cost in summary["costs"]:
        per_fact = cost["seconds"] / cost["n"] / cost["layers"] * summary["num_layers"]
        of_lga = lga["seconds"] / lga["facts"] if lga and lga["facts"] else None
        rows.append(
            [
                *(cost[name] for name in ("dataset", "method", "n", "layers")),
                f"{cost['seconds']:.0f}",
                f"{per_fact:.1f}",
                f"{per_fact / of_lga:.0f}" if of_lga else "",
            ]
        )
    yield from _table(
        ["dataset", "editor", "n", "layers", "seconds", "seconds a fact at all layers", "times those of LGA"], rows
    )
