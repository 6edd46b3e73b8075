"""Key statistics: the second moment `C = E[k k^T]` of what enters a down projection.

An edit is written along `C^-1 k*`: the direction that answers to the fact's key and least to everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import Call, evaluating, outside_inference_mode, stop_forward
from goldenedit.architecture.layers import Architecture
from goldenedit.cache import write_atomically
from goldenedit.devices import execution_device, input_device
from goldenedit.editing.rows import context_length, padding_id
from goldenedit.parallel import Processes, processes_of

logger = logging.getLogger(__name__)

_WIDEST_EXPERTS = 16_384  # a second moment of 1 GiB, and as wide as the widest MLPs that are one matrix


@dataclass(frozen=True)
class KeyStatistics:
    """Second moment of the keys of one layer, made invertible by a ridge relative to its spectrum.

    Attributes:
        second_moment: `(d_in, d_in)`, uncentred `E[k k^T]`; None for the identity.
        ridge: Added to the diagonal, in units of the mean eigenvalue `trace(C) / d_in`.
        contrast: `(d_in, c)`, keys that the identity holds as well, as `solve` takes them; None where there are none.
    """

    second_moment: Tensor | None
    ridge: float = 0.0
    contrast: Tensor | None = None

    @cached_property
    def _factor(self) -> Tensor:
        assert self.second_moment is not None
        C = self.second_moment.double()
        ridge = self.ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        try:
            return torch.linalg.cholesky(C + ridge)
        except RuntimeError as error:
            raise ValueError(
                f"The key statistics cannot be inverted with ridge={self.ridge}: raise EditConfig.ridge, or take "
                "more text (EditConfig.covariance_tokens)."
            ) from error

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the second moment without its ridge, ascending, and its eigenvectors as columns, float64.

        Raises:
            ValueError: There is none: the covariance is the identity.
        """
        if self.second_moment is None:
            raise ValueError("The identity has no null space: give EditConfig.covariance a source of text.")
        values, vectors = torch.linalg.eigh(self.second_moment.double())
        return values, vectors

    @property
    def _mean_eigenvalue(self) -> float:
        return 1.0 if self.second_moment is None else self.second_moment.diagonal().double().mean().item()

    def trace(self, width: int) -> float:
        """Return the trace of `C`, that of the identity of `width` where there is none."""
        return self._mean_eigenvalue * width

    def with_contrast(self, contrast: Tensor) -> KeyStatistics:
        """Return statistics that hold `trace(C) D D^T` as well: what `solve` does with a contrast, for many facts."""
        width = len(contrast)
        if self.second_moment is None:
            contrast = contrast if self.contrast is None else torch.cat([self.contrast, contrast], 1)
            if contrast.shape[1] < width:  # as it is: the keys of fused experts are too wide for a matrix
                return KeyStatistics(None, contrast=contrast)
        eye = torch.eye(width, dtype=torch.float64)
        D = contrast.double().cpu()
        C = eye  # which needs no ridge
        if self.second_moment is not None:
            C = self.second_moment.double().cpu() + self.ridge * self._mean_eigenvalue * eye
        return KeyStatistics(C + self._mean_eigenvalue * width * D @ D.T)

    def solve(self, keys: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Return `(C + ridge * mean eigenvalue * I + trace(C) D D^T)^-1 keys`, `(d_in, N)`, in float64.

        Args:
            keys: `(d_in, N)`.
            contrast: `(d_in, c)` keys to stay silent on, in units of `trace(C)^0.5` (see `relative_contrast`): their
                weight beside the other text is then the same for every model.

        Raises:
            ValueError: The second moment is not positive definite, even with the ridge.
        """
        solved = self._solve(keys)
        contrasts = [found for found in (self.contrast, contrast) if found is not None]
        if not contrasts:
            return solved
        contrast = torch.cat(contrasts, 1)
        D = contrast.double() * (self._mean_eigenvalue * len(contrast)) ** 0.5
        # Woodbury: c is small, and the factor of C serves all facts.
        CD = self._solve(D)
        inner = torch.eye(D.shape[1], dtype=D.dtype, device=D.device) + D.T @ CD
        return solved - CD @ torch.linalg.solve(inner, CD.T @ keys.to(CD))

    def _solve(self, keys: Tensor) -> Tensor:
        if self.second_moment is None:
            return keys.double()
        return torch.cholesky_solve(keys.to(self._factor.device).double(), self._factor)


def relative_contrast(contrast: Tensor, weight: float) -> Tensor:
    """Scale `(d_in, c)` keys so that the mean of `D D^T` over them has `weight` times the trace of `C` in `solve`."""
    return contrast.double() * (weight / contrast.double().square().sum()) ** 0.5


@outside_inference_mode()
@torch.no_grad()
def second_moments(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
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
    rows = _token_rows(tokenizer, texts, min(256, context_length(model.config) or 256), max_tokens)
    count = sum(map(len, rows))
    sums: dict[int, Tensor] = {}
    device = input_device(model)
    processes = processes_of(model) if processes is None else processes
    batches = processes.share(list(_batches(rows, batch_tokens, padding_id(tokenizer))))
    own = sum(int(mask.sum()) for _, mask in batches)
    with evaluating(model), tqdm(total=own, desc="Key statistics", unit="token", leave=False) as progress:
        for tokens, mask in batches:
            with stop_forward() as stop, ExitStack() as stack:
                for layer in layers:
                    add = _adder(model, architecture, layer, sums, mask.reshape(-1).nonzero()[:, 0])
                    hook = _accumulate(add, stop if layer == max(layers) else None)
                    module = architecture.down_projection(model, layer)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
            progress.update(int(mask.sum()))
    for layer in layers:
        if layer not in sums:  # more processes than batches
            module = architecture.down_projection(model, layer)
            sums[layer] = torch.zeros([architecture.shape(model, layer)[1]] * 2, device=execution_device(module))
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


def check_widths(model: nn.Module, architecture: Architecture, layers: Sequence[int]) -> None:
    """Raise ValueError where the keys of a layer's experts are too wide for a second moment."""
    for layer in layers:
        width = architecture.shape(model, layer)[1]
        if layer in architecture.experts and width > _WIDEST_EXPERTS:
            raise ValueError(
                f"The keys of all experts of layer {layer} are {width} wide together, too wide for a second moment "
                f"(at most {_WIDEST_EXPERTS}): edit with EditConfig(covariance='identity')."
            )


def _adder(
    model: nn.Module, architecture: Architecture, layer: int, sums: dict[int, Tensor], tokens: Tensor
) -> Callable[[Call], None]:
    """Return a function that adds the keys of some tokens to the sum of a layer."""

    def add(call: Call) -> None:
        keys = architecture.keys(model, layer, call, tokens)
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
    """Read a cached second moment; None where there is none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("second_moment")
    except Exception as error:  # safetensors raises its own error class, which it does not export
        logger.warning("Ignoring the damaged cache file %s (%s).", path, error)
        return None


def save_second_moment(path: Path, second_moment: Tensor) -> None:
    """Write a second moment as safetensors, atomically."""
    write_atomically(path, save({"second_moment": second_moment.cpu().contiguous()}, {"format": "pt"}))
