"""Likelihoods of answers, which all probability scores are computed from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.architecture.replay import Batch, Replayer, capture
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, encode, pad


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of one answer after one prompt.

    Attributes:
        nll: Negative log likelihood in nats, mean over the answer's tokens.
        accuracy: Share of the answer's tokens that are the model's first choice after the answer's tokens before them.
        weakest: Probability of the least likely token of the answer.
        choices: The first choice for each token of the answer.
    """

    nll: float
    accuracy: float
    weakest: float
    choices: tuple[int, ...] = ()

    @property
    def probability(self) -> float:
        """Probability of the answer, as the geometric mean over its tokens."""
        return math.exp(-self.nll)


@torch.no_grad()
def likelihoods(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 64,
    owners: Sequence[int] | None = None,
    within: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None,
) -> list[Likelihood]:
    """Return the likelihood of each `(prompt, answer)` pair, computed in batches of similar length.

    The last token of an answer is never an input. So pairs share a row if their texts without it are equal or one
    begins with the other, for example all pairs of a prompt with answers of one token.

    Args:
        batch_size: Rows per forward.
        owners: Who asks for each pair. Pairs of different owners share no row.
        within: Returns a context for a forward over rows of these owners, for models that differ by row.

    Raises:
        ValueError: An answer has no tokens after its prompt, or a pair does not fit in the model's context.
    """
    by_pair: dict[int, Likelihood] = {}
    with evaluating(lm.model):
        for reading in _readings(lm, pairs, batch_size, owners):
            batch = reading.batch
            with (
                nullcontext() if within is None else within(reading.owners),
                reading_logits(lm.model, batch.read_rows, batch.read_positions) as logits_of,
            ):
                output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                by_pair |= reading.likelihoods(logits_of(output))
    return [by_pair[index] for index in range(len(pairs))]


@torch.no_grad()
def likelihoods_with_and_without(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    start: int,
    without_edits: Callable[[], AbstractContextManager[None]],
    batch_size: int = 64,
) -> tuple[list[Likelihood], list[Likelihood]]:
    """Return the likelihoods of pairs in the model with its edits, and in the model without them.

    The layers before the edits run only once.

    Args:
        start: First layer with an edit.
        without_edits: Returns a context in which the edits are off.
        batch_size: Rows per forward.
    """
    edited: dict[int, Likelihood] = {}
    base: dict[int, Likelihood] = {}
    replay = Replayer(lm.model, lm.architecture, start, whole_rows=True)
    is_checked = False
    with evaluating(lm.model):
        for reading in _readings(lm, pairs, batch_size):
            with without_edits():
                whole = capture(lm.model, lm.architecture, start, reading.batch, {}, use_cache=False)
                if not is_checked:
                    replay.check(whole.select(torch.arange(min(2, len(whole.hidden)), device=whole.hidden.device)))
                    is_checked = True
            base |= reading.likelihoods(whole.logits)
            edited |= reading.likelihoods(replay(whole))
    return [edited[index] for index in range(len(pairs))], [base[index] for index in range(len(pairs))]


@dataclass(frozen=True)
class _Reading:
    """One batch of rows, and the logits that belong to each pair.

    Attributes:
        batch: The rows, and the positions where logits are read.
        answers: By index of a pair, the indices of its logits among those that are read, and the answer's tokens.
        owners: Who asks for the pairs of each row.
    """

    batch: Batch
    answers: dict[int, tuple[list[int], tuple[int, ...]]]
    owners: Sequence[int]

    def likelihoods(self, logits: Tensor) -> dict[int, Likelihood]:
        """Return the likelihood of each pair by its index, from the logits `(M, V)`."""
        log_probs = logits.float().log_softmax(-1)
        first_choices = log_probs.argmax(-1).tolist()
        places = [place for of_answer, _ in self.answers.values() for place in of_answer]
        ids = [token for _, tokens in self.answers.values() for token in tokens]
        nll = -log_probs[places, ids].cpu()
        by_pair = {}
        sizes = [len(tokens) for _, tokens in self.answers.values()]
        for (index, (of_answer, tokens)), token_nll in zip(self.answers.items(), nll.split(sizes), strict=True):
            choices = tuple(first_choices[place] for place in of_answer)
            hits = [choice == token for choice, token in zip(choices, tokens, strict=True)]
            weakest = math.exp(-token_nll.max().item())
            by_pair[index] = Likelihood(token_nll.mean().item(), sum(hits) / len(hits), weakest, choices)
        return by_pair


def _readings(
    lm: LanguageModel, pairs: Sequence[tuple[str, str]], batch_size: int, owners: Sequence[int] | None = None
) -> Iterator[_Reading]:
    """Yield batches of rows that cover all pairs, in ascending order of length."""
    owners = [0] * len(pairs) if owners is None else owners
    rows = [encode(lm.tokenizer, prompt, answer, max_length=lm.max_length) for prompt, answer in pairs]
    inputs = [row.input_ids[: row.reads[-1] + 1] for row in rows]
    members: dict[int, list[int]] = defaultdict(list)
    for index, host in enumerate(_hosts([(owner, *ids) for owner, ids in zip(owners, inputs, strict=True)])):
        members[host].append(index)
    order = sorted(members, key=lambda host: len(inputs[host]))
    device = lm.device
    for start in range(0, len(order), batch_size):
        hosts = order[start : start + batch_size]
        host_rows = [Row(inputs[host], subject=-1, target=(), last=len(inputs[host]) - 1) for host in hosts]
        padded = pad(host_rows, lm.padding_id, device)
        pair_rows = [(row, index) for row, host in enumerate(hosts) for index in members[host]]
        reads = list(dict.fromkeys((row, position) for row, index in pair_rows for position in rows[index].reads))
        places = {read: place for place, read in enumerate(reads)}
        read_rows, read_positions = torch.tensor(reads, device=device).T
        answers = {
            index: ([places[row, position] for position in rows[index].reads], tuple(rows[index].target_ids))
            for row, index in pair_rows
        }
        yield _Reading(
            replace(padded, read_rows=read_rows, read_positions=read_positions),
            answers,
            [owners[host] for host in hosts],
        )


def _hosts(sequences: Sequence[tuple[int, ...]]) -> list[int]:
    """Return for each token sequence the index of a longest sequence that begins with it, which may be itself."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    hosts = list(range(len(sequences)))
    for index, following in zip(reversed(order[:-1]), reversed(order[1:]), strict=True):
        # In this order, the sequences that begin with a sequence directly follow it.
        if sequences[following][: len(sequences[index])] == sequences[index]:
            hosts[index] = hosts[following]
    return hosts
