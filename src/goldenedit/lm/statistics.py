"""Second moments of keys, computed on text in one pass, and the files that they are kept in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import Call, evaluating, outside_inference_mode, stop_forward
from goldenedit.cache import is_kept, keep
from goldenedit.devices import execution_device
from goldenedit.lm.base import TokenizedModel
from goldenedit.parallel import Processes

logger = logging.getLogger(__name__)

_WIDEST_EXPERTS = 16_384  # a second moment of 1 GiB, and as wide as the widest MLPs that are one matrix


@outside_inference_mode()
@torch.no_grad()
def second_moments(
    lm: TokenizedModel,
    texts: Sequence[str],
    layers: Sequence[int],
    max_tokens: int,
    batch_tokens: int = 2048,
    processes: Processes | None = None,
) -> dict[int, Tensor]:
    """Return `E[k k^T]` of each wanted layer over the tokens of `texts`, accumulated in float32, all in one pass.

    Under `accelerate launch` or torchrun the texts are shared among the processes (see `goldenedit.parallel`).

    Args:
        texts: Texts, taken from the front until `max_tokens` tokens are seen; cut to 256 tokens each.
        layers: Layers whose keys are wanted; the model runs no further than the last of them.
        max_tokens: Number of tokens to look at.
        batch_tokens: Tokens a forward, padding included.
        processes: Those that have the same texts; by default all that have the model.

    Raises:
        ValueError: `texts` hold no tokens, or a key is not finite.
    """
    rows = _token_rows(lm.tokenizer, texts, min(256, lm.max_length or 256), max_tokens)
    count = sum(map(len, rows))
    sums: dict[int, Tensor] = {}
    device = lm.device
    processes = lm.processes if processes is None else processes
    batches = processes.share(list(_batches(rows, batch_tokens, lm.padding_id)))
    own = sum(int(mask.sum()) for _, mask in batches)
    with (
        processes.together(),
        evaluating(lm.model),
        tqdm(total=own, desc="Key statistics", unit="token", leave=False) as progress,
    ):
        for tokens, mask in batches:
            with stop_forward() as stop, ExitStack() as stack:
                for layer in layers:
                    add = _adder(lm, layer, sums, mask.reshape(-1).nonzero()[:, 0])
                    hook = _accumulate(add, stop if layer == max(layers) else None)
                    module = lm.architecture.down_projection(lm.model, layer)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                lm.model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
            progress.update(int(mask.sum()))
    for layer in layers:
        if layer not in sums:  # more processes than batches
            module = lm.architecture.down_projection(lm.model, layer)
            sums[layer] = torch.zeros([lm.architecture.shape(lm.model, layer)[1]] * 2, device=execution_device(module))
        sums[layer] = processes.total(sums[layer])
    moments = {layer: (total / count).cpu() for layer, total in sums.items()}  # where keys and cached moments are
    for layer, moment in moments.items():
        if not moment.isfinite().all():
            raise ValueError(f"Keys of layer {layer} are not finite: load the model in float32 or bfloat16.")
    return moments


def _token_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int, max_tokens: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    count = 0
    for text in texts:
        ids = list(tokenizer(text, truncation=True, max_length=longest)["input_ids"])[: max_tokens - count]
        if len(ids) > 1:
            rows.append(ids)
            count += len(ids)
        if count >= max_tokens:
            break
    if not rows:
        raise ValueError("There is no text to compute key statistics on.")
    return rows


def check_widths(lm: TokenizedModel, layers: Sequence[int]) -> None:
    """Raise ValueError where the keys of a layer's experts are too wide for a second moment."""
    for layer in layers:
        width = lm.architecture.shape(lm.model, layer)[1]
        if layer in lm.architecture.experts and width > _WIDEST_EXPERTS:
            raise ValueError(
                f"The keys of all experts of layer {layer} are {width} wide together, too wide for a second moment "
                f"(at most {_WIDEST_EXPERTS}): edit with EditConfig(covariance='identity')."
            )


def _adder(lm: TokenizedModel, layer: int, sums: dict[int, Tensor], tokens: Tensor) -> Callable[[Call], None]:
    """Return a function that adds the keys of some tokens to the sum of a layer."""

    def add(call: Call) -> None:
        keys = lm.architecture.keys(lm.model, layer, call, tokens)
        if layer not in sums:
            sums[layer] = keys.new_zeros(keys.shape[1], keys.shape[1])
        sums[layer].addmm_(keys.T, keys)

    return add


def _accumulate(add: Callable[[Call], None], stop: Callable[[], None] | None) -> Callable[..., None]:
    """Return a hook that adds what a module is called with, and ends the forward where nothing behind is wanted."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        add((args, kwargs))
        if stop is not None:
            stop()

    return hook


def _batches(rows: Iterable[list[int]], batch_tokens: int, pad: int) -> Iterable[tuple[Tensor, Tensor]]:
    group: list[list[int]] = []
    for row in sorted(rows, key=len):
        if group and len(row) * (len(group) + 1) > batch_tokens:
            yield _padded(group, pad)
            group = []
        group.append(row)
    if group:
        yield _padded(group, pad)


def _padded(group: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in group)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in group])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
    return ids, mask


def load_second_moment(path: Path) -> Tensor | None:
    """Read a cached second moment; None where there is none, or the file is damaged or cannot be read."""
    if not is_kept(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("second_moment")
    except Exception as error:  # safetensors raises its own error class, which it does not export
        logger.warning("Ignoring the cache file %s, which cannot be read (%s).", path, error)
        return None


def save_second_moment(path: Path, second_moment: Tensor) -> None:
    """Write a second moment as safetensors, atomically; where the cache cannot be written, a warning says so."""
    keep(path, save({"second_moment": second_moment.cpu().contiguous()}, {"format": "pt"}))
