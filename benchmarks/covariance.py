"""Which key covariance and ridge make the best edits? Single R-ROME edits of development facts, one layer.

Facts from position 40 on among those the model knows: the first 40 are kept for benchmarks/quality.py.
"""

from __future__ import annotations

from common import as_row, known_counterfacts, load, parser, prepare, record, score_single_edits

from goldenedit import EditConfig
from goldenedit.editing.covariance import key_statistics
from goldenedit.editing.statistics import KeyStatistics


def main() -> None:
    """Measure every source, number of tokens and ridge."""
    options = parser(__doc__)
    options.add_argument("--layer", type=int, default=3)
    options.add_argument("--facts", type=int, default=16)
    options.add_argument("--tokens", type=int, nargs="+", default=[5_000, 20_000])
    options.add_argument("--ridges", type=float, nargs="+", default=[1e-2, 1e-1])
    options.add_argument("--sources", nargs="+", default=["sampled", "wikibio.json"])
    arguments = options.parse_args()

    config = EditConfig(layer=arguments.layer)
    model = load(arguments.model, config)
    requests = known_counterfacts(model, arguments.data)[40 : 40 + arguments.facts]
    facts = prepare(model, requests)
    rows = []

    def measure(source: str, tokens: int, ridge: float, statistics: KeyStatistics) -> None:
        (scores,) = score_single_edits(model, facts, {arguments.layer: statistics}).values()
        rows.append({"covariance": source, "tokens": tokens, "ridge": ridge, **as_row(scores)})
        print(rows[-1], flush=True)

    measure("identity", 0, 0.0, KeyStatistics(None))
    for source in arguments.sources:
        for tokens in arguments.tokens:
            config.covariance = source if source == "sampled" else str(arguments.data / source)
            config.covariance_tokens = tokens
            found = key_statistics(
                model.get_base_model(),
                model.architecture,
                model.tokenizer,
                [arguments.layer],
                config,
                model.base_info.fingerprint,
            )[arguments.layer]
            for ridge in arguments.ridges:
                measure(source, tokens, ridge, KeyStatistics(found.second_moment, ridge))
    record(f"covariance-{arguments.model}-layer{arguments.layer}", rows)


if __name__ == "__main__":
    main()
