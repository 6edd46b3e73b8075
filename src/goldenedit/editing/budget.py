"""Which facts are run side by side: as many as fit into memory, and as alike in length as pays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from goldenedit.devices import input_device

# Tensors of the model's width, and of the MLP's, that autograd keeps for a token and a layer; and copies of the logits.
_WIDTHS, _MLP_WIDTHS, _LOGITS = 16, 4, 4
_SHARE = 0.5  # of the free memory
_MOST = 16  # more side by side is no faster
# What a step costs beside its tokens (weights to read, operators to start), in tokens. Measured on CPUs: 40 to 80.
_STEP_TOKENS = {"cpu": 64}
_STEP_TOKENS_ELSEWHERE = 4096


def facts_at_once(
    model: nn.Module, layers: int, mlp_width: int, rows: int, tokens: int, answer_tokens: int, free: int | None = None
) -> int:
    """Return how many facts the value optimization may run side by side: an estimate that errs on the small side.

    Args:
        layers: Layers that run with gradients.
        mlp_width: Width of the keys, `d_in`.
        rows: Rows of a fact, one a context.
        tokens: Tokens of its longest row.
        answer_tokens: Tokens of its answer, whose logits are kept.
        free: Bytes of free memory; those of the model's device by default.
    """
    vocabulary, width = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    free = free_memory(input_device(model)) if free is None else free
    kept = layers * tokens * (_WIDTHS * width + _MLP_WIDTHS * mlp_width) + _LOGITS * (answer_tokens + 1) * vocabulary
    return max(1, min(_MOST, int(_SHARE * free / (4 * rows * kept))))


def groups_by_length(
    lengths: Sequence[int], rows: int, most: int, device: torch.device, padded: bool = True
) -> list[slice]:
    """Return which facts to run side by side, slices of facts in ascending order of length.

    Each group costs steps of its own. Without padding the cheapest is as few groups as fit; where all rows of a group
    are padded to its longest, it is found among all ways to split the facts.

    Args:
        lengths: Tokens that are run of each fact's rows, ascending.
        rows: Rows of a fact, one a context.
        most: Facts that fit side by side.
        padded: Whether rows are padded.
    """
    if not padded:
        count = -(-len(lengths) // most)
        bounds = [len(lengths) * number // max(count, 1) for number in range(count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]
    step = _STEP_TOKENS.get(device.type, _STEP_TOKENS_ELSEWHERE)
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n facts, and where their last group starts
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
    """Return the bytes of memory that are free on a device; a gigabyte where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    try:
        with open("/proc/meminfo") as file:  # what is free, and what the system would give back at once
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 30
