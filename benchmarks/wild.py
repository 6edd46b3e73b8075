"""The published protocol of free generation (arXiv 2502.11177, 2509.22072) on the data sets of published tables.

Each fact is edited alone, or with `--together` all in one batch. Then the model writes up to 32 tokens after the edited
prompt, its rephrase and the prompt of another fact, up to the first full stop. *Exact match* is SQuAD's. Locality is
the share of other prompts after which the model writes what the base model writes. Published figures are from the
second half of each file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from common import constants, load, parser, record, timed

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.evaluation.intervals import wilson
from goldenedit.evaluation.verdicts import contains, is_exact
from goldenedit.lm.decoding import greedy

DATASETS = ("wild_zsre", "wild_counterfact", "wild_wikibigedit", "qaedit")
TOKENS = 32


def main() -> None:
    """Measure an editor on all data sets."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=20)
    options.add_argument("--half", choices=("first", "second"), default="second")
    options.add_argument("--together", action="store_true", help="edit all facts in one batch")
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(**constants(arguments.set)))
    model.select_layer()
    rows = []
    for name in DATASETS:
        # Some subjects of QAEdit are not in their prompts.
        requests = load_requests(arguments.data / f"{name}.json", skip_bad=True)
        middle = len(requests) // 2
        chosen = (requests[:middle] if arguments.half == "first" else requests[middle:])[: arguments.facts]
        with timed() as seconds:
            verdicts = list(_verdicts(model, chosen, arguments.together))
        rows.append({"dataset": name, **_row(verdicts), "seconds a fact": round(seconds() / len(chosen), 2)})
        print(rows[-1], flush=True)
    together = "-together" if arguments.together else ""
    about = {"method": model.edit_config.method, "layer": model.edit_config.target_layer}
    record(f"wild-{arguments.model}{together}", [{**about, **row} for row in rows])


def _verdicts(model: EditModel, requests: Sequence[EditRequest], together: bool) -> Iterator[dict[str, bool]]:
    """Edit facts, and yield what holds for each."""
    for batch in [list(requests)] if together else [[request] for request in requests]:
        edit = model.edit(batch)
        for request in batch:
            old = () if request.target_true is None else (request.target_true,)
            names = request.names_of(request.target_new)
            prompts = {"edited prompt": request.text}
            if request.paraphrases:
                prompts["rephrase"] = request.paraphrases[0]
            texts = dict(zip(prompts, _texts(model, list(prompts.values())), strict=True))
            verdicts = {f"{kind}, exact": is_exact(text, names) for kind, text in texts.items()}
            verdicts |= {f"{kind}, contains": contains(text, names, old) for kind, text in texts.items()}
            if request.locality:
                other = [request.locality[0][0]]
                after = _texts(model, other)
                with model.disable_adapter():
                    verdicts["locality"] = after == _texts(model, other)
            yield verdicts
        model.delete_adapter(edit.name)


def _texts(model: EditModel, prompts: list[str]) -> list[str]:
    """Return what the model writes, up to the first full stop."""
    written = greedy(model.lm, prompts, TOKENS, lambda text: "." in text or "\n" in text.strip())
    return [continuation.text.strip().split("\n")[0].split(".")[0] for continuation in written]


def _row(verdicts: Sequence[dict[str, bool]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for of_fact in verdicts for kind in of_fact):
        held = [of_fact[kind] for of_fact in verdicts if kind in of_fact]
        low, high = wilson(fmean(held), len(held))
        row[kind] = {"share": round(fmean(held), 3), "95%": [round(low, 3), round(high, 3)], "n": len(held)}
    return row


if __name__ == "__main__":
    main()
