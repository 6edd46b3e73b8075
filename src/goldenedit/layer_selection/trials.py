"""Trial edits of facts, and what they did: the outcome for each fact, from forwards that many edits share.

The layers before an edit run once for all edits of a layer, and texts of several edits run in one batch, in which each
row has the change of its own edit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from goldenedit.editors.delta import LowRankDelta
from goldenedit.evaluation.counterfact import likelihoods_of_fact
from goldenedit.evaluation.evaluate import Observed, matches_of, pairs_of
from goldenedit.evaluation.generation import ngram_entropy
from goldenedit.evaluation.harm import Compared, compare
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.evaluation.seen import Baseline, SeenOptions, baseline, has_ended
from goldenedit.evaluation.verdicts import answer_of, contains
from goldenedit.layer_selection.cells import Outcome, Sight
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import greedy
from goldenedit.requests import EditRequest

_OTHERS = {"neighbors": 2, "subject": 2, "unrelated": 3}  # prompts of each kind that an edit is compared on
SIGHT = SeenOptions(
    forms=("completion", "rephrase", "question", "chat"),
    in_prompt=False,
    neighbors=_OTHERS["neighbors"],
    max_new_tokens=24,
    continuation=24,
    texts=3,
)


@dataclass(frozen=True)
class Trial:
    """A trial edit: the indices of its facts, and its deltas by path."""

    facts: Sequence[int]
    deltas: Mapping[str, LowRankDelta]


def is_comparable(fact: EditRequest) -> bool:
    """Return whether a fact has an old answer, paraphrases and neighbors to compare its answers on."""
    return fact.target_true is not None and bool(fact.paraphrases) and bool(fact.neighborhood)


class Trials:
    """The base model on some facts, and what becomes of it under trial edits of them.

    Args:
        lm: The model, without edits.
        facts: The facts.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
        sees: Whether to ask and compare as a user does, beside the scores of papers.
    """

    def __init__(
        self, lm: LanguageModel, facts: Sequence[EditRequest], neighbors: int | None = None, sees: bool = False
    ) -> None:
        self.lm = lm
        self.facts = facts
        self.neighbors = neighbors
        pairs = pairs_of(facts, neighbors)
        self.before = Observed(dict(zip(pairs, likelihoods(lm, pairs), strict=True)), {})
        self.base = _few(baseline(lm, lm.tokenizer, facts, SIGHT)) if sees else None

    def outcomes(self, trials: Sequence[Trial], layer: int) -> list[list[Outcome]]:
        """Return the outcomes of each edit, in the order of its facts.

        Args:
            trials: The edits.
            layer: First layer that any of them changes.
        """
        found: list[list[Outcome]] = []
        for group in self._groups(trials):
            observed = group.observe()
            sights = [None] * len(observed) if self.base is None else group.see(layer)
            found += [
                [self._outcome(fact, after, None if seen is None else seen[fact]) for fact in trial.facts]
                for trial, after, seen in zip(group.trials, observed, sights, strict=True)
            ]
        return found

    def _groups(self, trials: Sequence[Trial]) -> Iterator[_Group]:
        """Yield edits that can run in one batch: each alone where the changes are of fused experts."""
        for is_shared, several in groupby(trials, lambda trial: self.lm.architecture.takes_rows(trial.deltas)):
            members = list(several)
            yield from [_Group(self, members, True)] if is_shared else (_Group(self, [one], False) for one in members)

    def _outcome(self, fact: int, after: Observed, seen: Sight | None) -> Outcome:
        request = self.facts[fact]
        nll = None
        if is_comparable(request):
            nll = likelihoods_of_fact(request, after.likelihoods, self.neighbors)
        return Outcome(matches_of(request, after.likelihoods, self.before.likelihoods), nll, seen)


class _Group:
    """Edits whose texts run together, each row with the change of its own edit, or the texts of a single edit."""

    def __init__(self, over: Trials, trials: Sequence[Trial], by_row: bool) -> None:
        self.over = over
        self.trials = trials
        self.by_row = by_row

    def _state(self, trial: Trial) -> AbstractContextManager[None]:
        return self.over.lm.architecture.adding_deltas(self.over.lm.model, trial.deltas)

    def _running(
        self, owners: Sequence[int]
    ) -> tuple[AbstractContextManager[None], Callable[[Sequence[int]], AbstractContextManager[None]] | None]:
        """Return a context for texts of some edits, and one for the rows of a batch of them.

        Args:
            owners: By text, the edit it is asked under.
        """
        if not self.by_row:
            return self._state(self.trials[0]), None
        lm = self.over.lm

        def within(texts: Sequence[int]) -> AbstractContextManager[None]:
            return lm.architecture.adding_deltas_by_row(lm.model, [self.trials[owners[text]].deltas for text in texts])

        return nullcontext(), within

    def observe(self) -> list[Observed]:
        """Return the likelihoods that the scores of papers need, under each edit."""
        pairs, owners = [], []
        for number, trial in enumerate(self.trials):
            of_trial = pairs_of([self.over.facts[fact] for fact in trial.facts], self.over.neighbors)
            pairs += of_trial
            owners += [number] * len(of_trial)
        around, within = self._running(list(range(len(self.trials))))
        with around:
            found = likelihoods(self.over.lm, pairs, owners=owners, within=within)
        by_trial: list[dict[tuple[str, str], object]] = [{} for _ in self.trials]
        for owner, pair, likelihood in zip(owners, pairs, found, strict=True):
            by_trial[owner][pair] = likelihood
        return [Observed(of_trial, {}) for of_trial in by_trial]  # type: ignore[arg-type]

    def see(self, layer: int) -> list[dict[int, Sight]]:
        """Return by edit and fact what a user sees."""
        answers = self._ask()
        about = self._compare(layer)
        found = []
        for trial, of_trial, compared in zip(self.trials, answers, about, strict=True):
            found.append({fact: _sight(of_trial[fact], *compared[fact]) for fact in trial.facts})
        return found

    def _ask(self) -> list[dict[int, tuple[dict[str, list[bool]], str]]]:
        """Return by edit and fact whether its answers are given, by form, and what is written after its prompt."""
        base = self.over.base
        assert base is not None
        asked = [
            (number, text)
            for number, trial in enumerate(self.trials)
            for text in base.asked
            if text.fact in trial.facts
        ]
        found: list[dict[int, tuple[dict[str, list[bool]], str]]] = [
            {fact: (defaultdict(list), "") for fact in trial.facts} for trial in self.trials
        ]
        for ends, chosen in (
            (None, [pair for pair in asked if pair[1].form == "completion"]),
            (has_ended, [pair for pair in asked if pair[1].form != "completion"]),
        ):
            around, within = self._running([number for number, _ in chosen])
            with around:
                written = greedy(
                    self.over.lm, [text.prompt for _, text in chosen], base.options.max_new_tokens, ends, within=within
                )
            for (number, text), continuation in zip(chosen, written, strict=True):
                said, after = found[number][text.fact]
                said[text.form].append(contains(answer_of(continuation.text), text.answers, text.old))
                found[number][text.fact] = said, after if ends else text.prompt + continuation.text
        return found

    def _compare(self, layer: int) -> list[dict[int, tuple[dict[str, list[Compared]], list[Compared]]]]:
        """Return by edit and fact how the continuations of other prompts, by kind, and plain texts compare."""
        base = self.over.base
        assert base is not None
        lm = self.over.lm
        shared = [place for place, other in enumerate(base.others) if other.fact < 0]
        rows = [base.rows[place] for place in shared] + list(base.rows[len(base.others) :])
        states = {str(number): lambda trial=trial: self._state(trial) for number, trial in enumerate(self.trials)}
        of_all = compare(lm, rows, layer, nullcontext, states)
        found: list[dict[int, tuple[dict[str, list[Compared]], list[Compared]]]] = []
        for number, trial in enumerate(self.trials):
            unrelated, texts = of_all[str(number)][: len(shared)], of_all[str(number)][len(shared) :]
            found.append({fact: (defaultdict(list, unrelated=list(unrelated)), texts) for fact in trial.facts})
        for fact in sorted({fact for trial in self.trials for fact in trial.facts}):
            own = [place for place, other in enumerate(base.others) if other.fact == fact]
            editing = [number for number, trial in enumerate(self.trials) if fact in trial.facts]
            of_fact = compare(
                lm, [base.rows[place] for place in own], layer, nullcontext, {str(n): states[str(n)] for n in editing}
            )
            for number in editing:
                for place, one in zip(own, of_fact[str(number)], strict=True):
                    found[number][fact][0][base.others[place].kind].append(one)
        return found


def _few(base: Baseline) -> Baseline:
    """Return a baseline with a few other prompts of each kind: for each fact, or shared by all facts."""
    counts: dict[tuple[int, str], int] = defaultdict(int)
    kept = []
    for place, other in enumerate(base.others):
        counts[other.fact, other.kind] += 1
        if counts[other.fact, other.kind] <= _OTHERS[other.kind]:
            kept.append(place)
    return replace(
        base,
        others=[base.others[place] for place in kept],
        continuations=[base.continuations[place] for place in kept],
        rows=[base.rows[place] for place in kept] + list(base.rows[len(base.others) :]),
    )


def _sight(
    answered: tuple[Mapping[str, Sequence[bool]], str],
    others: Mapping[str, Sequence[Compared]],
    texts: Sequence[Compared],
) -> Sight:
    said, written = answered
    return Sight(
        says={form: fmean(of_form) for form, of_form in said.items()},
        unchanged={kind: fmean(all(one.same) for one in of_kind) for kind, of_kind in others.items()},
        kept={kind: fmean(fmean(one.same or (1.0,)) for one in of_kind) for kind, of_kind in others.items()},
        kl=fmean(value for text in texts for value in text.kl),
        agreement=fmean(agrees for text in texts for agrees in text.same),
        fluency=ngram_entropy(written),
    )
