"""Growth of the cost of edits and LGA with the number of edits, layer, prompt length, contexts and proxy facts.

Seconds are measured in one run each and include the counting of operations. Operations are counted (see
`goldenedit.cost`) because they do not depend on how busy the machine is. The exponent is the slope of operations
between the last two sizes: 1 is linear, and less than 1 means that work is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import RESULTS, load, parser, record

from goldenedit import EditConfig, EditModel, EditRequest, proxy_facts
from goldenedit.cost import measuring
from goldenedit.layer_selection import lga_scores

# Few steps, so that a thousand edits take minutes; without statistics, which are there once.
QUICK: dict[str, Any] = {"covariance": "identity", "contexts": 2, "steps": 2, "stop_loss": 0.0, "contrast": 0}
FACT = EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome")
Point = tuple[int, Callable[[], Any]]


def main() -> None:
    """Measure every curve, print a table, and draw them."""
    options = parser(__doc__)
    options.add_argument("--layer", type=int, default=3)
    options.add_argument("--most", type=int, default=64, help="edits of the largest batch")
    arguments = options.parse_args()
    if arguments.most < 4:
        options.error("--most must be 4 at least: a slope takes two sizes.")
    model = load(arguments.model, EditConfig(layer=arguments.layer, **QUICK))
    curves = {
        "edits in one batch (R-ROME)": of_edits(model, "r-rome", arguments.most),
        "edits in one batch (MEMIT)": of_edits(model, "memit", arguments.most),
        "edited layer": of_layers(model),
        "tokens before the subject": of_prompts(model, arguments.layer, before=True),
        "tokens behind the subject": of_prompts(model, arguments.layer, before=False),
        "contexts": of_contexts(model, arguments.layer),
        "proxy facts (LGA)": of_proxies(model),
    }
    rows: list[dict[str, Any]] = []
    print("| what grows | from, to | s | GFLOP | exponent |\n|---|---|---|---|---|")
    for name, points in curves.items():
        points[0][1]()  # what is found once
        measured = [measure(*point) for point in points]
        (size, _, flops), (last, _, more) = measured[-2:]
        slope = math.log(more / flops) / math.log(last / size)
        first = measured[0]
        print(
            f"| {name} | {first[0]}, {last} | {first[1]:.2f}, {measured[-1][1]:.2f} | {first[2]:.1f}, {more:.1f} "
            f"| {slope:.2f} |",
            flush=True,
        )
        rows.append({"model": arguments.model, "what": name, "points": measured, "exponent": round(slope, 2)})
    record(f"growth-{arguments.model}", rows)
    draw(rows, arguments.model)


def measure(size: int, run: Callable[[], Any]) -> tuple[int, float, float]:
    """Return size, seconds and GFLOP of one run."""
    with measuring() as cost:
        run()
    return size, round(cost().seconds, 3), round(cost().flops / 1e9, 2)


def edit(model: EditModel, facts: list[EditRequest], **options: Any) -> Callable[[], Any]:
    """Return a function that edits facts and undoes the edits."""

    def run() -> None:
        model.edit_config = replace(model.edit_config, **options)
        model.edit(facts, name="edit")
        model.delete_adapter("edit")

    return run


def of_edits(model: EditModel, method: str, most: int) -> list[Point]:
    """Return batches of different sizes, of invented facts of similar length."""
    proxies = proxy_facts()
    facts = [
        replace(
            fact, prompt=fact.prompt.replace(fact.subject, "{}"), subject=f"{fact.subject} {number}", target_true=None
        )
        for number in range(1 + most // len(proxies))
        for fact in proxies
    ]
    facts = [
        replace(fact, paraphrases=(), neighborhood=(), locality=(), portability=(), generation=()) for fact in facts
    ]
    sizes = [size for size in (1, 4, 16, 64, 250, 500, 1000) if size <= most]
    late = max(model.architecture.down_projections) - 4  # most of each value's cost is not what grows here
    return [(size, edit(model, facts[:size], method=method, layer=late, target_layer=late)) for size in sizes]


def of_layers(model: EditModel) -> list[Point]:
    """Return one edit at each of several layers."""
    layers = [layer for layer in (1, 2, 4, 8, 16, 28) if layer in model.architecture.down_projections]
    return [(layer, edit(model, [FACT], method="r-rome", layer=layer, target_layer=layer)) for layer in layers]


def of_prompts(model: EditModel, layer: int, before: bool) -> list[Point]:
    """Return edits with prompts of different lengths and the same subject."""
    words, points = "Many people visit the city every year. ", []
    for times in (1, 2, 4, 8, 16, 32):
        text = words * times
        prompt = f"{text}{FACT.prompt}" if before else f"{FACT.subject} is famous. {text}It is located in the city of"
        size = len(model.tokenizer(text)["input_ids"])
        points.append((size, edit(model, [replace(FACT, prompt=prompt)], layer=layer, target_layer=layer)))
    return points


def of_contexts(model: EditModel, layer: int) -> list[Point]:
    """Return edits of one prompt with different numbers of contexts."""
    return [
        (count, edit(model, [FACT], contexts=count, layer=layer, target_layer=layer)) for count in (1, 2, 5, 10, 20)
    ]


def of_proxies(model: EditModel) -> list[Point]:
    """Return runs of LGA with different numbers of proxy facts."""
    facts = proxy_facts()
    return [(size, lambda size=size: lga_scores(model.lm, facts[:size])) for size in (8, 16, 32, 64, 128, 250)]


def draw(rows: list[dict[str, Any]], name: str) -> None:
    """Draw seconds against size, with a line of linear growth for comparison."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7))
    for axis, row in zip(axes.flat, rows, strict=False):
        sizes, seconds, flops = zip(*row["points"], strict=True)
        axis.plot(sizes, seconds, marker="o", label="seconds")
        axis.plot(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], color="0.7", ls="--", label="linear")
        axis.plot(sizes, [seconds[-1] * flop / flops[-1] for flop in flops], lw=1, label="operations, scaled")
        axis.set(xscale="log", yscale="log", xlabel=row["what"], title=f"exponent {row['exponent']}")
    axes.flat[0].legend()
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(RESULTS / f"growth-{name}.svg")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
