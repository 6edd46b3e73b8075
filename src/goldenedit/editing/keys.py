"""Keys of a fact: what enters the edited down projection at the last token of its subject."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import evaluating, recording, stop_forward
from goldenedit.architecture.layers import Architecture
from goldenedit.devices import input_device
from goldenedit.lm.tokens import context_length, encode_request, padding_id, subject_tokens
from goldenedit.requests import EditRequest, proxy_facts


@torch.no_grad()
def contrast_keys(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    count: int,
    seed: int,
    batch_size: int = 8,
) -> list[list[Tensor] | None]:
    """Return keys of invented subjects that end in the same token as each request's subject, by layer `(d_in, count)`.

    In early layers the key of "Battambang Province" is mostly that of "Province", so an edit of one province answers to
    all of them. The beginnings of other subjects before the same last token show which part of the key is the token's
    and which the subject's. Subjects of one token have none.

    Args:
        layers: The layers whose keys are wanted, ascending; the model runs no further than the last.
        count: Invented subjects for each request.
        batch_size: Requests a forward.
    """
    own = [subject_tokens(tokenizer, request.text, request.subject_start, request.subject_end) for request in requests]
    many = [index for index, ids in enumerate(own) if len(ids) > 1]
    found: list[list[Tensor] | None] = [None] * len(requests)
    beginnings = _beginnings(tokenizer, count, seed)
    if not beginnings or not many:
        return found
    with evaluating(model):
        for start in range(0, len(many), batch_size):
            group = many[start : start + batch_size]
            rows = [[*beginning, own[index][-1]] for index in group for beginning in beginnings]
            keys = _last_keys(model, architecture, rows, layers, padding_id(tokenizer))
            for row, index in enumerate(group):
                own_rows = slice(row * len(beginnings), (row + 1) * len(beginnings))
                found[index] = [of_layer[own_rows].T for of_layer in keys]
    return found


def subject_keys(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the key of each request at its bare prompt, by layer `(N, d_in)` float32.

    Args:
        layers: The layers whose keys are wanted, ascending.
        batch_size: Requests a forward.
    """
    found = context_keys(model, architecture, tokenizer, requests, layers, [""], batch_size)
    return [of_layer[:, 0] for of_layer in found]


@torch.no_grad()
def context_keys(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    contexts: Sequence[str],
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the key of each request behind each prefix, by layer `(N, contexts, d_in)` float32.

    Args:
        layers: The layers whose keys are wanted, ascending.
        contexts: Prefixes to each prompt.
        batch_size: Rows a forward.
    """
    longest = context_length(model.config)
    rows = [
        encode_request(tokenizer, request, context=prefix, max_length=longest)
        for request in requests
        for prefix in contexts
    ]
    ids = [list(row.input_ids[: row.subject + 1]) for row in rows]
    groups = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    with evaluating(model):
        found = [_last_keys(model, architecture, group, layers, padding_id(tokenizer)) for group in groups]
    return [torch.cat(parts).unflatten(0, (len(requests), len(contexts))) for parts in zip(*found, strict=True)]


def _beginnings(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[list[int]]:
    """Return tokens of `count` other subjects without their last, as they begin a text and as they go on in one."""
    start = _special_start(tokenizer)
    subjects = sorted({fact.subject for fact in proxy_facts()})
    plain = [
        tokenizer((" " if index % 2 else "") + subject, add_special_tokens=False)["input_ids"][:-1]
        for index, subject in enumerate(subjects)
    ]
    usable = [[*start, *ids] for ids in plain if ids]
    return random.Random(seed).sample(usable, min(count, len(usable)))


def _last_keys(
    model: nn.Module, architecture: Architecture, rows: list[list[int]], layers: Sequence[int], pad: int
) -> list[Tensor]:
    """Return the keys at the last token of each row, by layer `(rows, d_in)` float32."""
    device = input_device(model)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    modules = {str(layer): architecture.down_projection(model, layer) for layer in layers}
    with stop_forward() as stop, recording(modules) as record:
        handle = modules[str(layers[-1])].register_forward_hook(lambda *_: stop())
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
    ends = torch.arange(len(rows), device=device) * longest + lengths - 1
    return [architecture.keys(model, layer, record.calls[str(layer)], ends).cpu() for layer in layers]


def _special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return list(ids[: ids.index(plain[0])]) if plain and plain[0] in ids else []
