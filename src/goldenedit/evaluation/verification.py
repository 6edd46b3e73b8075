"""What a model writes before and after an edit, right after it was made: what holds, and what moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from goldenedit import html
from goldenedit.evaluation.forms import Asked, asked_forms
from goldenedit.evaluation.report import Text, cut_to_end, shown
from goldenedit.evaluation.seen import fits, has_ended
from goldenedit.evaluation.verdicts import answer_of, contains
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import greedy
from goldenedit.questions import question_from
from goldenedit.requests import EditRequest

_SHOWN = 20  # texts in `str()`


@dataclass(frozen=True)
class Said:
    """What a model says where it is asked for a fact.

    Attributes:
        question: What it was asked, without the wrapping of a chat.
        expected: The new answer.
        written: Its answer, to the end of the first sentence.
        holds: Whether this says the new answer.
    """

    question: str
    expected: str
    written: str
    holds: bool


def said_in_chat(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[Said]:
    """Ask a model for each fact once, as a user's message in its chat template: one short greedy text for each.

    A fact without a question is asked by the one that its prompt answers, where English has a simple rule for it. Facts
    that a chat cannot ask for are left out: all of them if there is no chat template.
    """
    with_questions = [with_question(request) for request in requests]
    asked: list[Asked] = [text for text in asked_forms(lm.tokenizer, with_questions, ["chat"]) if fits(lm, text.prompt)]
    answers = [answer_of(text.text) for text in greedy(lm, [text.prompt for text in asked], ends=has_ended)]
    return [
        Said(text.question, text.answers[0], answer, contains(answer, text.answers, text.old))
        for text, answer in zip(asked, answers, strict=True)
    ]


def with_question(request: EditRequest) -> EditRequest:
    """Return a request with the question that its prompt answers, if it has none and English has a simple rule."""
    if request.messages is not None or request.question is not None:
        return request
    return replace(request, question=question_from(request.text, request.subject_start, request.subject_end))


@dataclass(frozen=True)
class Verification:
    """The texts before and after an edit: its facts in every form, and other prompts.

    Attributes:
        texts: The texts that ask for the facts, then prompts whose answers should not change.
    """

    texts: tuple[Text, ...]

    @property
    def asked(self) -> list[Text]:
        """The texts that ask for the facts."""
        return [text for text in self.texts if text.answers]

    @property
    def others(self) -> list[Text]:
        """The prompts whose answers should not change."""
        return [text for text in self.texts if not text.answers]

    @property
    def holds(self) -> bool:
        """Whether the model says each new answer where it was edited."""
        edited = {text.fact: text for text in reversed(self.asked) if text.kind in ("completion", "chat")}
        return all(text.holds for text in edited.values())

    @property
    def summary(self) -> str:
        """What holds and what moved, in one line."""
        asked = [text for text in self.asked if text.kind != "negation"]
        said = [text for text in asked if text.holds]
        missed = list(dict.fromkeys(text.kind.replace("_", " ") for text in asked if not text.holds))
        line = f"says the new answer in {len(said)} of {len(asked)} texts"
        line += f" (not in every {', '.join(missed)})" if missed else ""
        negated = [text for text in self.asked if text.kind == "negation"]
        if denied := sum(text.says for text in negated):
            line += f', also in {denied} of {len(negated)} with "not"'
        kinds = dict.fromkeys(text.kind for text in self.others)
        moved = [f"{_moved(self.others, kind)} {kind}" for kind in kinds]
        return f"{line}; changed answers: {', '.join(moved)}" if moved else line

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked and written, as JSON values."""
        return {"holds": self.holds, "summary": self.summary, "texts": [asdict(text) for text in self.texts]}

    def lines(self, most: int = _SHOWN) -> Iterator[str]:
        """Yield the texts that ask for the facts and those that changed, with the answers before and after.

        Args:
            most: Largest number of texts. Of more, at least half ask for the facts, those that fail first.
        """
        asked, moved = self.asked, [text for text in self.others if not text.holds]
        if len(asked) + len(moved) > most:
            asked.sort(key=lambda text: text.holds)
            asked = asked[: max(most - len(moved), most // 2)]
            moved = moved[: most - len(asked)]
        yield from map(shown, (*asked, *moved))
        if left_out := len(self.asked) + sum(not text.holds for text in self.others) - len(asked) - len(moved):
            yield f"and {left_out} more texts"

    def __str__(self) -> str:
        return "\n".join([self.summary, *self.lines()])

    def _repr_html_(self) -> str:
        """Return the texts before and after the edit as a table, for notebooks."""
        rows = [
            (
                text.kind.replace("_", " "),
                cut_to_end(text.question),
                text.base,
                text.edited,
                "yes" if text.holds else "no",
            )
            for text in (*self.asked, *(text for text in self.others if not text.holds))[:_SHOWN]
        ]
        return html.table(("form", "asked", "before", "after", "as it should be"), rows, self.summary)


def _moved(texts: Sequence[Text], kind: str) -> str:
    of_kind = [text for text in texts if text.kind == kind]
    return f"{sum(not text.holds for text in of_kind)} of {len(of_kind)}"
