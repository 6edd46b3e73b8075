r"""Several facts about one subject: do all of them hold in every form, and is the rest of the subject as it was?

Each half of subjects.json has one invented company and four known subjects, with five facts each. A fact is edited as a
user types it: a prompt, the subject and the new answer. It is asked in seven forms: the edited prompt, a prompt in
other words, `Q: ...\nA:`, and a question in two wordings in a chat and in a second turn. A model without a chat
template is asked both wordings as `Q: ...\nA:` instead. All five facts are edited in one call, and then one call after
another. Six other questions about each subject ask for nothing that is edited. At the end all edits are deleted, and
the base model's texts must come back exactly.

Published figures are from `--half second`; constants are chosen on the first half. Intervals of what the model says are
over facts, those of other questions are over questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import constants, load, parser, record, timed
from transformers import PreTrainedTokenizerBase

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.evaluation.intervals import wilson
from goldenedit.evaluation.report import Share, share_of
from goldenedit.evaluation.seen import has_ended
from goldenedit.evaluation.texts import first_turn
from goldenedit.evaluation.verdicts import answer_of, contains, key_word, mentions
from goldenedit.lm.chat import conversation
from goldenedit.lm.decoding import Continuation, greedy

SUBJECTS = Path(__file__).with_suffix(".json")
ANSWER_TOKENS, OTHER_TOKENS = 50, 32


@dataclass(frozen=True)
class Probe:
    """One text that asks for a fact.

    Attributes:
        fact: The fact's number among those of the subject.
        form: How it asks.
        prompt: What the model reads.
        new: The names of the new answer.
        old: The names of the old answer; empty if it is not known.
    """

    fact: int
    form: str
    prompt: str
    new: tuple[str, ...]
    old: tuple[str, ...]

    def holds(self, answer: str) -> bool:
        """Return whether an answer says the new one, and not the old one before it."""
        return contains(answer, self.new, self.old)


@dataclass(frozen=True)
class Subject:
    """A subject with its facts, and everything that a model is asked about it.

    Attributes:
        name: The subject.
        requests: Its facts, as a user types them.
        probes: The texts that ask for the facts.
        questions: Questions about other properties.
        others: The same as the model reads them.
    """

    name: str
    requests: list[EditRequest]
    probes: list[Probe]
    questions: list[str]
    others: list[str]


@dataclass(frozen=True)
class Written:
    """What a model writes about a subject: answers to the probes, and continuations of other questions."""

    answers: list[str]
    others: list[Continuation]


def main() -> None:
    """Edit the facts of each subject in both ways, and measure what the model says."""
    options = parser(__doc__)
    options.add_argument("--half", choices=("first", "second"), default="second")
    options.add_argument("--subjects", type=int, help="number of subjects, from the first on; by default all")
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    arguments = options.parse_args()

    model = load(arguments.model, EditConfig(**constants(arguments.set)))
    model.select_layer()
    records = json.loads(SUBJECTS.read_text(encoding="utf-8"))[arguments.half][: arguments.subjects]
    measured: dict[str, list[dict[str, Any]]] = {arrangement: [] for arrangement in ("base model", *ARRANGEMENTS)}
    for entry in records:
        subject = subject_of(model.tokenizer, entry)
        base = written(model, subject)
        measured["base model"].append({"subject": subject.name, **figures(subject, base, base)})
        for arrangement, edit in ARRANGEMENTS.items():
            with timed() as seconds:
                edit(model, subject.requests)
            scores = figures(subject, base, written(model, subject))
            for name in list(model.edits):
                model.delete_adapter(name)
            is_undone = written(model, subject) == base
            about = {"seconds": round(seconds(), 1), "base texts come back": is_undone}
            measured[arrangement].append({"subject": subject.name, **scores, **about})
            print(arrangement, summary(measured[arrangement][-1]), flush=True)
    about = {"method": model.edit_config.method, "layer": model.edit_config.target_layer, "set": arguments.set}
    totals = [{"arrangement": arrangement, **about, **total(rows)} for arrangement, rows in measured.items()]
    each = [{"arrangement": arrangement, **row} for arrangement, rows in measured.items() for row in rows]
    record(f"subjects-{arguments.model}-{arguments.half}", [*totals, *each])
    print("\n".join(table(measured)))
    for row in totals:
        print(row["arrangement"], "by form:", row["by form"])


def in_one_call(model: EditModel, requests: Sequence[EditRequest]) -> None:
    """Edit all facts together."""
    model.edit(list(requests))


def one_after_another(model: EditModel, requests: Sequence[EditRequest]) -> None:
    """Edit fact after fact, each beside the edits before it."""
    for request in requests:
        model.edit(request)


ARRANGEMENTS: dict[str, Callable[[EditModel, Sequence[EditRequest]], None]] = {
    "one call": in_one_call,
    "one after another": one_after_another,
}


# ---------------------------------------------------------------------- what is asked


def subject_of(tokenizer: PreTrainedTokenizerBase, entry: dict[str, Any]) -> Subject:
    """Return a subject of the file, with what a model with this tokenizer is asked."""
    name = entry["subject"]
    facts = [{key: _filled(value, name) for key, value in fact.items()} for fact in entry["facts"]]
    questions = [_filled(question, name) for question in entry["others"]]
    chats = bool(getattr(tokenizer, "chat_template", None))
    return Subject(
        name=name,
        # What measures the facts is listed as such, so that it is not among the wordings that they are taught in.
        requests=[
            EditRequest(
                fact["prompt"],
                name,
                fact["target_new"],
                question=fact["question"],
                paraphrases=[fact["other_prompt"], fact["other_question"]],
            )
            for fact in facts
        ],
        probes=[probe for index, fact in enumerate(facts) for probe in probes_of(tokenizer, index, fact)],
        questions=questions,
        others=[_chat(tokenizer, question) if chats else _short(question) for question in questions],
    )


def _filled(value: Any, subject: str) -> Any:
    return value.replace("{}", subject) if isinstance(value, str) else value


def probes_of(tokenizer: PreTrainedTokenizerBase, index: int, fact: dict[str, Any]) -> list[Probe]:
    """Return the texts that ask for one fact."""
    question, other = fact["question"], fact["other_question"]
    prompts = {"prompt": fact["prompt"], "other prompt": fact["other_prompt"], "question": _short(question)}
    if getattr(tokenizer, "chat_template", None):
        prompts |= {
            "chat": _chat(tokenizer, question),
            "other chat": _chat(tokenizer, other),
            "second turn": _chat(tokenizer, question, first_turn()),
            "other second turn": _chat(tokenizer, other, first_turn()),
        }
    else:
        prompts["other question"] = _short(other)
    new = (fact["target_new"], *fact.get("names_new", ()))
    old = (fact["target_true"], *fact.get("names_true", ())) if "target_true" in fact else ()
    return [Probe(index, form, prompt, new, old) for form, prompt in prompts.items()]


def _short(question: str) -> str:
    return f"Q: {question}\nA:"


def _chat(tokenizer: PreTrainedTokenizerBase, question: str, turns: Sequence[dict[str, str]] = ()) -> str:
    return conversation(tokenizer, [*turns, {"role": "user", "content": question}])


def written(model: EditModel, subject: Subject) -> Written:
    """Return what the model writes with its active edits."""
    answers = greedy(model.lm, [probe.prompt for probe in subject.probes], ANSWER_TOKENS, has_ended)
    return Written([answer_of(answer.text) for answer in answers], greedy(model.lm, subject.others, OTHER_TOKENS))


# ---------------------------------------------------------------------- figures


def figures(subject: Subject, base: Written, after: Written) -> dict[str, Any]:
    """Return verdicts on one subject, and all texts.

    `holds` has a list for each fact, `says new` and `same` a verdict for each other question, and `key word` one for
    each whose answer by the base model has a key word.
    """
    holds: list[list[bool]] = [[] for _ in subject.requests]
    forms: dict[str, int] = {}
    for probe, answer in zip(subject.probes, after.answers, strict=True):
        holds[probe.fact].append(probe.holds(answer))
        forms[probe.form] = forms.get(probe.form, 0) + probe.holds(answer)
    new = [name for probe in subject.probes for name in probe.new]
    before = [answer_of(continuation.text) for continuation in base.others]
    now = [answer_of(continuation.text) for continuation in after.others]
    words = [key_word(question, answer) for question, answer in zip(subject.questions, before, strict=True)]
    return {
        "holds": holds,
        "forms": forms,
        "says new": [mentions(answer, new) for answer in now],
        "key word": [mentions(answer, [word]) for word, answer in zip(words, now, strict=True) if word is not None],
        "same": [text.tokens == old.tokens for text, old in zip(after.others, base.others, strict=True)],
        "answers": after.answers,
        "other answers": now,
    }


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one arrangement over all subjects."""
    forms = {form: sum(row["forms"][form] for row in rows) for form in rows[0]["forms"]}
    facts = [fact for row in rows for fact in row["holds"]]
    shares = {
        "says": _share(share_of(facts)),
        "all forms of a fact": _share(Share(sum(map(all, facts)) / len(facts), len(facts))),
    }
    for name in ("says new", "key word", "same"):
        values = [verdict for row in rows for verdict in row[name]]
        if values:
            shares[f"others: {name}"] = _share(Share(sum(values) / len(values), len(values)))
    undone = [row["base texts come back"] for row in rows if "base texts come back" in row]
    return {
        "subjects": len(rows),
        "probes": sum(map(len, facts)),
        "probes that hold": sum(map(sum, facts)),
        "by form": forms,
        **shares,
        **({"base texts come back": all(undone)} if undone else {}),
    }


