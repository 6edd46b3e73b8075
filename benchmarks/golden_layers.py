"""Is there a golden layer, and who finds it? Edits of test facts at every layer against what all selectors choose.

This runs `goldenedit benchmark golden-layers` with the settings of the tables. Test facts are from the second half of
each file. The model runs in bfloat16, and without the fused attention kernel, which is slow on few tokens. Cells are
kept in the results folder, so that a stopped run goes on, and a run with more facts adds to what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from common import RESULTS, parser
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from goldenedit import EditRequest, load_requests
from goldenedit.benchmark.golden_layers import Setting
from goldenedit.benchmark.run import run_golden_layers
from goldenedit.loading import load_model

DATASETS = ("zsre", "wiki_counterfact")


def main() -> None:
    """Measure one model; results that are in the results folder already are not measured again."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=64, help="test facts of each dataset")
    options.add_argument("--datasets", nargs="+", default=DATASETS)
    options.add_argument("--methods", nargs="+", default=["locft"], metavar="NAME[=FACTS]")
    options.add_argument("--layers", type=int, default=10, help="evenly spaced layers, beside those of selectors")
    options.add_argument("--budget", type=float, help="minutes")
    arguments = options.parse_args()

    sources: dict[str, str | Sequence[EditRequest]] = {}
    for name in arguments.datasets:
        facts = load_requests(arguments.data / f"{name}.json")
        sources[name] = facts[len(facts) // 2 :]
    named = [one.partition("=") for one in arguments.methods]
    counts = {name: int(count) if count else None for name, _, count in named}
    setting = Setting(sources, counts, arguments.facts, grid=arguments.layers, budget=arguments.budget)
    with sdpa_kernel(SDPBackend.MATH):
        run_golden_layers(
            [arguments.model], partial(load_model, dtype="bfloat16"), setting, RESULTS / "golden-layers", Console()
        )


if __name__ == "__main__":
    main()
