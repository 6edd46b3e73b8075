"""Cells of a sweep: the outcome of one editor at one layer for each fact, and the files that keep them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from goldenedit.cache import going_on_without
from goldenedit.cost import Cost
from goldenedit.evaluation.scores import (
    FactLikelihoods,
    FactMatches,
    harmonic_mean,
    probability_scores,
    token_match_scores,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sight:
    """What a user sees of an edit of one fact.

    Attributes:
        says: Share of texts that are answered with the new answer, by form.
        unchanged: Share of other prompts whose continuation is, token for token, that of the base model, by kind.
        kept: Share of the tokens of these continuations that are still the first choice, by kind; older cells lack it.
        kl: KL divergence from the base model on plain text, in nats a token.
        agreement: Share of tokens of plain text for which the first choice is that of the base model.
        fluency: Entropy of the n-grams of the edited prompt with its continuation, in bits.
    """

    says: Mapping[str, float]
    unchanged: Mapping[str, float]
    kl: float
    agreement: float
    fluency: float
    kept: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The outcome of an edit for one fact, in the families of scores that it has prompts for.

    Attributes:
        matches: Token match, which every fact has.
        likelihoods: NLLs of new and old answer, if the fact has paraphrases and neighbors to compare them on.
        sight: What a user sees, if it was measured.
    """

    matches: FactMatches
    likelihoods: FactLikelihoods | None = None
    sight: Sight | None = None


def edit_score(outcomes: Sequence[Outcome]) -> float:
    """Return S of edits: the harmonic mean of ES, PS and NS if every fact has likelihoods.

    Otherwise it is the harmonic mean of rewrite, rephrase and locality, as far as the facts have prompts for them.
    """
    likelihoods = [outcome.likelihoods for outcome in outcomes if outcome.likelihoods is not None]
    if len(likelihoods) == len(outcomes):
        score = probability_scores(likelihoods).score
        assert score is not None  # facts with likelihoods have paraphrases and neighbors
        return score
    matched = token_match_scores([outcome.matches for outcome in outcomes])
    values = (matched.rewrite, matched.rephrase, matched.locality)
    return harmonic_mean([value for value in values if value is not None])


@dataclass(frozen=True)
class Cell:
    """One editor at one layer: the outcome for each fact, and the cost of measuring it."""

    method: str
    layer: int
    outcomes: list[Outcome]
    cost: Cost

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cell:
        """Read a cell from the record that `dataclasses.asdict` wrote."""
        outcomes = [
            Outcome(
                FactMatches(**outcome["matches"]),
                outcome["likelihoods"] and _likelihoods(outcome["likelihoods"]),
                outcome.get("sight") and Sight(**outcome["sight"]),
            )
            for outcome in record["outcomes"]
        ]
        return cls(record["method"], record["layer"], outcomes, Cost(**record["cost"]))


def _likelihoods(record: Mapping[str, Any]) -> FactLikelihoods:
    pairs = {name: [tuple(pair) for pair in record[name]] for name in ("paraphrases", "neighborhood")}
    return FactLikelihoods(tuple(record["rewrite"]), **pairs, paraphrase_accuracy=record["paraphrase_accuracy"])


class CellStore:
    """Cells in a JSON-lines file, by a key of everything that they depend on.

    Args:
        path: File that new cells are appended to.
        others: Files of other processes, which are only read.
        is_cache: Whether the cells only save time. A file that cannot be read or written is then logged as a warning,
            not raised as an error.
    """

    def __init__(self, path: Path, others: Iterable[Path] = (), is_cache: bool = False) -> None:
        self.path = path
        self.is_cache = is_cache
        self.cells: dict[str, Cell] = {}
        for file in {path, *others}:
            with self._access(file, "read"):
                self._read(file)

    def add(self, key: str, cell: Cell, about: Mapping[str, Any]) -> None:
        """Store a cell, with information for readers of the file."""
        self.cells[key] = cell
        with self._access(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:  # at once, because two runs may write to one file
                file.write((json.dumps({"key": key, **about, **asdict(cell)}) + "\n").encode())

    def _access(self, file: Path, access: str) -> AbstractContextManager[None]:
        return going_on_without(file, access) if self.is_cache else nullcontext()

    def _read(self, file: Path) -> None:
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                self.cells[record["key"]] = Cell.from_dict(record)
            except (ValueError, KeyError, TypeError):  # an interrupted process may leave half a line
                logger.warning("Line %d of %s is not a cell. The cell is measured again.", number, file)
        if text and not text.endswith("\n") and file == self.path:
            with file.open("a", encoding="utf-8", newline="\n") as end:
                end.write("\n")
