"""Many facts in one batch: ES, PS, NS and S of each editor that supports batches.

The facts are the first CounterFact records whose old answer the model prefers by any margin.
"""

from __future__ import annotations

from dataclasses import replace

from common import NEIGHBORS, applied, as_row, constants, load, parser, preferring, prepare, record, timed

from goldenedit import EditConfig
from goldenedit.evaluation.counterfact import fact_likelihoods
from goldenedit.evaluation.scores import probability_scores


def main() -> None:
    """Measure each editor on batches of several sizes."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, nargs="+", default=[10, 100])
    options.add_argument("--skip", type=int, default=0, help="facts to pass by")
    options.add_argument("--methods", nargs="+", default=["r-rome", "memit", "emmet", "alphaedit"])
    options.add_argument("--set", nargs="*", default=[], help="constants of EditConfig as name=value")
    options.add_argument("--name", default="batch", help="name of the results")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(**{"layer": "lga", **constants(arguments.set)}))
    layer = model.select_layer()
    most = max(arguments.facts)
    requests, before = preferring(model, arguments.data, most, arguments.skip)
    statistics = model.lm.statistics(model.edit_config, model.edit_config.target_layers)
    with timed() as seconds:
        facts = prepare(model, requests)
    rows = []
    for count in arguments.facts:
        rows.append({"method": "base model", **as_row(probability_scores(before[:count]))})
        print(rows[-1], flush=True)
        for method in arguments.methods:
            config = replace(model.edit_config, method=method)
            with applied(
                model, lambda config=config, count=count: facts.changes(config, statistics, chosen=range(count)).deltas
            ):
                found = [fact_likelihoods(model.lm, request, NEIGHBORS) for request in requests[:count]]
            row = {"method": method, "layer": layer, **as_row(probability_scores(found))}
            rows.append({**row, "seconds a value": round(seconds() / most, 2)})
            print(rows[-1], flush=True)
    record(f"{arguments.name}-{arguments.model}", rows)


if __name__ == "__main__":
    main()
