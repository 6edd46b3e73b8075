"""Second moments of keys and of output gradients, computed on text in one pass, and the files they are cached in."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import (
    Call,
    evaluating,
    inputs_at,
    outside_inference_mode,
    reading_logits,
    recording,
    stop_forward,
    watching_gradients,
)
from goldenedit.cache import is_kept, keep
from goldenedit.devices import execution_device
from goldenedit.editors.gated import InputMoments
from goldenedit.lm.base import TokenizedModel
from goldenedit.parallel import Processes

logger = logging.getLogger(__name__)

WIDEST_EXPERTS = 16_384  # their second moment takes 1 GiB; the widest dense MLPs are as wide


@outside_inference_mode()
@torch.no_grad()
def second_moments(
    lm: TokenizedModel,
    texts: Sequence[str],
    layers: Sequence[int],
    max_tokens: int,
    batch_tokens: int = 2048,
    processes: Processes | None = None,
    hold_keys: bool = False,
) -> dict[int, Tensor]:
    """Return `E[k k^T]`, `(d_in, d_in)`, of each layer over the tokens of texts, summed in float32 in one pass.

    All of them are in memory at once. Under `accelerate launch` or torchrun the processes share the texts (see
    `goldenedit.parallel`).

    Args:
        texts: Texts, cut to 256 tokens each and read in order until `max_tokens` tokens are seen.
        layers: Layers to compute the moments of. A forward stops at the last of them.
        max_tokens: Largest number of tokens.
        batch_tokens: Tokens of a forward, padding included.
        processes: Processes that have the same texts. Defaults to all that hold the model.
        hold_keys: Return the keys of the n tokens, `(n, d_in)`, divided by the square root of n, instead of their
            moment, where they are fewer than they are wide.

    Raises:
        ValueError: `texts` have no tokens, or a key is not finite.
    """
    rows = _token_rows(lm.tokenizer, texts, min(256, lm.max_length or 256), max_tokens)
    count = sum(map(len, rows))
    processes = lm.processes if processes is None else processes
    every = list(_batches(rows, batch_tokens, lm.padding_id))
    starts = list(accumulate((int(mask.sum()) for _, mask in every), initial=0))
    batches = processes.share(list(zip(every, starts, strict=False)))
    num_tokens = sum(int(mask.sum()) for (_, mask), _ in batches)
    sums = {layer: _KeySum.of(lm, layer, count if hold_keys else None) for layer in layers}
    with (
        processes.together(),
        evaluating(lm.model),
        tqdm(total=num_tokens, desc="Key statistics", unit="token", leave=False) as progress,
    ):
        for (tokens, mask), start in batches:
            with stop_forward() as stop, ExitStack() as stack:
                for layer in layers:
                    add = partial(sums[layer].add, mask.reshape(-1).nonzero()[:, 0], start)
                    hook = _key_hook(add, stop if layer == max(layers) else None)
                    module = lm.architecture.down_projection(lm.model, layer)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                lm.model(input_ids=tokens.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
            progress.update(int(mask.sum()))
    moments: dict[int, Tensor] = {}
    for layer in layers:
        of_layer = sums.pop(layer)
        moments[layer] = processes.total(of_layer.total).div_(of_layer.divisor(count)).cpu()  # as cached moments are
        if not moments[layer].isfinite().all():
            raise ValueError(f"The keys of layer {layer} are not finite. Load the model in float32 or bfloat16.")
    return moments


@outside_inference_mode()
@torch.no_grad()
def input_moments(
    lm: TokenizedModel,
    texts: Sequence[str],
    sites: Mapping[int, nn.Module],
    max_tokens: int,
    batch_tokens: int = 2048,
) -> dict[int, InputMoments]:
    """Return the moments of the inputs of MLPs, and the energies of their neurons, over the tokens of texts.

    Args:
        texts: Texts, cut and read as in `second_moments`.
        sites: A linear map of each layer that reads the input of its MLP.
        max_tokens: Largest number of tokens.
        batch_tokens: Tokens of a forward, padding included.

    Raises:
        ValueError: `texts` have no tokens, or an input is not finite.
    """
    rows = _token_rows(lm.tokenizer, texts, min(256, lm.max_length or 256), max_tokens)
    count = sum(map(len, rows))
    sums: dict[int, list[Tensor]] = {}
    named = {f"in {layer}": site for layer, site in sites.items()}
    named |= {f"out {layer}": lm.architecture.down_projection(lm.model, layer) for layer in sites}
    with evaluating(lm.model), tqdm(total=count, desc="MLP statistics", unit="token", leave=False) as progress:
        for tokens, mask in _batches(rows, batch_tokens, lm.padding_id):
            with stop_forward() as stop, recording(named) as record, ExitStack() as stack:
                last = named[f"out {max(sites)}"]
                stack.callback(last.register_forward_hook(lambda *_, stop=stop: stop()).remove)
                lm.model(input_ids=tokens.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
            read = mask.reshape(-1).nonzero()[:, 0]
            for layer in sites:
                inputs, neurons = (inputs_at(record.calls[f"{side} {layer}"], read) for side in ("in", "out"))
                moments = [inputs.sum(0), inputs.T @ inputs, neurons.square().sum(0)]
                sums[layer] = [a + b for a, b in zip(sums[layer], moments, strict=True)] if layer in sums else moments
            progress.update(int(mask.sum()))
    found = {layer: InputMoments(*((total / count).cpu() for total in totals)) for layer, totals in sums.items()}
    for layer, of_layer in found.items():
        if not (of_layer.second_moment.isfinite().all() and of_layer.energy.isfinite().all()):
            raise ValueError(f"The MLP of layer {layer} is not finite. Load the model in float32 or bfloat16.")
    return found


@outside_inference_mode()
def gradient_moments(
    lm: TokenizedModel, texts: Sequence[str], layers: Sequence[int], max_tokens: int, seed: int, batch_tokens: int = 256
) -> dict[int, Tensor]:
    """Return `E[g g^T]`, `(d_out, d_out)`, of each layer over the tokens of texts, summed in float32.

    `g` is the gradient, at the output of a layer's down projection at one token, of the summed cross entropy of a text
    whose labels are drawn from the model's own distribution. So the moment is a factor of the Fisher matrix
    (K-FAC: Martens and Grosse 2015, arXiv 1503.05671).

    Args:
        texts: Texts, cut and read as in `second_moments`.
        layers: Layers to compute the moments of. A backward stops at the first of them.
        max_tokens: Largest number of tokens.
        seed: Seed of the labels.
        batch_tokens: Tokens of a forward and backward, padding included.

    Raises:
        ValueError: `texts` have no tokens, or a gradient is not finite.
    """
    rows = _token_rows(lm.tokenizer, texts, min(256, lm.max_length or 256), max_tokens)
    count = sum(map(len, rows))
    generator = torch.Generator().manual_seed(seed)
    modules = {lm.architecture.down_projection(lm.model, layer): layer for layer in layers}
    sums: dict[int, Tensor] = {}

    def add(module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        # Padding comes last, so no token that counts attends to it, and its gradients are zeros.
        flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        sums[modules[module]] = sums.get(modules[module], 0.0) + flat.T @ flat

    with evaluating(lm.model), tqdm(total=count, desc="Output gradients", unit="token", leave=False) as progress:
        for tokens, mask in _batches(rows, batch_tokens, lm.padding_id):
            read_rows, positions = (mask > 0).nonzero().T
            first = lm.architecture.layer(lm.model, min(layers))
            with (
                watching_gradients(first, modules, add) as roots,
                reading_logits(lm.model, read_rows, positions) as logits_of,
            ):
                output = lm.model(input_ids=tokens.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
                logits = logits_of(output).float()
                if not logits.isfinite().all():
                    raise ValueError("The model's logits are not finite. Load it in float32 or bfloat16.")
                labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                torch.autograd.grad(loss, roots, allow_unused=True)
            progress.update(int(mask.sum()))
    moments = {layer: (sums[layer] / count).cpu() for layer in layers}
    for layer, moment in moments.items():
        if not moment.isfinite().all():
            raise ValueError(
                f"The output gradients of layer {layer} are not finite. Load the model in float32 or bfloat16."
            )
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
        raise ValueError(
            "The text for key statistics has no two tokens to read. Set EditConfig.covariance to another source, or "
            "EditConfig.covariance_tokens to more."
        )
    return rows


def check_widths(lm: TokenizedModel, layers: Sequence[int]) -> None:
    """Raise ValueError if the keys of a layer's fused experts are too wide for a second moment."""
    for layer in layers:
        width = lm.architecture.shape(lm.model, layer)[1]
        if layer in lm.architecture.experts and width > WIDEST_EXPERTS:
            raise ValueError(
                f"The keys of all experts of layer {layer} have {width} dimensions together, too many for a second "
                f"moment (at most {WIDEST_EXPERTS}). Edit with EditConfig(covariance='identity')."
            )


