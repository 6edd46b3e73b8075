"""How good single edits are: ES, PS, NS over 5 neighbors, their harmonic mean S, and paraphrase accuracy.

The facts are the first CounterFact records whose old answer the model prefers. Settings are the defaults.
"""

from __future__ import annotations

from dataclasses import replace

from common import NEIGHBORS, as_row, known_counterfacts, load, parser, prepare, record, score_single_edits, timed

from goldenedit import EditConfig
from goldenedit.evaluation.counterfact import fact_likelihoods
from goldenedit.evaluation.scores import probability_scores
from goldenedit.layer_selection.select import choose


def main() -> None:
    """Measure single edits at LGA's layer, or at the layers on the command line."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, nargs="*", help="layers to edit; LGA's by default")
    options.add_argument("--facts", type=int, default=40)
    options.add_argument("--skip", type=int, default=0, help="known facts to pass by")
    options.add_argument("--also-first", type=int, default=10, help="score the first so many facts apart too")
    options.add_argument("--name", default="quality", help="name of the results")
    options.add_argument("--methods", nargs="+", default=[EditConfig().method])
    options.add_argument("--as-published", action="store_true", help="without anchor and contrast")
    arguments = options.parse_args()

    as_published = {"anchor_bare_prompt": False, "contrast": 0} if arguments.as_published else {}
    model = load(arguments.model, EditConfig(layer="lga", **as_published))
    model.select_layer()
    requests = known_counterfacts(model, arguments.data)[arguments.skip : arguments.skip + arguments.facts]
    before = [fact_likelihoods(model.lm, fact, NEIGHBORS) for fact in requests]
    counts = sorted({count for count in (arguments.also_first, len(requests)) if count <= len(requests)})
    rows = [{"method": "base model", **as_row(probability_scores(before[:count]))} for count in counts]
    for method in arguments.methods:
        config = model.edit_config = replace(model.edit_config, method=method)
        for layer in arguments.layers or [choose(config)]:
            config.target_layer = layer
            statistics = model.lm.statistics(config, config.target_layers)
            with timed() as seconds:
                facts = prepare(model, requests, statistics)
            for scores in score_single_edits(model, facts, statistics, method, counts=counts).values():
                row = {"method": method, "layer": layer, **as_row(scores)}
                rows.append({**row, "seconds an edit": round(seconds() / len(requests), 2)})
                print(rows[-1], flush=True)
    record(f"{arguments.name}-{arguments.model}", rows)


if __name__ == "__main__":
    main()
