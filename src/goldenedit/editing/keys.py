"""Keys of a fact: the inputs of the edited down projection at the last token of the subject."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import evaluating, recording, stop_forward
from goldenedit.config import EditConfig
from goldenedit.editors import FactKeys
from goldenedit.editors.statistics import relative_contrast
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode_request, subject_tokens
from goldenedit.requests import EditRequest, proxy_facts


def fact_keys(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    keys: Sequence[Sequence[Tensor]],
    config: EditConfig,
) -> dict[int, list[FactKeys]]:
    """Return the keys of each fact as the configured editor reads them, by layer.

    Args:
        layers: The layers, ascending.
        keys: By layer `(N, contexts, d_in)`, keys of each fact in each context, with the bare prompt's key first.
        config: Says which anchors and contrast keys the editor reads.
    """
    return with_contrasts(layers, keys, weighted_contrasts(lm, requests, layers, config), config)


def contrast_count(config: EditConfig) -> int:
    """Return the number of contrast keys per fact that the configured editor reads."""
    return config.contrast if "contrast" in config.editor.reads and config.contrast_weight > 0 else 0


def weighted_contrasts(
    lm: LanguageModel, requests: Sequence[EditRequest], layers: Sequence[int], config: EditConfig
) -> list[list[Tensor] | None]:
    """Return the contrast keys that the configured editor reads, by fact and layer, scaled by their weight."""
    return [
        None if keys is None else [relative_contrast(of_layer, config.contrast_weight) for of_layer in keys]
        for keys in contrast_keys(lm, requests, layers, contrast_count(config), config.seed)
    ]


def with_contrasts(
    layers: Sequence[int],
    keys: Sequence[Sequence[Tensor]],
    contrasts: Sequence[list[Tensor] | None],
    config: EditConfig,
) -> dict[int, list[FactKeys]]:
    """Return the keys of each fact as the configured editor reads them, by layer. Arguments are as in `fact_keys`.

    Args:
        contrasts: By fact and layer, from `weighted_contrasts`.
    """
    # With a single context the bare key equals the mean.
    anchor = "anchor" in config.editor.reads and config.anchor_bare_prompt and len(keys[0][0]) > 1
    return {
        layer: [
            # A copy, because a view would keep the keys of all contexts in memory.
            FactKeys(
                of_fact[0].clone(), of_fact.mean(0), None if contrast is None else contrast[index], anchor, of_fact.T
            )
            for of_fact, contrast in zip(of_layer, contrasts, strict=True)
        ]
        for index, (layer, of_layer) in enumerate(zip(layers, keys, strict=True))
    }


@torch.no_grad()
def contrast_keys(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    count: int,
    seed: int,
    batch_size: int = 8,
) -> list[list[Tensor] | None]:
    """Return keys of invented subjects that end in the same token as each request's subject, by layer `(d_in, count)`.

    In early layers the key of "Battambang Province" is close to that of "Province" alone, so that an edit of one
    province changes all of them. Beginnings of other subjects before the same last token show which part of the key
    belongs to the token and which to the subject.

    Args:
        layers: The layers, ascending. A forward stops at the last of them.
        count: Invented subjects per request.
        seed: Seed of the choice of beginnings.
        batch_size: Requests per forward.

    Returns:
        For each request its keys by layer; None if its subject is a single token.
    """
    subject_ids = [
        subject_tokens(lm.tokenizer, request.text, request.subject_start, request.subject_end) for request in requests
    ]
    of_many_tokens = [index for index, ids in enumerate(subject_ids) if len(ids) > 1]
    contrasts: list[list[Tensor] | None] = [None] * len(requests)
    starts = beginnings(lm.tokenizer, count, seed)
    if not starts or not of_many_tokens:
        return contrasts
    with evaluating(lm.model):
        for start in range(0, len(of_many_tokens), batch_size):
            group = of_many_tokens[start : start + batch_size]
            rows = [[*beginning, subject_ids[index][-1]] for index in group for beginning in starts]
            keys = _last_keys(lm, rows, layers)
            for place, index in enumerate(group):
                of_request = slice(place * len(starts), (place + 1) * len(starts))
                contrasts[index] = [of_layer[of_request].T for of_layer in keys]
    return contrasts


def subject_keys(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the key of each request at its bare prompt, by layer `(N, d_in)` float32.

    Args:
        layers: The layers, ascending.
        batch_size: Requests per forward.
    """
    return [of_layer[:, 0] for of_layer in context_keys(lm, requests, layers, [""], batch_size)]


@torch.no_grad()
def context_keys(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    contexts: Sequence[str],
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the key of each request after each prefix, by layer `(N, contexts, d_in)` float32.

    Args:
        layers: The layers, ascending.
        contexts: Prefixes of each prompt.
        batch_size: Rows per forward.
    """
    longest = lm.max_length
    rows = [
        encode_request(lm.tokenizer, request, context=prefix, max_length=longest)
        for request in requests
        for prefix in contexts
    ]
    ids = [list(row.input_ids[: row.subject + 1]) for row in rows]
    groups = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    with evaluating(lm.model):
        keys = [_last_keys(lm, group, layers) for group in groups]
    by_layer = zip(*keys, strict=True)
    return [torch.cat(of_layer).unflatten(0, (len(requests), len(contexts))) for of_layer in by_layer]


@torch.no_grad()
def keys_at_ends(
    lm: LanguageModel, rows: Sequence[list[int]], layers: Sequence[int], batch_size: int = 32
) -> list[Tensor]:
    """Return the key at the last token of each row of tokens, by layer `(rows, d_in)` float32."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with evaluating(lm.model):
        found = [
            _last_keys(lm, [rows[index] for index in order[start : start + batch_size]], layers)
            for start in range(0, len(rows), batch_size)
        ]
    ranks = sorted(range(len(order)), key=order.__getitem__)
    return [torch.cat(of_layer)[ranks] for of_layer in zip(*found, strict=True)]


def beginnings(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[list[int]]:
    """Return the tokens of `count` proxy subjects without the last token, half of them as at the start of a text."""
    start = _special_start(tokenizer)
    subjects = sorted({fact.subject for fact in proxy_facts()})
    plain = [
        tokenizer((" " if index % 2 else "") + subject, add_special_tokens=False)["input_ids"][:-1]
        for index, subject in enumerate(subjects)
    ]
    usable = [[*start, *ids] for ids in plain if ids]
    return random.Random(seed).sample(usable, min(count, len(usable)))


def _last_keys(lm: LanguageModel, rows: list[list[int]], layers: Sequence[int]) -> list[Tensor]:
    """Return the keys at the last token of each row, by layer `(rows, d_in)` float32."""
    device = lm.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([row + [lm.padding_id] * (longest - len(row)) for row in rows], device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    modules = {str(layer): lm.architecture.down_projection(lm.model, layer) for layer in layers}
    with stop_forward() as stop, recording(modules) as record:
        handle = modules[str(layers[-1])].register_forward_hook(lambda *_: stop())
        try:
            lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
    ends = torch.arange(len(rows), device=device) * longest + lengths - 1
    return [lm.architecture.keys(lm.model, layer, record.calls[str(layer)], ends).cpu() for layer in layers]


def _special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer adds before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return list(ids[: ids.index(plain[0])]) if plain and plain[0] in ids else []
