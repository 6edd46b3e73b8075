"""Every editor on the same single edits: ES, PS, NS, their harmonic mean S, fluency, and seconds an edit.

The facts are the first CounterFact records whose old answer the model prefers. Edits are made at LGA's golden layer
with default settings. Editors that optimize values in the same way share these values, which are computed in batches.
UltraEdit normalizes by the features of earlier edits, here of the packaged proxy facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

from common import (
    NEIGHBORS,
    applied,
    as_row,
    constants,
    known_counterfacts,
    load,
    parser,
    preferring_proxy,
    prepare,
    record,
    timed,
)

from goldenedit import EditConfig, EditModel, EditRequest, proxy_facts
from goldenedit.editing.learn import TextStatistics, learn_facts
from goldenedit.editing.prepared import Changes, PreparedFacts
from goldenedit.editors import EDITORS, LowRankDelta
from goldenedit.evaluation.counterfact import fact_likelihoods
from goldenedit.evaluation.generation import fluency
from goldenedit.evaluation.scores import FactLikelihoods, probability_scores

TOKENS = 60  # of the text that each fluency is taken from
Deltas = Callable[[int], dict[str, LowRankDelta]]


def main() -> None:
    """Measure every editor."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=40)
    options.add_argument("--fluent", type=int, default=16, help="facts whose fluency is measured too")
    options.add_argument("--methods", nargs="+", default=EDITORS.names())
    options.add_argument("--development", action="store_true", help="use proxy facts: to choose constants on")
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    options.add_argument("--name", default="editors", help="name of the results")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(**{"layer": "lga", **constants(arguments.set)}))
    model.select_layer()
    if arguments.development:
        requests = preferring_proxy(model)[-arguments.facts :]  # LGA and UltraEdit's moments read the first ones
    else:
        requests = known_counterfacts(model, arguments.data)[: arguments.facts]
    rows = [{"method": "base model", **_measure(model, requests, arguments.fluent, lambda index: {})}]
    print(rows[-1], flush=True)
    for method, deltas, seconds in _edits(model, requests, arguments.methods):
        with timed() as solving:
            found = [deltas(index) for index in range(len(requests))]
        row = {"method": method, **_measure(model, requests, arguments.fluent, found.__getitem__)}
        rows.append({**row, "seconds an edit": round((seconds + solving()) / len(requests), 2)})
        print(rows[-1], flush=True)
    layer = model.edit_config.target_layer
    record(f"{arguments.name}-{arguments.model}", [{"layer": layer, **row} for row in rows])


def _edits(model: EditModel, requests: list[EditRequest], methods: list[str]) -> Iterator[tuple[str, Deltas, float]]:
    """Yield each editor, a function of a fact's index to the deltas of its edit, and seconds spent before that."""
    config = model.edit_config
    statistics = model.lm.statistics(config, config.target_layers)
    shared: dict[tuple[str, ...], tuple[PreparedFacts, float]] = {}
    for method in methods:
        model.edit_config = own = replace(config, method=method)
        if own.editor.learns != "values":
            memory = _learned(model, proxy_facts()[:100], {}).state if own.editor.learns == "gradients" else {}
            yield method, lambda index, memory=memory: _learned(model, [requests[index]], memory).deltas, 0.0
            continue
        vectors = own.editor.vectors
        if vectors not in shared:
            with timed() as seconds:
                facts = prepare(model, requests)
            shared[vectors] = facts, seconds()
        facts, spent = shared[vectors]
        yield method, lambda index, facts=facts, own=own: facts.changes(own, statistics, chosen=[index]).deltas, spent


def _learned(model: EditModel, requests: list[EditRequest], memory: dict[str, Any]) -> Changes:
    text = TextStatistics.read_by(model.lm, model.edit_config)
    return learn_facts(model.lm, requests, model.edit_config, memory, text)


def _measure(model: EditModel, requests: list[EditRequest], fluent: int, deltas: Deltas) -> dict[str, Any]:
    measured: list[FactLikelihoods] = []
    entropies: list[float] = []

    def measure(index: int, request: EditRequest) -> None:
        measured.append(fact_likelihoods(model.lm, request, NEIGHBORS))
        if index < fluent:
            prompts = [*request.generation, request.text][:1]
            entropies.append(fluency(model.lm, prompts, TOKENS))

    for index, request in enumerate(requests):
        found = deltas(index)
        if found:
            with applied(model, lambda found=found: found):
                measure(index, request)
        else:
            measure(index, request)
    row = as_row(probability_scores(measured))
    return {**row, **({"fluency": round(fmean(entropies), 3), "n of fluency": len(entropies)} if entropies else {})}


if __name__ == "__main__":
    main()
