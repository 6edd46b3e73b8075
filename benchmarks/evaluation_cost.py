"""Seconds of edits against seconds of their evaluation: the same facts of MQuAKE, in one run.

Facts are edited one by one. Then all forms of all facts are asked of the edited model, and in a second step everything
else is compared with the base model.
"""

from __future__ import annotations

from common import load, parser, record, timed
from seen import known_mquake

from goldenedit import EditConfig


def main() -> None:
    """Measure edits and evaluations."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=40)
    arguments = options.parse_args()
    model = load(arguments.model, EditConfig())
    model.select_layer()
    requests = known_mquake(model, arguments.data, "second")[: arguments.facts]
    model.edit(requests[0])  # computes statistics and contexts once
    model.delete_adapter("edit_1")
    row: dict[str, float | int] = {"facts": len(requests)}
    with timed() as seconds:
        for request in requests:
            model.delete_adapter(model.edit(request).name)
    row["seconds of single edits"] = seconds()
    model.edit_config.method = "memit"
    with timed() as seconds:
        model.edit(requests)
    row["seconds of one batch (memit)"] = seconds()
    with timed() as seconds:
        model.evaluate(requests, unchanged=False, in_prompt=False, neighbors=0)
    row["seconds of all forms, both models"] = seconds()
    with timed() as seconds:
        model.evaluate(requests, unchanged=False, in_prompt=False, neighbors=0)
    row["seconds of all forms, the base model's answers kept"] = seconds()
    with timed() as seconds:
        model.evaluate(requests, control=False)
    row["seconds of everything"] = seconds()
    record(f"evaluation_cost-{arguments.model}", [row])
    print(row)


if __name__ == "__main__":
    main()
