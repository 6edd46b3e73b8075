"""Texts sampled from the model itself: prefixes for the value optimization, and text for key statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.architecture.replay import NO_CACHE
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.tokens import prompt_tokens

# Openings of MEMIT's context templates; a free start follows them.
_OPENINGS = ("The", "Therefore", "Because", "I", "You")


def sample_contexts(lm: TokenizedModel, count: int, length: int, seed: int) -> list[str]:
    """Return `count` prefixes: the empty one, then sampled texts of up to `length` tokens, each ending in `". "`.

    Meng et al. 2022 (ROME, section 3.1) prepend such texts so that an edit holds wherever its prompt stands.
    """
    if count <= 1:
        return [""]
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count - 1)]
    sampled = sample_continuations(lm, openings, length, seed)
    # One line, no special tokens: a context is a plain sentence before the prompt.
    return ["", *(" ".join(text.split()) + ". " for text in sampled)]


def sample_continuations(
    lm: TokenizedModel,
    openings: Sequence[str],
    length: int,
    seed: int,
    batch_size: int = 128,
    top_k: int | None = None,
) -> list[str]:
    """Continue each opening by `length` tokens drawn from the model's own distribution, with a generator of its own.

    Args:
        top_k: Draw from so many of the likeliest tokens; None for all.
    """
    ids = [prompt_tokens(lm.tokenizer, opening) for opening in openings]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    generator = torch.Generator().manual_seed(seed)
    texts: dict[int, str] = {}
    with evaluating(lm.model), tqdm(total=len(ids), desc="Sampling", unit="text", leave=False) as progress:
        for _, group in groupby(order, key=lambda index: len(ids[index])):  # rows of one length need no padding
            members = list(group)
            for start in range(0, len(members), batch_size):
                rows = members[start : start + batch_size]
                given = torch.tensor([ids[row] for row in rows])
                tokens = _continue(lm, given, length, generator, top_k)
                for row, sampled in zip(rows, tokens.tolist(), strict=True):
                    texts[row] = openings[row] + continuation(lm.tokenizer, sampled, len(ids[row]))
                progress.update(len(rows))
    return [texts[index] for index in range(len(openings))]


def continuation(tokenizer: PreTrainedTokenizerBase, tokens: list[int], given: int) -> str:
    """Return the text of the tokens behind the first `given`, with the space before it that these ask for."""
    whole, start = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (tokens, tokens[:given]))
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode(tokens[given:], skip_special_tokens=True))  # a character of both


@torch.no_grad()
def _continue(
    lm: TokenizedModel,
    ids: Tensor,
    length: int,
    generator: torch.Generator,
    top_k: int | None,
) -> Tensor:
    device = lm.device
    tokens = given = ids.to(device)
    past, cached = None, True
    for _ in range(length):
        try:
            logits, past = _next(lm.model, tokens, given, past, cached)
        except NO_CACHE:
            if not cached:
                raise
            cached = False
            logits, past = _next(lm.model, tokens, tokens, None, cached)
        if not logits.isfinite().all():
            raise ValueError("The model's logits are not finite: load it in float32 or bfloat16.")
        if top_k is not None and top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator).to(device)
        tokens = torch.cat([tokens, drawn], dim=1)
        given = drawn if past is not None else tokens
    return _until_end(tokens, ids.shape[1], lm.tokenizer.eos_token_id)


def _next(model: nn.Module, tokens: Tensor, given: Tensor, past: Any, cached: bool) -> tuple[Tensor, Any]:
    """Return the logits behind the last token, `(B, V)`, and the cache, from the tokens `given` that it lacks."""
    rows = torch.arange(len(tokens), device=tokens.device)
    with reading_logits(model, rows, torch.full_like(rows, given.shape[1] - 1)) as logits_of:
        output = model(input_ids=given, attention_mask=torch.ones_like(tokens), past_key_values=past, use_cache=cached)
        return logits_of(output), getattr(output, "past_key_values", None) if cached else None


def _until_end(tokens: Tensor, start: int, end: int | None) -> Tensor:
    """Replace all that was drawn behind an end of text by that end, which decoding skips."""
    if end is None:
        return tokens
    ended = (tokens[:, start:] == end).long().cumsum(1) > 0
    return torch.cat([tokens[:, :start], tokens[:, start:].masked_fill(ended, end)], dim=1)


@torch.no_grad()
def greedy_answer(lm: TokenizedModel, prompt: str, tokens: int = 4) -> str:
    """Return what the model itself answers, greedily, up to `tokens` tokens or the end of the line."""
    device = lm.device
    ids = torch.tensor([prompt_tokens(lm.tokenizer, prompt)], device=device)
    length = ids.shape[1]
    with evaluating(lm.model):
        for _ in range(tokens):
            logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    answer = continuation(lm.tokenizer, ids[0].tolist(), length).strip().split("\n")[0]
    if not answer:
        raise ValueError(f"The model has no answer to {prompt!r}: give the fact a target_true.")
    return answer
