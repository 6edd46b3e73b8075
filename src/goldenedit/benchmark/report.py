"""Reports of golden-layer measurements: a summary in JSON, and a report in Markdown."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from goldenedit.benchmark.golden_layers import PACKAGED, Curve, Measurement
from goldenedit.evaluation.intervals import Interval, quantile_interval
from goldenedit.evaluation.scores import token_match_scores
from goldenedit.layer_selection import LayerSelection, Outcome, edit_score

_RESAMPLES = 500
Summary = dict[str, Any]


def summarize(measurement: Measurement) -> Summary:
    """Return scores by layer, the optimum per sample, and selectors' regret and rank correlation, as JSON values."""
    tested = {key: curve for key, curve in measurement.curves.items() if key[0] != PACKAGED}
    methods = list(dict.fromkeys(method for _, method in tested))
    golden = {
        method: _layer_scores(measurement.curves[PACKAGED, method])
        for method in methods
        if (PACKAGED, method) in measurement.curves
    }
    curves = [
        _curve(dataset, method, curve, _best(golden[method]) if dataset != PACKAGED and method in golden else None)
        for (dataset, method), curve in measurement.curves.items()
    ]
    draws = {key: _resampled(curve) for key, curve in tested.items()}
    selections = [
        _selection(proxy, selection, name, tested, draws) for (proxy, name), selection in measurement.selections.items()
    ]
    for method in golden:
        curve = measurement.curves[PACKAGED, method]
        brute = LayerSelection(
            selector="sweep",
            scores=[golden[method].get(layer) for layer in range(measurement.num_layers)],
            layers=[_best(golden[method])],
            facts=curve.facts,
            cost=curve.cost,
            forward_equivalents=curve.forward_equivalents,
        )
        of_method = {key: curve for key, curve in tested.items() if key[1] == method}
        selections.append(_selection(PACKAGED, brute, f"brute force of {method}", of_method, draws))
    return {
        "model": measurement.model,
        "num_layers": measurement.num_layers,
        "curves": curves,
        "selections": selections,
        "random": [
            {"dataset": dataset, "method": method, "regret": _regret(fmean(scores.values()), max(scores.values()))}
            for (dataset, method), curve in tested.items()
            if (scores := _layer_scores(curve))
        ],
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None if one side is constant.

    Example:
        ```python
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
        ```
    """
    a, b = _ranks(first), _ranks(second)
    mean = fmean(a)
    spread = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    if spread == 0:
        return None
    return float(sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True)) / spread**0.5)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _layer_scores(curve: Curve) -> dict[int, float]:
    return {layer: edit_score(outcomes) for layer, outcomes in curve.outcomes.items()}


def _best(scores: Mapping[int, float]) -> int:
    return max(scores, key=scores.__getitem__)


def _interval(facts: int, statistic: Callable[[list[int]], float]) -> Interval:
    """Return the 95% bootstrap interval of a statistic, which takes the indices of facts."""
    generator = random.Random(0)
    return quantile_interval([statistic(generator.choices(range(facts), k=facts)) for _ in range(_RESAMPLES)])


def _score_at(outcomes: Sequence[Outcome]) -> Callable[[list[int]], float]:
    return lambda facts: edit_score([outcomes[fact] for fact in facts])


def _curve(dataset: str, method: str, curve: Curve, golden: int | None) -> Summary:
    """Return scores by layer, with the best layer for each fact and the golden layer of the proxy facts."""
    scores = _layer_scores(curve)
    best_outcomes = [
        max(curve.outcomes.values(), key=lambda outcomes, fact=fact: outcomes[fact].score)[fact]  # type: ignore[misc]
        for fact in range(curve.facts)
    ]
    matched = {
        layer: token_match_scores([outcome.matches for outcome in outcomes])
        for layer, outcomes in curve.outcomes.items()
    }
    summary: Summary = {
        "dataset": dataset,
        "method": method,
        "n": curve.facts,
        "layers": list(scores),
        "scores": list(scores.values()),
        "rewrite": [matched[layer].rewrite for layer in scores],
        "rephrase": [matched[layer].rephrase for layer in scores],
        "best": _best(scores),
        "held_out_best": _held_out_best(curve),
        "per_sample": {
            "score": edit_score(best_outcomes),
            "interval": _interval(curve.facts, _score_at(best_outcomes)),
        },
        "seconds": curve.cost.seconds,
        "forward_equivalents": curve.forward_equivalents,
    }
    if golden is not None:
        outcomes = curve.outcomes.get(golden)
        interval = (0.0, 0.0) if outcomes is None else _interval(curve.facts, _score_at(outcomes))
        summary["golden"] = {"layer": golden, "score": scores.get(golden, 0.0), "interval": interval}
    return summary


def _held_out_best(curve: Curve) -> float:
    """Return S if each fact is edited at the layer that is best for the other facts.

    The score of the best of many layers is too high, because the layer was chosen on the same facts.
    """
    if curve.facts < 2:
        return max(_layer_scores(curve).values())
    outcomes_of_facts = []
    for fact in range(curve.facts):
        others = [other for other in range(curve.facts) if other != fact]
        best = max(curve.outcomes.values(), key=lambda outcomes, others=others: _score_at(outcomes)(others))  # type: ignore[misc]
        outcomes_of_facts.append(best[fact])
    return edit_score(outcomes_of_facts)


def _selection(
    proxy: str,
    selection: LayerSelection,
    name: str,
    tested: Mapping[tuple[str, str], Curve],
    draws: Mapping[tuple[str, str], Sequence[dict[int, float]]],
) -> Summary:
    """Return the layer of a selector, its cost, and its scores on the test facts.

    A selector that read the proxy facts of a dataset is tested on that dataset only.
    """
    layer = selection.layers[-1]  # a window ends at the golden layer
    return {
        "selector": name,
        "proxy": proxy,
        "layer": layer,
        "scores": selection.scores,
        "facts": selection.facts,
        "seconds": selection.cost.seconds,
        "forward_equivalents": selection.forward_equivalents,
        "tests": [
            {"dataset": dataset, "method": method, **_test(layer, selection.scores, curve, draws[dataset, method])}
            for (dataset, method), curve in tested.items()
            if proxy in (PACKAGED, dataset)
        ],
    }


def _resampled(curve: Curve) -> list[dict[int, float]]:
    """Return the scores by layer on facts that are resampled with replacement."""
    generator = random.Random(0)
    samples = [generator.choices(range(curve.facts), k=curve.facts) for _ in range(_RESAMPLES)]
    return [{layer: _score_at(outcomes)(facts) for layer, outcomes in curve.outcomes.items()} for facts in samples]


def _regret(score: float, best: float) -> float | None:
    """Return the relative loss against the best score, or None if all scores are 0."""
    return 1 - score / best if best > 0 else None


def _test(
    layer: int, predicted: Sequence[float | None] | None, curve: Curve, draws: Sequence[dict[int, float]]
) -> Summary:
    """Return how a layer, and the predicted scores of all layers, do on the facts of a curve."""
    scores = _layer_scores(curve)
    drawn_regrets = [_regret(draw.get(layer, 0.0), max(draw.values())) for draw in draws]
    regrets = [regret for regret in drawn_regrets if regret is not None]
    pairs = [] if predicted is None else [(predicted[index], score) for index, score in scores.items()]
    predictions = [prediction for prediction, _ in pairs if prediction is not None]
    measured = [score for prediction, score in pairs if prediction is not None]
    outcomes = curve.outcomes.get(layer)
    matched = None if outcomes is None else token_match_scores([outcome.matches for outcome in outcomes])
    return {
        "score": scores.get(layer, 0.0),
        "regret": _regret(scores.get(layer, 0.0), max(scores.values())),
        "interval": quantile_interval(regrets) if regrets else None,
        "rank_correlation": rank_correlation(predictions, measured) if predictions else None,
        "rewrite": matched and matched.rewrite,
        "rephrase": matched and matched.rephrase,
    }


def render(summaries: Sequence[Summary], figures: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the report on models in Markdown.

    Args:
        summaries: Summaries of `summarize`.
        figures: File names of each model's figures.
    """
    lines = ["# Golden layers", "", _EXPLANATION]
    for summary in summaries:
        lines += ["", f"## {summary['model']}", ""]
        for title, text in (
            ("Regret of every selector", _regret_table(summary)),
            ("Golden layer against the best layer for each fact", _golden_table(summary)),
            ("Token match against causal tracing", _tracing_table(summary)),
            ("Cost", _cost_table(summary)),
            ("S by layer", _layer_table(summary)),
        ):
            lines += [f"### {title}", "", text, ""]
        lines += [f"![{name}]({name})" for name in (figures or {}).get(summary["model"], ())]
    return "\n".join(lines).rstrip() + "\n"


_EXPLANATION = """\
S of CounterFact is the harmonic mean of ES, PS and NS. For the other datasets it is the harmonic mean of token match on
rewrite, rephrase (if there is one) and locality. Regret is 1 - S(layer) / S(best layer of the test facts). With few
facts, S of the best of many layers is too high, because the layer is chosen on the same facts. The row *best layer of
the other test facts* corrects this: each fact is edited at the layer that is best for the other facts. `lga sequence`
is the selector of `layer="lga"`: loss over the sequence, MLP weights, with the filter. Selectors read the packaged
proxy facts. Those marked *own* read other facts of the dataset that they are tested on, and choose a layer for each
dataset, in the order of the columns. Selectors that depend on the editor ran for the first one. Intervals are 95%, by
bootstrap over facts. Forward-equivalents are plain forwards per fact. Seconds are those of the first computation."""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _spread(interval: Interval) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _regret_table(summary: Summary) -> str:
    columns = list(dict.fromkeys((chance["dataset"], chance["method"]) for chance in summary["random"]))
    methods = list(dict.fromkeys(method for _, method in columns))
    datasets = list(dict.fromkeys(dataset for dataset, _ in columns))
    groups: dict[tuple[str, bool], list[Summary]] = {}  # selectors with proxy facts of each dataset share a row
    for selection in summary["selections"]:
        groups.setdefault((selection["selector"], selection["proxy"] == PACKAGED), []).append(selection)
    rows = []
    for (name, is_packaged), members in groups.items():
        tests = {(test["dataset"], test["method"]): test for member in members for test in member["tests"]}
        layers = {member["proxy"]: str(member["layer"]) for member in members}
        rows.append(
            [
                name if is_packaged else f"{name}, own",
                layers[PACKAGED] if is_packaged else ", ".join(layers.get(dataset, "none") for dataset in datasets),
                *(
                    _mean(tests[key]["regret"] for key in columns if key in tests and key[1] == method)
                    for method in methods
                ),
                _mean(test["rank_correlation"] for test in tests.values()),
                *(_number(tests[key]["regret"]) if key in tests else "" for key in columns),
            ]
        )
    by_chance = {(chance["dataset"], chance["method"]): chance["regret"] for chance in summary["random"]}
    curves = {(curve["dataset"], curve["method"]): curve for curve in summary["curves"]}
    held_out = {key: _regret(curves[key]["held_out_best"], max(curves[key]["scores"])) for key in columns}
    for name, regrets in (("any layer, mean", by_chance), ("best layer of the other test facts", held_out)):
        means = [_mean(regret for (_, editor), regret in regrets.items() if editor == method) for method in methods]
        rows.append([name, "", *means, "", *(_number(regrets[key]) for key in columns)])
    header = ["selector", "layer", *(f"mean, {method}" for method in methods), "Spearman, mean"]
    return _table([*header, *(f"{dataset}, {method}" for dataset, method in columns)], rows)


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(fmean(known)) if known else ""


def _golden_table(summary: Summary) -> str:
    rows = [
        [
            curve["dataset"],
            curve["method"],
            str(curve["n"]),
            f"{curve['golden']['layer']}: {_number(curve['golden']['score'])}",
            _spread(curve["golden"]["interval"]),
            f"{curve['best']}: {_number(max(curve['scores']))}",
            _number(curve["held_out_best"]),
            _number(curve["per_sample"]["score"]),
            _spread(curve["per_sample"]["interval"]),
            _number(1 - curve["golden"]["score"] / curve["per_sample"]["score"] if curve["per_sample"]["score"] else 0),
        ]
        for curve in summary["curves"]
        if "golden" in curve
    ]
    header = ["dataset", "editor", "n", "golden layer of the proxy facts: S", "95%", "best layer: S"]
    header += ["best layer of the other facts: S"]
    return _table([*header, "best layer for each fact: S", "95%", "regret against that"], rows)


def _tracing_table(summary: Summary) -> str:
    packaged = [selection for selection in summary["selections"] if selection["proxy"] == PACKAGED]
    tests = {selection["selector"]: selection["tests"] for selection in packaged}
    traced = {(test["dataset"], test["method"]): test for test in tests["causal_tracing"]}
    rows = []
    for name in ("auto", "lga sequence"):
        for test in tests[name]:
            baseline = traced[test["dataset"], test["method"]]
            cells = [name, test["dataset"], test["method"]]
            for kind in ("rewrite", "rephrase"):
                if test[kind] is None:
                    cells += ["", ""]
                else:
                    cells += [f"{100 * test[kind]:.1f}", f"{100 * (test[kind] - baseline[kind]):+.1f}"]
            rows.append(cells)
    return _table(["selector", "dataset", "editor", "rewrite", "points won", "rephrase", "points won"], rows)


def _cost_table(summary: Summary) -> str:
    brute = [curve for curve in summary["curves"] if curve["method"] == summary["curves"][0]["method"]]
    forwards = fmean(curve["forward_equivalents"] for curve in brute)
    facts = sum(curve["n"] for curve in brute)
    seconds = sum(curve["seconds"] for curve in brute) / facts
    rows = [[f"brute force, {brute[0]['method']}", f"{forwards:.0f}", f"{seconds:.2f}", "1", "1"]]
    for selection in summary["selections"]:
        cost, facts = selection["forward_equivalents"], selection["facts"]
        if cost and selection["proxy"] == PACKAGED and not selection["selector"].startswith("brute"):
            fact_seconds = selection["seconds"] / facts
            ratios = [f"{forwards / cost:.0f}", f"{seconds / fact_seconds:.0f}"]
            rows.append([selection["selector"], f"{cost:.1f}", f"{fact_seconds:.3f}", *ratios])
    header = ["selector", "forward-equivalents per fact", "seconds per fact", "times cheaper in operations"]
    return _table([*header, "times cheaper in seconds"], rows)


def _layer_table(summary: Summary) -> str:
    curves = summary["curves"]
    layers = sorted({layer for curve in curves for layer in curve["layers"]})
    by_layer = [dict(zip(curve["layers"], curve["scores"], strict=True)) for curve in curves]
    rows = [[str(layer), *(_number(scores.get(layer)) for scores in by_layer)] for layer in layers]
    return _table(["layer", *(f"{curve['dataset']}, {curve['method']} (n = {curve['n']})" for curve in curves)], rows)
