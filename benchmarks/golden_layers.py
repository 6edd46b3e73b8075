"""Every layer selector against brute force: four datasets, R-ROME alone, MEMIT and EMMET in batches of 8.

`goldenedit benchmark golden-layers` with the settings of the tables. To have more facts in the time that there is,
products of float32 may be rounded, `torch.set_float32_matmul_precision("medium")`, which on the processor of the tables
leaves last hidden states of up to 57 within 0.002; attention then runs without its fused kernel, slow on few tokens.
"""

from __future__ import annotations

import torch
from common import RESULTS, parser
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from goldenedit.benchmark.golden_layers import Setting
from goldenedit.benchmark.run import run_golden_layers
from goldenedit.cli import load_model

DATASETS = ("counterfact", "zsre", "wiki_counterfact", "wiki_recent")


def main() -> None:
    """Measure one model; what is in the results folder is not measured again."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=8, help="test facts of each dataset, and packaged ones")
    options.add_argument("--datasets", nargs="+", default=DATASETS)
    options.add_argument("--methods", nargs="+", default=("r-rome", "memit", "emmet"))
    arguments = options.parse_args()

    torch.set_float32_matmul_precision("medium")
    sources = {name: str(arguments.data / f"{name}.json") for name in arguments.datasets}
    setting = Setting(sources, tuple(arguments.methods), arguments.facts, arguments.facts, chunk=8)
    with sdpa_kernel(SDPBackend.MATH):
        run_golden_layers([arguments.model], load_model, setting, RESULTS / "golden-layers", Console())


if __name__ == "__main__":
    main()
