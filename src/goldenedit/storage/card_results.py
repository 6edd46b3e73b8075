"""What a model card says about an evaluation, as table rows and sentences, what a user sees first.

All cells are Markdown: names and texts, which may come from a stranger, are escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from goldenedit.storage.markdown import literal

Row = list[str]

# Forms in which a fact is asked, in plain words, and why facts may lack one.
_FORMS = {
    "completion": ("the edited prompt", "the facts are messages of a chat"),
    "rephrase": ("the same in other words", "the facts have no paraphrases"),
    "question": ("a question", "the facts have no question"),
    "chat": ("a message in a chat", "the tokenizer has no chat template"),
    "second_turn": ("a later message in a chat", "the tokenizer has no chat template"),
    "prefix": ("the edited prompt after other text", ""),
    "negation": ('the edited prompt with "not"', "no prompt can be negated with certainty"),
    "portability": ("a prompt whose answer follows from the fact", "the facts have no such prompts"),
}
_KINDS = {
    "neighbors": ("prompts about other subjects of the same kind", "the facts have no neighborhood prompts"),
    "subject": ("other questions about the edited subject", ""),
    "unrelated": ("questions about other things", ""),
}
_EXAMPLE_KINDS = {
    "neighbors": "a prompt about another subject",
    "subject": "another question about the edited subject",
    "unrelated": "a question about something else",
}
FAMILIES = {
    "probability": "share of prompts where the new answer is likelier than the old one; on neighbors, the reverse",
    "token_match": "share of the answer's tokens that are the model's first choice, with teacher forcing",
    "generation": "share of freely generated texts that begin with the expected answer",
}
_NOT_FAMILIES = ("says", "in_prompt", "unchanged", "text")
_EXAMPLES = 3
_MISSING = "-"


@dataclass(frozen=True)
class CardResults:
    """The sections of a card about an evaluation; each is empty if nothing of the kind was measured.

    Attributes:
        says: How often the model says the answers: a row for each form.
        is_judged: Whether these rows have a column for a judge.
        is_negated: Whether a negated prompt is among the forms.
        unchanged: How often it writes what the base model writes: a row for each kind of prompt.
        remarks: Sentences on plain text and on the rest of the subject.
        general: Results of lm-evaluation-harness.
        not_measured: What was not measured, in words.
        examples: Prompts with the texts of both models.
        scores: Scores of papers by family.
        families: What each family measures.
    """

    says: list[Row]
    is_judged: bool
    is_negated: bool
    unchanged: list[Row]
    remarks: list[str]
    general: list[Row]
    not_measured: str
    examples: list[Row]
    scores: list[Row]
    families: list[tuple[str, str]]


def card_results(evaluation: Mapping[str, Any] | None) -> CardResults:
    """Return the sections of a card about an evaluation as `EditFolder` has it."""
    evaluation = evaluation or {"edited": {}, "base": {}}
    edited, base = evaluation["edited"], evaluation["base"]
    says = edited.get("says", {})
    is_judged = any("judge" in figures for figures in says.values())
    return CardResults(
        says=list(_says_rows(edited, base, is_judged)),
        is_judged=is_judged,
        is_negated="negation" in says,
        unchanged=list(_unchanged_rows(edited)),
        remarks=[*_on_subject(edited), *_on_text(edited)],
        general=list(_general_rows(evaluation)),
        not_measured="; ".join(_not_measured(evaluation)),
        examples=[_example(text) for text in evaluation.get("texts", ())[:_EXAMPLES]],
        scores=[
            [_plain(family), _plain(name), str(n), f"{value:.3f}", _bounds(bounds, 3), f"{before:.3f}"]
            for family, name, n, value, bounds, before in _scores(evaluation)
        ],
        families=[(_plain(family), FAMILIES[family]) for family in edited if family in FAMILIES],
    )


def eval_results(evaluation: Mapping[str, Any] | None) -> list[EvalResult]:
    """Return the figures for the metadata of a card, what a user sees first."""
    if evaluation is None:
        return []
    facts = ("edited-facts", "the edited facts") if evaluation["own_facts"] else ("facts", "given facts")
    # The Hub groups results by their dataset. With one of their own, scores of papers stay behind the others.
    papers = (f"{facts[0]}-paper-scores", f"{facts[1]}, scores of papers")
    edited = evaluation["edited"]
    results = [
        _eval_result(*facts, "contains", f"says: {form}{_lower(form)} (n = {figures['n']})", figures["contains"])
        for form, figures in _in_order(edited.get("says", {}), _FORMS)
    ]
    if "text" in edited:
        name = f"text: kl, lower is better (tokens = {edited['text']['tokens']})"
        results.append(_eval_result("plain-text", "plain text", "kl", name, edited["text"]["kl"]))
    results += [
        _eval_result(*papers, name, f"{family}: {name} (n = {n})", value)
        for family, name, n, value, _, _ in _scores(evaluation)
    ]
    return results


def _eval_result(dataset_type: str, dataset_name: str, metric_type: str, metric_name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        metric_type=metric_type,
        metric_name=metric_name,
        metric_value=round(value, 6 if metric_type == "kl" else 4),
    )


def _lower(form: str) -> str:
    return ", lower is better" if form == "negation" else ""


def _says_rows(edited: Mapping[str, Any], base: Mapping[str, Any], is_judged: bool) -> Iterator[Row]:
    for form, figures in _in_order(edited.get("says", {}), _FORMS):
        judge = [_share(figures.get("judge"))] if is_judged else []
        yield [
            _label(form),
            str(figures["n"]),
            _share(figures["contains"]),
            _bounds(figures["intervals"].get("contains")),
            _share(figures["exact"]),
            *judge,
            _share(base.get("says", {}).get(form, {}).get("contains")),
            _share(edited.get("in_prompt", {}).get(form, {}).get("contains")),
        ]


def _unchanged_rows(edited: Mapping[str, Any]) -> Iterator[Row]:
    for kind, figures in _in_order(edited.get("unchanged", {}), _KINDS):
        same = _share(figures["same"]), _bounds(figures["intervals"].get("same"))
        yield [_label(kind), str(figures["n"]), *same, _share(figures.get("control")), f"{figures['kl']:.2g}"]


def _on_subject(edited: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence on what the model still says about the edited subject."""
    figures = edited.get("unchanged", {}).get("subject", {})
    claims = {
        "keyword": "keep the key word of the base model's answer",
        "says_new": "say the new answer instead",
    }
    parts = [
        f"{figures[name]:.0%} {claim}{_in_brackets(figures['intervals'].get(name), '.0%')}"
        for name, claim in claims.items()
        if figures.get(name) is not None
    ]
    if parts:
        yield f"Of the answers to other questions about the edited subject, {' and '.join(parts)}."


