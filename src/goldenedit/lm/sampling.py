"""Texts sampled from the model itself: prefixes for the value optimization, and text for key statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.caching import cache_argument, cache_of
from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.architecture.replay import NO_CACHE
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.tokens import prompt_tokens
from goldenedit.parallel import Processes

# Openings of MEMIT's context templates. The model continues them freely.
_OPENINGS = ("The", "Therefore", "Because", "I", "You")
_MOST_BATCHES = 1 << 20  # of one seed
_SEEDS = 1 << 63  # that torch takes


def sample_contexts(lm: TokenizedModel, count: int, length: int, seed: int) -> list[str]:
    """Return `count` prefixes: the empty one, then sampled texts of up to `length` tokens, each ending in `". "`.

    Meng et al. 2022 (ROME, section 3.1) prepend such texts, so that an edit holds wherever its prompt appears.

    Raises:
        ValueError: The model does not take texts that long.
    """
    if count <= 1:
        return [""]
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count - 1)]
    longest = length + max(len(prompt_tokens(lm.tokenizer, opening)) for opening in openings)
    if lm.max_length is not None and longest > lm.max_length:
        raise ValueError(
            f"Contexts of {length} tokens are too long: the model takes {lm.max_length} tokens, with the prompt. Set "
            "EditConfig.context_length to a smaller number, such as 10."
        )
    sampled = sample_continuations(lm, openings, length, seed)
    # A context is a plain sentence before the prompt: one line without special tokens.
    return ["", *(" ".join(text.split()) + ". " for text in sampled)]


def sample_continuations(
    lm: TokenizedModel,
    openings: Sequence[str],
    length: int,
    seed: int,
    batch_size: int = 128,
    top_k: int | None = None,
    processes: Processes | None = None,
) -> list[str]:
    """Continue each opening by `length` tokens sampled from the model, and return openings with continuations.

    Args:
        openings: Texts to continue.
        length: Tokens to sample after each opening.
        seed: Seed of the sampling, which leaves torch's global generator alone.
        batch_size: Largest number of rows of a forward.
        top_k: Sample from the `top_k` most likely tokens; None for all.
        processes: Processes that make this call together and share the batches. Defaults to this one alone.

    Raises:
        ValueError: An opening has no tokens, or the logits are not finite.
    """
    ids = [prompt_tokens(lm.tokenizer, opening) for opening in openings]
    if not all(ids):
        raise ValueError(
            f"The tokenizer has no tokens for {openings[ids.index([])]!r}, so the model cannot sample text after it. "
            "Pass the model's own tokenizer, or give text (EditConfig.covariance) and contexts=1."
        )
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    batches: list[list[int]] = []
    for _, group in groupby(order, key=lambda index: len(ids[index])):  # rows of equal length need no padding
        members = list(group)
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
    processes = Processes() if processes is None else processes
    of_this_process = sum(map(len, processes.share(batches)))
    with evaluating(lm.model), tqdm(total=of_this_process, desc="Sampling", unit="text", leave=False) as progress:

        def sampled(number: int) -> list[str]:
            rows = batches[number]
            # A generator of its own for each batch, so that the texts do not depend on who samples which.
            generator = torch.Generator().manual_seed((seed * _MOST_BATCHES + number) % _SEEDS)
            tokens = _continue(lm, torch.tensor([ids[row] for row in rows]), length, generator, top_k)
            progress.update(len(rows))
            return [continuation(lm.tokenizer, of_row, len(ids[rows[0]])) for of_row in tokens.tolist()]

        written = processes.map(sampled, range(len(batches)))
    behind = dict(zip(chain(*batches), chain(*written), strict=True))
    return [opening + behind[index] for index, opening in enumerate(openings)]


def continuation(tokenizer: PreTrainedTokenizerBase, tokens: list[int], prompt_length: int) -> str:
    """Return the text of the tokens after the first `prompt_length`, with the space that separates it from them."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    prompt = str(tokenizer.decode(tokens[:prompt_length], skip_special_tokens=True))
    if text.startswith(prompt):
        return text[len(prompt) :]
    # The bytes of one character lie on both sides.
    return str(tokenizer.decode(tokens[prompt_length:], skip_special_tokens=True))


@torch.no_grad()
def _continue(
    lm: TokenizedModel,
    ids: Tensor,
    length: int,
    generator: torch.Generator,
    top_k: int | None,
) -> Tensor:
    device = lm.device
    tokens = new_tokens = ids.to(device)
    past, use_cache = None, True
    for _ in range(length):
        try:
            logits, past = _next(lm.model, tokens, new_tokens, past, use_cache)
        except NO_CACHE:
            if not use_cache:
                raise
            use_cache = False
            logits, past = _next(lm.model, tokens, tokens, None, use_cache)
        if not logits.isfinite().all():
            raise ValueError("The model's logits are not finite. Load it in float32 or bfloat16.")
        if top_k is not None and top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator).to(device)
        tokens = torch.cat([tokens, drawn], dim=1)
        new_tokens = drawn if past is not None else tokens
    return _until_end(tokens, ids.shape[1], lm.tokenizer.eos_token_id)


def _next(model: nn.Module, tokens: Tensor, new_tokens: Tensor, past: Any, use_cache: bool) -> tuple[Tensor, Any]:
    """Return the logits `(B, V)` after the last token, and the cache.

    Args:
        tokens: `(B, T)`, all tokens so far.
        new_tokens: `(B, n)`, the last tokens, which the cache `past` does not hold yet.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    with reading_logits(model, rows, torch.full_like(rows, new_tokens.shape[1] - 1)) as logits_of:
        mask = torch.ones_like(tokens)
        cache = cache_argument(model, past)
        output = model(input_ids=new_tokens, attention_mask=mask, use_cache=use_cache, **cache)
        return logits_of(output), cache_of(output) if use_cache else None


def _until_end(tokens: Tensor, start: int, end: int | None) -> Tensor:
    """Replace all tokens after an end of text by that token, which decoding skips."""
    if end is None:
        return tokens
    ended = (tokens[:, start:] == end).long().cumsum(1) > 0
    return torch.cat([tokens[:, :start], tokens[:, start:].masked_fill(ended, end)], dim=1)


@torch.no_grad()
def greedy_answer(lm: TokenizedModel, prompt: str, tokens: int = 4) -> str:
    """Return the greedy answer of the model, up to `tokens` tokens or the end of the line.

    Raises:
        ValueError: The answer is empty.
    """
    device = lm.device
    ids = torch.tensor([prompt_tokens(lm.tokenizer, prompt)], device=device)
    length = ids.shape[1]
    with evaluating(lm.model):
        for _ in range(tokens):
            logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    answer = continuation(lm.tokenizer, ids[0].tolist(), length).strip().split("\n")[0]
    if not answer:
        raise ValueError(f"The model gives no answer to {prompt!r}. Set target_true of this fact.")
    return answer
