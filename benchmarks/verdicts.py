"""How often the verdict `contains` agrees with a reading by hand of generated texts.

`verdicts.jsonl` has 100 texts of edited models, drawn at random over models, editors and forms from the first edits
that `seen.py` stored. `says` is the reader's judgment: is the new answer what this text replies? `unsure` marks texts
that name the new answer alone, but do not say of whom.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import RESULTS

from goldenedit.evaluation.intervals import wilson
from goldenedit.evaluation.verdicts import contains

TEXTS = Path(__file__).with_name("verdicts.jsonl")


def main() -> None:
    """Compare the verdicts."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    texts = [json.loads(line) for line in TEXTS.read_text().splitlines()]
    differing = [text for text in texts if contains(text["text"], text["answers"], text["old"]) != text["says"]]
    agreed = 1 - len(differing) / len(texts)
    row = {
        "texts": len(texts),
        "agreement": agreed,
        "95%": wilson(agreed, len(texts)),
        "agreement if no unsure text says it": agreed - sum(text["unsure"] for text in texts) / len(texts),
        "differing": differing,
    }
    (RESULTS / "verdicts.json").write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(row, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
