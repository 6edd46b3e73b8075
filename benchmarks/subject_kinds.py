"""The kind of a subject as the model tells it: the share of names of known kinds that it tells right.

The wording of `goldenedit.subject_questions.kind_of` was chosen on the first half of subject_kinds.json (`--half
first`). "Any" is no wrong kind: its questions fit every subject.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import load, parser, record, timed

from goldenedit import EditConfig
from goldenedit.evaluation.intervals import wilson
from goldenedit.subject_questions import ANY, kind_of

SUBJECTS = Path(__file__).with_suffix(".json")
HALVES = {"first": "development", "second": "test"}


def main() -> None:
    """Tell the kinds of all names of a half, and print the wrong ones."""
    options = parser(__doc__)
    options.add_argument("--half", choices=HALVES, default="second")
    arguments = options.parse_args()
    by_kind = json.loads(SUBJECTS.read_text(encoding="utf-8"))[HALVES[arguments.half]]
    kinds = {subject: kind for kind, subjects in by_kind.items() for subject in subjects}
    model = load(arguments.model, EditConfig())
    with timed() as seconds:
        told = dict(zip(kinds, kind_of(model.lm, list(kinds)), strict=True))
    wrong = {subject: kind for subject, kind in told.items() if kind not in (kinds[subject], ANY)}
    shares = {
        "right": sum(told[subject] == kind for subject, kind in kinds.items()) / len(kinds),
        "any": sum(kind == ANY for kind in told.values()) / len(kinds),
        "wrong": len(wrong) / len(kinds),
    }
    figures = {
        name: {"share": round(share, 3), "interval": [round(bound, 3) for bound in wilson(share, len(kinds))]}
        for name, share in shares.items()
    }
    row = {"n": len(kinds), **figures, "seconds": round(seconds(), 2), "wrong kinds": wrong}
    print(json.dumps(row, ensure_ascii=False))
    record(f"subject-kinds-{arguments.model}-{arguments.half}", [row])


if __name__ == "__main__":
    main()
