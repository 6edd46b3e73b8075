"""Which layers to edit together: LGA's golden layer, the window that ends at it, the window's ends, or the best.

The facts are packaged proxy facts whose old answer the model prefers. The golden layer is chosen on other facts.
"""

from __future__ import annotations

from dataclasses import replace

from common import as_row, constants, load, parser, preferring_proxy, prepare, record, score_single_edits, timed

from goldenedit import EditConfig
from goldenedit.config import LAYER_PATTERNS
from goldenedit.layer_selection import choose


def main() -> None:
    """Measure single edits by each pattern and editor."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=24)
    options.add_argument("--methods", nargs="+", default=["r-rome", "memit", "alphaedit"])
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(**{"layer": "lga", **constants(arguments.set)}))
    model.select_layer()
    config = model.edit_config
    requests = preferring_proxy(model)[-arguments.facts :]  # LGA reads the first ones
    rows = []
    for pattern in LAYER_PATTERNS:
        model.edit_config = replace(config, layer_pattern=pattern)
        model.edit_config.target_layer = choose(model.edit_config)
        statistics = model.lm.statistics(model.edit_config, model.edit_config.target_layers)
        with timed() as seconds:
            facts = prepare(model, requests)
        for method in arguments.methods:
            (scores,) = score_single_edits(model, facts, statistics, method).values()
            row = {"pattern": pattern, "layers": model.edit_config.target_layers, "method": method, **as_row(scores)}
            rows.append({**row, "seconds a value": round(seconds() / len(requests), 2)})
            print(rows[-1], flush=True)
    record(f"patterns-{arguments.model}", rows)


if __name__ == "__main__":
    main()
