"""Thousands of edits, batch after batch into one edit: what holds, what else changes, and what an edit costs.

The facts are the records of wild_zsre.json and wild_counterfact.json in turn, whether the model knows them or not. At
each of some numbers of edits, a sample of the edits so far is asked: *exact* is the share whose new answer is what the
model writes behind the edited prompt, token by token, *rephrase* the same behind a rephrase. KL, agreement of first
choices and the ratio of perplexities are those of the texts of me_ppl_50.json, which nothing is edited or chosen on.

The edit is saved after each batch, and the figures after each number, so a run that was ended goes on. Constants are
chosen on other facts (`--facts development`: zsre.json and counterfact.json).
"""

from __future__ import annotations

import json
import random
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from common import RESULTS, constants, load, parser, record, timed

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.commands.terminal import parse_layer
from goldenedit.evaluation.harm import Compared, compare, text_rows
from goldenedit.evaluation.intervals import wilson
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.perplexity import perplexity
from goldenedit.requests import distinct
from goldenedit.storage.folder import EDIT_CONFIG

SETS = {"test": ("wild_zsre.json", "wild_counterfact.json"), "development": ("zsre.json", "counterfact.json")}


def main() -> None:
    """Edit batch after batch with one editor, and measure at each number of edits."""
    options = parser(__doc__)
    options.add_argument("--method", default="alphaedit")
    options.add_argument("--facts", choices=SETS, default="test")
    options.add_argument("--at", type=int, nargs="+", default=[10, 100, 500, 1000, 2000, 3000])
    options.add_argument("--batch", type=int, default=100)
    options.add_argument("--measured", type=int, default=200, help="edits so far that are asked, drawn with a seed")
    options.add_argument("--layer", default="lga", help="a layer selector, a number, or numbers with commas")
    options.add_argument("--dtype", default="auto", help="precision of the model, such as bfloat16")
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    options.add_argument("--name", default="", help="of the results, behind the editor")
    arguments = options.parse_args()

    name = f"sequence-{arguments.method}{arguments.name}-{arguments.model}"
    folder = RESULTS / "sequences" / f"{name}-{arguments.facts}"
    chosen = {"method": arguments.method, "layer": parse_layer(arguments.layer), **constants(arguments.set)}
    model = load(arguments.model, EditConfig(**chosen), arguments.dtype)
    requests = in_turn(arguments.data, arguments.facts)[: max(arguments.at)]
    texts = [entry["Text"] for entry in json.loads((arguments.data / "me_ppl_50.json").read_text())]
    rows: list[dict[str, Any]] = []
    if (folder / EDIT_CONFIG).exists():
        model = EditModel.from_pretrained(model.get_base_model(), folder, tokenizer=model.tokenizer)
        rows = json.loads((folder / "rows.json").read_text())
    else:
        model.select_layer()
        rows.append({"method": "base model", "edits": 0, **asked(model, requests, arguments.measured)})
        print(rows[-1], flush=True)
    for count in arguments.at:
        if any(row["edits"] == count for row in rows):
            continue
        done = len(model.edits["facts"].facts) if model.edits else 0
        with timed() as seconds:
            model.edit_in_batches(requests[:count], arguments.batch, save_directory=folder)
        row = {"method": arguments.method, "edits": count, **asked(model, requests[:count], arguments.measured)}
        row |= {**harm(model, texts), "seconds an edit": round(seconds() / (count - done), 2)}
        row["rank"] = model.edits["facts"].rank
        rows.append(row)
        print(rows[-1], flush=True)
        (folder / "rows.json").write_text(json.dumps(rows))
    if arguments.facts == "test":
        about = {"layers": model.edit_config.target_layers, "batch": arguments.batch}
        about |= {"dtype": str(model.lm.model.dtype), "set": arguments.set}
        record(name, [about | row for row in rows])


def in_turn(data: Path, name: str) -> list[EditRequest]:
    """Return the facts of two files, one of each in turn."""
    one, other = (load_requests(data / file) for file in SETS[name])
    mixed = [request for request in chain(*zip_longest(one, other)) if request is not None]
    by_prompt = {(request.prompt_key, request.subject): request for request in mixed}
    return distinct(list(by_prompt.values()))


def asked(model: EditModel, requests: list[EditRequest], most: int) -> dict[str, Any]:
    """Return the shares of facts whose new answer the model writes behind their prompt, and behind a rephrase."""
    facts = random.Random(0).sample(requests, min(most, len(requests)))
    with_rephrase = [fact for fact in facts if fact.paraphrases]
    pairs = [(fact.text, fact.target_new) for fact in facts]
    pairs += [(fact.paraphrases[0], fact.target_new) for fact in with_rephrase]
    found = [answer.accuracy == 1 for answer in likelihoods(model.lm, pairs)]
    return {"exact": _share(found[: len(facts)]), "rephrase": _share(found[len(facts) :]), "n": len(facts)}


def _share(found: list[bool]) -> list[float]:
    share = sum(found) / max(len(found), 1)
    return [round(value, 3) for value in (share, *wilson(share, max(len(found), 1)))]


def harm(model: EditModel, texts: list[str]) -> dict[str, float]:
    """Return how plain text reads to the edited model."""
    rows = text_rows(model.lm, texts)
    start = min(model.edits["facts"].layers)

    def on() -> Any:
        return model._only(["facts"])

    compared: list[Compared] = compare(model.lm, rows, start, model.disable_adapter, {"on": on})["on"]
    kl = [value for text in compared for value in text.kl]
    same = [value for text in compared for value in text.same]
    with model.disable_adapter():
        before = perplexity(model.lm, texts)
    return {
        "KL": round(sum(kl) / len(kl), 4),
        "agreement": round(sum(same) / len(same), 3),
        "perplexity ratio": round(perplexity(model.lm, texts) / before, 3),
    }


if __name__ == "__main__":
    main()
