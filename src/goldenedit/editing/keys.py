"""Keys of a fact: what enters the edited down projection at the last token of its subject."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import evaluating, recording
from goldenedit.architecture.layers import Architecture
from goldenedit.editing.rows import padding_id
from goldenedit.requests import EditRequest, proxy_facts


@dataclass(frozen=True)
class FactKeys:
    """Keys of one fact at one layer.

    Attributes:
        bare: `(d_in,)`, key at the bare prompt, `k`.
        mean: `(d_in,)`, key averaged over contexts, `k*`.
        contrast: `(d_in, c)`, keys of other subjects that end in the same token, scaled by the weight they have beside
            the other text; None where there are none.
        anchor_bare: Whether the edit must answer to `bare` as it does to `mean`.
    """

    bare: Tensor
    mean: Tensor
    contrast: Tensor | None = None
    anchor_bare: bool = False


@torch.no_grad()
def contrast_keys(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    count: int,
    seed: int,
) -> list[Tensor | None]:
    """Return keys of invented subjects that end in the same token as each request's subject, `(m, d_in, count)`.

    In early layers the key of "Battambang Province" is mostly that of "Province", so an edit of one province answers to
    all of them. The beginnings of other subjects before the same last token show which part of the key is the token's
    and which the subject's. Subjects of one token have none.
    """
    own = [tokenizer(" " + request.subject.strip(), add_special_tokens=False)["input_ids"] for request in requests]
    many = [index for index, ids in enumerate(own) if len(ids) > 1]
    if not many or count == 0:
        return [None] * len(requests)
    # As a subject begins a text and as it goes on in one, in turn.
    beginnings = [
        tokenizer((" " if index % 2 else "") + subject, add_special_tokens=False)["input_ids"][:-1]
        for index, subject in enumerate(sorted({fact.subject for fact in proxy_facts()}))
    ]
    beginnings = [ids for ids in beginnings if ids]
    chosen = random.Random(seed).sample(beginnings, min(count, len(beginnings)))
    start = _special_start(tokenizer)
    rows = [[*start, *beginning, own[index][-1]] for index in many for beginning in chosen]
    length = max(map(len, rows))
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.tensor([row + [padding_id(tokenizer)] * (length - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None]).long()
    modules = {str(layer): architecture.down_projection(model, layer) for layer in layers}
    with evaluating(model), recording(modules) as record:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    found = []
    for layer in layers:
        inputs = record.inputs[str(layer)]
        at_end = inputs.view(len(rows), length, -1)[torch.arange(len(rows)), (lengths - 1).to(inputs.device)]
        found.append(at_end.float().cpu().view(len(many), len(chosen), -1))
    keys = torch.stack(found, 1).mT  # (many, m, d_in, count)
    place = {index: position for position, index in enumerate(many)}
    return [keys[place[index]] if index in place else None for index in range(len(requests))]


def _special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return list(ids[: ids.index(plain[0])]) if plain and plain[0] in ids else []
