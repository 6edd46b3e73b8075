"""Every layer selector against brute force: four datasets, R-ROME alone, MEMIT and EMMET in batches of 8.

This runs `goldenedit benchmark golden-layers` with the settings of the tables. Float32 products may be rounded
(`common.rounded_products`), so that more facts can be measured in the same time.
"""

from __future__ import annotations

from common import DATASETS, RESULTS, parser, rounded_products
from rich.console import Console

from goldenedit.benchmark.golden_layers import Setting
from goldenedit.benchmark.run import run_golden_layers
from goldenedit.loading import load_model


def main() -> None:
    """Measure one model; results that are in the results folder already are not measured again."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=8, help="test facts of each dataset, and packaged ones")
    options.add_argument("--datasets", nargs="+", default=DATASETS)
    options.add_argument("--methods", nargs="+", default=("r-rome", "memit", "emmet"))
    arguments = options.parse_args()

    sources = {name: str(arguments.data / f"{name}.json") for name in arguments.datasets}
    setting = Setting(sources, tuple(arguments.methods), arguments.facts, arguments.facts, chunk=8)
    with rounded_products():
        run_golden_layers([arguments.model], load_model, setting, RESULTS / "golden-layers", Console())


if __name__ == "__main__":
    main()