@dataclass(frozen=True)
class _KeySum:
    """The sum of `k k^T` over tokens or, where `holds_keys`, all keys `k`, `(n, d_in)`."""

    lm: TokenizedModel
    layer: int
    total: Tensor
    holds_keys: bool

    @classmethod
    def of(cls, lm: TokenizedModel, layer: int, count: int | None) -> _KeySum:
        """Return an empty sum; of the keys, if a number of tokens is given that is below their width."""
        width = lm.architecture.shape(lm.model, layer)[1]
        rows = width if count is None else min(count, width)
        device = execution_device(lm.architecture.down_projection(lm.model, layer))
        return cls(lm, layer, torch.zeros(rows, width, device=device), rows < width)

    def add(self, tokens: Tensor, start: int, call: Call) -> None:
        """Add the keys of a call at the positions `tokens`. Those are tokens `start`, ... of the text."""
        keys = self.lm.architecture.keys(self.lm.model, self.layer, call, tokens)
        if self.holds_keys:
            self.total[start : start + len(keys)] = keys
        else:
            self.total.addmm_(keys.T, keys)

    def divisor(self, count: int) -> float:
        """Return what the sum over `count` tokens is divided by."""
        return math.sqrt(count) if self.holds_keys else count


def _key_hook(add: Callable[[Call], None], stop: Callable[[], None] | None) -> Callable[..., None]:
    """Return a hook that passes a module's arguments to `add`, and then ends the forward if `stop` is given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        add((args, kwargs))
        if stop is not None:
            stop()

    return hook


def _batches(rows: Iterable[list[int]], batch_tokens: int, pad: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield ids and attention mask of batches of rows of similar length."""
    group: list[list[int]] = []
    for row in sorted(rows, key=len):
        if group and len(row) * (len(group) + 1) > batch_tokens:
            yield padded(group, pad)
            group = []
        group.append(row)
    if group:
        yield padded(group, pad)


def padded(group: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return the ids and the attention mask of rows that are padded on the right, `(B, T)` each."""
    length = max(len(row) for row in group)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in group])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
    return ids, mask


def load_second_moment(path: Path) -> Tensor | None:
    """Read a cached second moment, or keys. Return None if the file is missing, damaged or cannot be read."""
    tensors = load_tensors(path, ["second_moment"])
    return None if tensors is None else tensors[0]


def load_tensors(path: Path, names: Sequence[str]) -> list[Tensor] | None:
    """Read cached tensors. Return None if the file is missing, damaged or cannot be read."""
    if not is_kept(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names]
    except Exception as error:  # safetensors raises its own error class, which it does not export
        logger.warning("Ignoring the cache file %s, which cannot be read (%s).", path, error)
        return None


def save_second_moment(path: Path, second_moment: Tensor) -> None:
    """Write a second moment as safetensors, atomically. A failure is logged as a warning."""
    save_tensors(path, {"second_moment": second_moment})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically. A failure is logged as a warning."""
    keep(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))
