"""How likely a model finds given answers: the measurement under every probability score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.devices import input_device
from goldenedit.editing.rows import context_length, encode, pad, padding_id, target_ids


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

    Args:
        batch_size: Rows a forward.

    Raises:
        ValueError: An answer has no tokens behind its prompt, or a pair does not fit the model's context.
    """
    rows = [encode(tokenizer, prompt, answer, max_length=context_length(model.config)) for prompt, answer in pairs]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    device = input_device(model)
    found: dict[int, Likelihood] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            group = [rows[index] for index in indices]
            batch = pad(group, padding_id(tokenizer), device)
            with reading_logits(model, batch.read_rows, batch.read_positions) as logits_of:
                output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                logits = logits_of(output).float()
            targets = target_ids(group, logits.device)
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
            first = logits.argmax(-1)
            hit = (first == targets).float().cpu()
            sizes = [len(row.target) for row in group]
            parts = (nll.split(sizes), hit.split(sizes), first.cpu().split(sizes))
            for index, one_nll, one_hit, choices in zip(indices, *parts, strict=True):
                found[index] = Likelihood(one_nll.mean().item(), one_hit.mean().item(), tuple(choices.tolist()))
    return [found[index] for index in range(len(pairs))]
