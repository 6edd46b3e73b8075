"""What a user sees of an edit, as figures with intervals: does the model say it, and is everything else as it was?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from goldenedit.evaluation.intervals import Interval, bootstrap, quantile_interval, wilson

_LONG = 100  # characters of a prompt that are shown
_FEW = 10  # fewer texts give no interval of a figure that has no bounds


@dataclass(frozen=True)
class Share:
    """A share of facts, or the mean of shares of facts' prompts.

    Attributes:
        value: The share.
        facts: Number of facts.
    """

    value: float
    facts: int

    @property
    def interval(self) -> Interval:
        """Wilson's 95% interval over facts."""
        return wilson(self.value, self.facts)


def share_of(groups: Sequence[Sequence[bool]]) -> Share:
    """Return the mean over facts of the share of each fact's prompts."""
    means = [fmean(group) for group in groups if group]
    return Share(fmean(means), len(means))


@dataclass(frozen=True)
class FormScores:
    """How often the model says the answer in one form.

    Attributes:
        exact: Share of answers that equal the expected one after normalization.
        contains: Share of answers that say the expected one as whole words, and the old one not before it.
        judge: Share of answers that a judge accepts; None without one.
        n: Number of facts that have this form.
    """

    exact: Share
    contains: Share
    judge: Share | None = None

    @property
    def n(self) -> int:
        """Number of facts that have this form."""
        return self.contains.facts

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return {**_shares({"exact": self.exact, "contains": self.contains, "judge": self.judge}), "n": self.n}


@dataclass(frozen=True)
class UnchangedScores:
    """How often the model still writes what the base model writes, for one kind of prompts.

    Attributes:
        same: Share of prompts whose greedy continuation is the base model's, token for token. Each fact has the same
            weight, whatever its number of prompts.
        n: Number of prompts.
        kl: KL divergence from the base model at the prompts' last token in nats, mean over prompts.
        control: `same` under a random change of the same rank and norm at the same place; None if not measured.
        keyword: Share of answers that still contain the key word of the base model's answer; for the subject only.
        says_new: Share of answers that say the new answer; for the subject only.
    """

    same: Share
    n: int
    kl: float
    control: Share | None = None
    keyword: Share | None = None
    says_new: Share | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        shares = {name: getattr(self, name) for name in ("same", "control", "keyword", "says_new")}
        return {**_shares(shares), "kl": self.kl, "n": self.n}


@dataclass(frozen=True)
class TextScores:
    """How far next-token distributions on plain text are from the base model's.

    Attributes:
        kl: KL divergence from the base model in nats, mean over tokens.
        agreement: Share of tokens with the base model's first choice.
        tokens: Number of tokens.
        worst: KL divergence of the text that changed most, mean over its tokens.
        control: `kl` under a random change of the same rank and norm at the same place; None if not measured.
        intervals: 95% intervals by bootstrap over texts.
    """

    kl: float
    agreement: float
    tokens: int
    worst: float
    control: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {**values, "intervals": {name: list(bounds) for name, bounds in self.intervals.items()}}


@dataclass(frozen=True)
class Text:
    """One prompt with what the models write after it.

    Attributes:
        fact: The fact's number, -1 if the prompt belongs to no fact.
        kind: The form, or the kind of an unrelated prompt.
        question: The prompt, without the wrapping of a chat.
        base: The base model's text.
        edited: The edited model's text.
        informed: The base model's text with the fact in its prompt; None if it was not asked.
        answers: The answer that is looked for and its other names; empty if nothing should change.
        holds: Whether the edited model's text is as it should be: it says the answer, it does not say it behind "not"
            (the form "negation"), or it is the base model's, token for token, if nothing should change.
    """

    fact: int
    kind: str
    question: str
    base: str
    edited: str
    informed: str | None
    answers: tuple[str, ...]
    holds: bool

    @property
    def says(self) -> bool:
        """Whether the edited model's text says the answer; False if there is none to say."""
        return bool(self.answers) and self.holds != (self.kind == "negation")


def spread(texts: Sequence[Text]) -> list[Text]:
    """Return the texts in an order in which every form and kind comes early: the first of each, then the second."""
    seen: Counter[str] = Counter()
    turns = []
    for text in texts:
        turns.append(seen[text.kind])
        seen[text.kind] += 1
    return [texts[place] for place in sorted(range(len(texts)), key=turns.__getitem__)]


def shown(text: Text, names: tuple[str, str] = ("before", "after")) -> str:
    """Return a prompt and what both models write after it, on three lines.

    Args:
        names: What the base model's and the edited model's text are called.
    """
    mark = ""
    if text.answers:
        says = "does not say it" if not text.says else "says it" if text.holds else "says it, an error"
        mark = f" ({says})"
    width = max(map(len, names)) + 1
    lines = [f"{text.kind.replace('_', ' ')}: {cut_to_end(text.question)!r}"]
    for name, written, note in zip(names, (text.base, text.edited), ("", mark), strict=True):
        lines.append(f"    {name + ':':{width}} {written!r}{note}")
    return "\n".join(lines)


def cut_to_end(question: str) -> str:
    """Return the end of a long prompt, which is what asks."""
    return question if len(question) <= _LONG else f"...{question[3 - _LONG :]}"


def text_scores(
    kl: Sequence[Sequence[float]], same: Sequence[Sequence[bool]], control: Sequence[Sequence[float]] | None
) -> TextScores:
    """Return the scores of texts from the KL divergence and the agreement at each token of each text."""

    def mean(groups: Sequence[Sequence[float]]) -> float:
        return sum(map(sum, groups)) / sum(map(len, groups))

    figures: dict[str, Sequence[Sequence[float]]] = {
        "kl": kl,
        "agreement": [[float(agrees) for agrees in text] for text in same],
    }
    intervals = {
        name: quantile_interval(bootstrap(mean, groups)) for name, groups in figures.items() if len(groups) >= _FEW
    }
    return TextScores(
        kl=mean(figures["kl"]),
        agreement=mean(figures["agreement"]),
        tokens=sum(map(len, kl)),
        worst=max(map(fmean, kl)),
        control=None if control is None else mean(control),
        intervals=intervals,
    )


def _shares(shares: dict[str, Share | None]) -> dict[str, Any]:
    """Return shares and their intervals as JSON values."""
    measured = {name: share for name, share in shares.items() if share is not None}
    return {
        **{name: share.value for name, share in measured.items()},
        "intervals": {name: list(share.interval) for name, share in measured.items()},
    }
