"""A long sequence of edits: after each batch, the efficacy on all edits so far, locality, and perplexity on plain text.

The facts are all 250 records of counterfact.json, then the packaged proxy set, whether the model knows them or not.
Perplexity is measured on the texts of me_ppl_50.json.
"""

from __future__ import annotations

import json
import random

from common import constants, load, parser, record, timed

from goldenedit import EditConfig, EditModel, EditRequest, load_requests, proxy_facts
from goldenedit.evaluation.counterfact import fact_likelihoods
from goldenedit.evaluation.scores import probability_scores
from goldenedit.lm.perplexity import perplexity


def main() -> None:
    """Edit batch after batch with one editor, and measure after each."""
    options = parser(__doc__)
    options.add_argument("--method", default="alphaedit")
    options.add_argument("--facts", type=int, default=500)
    options.add_argument("--batch", type=int, default=50)
    options.add_argument("--measured", type=int, default=100, help="edits so far that are measured, drawn with a seed")
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    options.add_argument("--name", default="sequence", help="name of the results")
    arguments = options.parse_args()

    chosen = {"method": arguments.method, "layer": "lga", **constants(arguments.set)}
    model = load(arguments.model, EditConfig(**chosen))
    model.select_layer()
    texts = [entry["Text"] for entry in json.loads((arguments.data / "me_ppl_50.json").read_text())]
    facts = [*load_requests(arguments.data / "counterfact.json"), *proxy_facts()]
    requests = list({(fact.text, fact.subject): fact for fact in facts}.values())[: arguments.facts]
    before = perplexity(model.lm, texts)
    rows = [
        {"method": "base model", "edits": 0, **_scores(model, requests, arguments.measured), "perplexity ratio": 1.0}
    ]
    print(rows[-1], flush=True)
    for start in range(0, len(requests), arguments.batch):
        with timed() as seconds:
            model.edit(requests[start : start + arguments.batch])
        done = requests[: start + arguments.batch]
        rows.append(
            {
                "method": arguments.method,
                "edits": len(done),
                **_scores(model, done, arguments.measured),
                "perplexity ratio": round(perplexity(model.lm, texts) / before, 3),
                "seconds an edit": round(seconds() / len(requests[start : start + arguments.batch]), 2),
            }
        )
        print(rows[-1], flush=True)
    record(f"{arguments.name}-{arguments.method}-{arguments.model}", rows)


def _scores(model: EditModel, requests: list[EditRequest], measured: int) -> dict[str, float]:
    chosen = random.Random(0).sample(requests, min(measured, len(requests)))
    scores = probability_scores([fact_likelihoods(model.lm, request, 2) for request in chosen])
    return {
        "efficacy": round(scores.efficacy, 3),
        "paraphrase": round(scores.paraphrase, 3),
        "neighborhood": round(scores.neighborhood, 3),
        "n": scores.n,
    }


if __name__ == "__main__":
    main()
