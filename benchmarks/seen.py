"""What a user sees of every editor: forms in which a fact holds, and what else changed, on the same single edits.

The facts are those of MQuAKE whose old answer the model prefers: each has a completion and a question. Published
figures are from the second half of the file; constants are chosen on the first half (`--half first`). Neighbors are
other subjects of the same relation. Edits are made at LGA's golden layer, or from there upward, with default settings.
The row `in the prompt` is the base model with the fact in its prompt. Rows `as published` have values as in the papers:
of the prompt alone, by Adam, added at the subject's last token. The row `rome as EasyEdit` also has C = I, no contrast
and the layer of EasyEdit's file for Llama, 5. `random change` is the control.

Each edit is stored with all texts in `results/seen/`, so the run can be interrupted, and new verdicts can be computed
from stored texts (`--score`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, applied, constants, load, parser, record, timed

from goldenedit import EditConfig, EditModel, EditRequest, load_requests, proxy_facts
from goldenedit.editing.learn import TextStatistics, learn_facts
from goldenedit.editing.prepared import prepare_facts
from goldenedit.editors import EDITORS, LowRankDelta
from goldenedit.evaluation.counterfact import known_facts
from goldenedit.evaluation.harm import Compared, compare
from goldenedit.evaluation.seen import Baseline, Measurement, Seen, SeenOptions, baseline, has_ended, seen
from goldenedit.evaluation.verdicts import answer_of
from goldenedit.layer_selection.select import choose
from goldenedit.lm.decoding import Within, greedy
from goldenedit.measuring import random_like

NEIGHBORS = 3
OPTIONS = SeenOptions(texts=4)
UNRELATED = 4  # questions that every edit is compared on
EASYEDIT = "rome as EasyEdit"
PUBLISHED = " as published"
AS_PUBLISHED: dict[str, Any] = {
    "phrasings": "none",
    "kept_questions": 0,
    "optimizer": "adam",
    "lr": 0.5,
    "contexts": 10,
    "flat_directions": False,
    "contrast": 0,
    "anchor_bare_prompt": False,
}
CONTROL = "random change"  # of rank and norm of the default editor's, at the same place


@dataclass(frozen=True)
class Made:
    """A single edit, and its share of the seconds that its editor took."""

    deltas: dict[str, LowRankDelta]
    seconds: float


def main() -> None:
    """Measure every editor, or only score what was measured."""
    options = parser(__doc__)
    inserting = [name for name in ("r-rome", "alphaedit", "memit") if name in EDITORS]
    every = dict.fromkeys(["gated", CONTROL, *EDITORS.names(), *(f"{name}{PUBLISHED}" for name in inserting), EASYEDIT])
    options.add_argument("--facts", type=int, default=40)
    options.add_argument("--half", choices=("first", "second"), default="second")
    options.add_argument("--methods", nargs="+", default=list(every))
    options.add_argument("--layer", default="lga", help="a layer selector or a number")
    options.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of EditConfig")
    options.add_argument("--name", default="", help="name of the results with these options")
    options.add_argument("--score", action="store_true", help="only compute figures from stored texts")
    arguments = options.parse_args()

    layer = int(arguments.layer) if arguments.layer.isdecimal() else arguments.layer
    model = load(arguments.model, EditConfig(**{"layer": layer, **constants(arguments.set)}))
    model.select_layer()
    requests = known_mquake(model, arguments.data, arguments.half)[: arguments.facts]
    with timed() as seconds_of_base:
        base = few_unrelated(baseline(model.lm, model.tokenizer, requests, OPTIONS))
    name = f"{arguments.model}-{arguments.half}-{arguments.name or arguments.layer}"
    folder = RESULTS / "seen" / name
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.score:
        measure(model, base, arguments.methods, folder)
    rows = list(figures(model, base, arguments.methods, folder, seconds_of_base()))
    record(f"seen-{name}", rows)
    print("\n".join(table(rows)))


def known_mquake(model: EditModel, data: Path, half: str) -> list[EditRequest]:
    """Return the single facts of MQuAKE whose old answer the model prefers, with neighbors of the same relation."""
    records = json.loads((data / "mquake.json").read_text())
    middle = len(records) // 2
    chosen = records[:middle] if half == "first" else records[middle:]
    every = _distinct(load_requests(records))
    single = load_requests([record for record in chosen if len(record["requested_rewrite"]) == 1])
    # Questions that need several facts do not follow from one of them.
    parts = [replace(request, portability=()) for request in load_requests(chosen)]
    facts = _distinct([*parts, *single])
    return [
        replace(request, neighborhood=_neighbors(request, every), portability=request.portability[:1])
        for request in (facts[index] for index in known_facts(model.lm, facts))
    ]


def _distinct(requests: Sequence[EditRequest]) -> list[EditRequest]:
    return list({request.text: request for request in requests}.values())


def _neighbors(request: EditRequest, every: Sequence[EditRequest]) -> list[str]:
    """Return prompts of other facts with the same relation."""
    others = [other.text for other in every if other.relation == request.relation and other.subject != request.subject]
    return random.Random(request.text).sample(others, min(NEIGHBORS, len(others)))


def few_unrelated(base: Baseline) -> Baseline:
    """Return a baseline with fewer unrelated questions, for many edits."""
    places = [place for place, other in enumerate(base.others) if other.kind != "unrelated"]
    places += [place for place, other in enumerate(base.others) if other.kind == "unrelated"][:UNRELATED]
    return replace(
        base,
        others=[base.others[place] for place in places],
        continuations=[base.continuations[place] for place in places],
        rows=[base.rows[place] for place in places] + list(base.rows[len(base.others) :]),
    )


def measure(model: EditModel, base: Baseline, methods: Sequence[str], folder: Path) -> None:
    """Edit each fact alone by each method, and store what the model writes and how far it is from the base model.

    The base model runs once for all edits of a fact.
    """
    stored = {method: len(results(folder, method)) for method in methods}
    if min(stored.values()) == len(base.requests):
        return
    config = model.edit_config
    made = {method: edits_of(model, base.requests, config_of(config, method), method, folder) for method in methods}
    start = min(model.architecture.layer_of(path) for edits in made.values() for edit in edits for path in edit.deltas)
    for index in range(len(base.requests)):
        about = base.about(index)
        edits = {method: made[method][index] for method in methods if stored[method] <= index}
        states = {name: lambda edit=edit: applied(model, lambda: edit.deltas) for name, edit in edits.items()}
        if not states:
            continue
        with timed() as seconds_of_comparing:
            compared = compare(model.lm, about.rows, start, nullcontext, states)
        with timed() as seconds_of_asking:
            asked = ask_all(model, about, list(edits.values()))
        for (method, edit), (written, others) in zip(edits.items(), asked, strict=True):
            result = {
                "fact": index,
                "prompt": base.requests[index].text,
                "written": written,
                "others": others,
                "compared": [
                    {"same": [int(agrees) for agrees in row.same], "kl": [round(value, 7) for value in row.kl]}
                    for row in compared[method]
                ],
                "seconds": round(edit.seconds, 3),
                "seconds of asking": round(seconds_of_asking() / len(edits), 3),
                "seconds of comparing": round(seconds_of_comparing() / len(edits), 3),
                "layers": sorted({model.architecture.layer_of(path) for path in edit.deltas}),
            }
            with path_of(folder, method).open("a") as file:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
        print(index, {method: results(folder, method)[index]["written"][0] for method in methods}, flush=True)


def ask_all(model: EditModel, base: Baseline, edits: Sequence[Made]) -> list[tuple[list[str], dict[int, str]]]:
    """Ask the models of several edits at once: each row of a batch has the deltas of its own edit.

    Returns the same as `goldenedit.evaluation.seen.ask` for each of them.
    """
    subjects = [place for place, other in enumerate(base.others) if other.kind == "subject"]
    asked = [text.prompt for text in base.asked]
    others = [base.others[place].prompt for place in subjects]

    def within(count: int) -> Within:
        def by_row(prompts: Sequence[int]) -> AbstractContextManager[None]:
            deltas = [edits[prompt // count].deltas for prompt in prompts]
            return model.architecture.adding_deltas_by_row(model.lm.model, deltas)

        return by_row

    options = base.options
    answers = greedy(model.lm, asked * len(edits), options.max_new_tokens, has_ended, within=within(len(asked)))
    texts = greedy(model.lm, others * len(edits), options.continuation, within=within(len(others)))
    written = [answer_of(answer.text) for answer in answers]
    return [
        (
            written[number * len(asked) : (number + 1) * len(asked)],
            {place: texts[number * len(subjects) + order].text.strip() for order, place in enumerate(subjects)},
        )
        for number in range(len(edits))
    ]


def path_of(folder: Path, method: str) -> Path:
    """Return the file with the results of a method."""
    return folder / f"{method.replace(' ', '-')}.jsonl"


def results(folder: Path, method: str) -> list[dict[str, Any]]:
    """Return what is stored of a method, fact by fact."""
    path = path_of(folder, method)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def config_of(config: EditConfig, method: str) -> EditConfig:
    """Return the config of a row of the table."""
    if method == EASYEDIT:
        return replace(config, method="rome", layer=5, covariance="identity", target_layer=5, **AS_PUBLISHED)
    if method == CONTROL:
        return config
    name = method.removesuffix(PUBLISHED)
    config = replace(config, method=name, **(AS_PUBLISHED if name != method else {}))
    if isinstance(config.layer, str):
        config.target_layer = choose(config)  # the editor may be made for other layers
    return config


def edits_of(
    model: EditModel, requests: Sequence[EditRequest], config: EditConfig, method: str, folder: Path
) -> list[Made]:
    """Return the edit of each fact."""
    path = folder / f"{method.replace(' ', '-')}.deltas.pt"
    if path.is_file():
        return [
            Made({name: LowRankDelta(*factors) for name, factors in deltas.items()}, seconds)
            for deltas, seconds in torch.load(path, weights_only=True)
        ]
    if method == CONTROL:
        generator = torch.Generator().manual_seed(0)
        default = edits_of(model, requests, config, config.method, folder)
        down = set(model.architecture.down_projections.values())  # a random gate would be open everywhere
        return [
            Made({name: random_like(delta, generator) for name, delta in edit.deltas.items() if name in down}, 0.0)
            for edit in default
        ]
    if config.editor.learns == "values":
        made = _inserted(model, requests, config)
    else:
        normalizes = config.editor.learns == "gradients"  # by the features of earlier edits
        text = TextStatistics.read_by(model.lm, config)
        memory = learn_facts(model.lm, proxy_facts()[:100], config, {}, text).state if normalizes else {}
        made = []
        for request in requests:
            with timed() as seconds:
                deltas = learn_facts(model.lm, [request], config, memory, text).deltas
            made.append(Made(deltas, seconds()))
    stored = [({name: (delta.A, delta.B) for name, delta in edit.deltas.items()}, edit.seconds) for edit in made]
    torch.save(stored, path)
    print(method, "edited", flush=True)
    return made


def _inserted(model: EditModel, requests: Sequence[EditRequest], config: EditConfig) -> list[Made]:
    statistics = model.lm.statistics(config, config.target_layers)
    output_gradients = model.lm.output_gradients(config, config.target_layers)
    with timed() as seconds_of_values:
        contexts = model.lm.contexts(config)
        changed = None if config.optimizer == "adam" else statistics
        facts = prepare_facts(model.lm, requests, config, contexts, False, changed, output_gradients)
    spent = seconds_of_values()
    made = []
    for index in range(len(requests)):
        with timed() as seconds:
            deltas = facts.changes(config, statistics, chosen=[index]).deltas
        made.append(Made(deltas, spent / len(requests) + seconds()))
    return made


def figures(
    model: EditModel, base: Baseline, methods: Sequence[str], folder: Path, seconds_of_base: float
) -> Iterator[dict[str, Any]]:
    """Yield the figures of the base model, of the fact in the prompt, and of each editor."""
    for method in methods:
        stored = results(folder, method)
        if not stored:
            continue
        measured = [_measurement(base, result) for result in stored]
        if method == methods[0]:
            unedited = seen(measured, edited=False)
            yield {"method": "base model", "n": len(stored), **unedited.to_dict(), "seconds": seconds_of_base}
            yield {"method": "in the prompt", "n": len(stored), **Seen(says=unedited.in_prompt).to_dict()}
        yield {
            "method": method,
            "n": len(stored),
            "layers": stored[0]["layers"],
            **{name: group for name, group in seen(measured).to_dict().items() if name != "in_prompt"},
            **{
                name: sum(result[name] for result in stored) / len(stored)
                for name in ("seconds", "seconds of asking", "seconds of comparing")
            },
        }


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the figures as a table in Markdown."""
    forms = ("completion", "question", "chat", "second_turn", "prefix", "negation", "portability")
    kinds = ("neighbors", "subject", "unrelated")
    heads = [*(form.replace("_", " ") for form in forms), *kinds, "key word", "says new", "KL", "worst", "agree", "s"]
    yield "| " + " | ".join(["editor", *heads]) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for row in rows:
        unchanged, text = row.get("unchanged", {}), row.get("text", {})
        shares = [row["says"].get(form, {}).get("contains") for form in forms]
        shares += [unchanged.get(kind, {}).get("same") for kind in kinds]
        shares += [unchanged.get("subject", {}).get(name) for name in ("keyword", "says_new")]
        cells = ["" if share is None else f"{share:.2f}" for share in shares]
        cells += [f"{text[name]:.4f}" if name in text else "" for name in ("kl", "worst")]
        cells += [f"{text['agreement']:.3f}" if text else "", f"{row['seconds']:.1f}" if "seconds" in row else ""]
        yield "| " + " | ".join([row["method"], *cells]) + " |"


def _measurement(base: Baseline, result: dict[str, Any]) -> Measurement:
    about = base.about(result["fact"])
    if base.requests[result["fact"]].text != result["prompt"]:
        raise ValueError("The stored edits are of other facts. Delete results/seen, and run again.")
    compared = [Compared(tuple(map(bool, row["same"])), tuple(row["kl"])) for row in result["compared"]]
    return Measurement(
        about, result["written"], {int(place): text for place, text in result["others"].items()}, compared
    )


if __name__ == "__main__":
    main()