def _share(share: Share) -> dict[str, Any]:
    low, high = wilson(share.value, share.facts)
    return {"share": round(share.value, 3), "interval": [round(low, 3), round(high, 3)], "n": share.facts}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of one subject."""
    verdicts = {"holds": [verdict for fact in row["holds"] for verdict in fact]}
    verdicts |= {name: row[name] for name in ("says new", "key word", "same")}
    counts = {name: f"{sum(values)}/{len(values)}" for name, values in verdicts.items()}
    about = {name: row[name] for name in ("seconds", "base texts come back") if name in row}
    return {"subject": row["subject"], **counts, **about}


def table(measured: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the counts of all subjects as lines of Markdown."""
    columns = ("holds", "says new", "key word", "same", "seconds", "base texts come back")
    lines = [
        "| arrangement | subject | facts hold | others say a new answer | keep the key word | unchanged | s | undone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arrangement, rows in measured.items():
        for counts in map(summary, rows):
            cells = [arrangement, counts["subject"], *(counts.get(name, "") for name in columns)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        scores = total(rows)
        shares = [scores.get(f"others: {name}", {}).get("share", "") for name in ("says new", "key word", "same")]
        held = f"{scores['probes that hold']}/{scores['probes']}"
        cells = [arrangement, "all", held, *shares, "", scores.get("base texts come back", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
