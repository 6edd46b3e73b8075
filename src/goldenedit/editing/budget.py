"""Which facts run in one batch: as many as fit in memory, grouped by length where that saves time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from goldenedit import platforms
from goldenedit.devices import input_device

# What autograd keeps: tensors of the model's width and of the MLP's per token and layer, and copies of the logits.
WIDTHS, MLP_WIDTHS, LOGITS = 16, 4, 4
SHARE = 0.5  # of the free memory
AT_MOST = 16  # larger batches are no faster
# Fixed cost of a step (reading weights, starting operators), in tokens. On CPUs 40 to 80 were measured.
_STEP_TOKENS = {"cpu": 64}
_STEP_TOKENS_ELSEWHERE = 4096


def facts_at_once(
    model: nn.Module, layers: int, mlp_width: int, rows: int, tokens: int, answer_tokens: int, free: int | None = None
) -> int:
    """Return how many facts the value optimization may run in one batch: a cautious estimate.

    Args:
        layers: Layers that run with gradients.
        mlp_width: Width of the keys, `d_in`.
        rows: Rows of a fact: one per context, and one for the KL term.
        tokens: Tokens of the longest row.
        answer_tokens: Tokens of the longest answer, whose logits are kept.
        free: Bytes of free memory. Defaults to those of the model's device.
    """
    vocabulary, width = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    free = free_memory(input_device(model)) if free is None else free
    activations = layers * tokens * (WIDTHS * width + MLP_WIDTHS * mlp_width)
    logits = LOGITS * (answer_tokens + 1) * vocabulary
    return max(1, min(AT_MOST, int(SHARE * free / (4 * rows * (activations + logits)))))


def groups_by_length(
    lengths: Sequence[int], rows: int, most: int, device: torch.device, padded: bool = True
) -> list[slice]:
    """Return the batches of facts, as slices of the facts in ascending order of length.

    Each batch runs steps of its own. Without padding, the fewest batches that fit are cheapest. Where rows are padded
    to the longest of their batch, the cheapest of all splits is returned.

    Args:
        lengths: Tokens to run of each fact's longest row, ascending.
        rows: Rows of a fact.
        most: Facts that fit in one batch.
        device: The device that runs the model.
        padded: Whether rows are padded.
    """
    if not padded:
        count = -(-len(lengths) // most)
        bounds = [len(lengths) * number // max(count, 1) for number in range(count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]
    step = _STEP_TOKENS.get(device.type, _STEP_TOKENS_ELSEWHERE)
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n facts, and the start of their last batch
    for end in range(1, len(lengths) + 1):
        starts = range(max(0, end - most), end)
        best.append(min((best[start][0] + step + (end - start) * rows * lengths[end - 1], start) for start in starts))
    groups: list[slice] = []
    end = len(lengths)
    while end:
        groups.append(slice(best[end][1], end))
        end = best[end][1]
    return groups[::-1]


def free_memory(device: torch.device) -> int:
    """Return the bytes of free memory on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return platforms.available_memory()