def _on_text(edited: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence on next-token distributions on plain text."""
    if "text" not in edited:
        return
    text = edited["text"]
    beside = "" if text.get("control") is None else f"; a random change of the same size: {text['control']:.2g}"
    yield (
        f"On {text['tokens']:,} tokens of plain text, KL is {text['kl']:.2g}"
        f"{_in_brackets(text['intervals'].get('kl'), '.2g')}{beside}; the text that changed most: {text['worst']:.2g}. "
        f"The most likely next token is the base model's at {text['agreement']:.1%} of them."
    )


def _general_rows(evaluation: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the results of each task of lm-evaluation-harness."""
    general = evaluation.get("general", {"edited": {}})
    for task, metrics in general["edited"].items():
        for metric, result in metrics.items():
            before = general["base"].get(task, {}).get(metric)
            count = _MISSING if result.get("n") is None else str(result["n"])
            yield [literal(task), literal(metric), count, _with_error(result), _with_error(before)]


def _with_error(result: Mapping[str, Any] | None) -> str:
    if result is None or result.get("value") is None:
        return _MISSING
    error = result.get("stderr")
    return f"{result['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _not_measured(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a card would show if it were measured, with the reasons for which facts may lack it."""
    edited = evaluation["edited"]
    says, unchanged = edited.get("says", {}), edited.get("unchanged", {})
    missing = [(label, reason, "the form was left out") for form, (label, reason) in _FORMS.items() if form not in says]
    missing += [(label, reason, "") for kind, (label, reason) in _KINDS.items() if kind not in unchanged]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for label, reason, other_reason in missing:
        by_reason.setdefault((reason, other_reason if reason else ""), []).append(label)
    for reasons, labels in by_reason.items():
        because = ", or ".join(filter(None, reasons))
        yield " and ".join(labels) + (f" ({because})" if because else "")
    if "text" not in edited:
        yield "plain text"
    if says and not edited.get("in_prompt"):
        yield "the fact in the prompt"
    if unchanged and not any("control" in figures for figures in unchanged.values()):
        yield "a random change of the same size"
    if not evaluation.get("general", {}).get("edited"):
        yield "general ability"


def _example(text: Mapping[str, Any]) -> Row:
    kind = text["kind"]
    written = [literal(text[name]) or "*nothing*" for name in ("question", "base", "edited")]
    return [_EXAMPLE_KINDS.get(kind) or _label(kind), *written]


def _scores(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, int, float, tuple[float, float], float]]:
    """Yield family, name and number of facts of each score, its value, its 95% interval and the base model's value."""
    for family, scores in evaluation["edited"].items():
        if family not in _NOT_FAMILIES:
            for name, bounds in scores["intervals"].items():
                yield family, name, scores["n"], scores[name], bounds, evaluation["base"][family][name]


def _in_order(figures: Mapping[str, Any], known: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return figures by form or kind, the known ones first and in their order."""
    names = [name for name in known if name in figures]
    return [(name, figures[name]) for name in [*names, *(name for name in figures if name not in known)]]


def label_of(name: str) -> str:
    """Return a form or kind of prompts in plain words; an unknown name as it is."""
    known = {**_FORMS, **_KINDS}
    return known[name][0] if name in known else name.replace("_", " ")


def _label(name: str) -> str:
    return literal(label_of(name))


def _plain(name: str) -> str:
    return literal(name.replace("_", " "))


def _share(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f}"


def _bounds(bounds: Sequence[float] | None, digits: int = 2) -> str:
    return _MISSING if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def _in_brackets(bounds: Sequence[float] | None, form: str) -> str:
    return "" if bounds is None else f" (95%: {bounds[0]:{form}} to {bounds[1]:{form}})"
