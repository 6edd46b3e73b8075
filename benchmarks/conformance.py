"""Test each causal LM class of transformers on a tiny random model, and write the table `docs/conformance.md`.

The properties come from `tests/conformance_checks.py` and the models from `tests/zoo.py`, which shrinks the defaults of
each config. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from common import machine, record
from rich.progress import track
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from conformance_checks import OUTCOMES, Verdict, examine  # noqa: E402
from models import tiny_tokenizer  # noqa: E402
from zoo import CATEGORIES, category, causal_lm_types  # noqa: E402


def main() -> None:
    """Examine the classes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types of transformers; all of the mapping, written to docs/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny models run fastest alone
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GOLDENEDIT_CACHE"] = folder
        verdicts = [examine(name, tokenizer) for name in track(arguments.types or causal_lm_types())]
    table = report(verdicts)
    if arguments.types:
        print(table)
        return
    record("conformance", [asdict(verdict) for verdict in verdicts])
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "conformance.md").write_text(table)


def report(verdicts: list[Verdict]) -> str:
    """Return the page: counts by category, then a row for each class."""
    versions = ", ".join(f"{name} {machine()[name]}" for name in ("transformers", "peft", "torch"))
    return "\n".join([_HEAD.format(versions=versions), *_counts(verdicts), "", *_rows(verdicts), ""])


_HEAD = """# Any causal LM

Every class of transformers' causal LM mapping, as a tiny random model in float32 ({versions}).
Made by `make conformance`.

A class *works* where all of these hold, each difference at most 1e-3 of the largest value compared:

- **LGA**: the scores equal those of plain weight gradients, two backwards a fact;
- **target**: after one R-ROME edit `W' k = v*` at the subject's last token;
- **written**: the logits equal those with the change written into the weights;
- **loaded**: the saved folder, loaded by stock PEFT, gives the same logits;
- with the edit switched off the logits are those before, exactly;
- **bf16**, **fp16**: an edit of the model in half precision misses its `v*` by at most 4 roundings of the largest value
  (the column has how many), stays finite, and switches off exactly.

**replay** is how the optimization runs the model again: `packed`, the tokens behind the subject over cached keys and
values, all rows in one without padding; `suffix`, the same in padded rows; `layers`, all tokens from the edited layer
on; `whole`, the whole model. Each proves itself against the whole forward on the data of the edit, and else the next
one is taken.
"""


def _counts(verdicts: list[Verdict]) -> list[str]:
    lines = [f"| category | classes | {' | '.join(OUTCOMES)} |", f"|---|---|{'---|' * len(OUTCOMES)}"]
    for name in CATEGORIES:
        found = Counter(verdict.outcome for verdict in verdicts if category(verdict.model_type) == name)
        lines.append(f"| {name} | {found.total()} | {' | '.join(str(found[outcome]) for outcome in OUTCOMES)} |")
    total = Counter(verdict.outcome for verdict in verdicts)
    return [*lines, f"| all | {total.total()} | {' | '.join(str(total[outcome]) for outcome in OUTCOMES)} |"]


def _rows(verdicts: list[Verdict]) -> list[str]:
    lines = []
    for name in CATEGORIES:
        lines += [
            f"## {name[0].upper()}{name[1:]}",
            "",
            "| type | class | edited | layers | replay | LGA | target | written | loaded | bf16 | fp16 | |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for verdict in verdicts:
            if category(verdict.model_type) == name:
                lines.append(_row(verdict))
        lines.append("")
    return lines


def _row(verdict: Verdict) -> str:
    found = verdict.found
    cells = [verdict.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[verdict.model_type]]
    if found.layers:
        modules = "<br>".join(f"`{path}`" for path in found.modules.split(" | "))
        errors = [f"{getattr(found, name):.0e}" for name in ("lga", "target", "written", "loaded")]
        half = [f"{found.half[name]:.1f}" if name in found.half else "" for name in ("bfloat16", "float16")]
        cells += [modules, f"{found.editable}/{found.layers}", found.replay, *errors, *half]
    else:
        cells += [""] * 9
    said = verdict.outcome if not verdict.reason else f"{verdict.outcome}: {verdict.reason}"
    return f"| {' | '.join([*cells, said.replace('|', '/')])} |"


if __name__ == "__main__":
    main()
