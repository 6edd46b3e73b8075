"""Time edits, LGA, statistics, generation and the switching of edits, compared with plain implementations.

Every ratio compares alternating runs in this process, with a reference in `references.py` that must give the same
result or with stock transformers. The facts are CounterFact's records after the first 40.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load, parser, record
from references import r_rome, weight_gradient_scores
from transformers import AutoModelForCausalLM

from goldenedit import EditConfig, EditModel, EditRequest, load_requests, proxy_facts
from goldenedit.cost import measuring, profiling
from goldenedit.layer_selection import golden_layer, lga_scores
from goldenedit.lm.covariance import sampled_texts
from goldenedit.lm.flops import forward_flops
from goldenedit.lm.statistics import second_moments
from goldenedit.packaged import PACKAGED_MODELS, packaged_model

# R-ROME as published, which is what the reference does: without this library's anchor and contrast.
PUBLISHED: dict[str, Any] = {"anchor_bare_prompt": False, "contrast": 0}
SAME = 1e-2  # largest relative difference of two results that are called the same: float32 through 25 steps of Adam
Row = dict[str, Any]


def seconds(run: Callable[[], Any]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each function, run in turns `repeats` times after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:
                found[name].append(taken)
    return found


def edits(model: EditModel, facts: Sequence[EditRequest], layer: int) -> list[Row]:
    """Compare one edit and a batch of edits with the reference, which edits one fact after the other."""
    config = model.edit_config
    contexts, own = model.lm.contexts(config), model.lm.statistics(config, [layer])[layer]
    assert own.second_moment is not None
    second_moment, path = own.second_moment.double(), model.architecture.down_projections[layer]
    ridge = own.ridge * second_moment.diagonal().mean() * torch.eye(len(second_moment), dtype=torch.float64)
    inverse = torch.linalg.inv(second_moment + ridge)  # cached by both
    model.edit(facts[0], name="warm")
    model.delete_adapter("warm")
    rows, plain, single, plain_flops, single_flops, differences, steps_taken = [], [], [], [], [], [], []
    for fact in facts:  # in turns, so that both meet the same machine
        single.append(seconds(lambda fact=fact: model.edit(fact, name="edit")))
        found = model.edits["edit"].deltas[path].dense()
        steps = model.edits["edit"].facts[0].steps
        model.delete_adapter("edit")
        base = model.get_base_model()
        started = time.perf_counter()
        change, taken = r_rome(base, model.tokenizer, path, fact, contexts, inverse, config)
        plain.append(time.perf_counter() - started)
        differences.append((found - change).norm().item() / change.norm().item())
        assert steps == taken, (steps, taken)
        steps_taken.append(taken)
        assert differences[-1] < SAME, differences
    for fact, taken in zip(facts, steps_taken, strict=True):
        with measuring() as cost:
            model.edit(fact, name="edit")
        model.delete_adapter("edit")
        single_flops.append(cost().flops)
        few: list[int] = []  # a plain step costs as many operations as the next
        for steps in (1, 2):
            with measuring() as cost:
                some = replace(config, steps=steps, stop_loss=0.0)
                r_rome(model.get_base_model(), model.tokenizer, path, fact, contexts, inverse, some)
            few.append(cost().flops)
        stopped = taken < config.steps  # by one more forward, half a step
        plain_flops.append(few[0] + (few[1] - few[0]) * (taken - 1 + stopped / 2))
    batch = []
    for _ in range(2):
        batch.append(seconds(lambda: model.edit(facts, name="batch")) / len(facts))
        model.delete_adapter("batch")
    with profiling() as phases:
        model.edit(facts, name="batch")
    model.delete_adapter("batch")
    batch_flops = sum(cost.flops for cost in phases.values()) / len(facts)
    one = statistics.fmean(plain) / statistics.fmean(single)
    many = statistics.fmean(plain) / statistics.fmean(batch)
    rows.append(
        {
            "what": "R-ROME, an edit",
            "facts": len(facts),
            "plain GFLOP": round(statistics.fmean(plain_flops) / 1e9),
            "plain s": round(statistics.fmean(plain), 2),
            "one at a time s": round(statistics.fmean(single), 2),
            "times faster": round(one, 2),
            "median of the ratios": round(statistics.median(a / b for a, b in zip(plain, single, strict=True)), 2),
            "times fewer operations": round(sum(plain_flops) / sum(single_flops), 2),
            "batch s": round(statistics.fmean(batch), 2),
            "batch: times faster": round(many, 2),
            "batch: times fewer operations": round(statistics.fmean(plain_flops) / batch_flops, 2),
            "largest relative difference of the change": float(f"{max(differences):.1e}"),
            "phases of the batch": {name: [round(c.seconds, 2), round(c.flops / 1e9, 1)] for name, c in phases.items()},
        }
    )
    return rows


def analysis(model: EditModel, facts: Sequence[EditRequest], plain_edit_flops: float | None) -> list[Row]:
    """Compare LGA with two weight gradients per fact."""
    base, tokenizer, lm, where = model.get_base_model(), model.tokenizer, model.lm, model.architecture
    few = facts[:20]
    scores = lga_scores(lm, few)
    reference = weight_gradient_scores(base, tokenizer, where.mlp_linears, where.num_layers, few)
    difference = ((scores - reference) / reference).abs().max().item()
    assert difference < SAME, difference
    own, plain = [], []
    for _ in range(3):
        own.append(seconds(lambda: lga_scores(lm, facts)))
        plain.append(
            seconds(lambda: weight_gradient_scores(base, tokenizer, where.mlp_linears, where.num_layers, few))
            * len(facts)
            / len(few)
        )
    with measuring() as cost:
        whole = lga_scores(lm, facts)
    row: Row = {
        "what": "LGA",
        "facts": len(facts),
        "golden layer": golden_layer(whole),
        "weight gradients s": round(statistics.median(plain), 2),
        "s": round(statistics.median(own), 2),
        "times faster": round(statistics.median(plain) / statistics.median(own), 2),
        "forward-equivalents a fact": round(cost().flops / forward_flops(lm, facts), 2),
        "largest relative difference": float(f"{difference:.1e}"),
    }
    if plain_edit_flops is not None:
        sweep = plain_edit_flops * len(where.down_projections) * len(facts)
        row["times cheaper than a plain sweep"] = round(sweep / cost().flops)
    return [row]


def key_statistics(model: EditModel, tokens: int) -> list[Row]:
    """Time the key statistics of all layers in one pass, including the sampling of text."""
    layers = sorted(model.architecture.down_projections)
    texts: list[str] = []
    sampling = seconds(lambda: texts.extend(sampled_texts(model.lm, tokens, 0)))
    passing = seconds(lambda: second_moments(model.lm, texts, layers, tokens))
    return [
        {
            "what": "key statistics, all layers",
            "layers": len(layers),
            "tokens": tokens,
            "sampling s": round(sampling, 1),
            "s": round(passing, 1),
            "all s": round(sampling + passing, 1),
        }
    ]


def generation(name: str, layer: int, repeats: int, tokens: int = 64) -> list[Row]:
    """Time generation by the base model, with one edit, and with ten edits at one layer."""
    rows = []
    source = str(packaged_model(name)) if name in PACKAGED_MODELS else name
    plain = AutoModelForCausalLM.from_pretrained(source)
    for count in (1, 10):
        with saved_edit(name, layer) as (model, folder):
            for number in range(count):
                model.load_adapter(folder, f"edit_{number}")
        model.set_adapter([f"edit_{number}" for number in range(count)])
        inputs = model.tokenizer("The history of the city begins in the", return_tensors="pt")
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

        def run(which: Any, inputs: Any = inputs, options: Any = options) -> None:
            which.generate(**inputs, **options)

        found = in_turns({"plain": lambda: run(plain), "edited": lambda model=model: run(model)}, repeats)
        base, edited = (statistics.median(found[key]) for key in ("plain", "edited"))
        overhead = statistics.median(b / a for a, b in zip(found["plain"], found["edited"], strict=True)) - 1
        rows.append(
            {
                "what": f"generation with {count} edits at one layer",
                "tokens": tokens,
                "plain ms a token": round(1000 * base / tokens, 2),
                "edited ms a token": round(1000 * edited / tokens, 2),
                "overhead %": round(100 * overhead, 2),
                "repeats": repeats,
            }
        )
    return rows


@contextmanager
def saved_edit(name: str, layer: int) -> Iterator[tuple[EditModel, str]]:
    """Yield a model without edits, and the folder of a rank-one edit of the same model."""
    model = load(name, EditConfig(layer=layer, covariance="identity", contexts=1, steps=1))
    model.edit("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", name="saved")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.delete_adapter("saved")
        yield model, folder


def stacking(name: str, layer: int, count: int) -> list[Row]:
    """Load one more edit from a folder beside `count` others, and switch between them."""
    with saved_edit(name, layer) as (model, folder):
        for number in range(count):
            model.load_adapter(folder, f"edit_{number}")
        loading, switching, all_on = [], [], []
        for turn in range(9):
            loading.append(seconds(lambda: model.load_adapter(folder)))
            switching.append(seconds(lambda turn=turn: model.set_adapter(f"edit_{turn * 7 % count}")))
            all_on.append(seconds(lambda: model.set_adapter([f"edit_{number}" for number in range(count)])))
            model.set_adapter("edit_0")
            model.delete_adapter("saved")
    return [
        {
            "what": f"beside {count} edits at one layer",
            "load one ms": round(1000 * statistics.median(loading), 1),
            "switch to one ms": round(1000 * statistics.median(switching), 1),
            "switch all on ms": round(1000 * statistics.median(all_on), 1),
        }
    ]


def start() -> list[Row]:
    """Time the import of this library after torch and transformers, and the help of the command line."""

    def python(code: str) -> float:
        return statistics.median(
            seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True)) for _ in range(5)
        )

    before = python("import torch, transformers")
    beside = python("import torch, transformers, goldenedit")
    used = python("import torch, transformers; from goldenedit import EditModel, get_edit_model")
    command = [str(Path(sys.executable).with_name("goldenedit")), "--help"]
    shown = statistics.median(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5)
    )
    return [
        {
            "what": "start",
            "import torch, transformers s": round(before, 2),
            "import goldenedit beside them s": round(beside - before, 2),
            "with what is imported lazily s": round(used - before, 2),
            "goldenedit --help s": round(shown, 2),
        }
    ]


def main() -> None:
    """Run all or some measurements, and print each row when it is done."""
    options = parser(__doc__)
    parts = ("edits", "lga", "statistics", "generation", "stacking", "start")
    options.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options.add_argument("--facts", type=int, default=16, help="facts of the batch")
    options.add_argument("--layer", type=int, default=3)
    options.add_argument("--repeats", type=int, default=9, help="of generation")
    arguments = options.parse_args()
    name, rows = f"speed-{arguments.model}", list[Row]()
    file = RESULTS / f"{name}.json"
    others: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []

    def keep(found: list[Row]) -> None:
        for row in found:
            print(row, flush=True)
        rows.extend(found)

    if "edits" in arguments.parts:
        model = load(arguments.model, EditConfig(layer=arguments.layer, **PUBLISHED))
        keep(
            edits(model, load_requests(arguments.data / "counterfact.json")[40 : 40 + arguments.facts], arguments.layer)
        )
    if "lga" in arguments.parts:
        model = load(arguments.model, EditConfig(layer=arguments.layer))
        # Operations are the same in every run.
        plain = next((1e9 * row["plain GFLOP"] for row in [*rows, *others] if "plain GFLOP" in row), None)
        keep(analysis(model, proxy_facts()[:100], plain))
    if "statistics" in arguments.parts:
        keep(key_statistics(load(arguments.model, EditConfig(layer=arguments.layer)), 5000))
    if "generation" in arguments.parts:
        keep(generation(arguments.model, arguments.layer, arguments.repeats))
    if "stacking" in arguments.parts:
        keep(stacking(arguments.model, arguments.layer, 1000))
    if "start" in arguments.parts:
        keep(start())
    measured = {row["what"] for row in rows}
    record(name, [*(row for row in others if row["what"] not in measured), *rows])


if __name__ == "__main__":
    main()
