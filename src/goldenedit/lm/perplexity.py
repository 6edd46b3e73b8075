"""Perplexity and KL divergence on plain text: the quickest checks for damage that edits do to a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import evaluating
from goldenedit.architecture.replay import Batch
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.tokens import Row, pad, with_answer
from goldenedit.requests import proxy_facts


@torch.no_grad()
def perplexity(lm: TokenizedModel, texts: Sequence[str], batch_size: int = 16, most: int = 512) -> float:
    """Return `exp` of the mean NLL over all tokens of all texts, without the first token of each text.

    Args:
        texts: Texts, one row each, cut after `most` tokens or at the end of the model's context.
        most: Largest number of tokens of a text.

    Raises:
        ValueError: No text has two tokens.
    """
    total, count = 0.0, 0
    with evaluating(lm.model):
        for batch in _batches(lm, texts, batch_size, most):
            logits, targets = _predicted(lm, batch)
            total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def text_kl(
    lm: TokenizedModel,
    texts: Sequence[str],
    without_edits: Callable[[], AbstractContextManager[None]],
    batch_size: int = 16,
    most: int = 512,
) -> float:
    """Return `KL(base || edited)` of the next-token distributions, in nats a token, over the tokens of texts.

    Arguments and errors are as in `perplexity`.

    Args:
        without_edits: Returns a context that switches all edits off.
    """
    total, count = 0.0, 0
    with evaluating(lm.model):
        for batch in _batches(lm, texts, batch_size, most):
            after = _predicted(lm, batch)[0].log_softmax(-1)
            with without_edits():
                before = _predicted(lm, batch)[0].log_softmax(-1)
            total += (before.exp() * (before - after)).sum().item()
            count += len(after)
    return total / count


def _batches(lm: TokenizedModel, texts: Sequence[str], batch_size: int, most: int) -> list[Batch]:
    longest = min(most, lm.max_length or most)
    ids = [list(lm.tokenizer(text, truncation=True, max_length=longest)["input_ids"]) for text in texts]
    rows = [
        Row(tuple(tokens), subject=-1, target=tuple(range(1, len(tokens))), last=len(tokens) - 1)
        for tokens in ids
        if len(tokens) > 1
    ]
    if not rows:
        raise ValueError("Perplexity needs a text of at least two tokens.")
    rows.sort(key=lambda row: len(row.input_ids))
    starts = range(0, len(rows), batch_size)
    return [pad(rows[start : start + batch_size], lm.padding_id, lm.device) for start in starts]


def _predicted(lm: TokenizedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits, `(n, V)` float32, of all tokens behind a first one, and these tokens."""
    logits = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    mask = batch.attention_mask[:, 1:].bool().to(logits.device)
    return logits[:, :-1][mask].float(), batch.input_ids[:, 1:].to(logits.device)[mask]


def sample_texts(count: int = 50) -> list[str]:
    """Return `count` plain statements of many kinds: packaged facts with their true answers."""
    facts = [fact for fact in proxy_facts() if fact.target_true is not None]
    step = max(1, len(facts) // count)
    return [f"{with_answer(fact.text, str(fact.target_true))}. {fact.paraphrases[0]}" for fact in facts[::step][:count]]
