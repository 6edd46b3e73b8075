"""How likely a model finds given answers: the measurement under every probability score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.architecture.replay import Batch, Replayer, capture
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, encode, pad


@dataclass(frozen=True)
class Likelihood:
    """How a model takes one answer after one prompt.

    Attributes:
        nll: Negative log likelihood in nats, mean over the answer's tokens.
        accuracy: Share of the answer's tokens that are the model's first choice, each after the true ones before it.
        choices: These first choices, a token each.
    """

    nll: float
    accuracy: float
    choices: tuple[int, ...] = ()


@torch.no_grad()
def likelihoods(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 64,
) -> list[Likelihood]:
    """Score `(prompt, answer)` pairs, in batches of similar length.

    An answer's last token is never read, so that pairs of one prompt whose answers begin alike share a row: most often
    all pairs of a prompt with answers of one token.

    Args:
        batch_size: Rows a forward.

    Raises:
        ValueError: An answer has no tokens behind its prompt, or a pair does not fit the model's context.
    """
    found: dict[int, Likelihood] = {}
    with evaluating(lm.model):
        for reading in _readings(lm, pairs, batch_size):
            batch = reading.batch
            with reading_logits(lm.model, batch.read_rows, batch.read_positions) as logits_of:
                output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                found |= reading.likelihoods(logits_of(output))
    return [found[index] for index in range(len(pairs))]


@torch.no_grad()
def likelihoods_with_and_without(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    start: int,
    without_edits: Callable[[], AbstractContextManager[None]],
    batch_size: int = 64,
) -> tuple[list[Likelihood], list[Likelihood]]:
    """Score pairs as `likelihoods` does, by the model with its edits and by the model without them.

    The layers before the edits run once for both.

    Args:
        start: First layer with an edit.
        without_edits: Returns a context that switches the edits off.
    """
    now: dict[int, Likelihood] = {}
    before: dict[int, Likelihood] = {}
    replay = Replayer(lm.model, lm.architecture, start, whole_rows=True)
    checked = False
    with evaluating(lm.model):
        for reading in _readings(lm, pairs, batch_size):
            with without_edits():
                whole = capture(lm.model, lm.architecture, start, reading.batch, {}, use_cache=False)
                if not checked:
                    replay.check(whole.select(torch.arange(min(2, len(whole.hidden)), device=whole.hidden.device)))
                    checked = True
            before |= reading.likelihoods(whole.logits)
            now |= reading.likelihoods(replay(whole))
    return [now[index] for index in range(len(pairs))], [before[index] for index in range(len(pairs))]


@dataclass(frozen=True)
class _Reading:
    """One batch of rows, and which of its logits belong to which pair.

    Attributes:
        batch: The rows, and where logits are read.
        answers: By the index of a pair the row of its answer's logits in what is read, and the answer's tokens.
    """

    batch: Batch
    answers: dict[int, tuple[list[int], tuple[int, ...]]]

    def likelihoods(self, logits: Tensor) -> dict[int, Likelihood]:
        """Return how likely the logits `(M, V)` find each pair, by its index."""
        log_probs = logits.float().log_softmax(-1)
        first = log_probs.argmax(-1).tolist()
        at = [position for positions, _ in self.answers.values() for position in positions]
        ids = [token for _, tokens in self.answers.values() for token in tokens]
        nll = -log_probs[at, ids].cpu()
        found = {}
        sizes = [len(tokens) for _, tokens in self.answers.values()]
        for (index, (positions, tokens)), own in zip(self.answers.items(), nll.split(sizes), strict=True):
            choices = tuple(first[position] for position in positions)
            hits = [one == other for one, other in zip(choices, tokens, strict=True)]
            found[index] = Likelihood(own.mean().item(), sum(hits) / len(hits), choices)
        return found


def _readings(lm: LanguageModel, pairs: Sequence[tuple[str, str]], batch_size: int) -> Iterator[_Reading]:
    rows = [encode(lm.tokenizer, prompt, answer, max_length=lm.max_length) for prompt, answer in pairs]
    read = [row.input_ids[: row.reads[-1] + 1] for row in rows]
    members: dict[int, list[int]] = defaultdict(list)
    for index, host in enumerate(_hosts(read)):
        members[host].append(index)
    order = sorted(members, key=lambda host: len(read[host]))
    device = lm.device
    for start in range(0, len(order), batch_size):
        hosts = order[start : start + batch_size]
        padded = pad([Row(read[host], -1, (), len(read[host]) - 1) for host in hosts], lm.padding_id, device)
        guests = [(row, index) for row, host in enumerate(hosts) for index in members[host]]
        spots = list(dict.fromkeys((row, position) for row, index in guests for position in rows[index].reads))
        number = {spot: position for position, spot in enumerate(spots)}
        read_rows, read_positions = torch.tensor(spots, device=device).T
        answers = {
            index: ([number[row, position] for position in rows[index].reads], tuple(rows[index].target_ids))
            for row, index in guests
        }
        yield _Reading(replace(padded, read_rows=read_rows, read_positions=read_positions), answers)


def _hosts(sequences: Sequence[tuple[int, ...]]) -> list[int]:
    """Return for each token sequence the index of a longest one that begins with it: its own, where there is none."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    hosts = list(range(len(sequences)))
    for index, following in zip(reversed(order[:-1]), reversed(order[1:]), strict=True):
        # In this order the sequences that begin with one come right behind it.
        if sequences[following][: len(sequences[index])] == sequences[index]:
            hosts[index] = hosts[following]
    return hosts
