"""How likely a model finds given answers: the measurement under every probability score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.devices import input_device
from goldenedit.editing.rows import Row, context_length, encode, pad, padding_id, target_ids


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
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
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
    rows = [encode(tokenizer, prompt, answer, max_length=context_length(model.config)) for prompt, answer in pairs]
    read = [row.input_ids[: row.reads[-1] + 1] for row in rows]
    members: dict[int, list[int]] = defaultdict(list)
    for index, host in enumerate(_hosts(read)):
        members[host].append(index)
    order = sorted(members, key=lambda host: len(read[host]))
    device = input_device(model)
    found: dict[int, Likelihood] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            hosts = order[start : start + batch_size]
            batch = pad([Row(read[host], -1, (), len(read[host]) - 1) for host in hosts], padding_id(tokenizer), device)
            guests = [(row, index) for row, host in enumerate(hosts) for index in members[host]]
            spots = list(dict.fromkeys((row, position) for row, index in guests for position in rows[index].reads))
            number = {spot: position for position, spot in enumerate(spots)}
            read_rows, read_positions = torch.tensor(spots, device=device).T
            with reading_logits(model, read_rows, read_positions) as logits_of:
                output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                log_probs = logits_of(output).float().log_softmax(-1)
            first = log_probs.argmax(-1).tolist()
            at = [number[row, position] for row, index in guests for position in rows[index].reads]
            nll = -log_probs[at, target_ids([rows[index] for _, index in guests], log_probs.device)].cpu()
            sizes = [len(rows[index].target) for _, index in guests]
            for (row, index), one_nll in zip(guests, nll.split(sizes), strict=True):
                choices = tuple(first[number[row, position]] for position in rows[index].reads)
                hits = [one == other for one, other in zip(choices, rows[index].target_ids, strict=True)]
                found[index] = Likelihood(one_nll.mean().item(), sum(hits) / len(hits), choices)
    return [found[index] for index in range(len(pairs))]


def _hosts(sequences: Sequence[tuple[int, ...]]) -> list[int]:
    """Return for each token sequence the index of a longest one that begins with it: its own, where there is none."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    hosts = list(range(len(sequences)))
    for index, following in zip(reversed(order[:-1]), reversed(order[1:]), strict=True):
        # In this order the sequences that begin with one come right behind it.
        if sequences[following][: len(sequences[index])] == sequences[index]:
            hosts[index] = hosts[following]
    return hosts
