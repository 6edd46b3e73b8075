r"""Facts about different subjects that ask for one property: does each edit keep to its own subject?

The first facts of a half of MQuAKE with one prompt, such as "{} is a citizen of", are edited in one call, one call
after another, and separately: each in a model without the others, after which all edits are switched on, as those of
different authors are. Every fact is asked in its prompt, as `Q: ...\nA:`, and in a chat and its second turn where there
is a chat template. A text is right if it says the fact's new answer, and mixed up if it says that of another subject.
Prompts of the same relation about subjects that nobody edited are to be continued as before.

Published figures are from `--half second`; constants are chosen on the first half. Intervals are over facts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from common import constants, load, parser, record, timed
from seen import known_mquake

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.editing.wordings import asked
from goldenedit.evaluation.intervals import wilson
from goldenedit.evaluation.report import share_of
from goldenedit.evaluation.verdicts import answer_of, contains, mentions
from goldenedit.lm.decoding import greedy

TOKENS = 20


def main() -> None:
    """Edit the facts in each way, and count which answers they give."""
    options = parser(__doc__)
    options.add_argument("--half", choices=("first", "second"), default="second")
    options.add_argument("--prompt", default="{} is a citizen of")
    options.add_argument("--facts", type=int, default=8)
    options.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(**constants(arguments.set)))
    model.select_layer()
    found = {request.subject: request for request in known_mquake(model, arguments.data, arguments.half)}
    facts = [request for request in found.values() if request.prompt == arguments.prompt][: arguments.facts]
    neighbors = list(dict.fromkeys(text for request in facts for text in request.neighborhood))
    before = [text.tokens for text in greedy(model.lm, neighbors, TOKENS)]
    rows: list[dict[str, Any]] = []
    for way in arguments.ways:
        with timed() as seconds:
            WAYS[way](model, facts)
        took = sum(fact.takes for edit in model.edits.values() for fact in edit.facts)
        after = [text.tokens for text in greedy(model.lm, neighbors, TOKENS)]
        same = [one == other for one, other in zip(before, after, strict=True)]
        rows.append(
            {
                "way": way,
                "facts": len(facts),
                "facts that took": took,
                **verdicts(model, facts),
                "neighbors unchanged": round(sum(same) / len(same), 3),
                "seconds an edit": round(seconds() / len(facts), 1),
            }
        )
        for name in list(model.edits):
            model.delete_adapter(name)
        print({key: value for key, value in rows[-1].items() if key != "texts"}, flush=True)
    about = {"prompt": arguments.prompt, "method": model.edit_config.method, "set": arguments.set}
    record(f"beside-{arguments.model}-{arguments.half}", [about | row for row in rows])


def in_one_call(model: EditModel, facts: Sequence[EditRequest]) -> None:
    """Edit all facts together."""
    model.edit(list(facts))


def one_after_another(model: EditModel, facts: Sequence[EditRequest]) -> None:
    """Edit fact after fact, each beside the edits before it."""
    for fact in facts:
        model.edit(fact)


def separately(model: EditModel, facts: Sequence[EditRequest]) -> None:
    """Edit each fact in the base model, and switch all edits on."""
    for fact in facts:
        if model.edits:
            model.set_adapter([])
        model.edit(fact)
    model.set_adapter(list(model.edits))


WAYS: dict[str, Callable[[EditModel, Sequence[EditRequest]], None]] = {
    "one call": in_one_call,
    "one after another": one_after_another,
    "separately": separately,
}


def verdicts(model: EditModel, facts: Sequence[EditRequest]) -> dict[str, Any]:
    """Return the shares of texts that say the fact's new answer, and that of another subject, and all texts."""
    right: list[list[bool]] = []
    mixed: list[list[bool]] = []
    texts: list[str] = []
    for fact in facts:
        prompts = [fact.text, *(other.text for other in asked(model.tokenizer, fact))]
        answers = [answer_of(text.text) for text in greedy(model.lm, prompts, TOKENS)]
        new = fact.names_of(fact.target_new)
        old = fact.names_of(fact.target_true) if fact.target_true else ()
        others = [other.target_new for other in facts if other.target_new not in (fact.target_new, fact.target_true)]
        right.append([contains(answer, new, old) for answer in answers])
        mixed.append([mentions(answer, others) for answer in answers])
        texts += answers
    shares = {}
    for name, values in (("right", right), ("mixed up", mixed)):
        share = share_of(values)
        shares[name] = [round(share.value, 3), *(round(bound, 3) for bound in wilson(share.value, share.facts))]
    return {**shares, "texts": texts}


if __name__ == "__main__":
    main()
