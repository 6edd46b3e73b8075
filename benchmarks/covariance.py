"""Which key covariance and ridge make the best edits? Single R-ROME edits of development facts.

The facts are those whose old answer the model prefers by any margin. The first 40 of them are left out, as
benchmarks/quality.py uses them. Each fact is measured with this library's anchor and contrast, and without them as
published.
"""

from __future__ import annotations

from dataclasses import replace

from common import as_row, known_counterfacts, load, parser, preferring, prepare, record, score_single_edits

from goldenedit import EditConfig
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.evaluation.scores import probability_scores


def main() -> None:
    """Measure every source, number of tokens and ridge."""
    options = parser(__doc__)
    options.add_argument("--layer", type=int, default=3)
    options.add_argument("--facts", type=int, default=40)
    options.add_argument("--tokens", type=int, nargs="+", default=[5_000])
    options.add_argument("--ridges", type=float, nargs="+", default=[1e-2, 1e-1])
    options.add_argument("--sources", nargs="+", default=["sampled", "wikibio.json"])
    options.add_argument("--name", default="covariance", help="of the file of results")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(layer=arguments.layer))
    config = model.edit_config
    tests = set(known_counterfacts(model, arguments.data)[:40])
    requests, before = preferring(model, arguments.data, arguments.facts, without=tests)
    facts = prepare(model, requests)
    rows = [{"covariance": "base model", **as_row(probability_scores(before))}]
    print(rows[-1], flush=True)

    def measure(source: str, tokens: int, ridge: float, statistics: KeyStatistics) -> None:
        for published in (False, True):
            model.edit_config = replace(config, contrast=0, anchor_bare_prompt=False) if published else config
            (scores,) = score_single_edits(model, facts, {arguments.layer: statistics}).values()
            row = {"covariance": source, "tokens": tokens, "ridge": ridge, "as published": published}
            rows.append({**row, **as_row(scores)})
            print(rows[-1], flush=True)

    measure("identity", 0, 0.0, KeyStatistics(None))
    for source in arguments.sources:
        for tokens in arguments.tokens:
            config.covariance = source if source == "sampled" else str(arguments.data / source)
            config.covariance_tokens = tokens
            found = model.lm.statistics(config, config.target_layers)[arguments.layer]
            for ridge in arguments.ridges:
                measure(source, tokens, ridge, KeyStatistics(found.second_moment, ridge))
    record(f"{arguments.name}-{arguments.model}-layer{arguments.layer}", rows)


if __name__ == "__main__":
    main()
