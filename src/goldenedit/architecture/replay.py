"""Replay a model from the edited layer on. An edit does not change earlier layers, so they run only once.

A `Capture` holds the results of one whole forward. From it, a `Replayer` computes the same logits in one of four ways,
fastest first:

- `packed`: runs only the tokens from the subject's last token to the last one read, on top of cached keys and values.
  The tokens of all rows are packed into one row without padding;
- `suffix`: runs the same tokens, in rows padded to the longest one;
- `layers`: runs all tokens, from the edited layer on;
- `whole`: runs the whole model.

`Replayer.check` compares the replayed logits with the captured ones and falls back to a slower way if they differ. It
warns about that once per model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.caching import cache_argument, cache_of
from goldenedit.architecture.hooks import Record, hidden_argument, reading_logits, recording
from goldenedit.architecture.layers import Architecture
from goldenedit.architecture.packing import PackedAttention
from goldenedit.precision import matmul_precision

logger = logging.getLogger(__name__)

# What a model may raise if it does not accept a cache from outside: encoder-decoders, recurrent models.
NO_CACHE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# Largest difference between replayed and captured logits, relative to the largest captured logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_MATMUL_TOLERANCE = {"highest": 0.0, "high": 1e-2, "medium": 5e-2}  # if float32 products may be rounded
# For each way except the fastest: the extra work it does, and what the next faster way would do instead.
_SLOWER = {
    "suffix": ("texts are padded to one length", "running them without padding"),
    "layers": ("all tokens run at every step", "running only those from the subject on"),
    "whole": ("all layers run at every step", "running only those from the edited one on"),
}


@dataclass(frozen=True)
class Suffix:
    """The tokens of a batch that a replay needs: from the subject's last token to the last token read.

    Attributes:
        positions: `(B, t)`, their positions in their rows. Entries after the last needed token of a row are padding.
        real: `(B, t)`, which entries of `positions` are needed tokens.
        seen: `(B, P)`, which of the first `P` tokens of a row come before the needed ones.
        starts: `(B,)`, the number of needed tokens in all earlier rows.
    """

    positions: Tensor
    real: Tensor
    seen: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Batch:
    """Token sequences padded on the right, with the position that is edited and the positions to read logits at.

    Attributes:
        input_ids: `(B, T)`.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding.
        subject: `(B,)`, index of the last token of the subject.
        read_rows: `(M,)`, the row of each position to read.
        read_positions: `(M,)`, its index in the row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    subject: Tensor
    read_rows: Tensor
    read_positions: Tensor

    @property
    def flat_subject(self) -> Tensor:
        """Index of each subject's last token among all tokens, flattened row by row, `(B,)`."""
        rows = torch.arange(len(self.subject), device=self.subject.device)
        return rows * self.input_ids.shape[1] + self.subject

    @cached_property
    def suffix(self) -> Suffix:
        """The tokens that a replay needs."""
        first = self.subject
        last = first.scatter_reduce(0, self.read_rows, self.read_positions, "amax")
        lengths = last + 1 - first
        steps = torch.arange(int(lengths.max()), device=first.device)
        return Suffix(
            positions=(first[:, None] + steps).clamp(max=self.input_ids.shape[1] - 1),
            real=steps < lengths[:, None],
            seen=torch.arange(int(first.max()), device=first.device) < first[:, None],
            starts=lengths.cumsum(0) - lengths,
        )

    def select(self, rows: Tensor) -> tuple[Batch, Tensor]:
        """Return the batch restricted to `rows`, and a mask over the `M` logits for those that remain, `(M,)`."""
        new_index = torch.full((len(self.input_ids),), -1, device=rows.device)
        new_index[rows] = torch.arange(len(rows), device=rows.device)
        is_read = new_index[self.read_rows] >= 0
        batch = Batch(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.subject[rows],
            new_index[self.read_rows[is_read]],
            self.read_positions[is_read],
        )
        return batch, is_read


@dataclass(frozen=True)
class Capture:
    """The results of a whole forward of the unedited model that replays need.

    Attributes:
        batch: The sequences.
        logits: `(M, V)`, logits at the positions read.
        hidden: `(B, T, d_model)`, input of the layer to replay from; `(4, B, T, d_model)` in models with four streams.
        returns_tuple: Length of the tuple that a decoder layer returns, 0 if it returns a tensor.
        cache: `(keys, values)` of every layer, or None if the model has no such cache.
        record: Inputs and outputs of the recorded modules.
    """

    batch: Batch
    logits: Tensor
    hidden: Tensor
    returns_tuple: int
    cache: list[tuple[Tensor, Tensor]] | None
    record: Record

    def select(self, rows: Tensor) -> Capture:
        """Return the capture restricted to `rows`."""
        batch, is_read = self.batch.select(rows)
        cache = None
        if self.cache is not None:  # layers may be on several devices
            cache = [(keys[rows.to(keys.device)], values[rows.to(keys.device)]) for keys, values in self.cache]
        hidden = self.hidden.index_select(-3, rows.to(self.hidden.device))
        return replace(self, batch=batch, logits=self.logits[is_read], hidden=hidden, cache=cache)


@torch.no_grad()
def capture(
    model: nn.Module,
    architecture: Architecture,
    start: int,
    batch: Batch,
    modules: dict[str, nn.Module],
    use_cache: bool = True,
) -> Capture:
    """Run the whole model once, and keep what replays from layer `start` need.

    Args:
        modules: Modules whose inputs and outputs are recorded, by the name to record them under.
        use_cache: Keep keys and values. Without them, replays run all tokens.
    """
    layer = architecture.layer(model, start)
    hidden: list[Tensor] = []
    result: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden.append(hidden_argument(args, kwargs))
        result.append(output)

    def run(use_cache: bool) -> tuple[Any, Tensor, Record]:
        with recording(modules) as record, reading_logits(model, batch.read_rows, batch.read_positions) as logits_of:
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=use_cache)
            return output, logits_of(output), record

    handle = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        output, logits, record = run(use_cache)
    except NO_CACHE:
        hidden.clear()
        result.clear()
        output, logits, record = run(use_cache=False)
    finally:
        handle.remove()
    returns_tuple = len(result[0]) if isinstance(result[0], tuple) else 0
    past = cache_of(output)
    return Capture(batch, logits, hidden[0], returns_tuple, _cached_tensors(past, architecture.num_layers), record)


def _cached_tensors(past: Any, num_layers: int) -> list[tuple[Tensor, Tensor]] | None:
    layers = getattr(past, "layers", None)
    if layers is None or len(layers) != num_layers:
        return None
    tensors = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not all(isinstance(keys, Tensor) and isinstance(values, Tensor) for keys, values in tensors):
        return None
    return tensors  # type: ignore[return-value]


class Replayer:
    """Computes the logits of a capture again, under the hooks that are registered at that time.

    Args:
        model: The captured model, with unchanged weights.
        architecture: Its architecture.
        start: The layer to replay from. No hook may change an earlier layer.
        whole_rows: Replay all tokens: needed for edits that also act on tokens before the subject's last one.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, start: int, whole_rows: bool = False) -> None:
        self.model = model
        self.architecture = architecture
        self.start = start
        ways: dict[str, Callable[[Capture], Tensor]] = {
            "packed": self._packed,
            "suffix": self._suffix,
            "layers": self._layers,
            "whole": self._whole,
        }
        self._ways = list(ways.items())[2 if whole_rows else 0 :]
        self._attention: tuple[Capture, PackedAttention] | None = None  # of the last replayed capture

    @property
    def way(self) -> str:
        """The way in use: `packed`, `suffix`, `layers` or `whole`."""
        return self._ways[0][0]

    def subjects(self, batch: Batch) -> Tensor:
        """Return the index of each subject's last token among the replayed tokens, flattened row by row, `(B,)`."""
        if self.way == "packed":
            return batch.suffix.starts
        rows = torch.arange(len(batch.subject), device=batch.subject.device)
        if self.way == "suffix":
            return rows * batch.suffix.positions.shape[1]
        return batch.flat_subject

    def rows(self, batch: Batch) -> Tensor:
        """Return the row of each replayed token, flattened row by row, with those of padding."""
        if self.way == "packed":
            return batch.suffix.real.nonzero(as_tuple=True)[0]
        width = (batch.suffix.positions if self.way == "suffix" else batch.input_ids).shape[1]
        return torch.arange(len(batch.subject), device=batch.subject.device).repeat_interleave(width)

    def from_subjects(self, batch: Batch) -> Tensor:
        """Return which of the replayed tokens, flattened row by row, do not come before the subject's last one."""
        if self.way in ("packed", "suffix"):
            return torch.ones_like(self.rows(batch), dtype=torch.bool)
        positions = torch.arange(batch.input_ids.shape[1], device=batch.subject.device)
        return (positions >= batch.subject[:, None]).flatten()

    def reads(self, batch: Batch) -> Tensor:
        """Return the index of each position read among the replayed tokens, flattened row by row, `(M,)`."""
        rows, positions = batch.read_rows, batch.read_positions
        if self.way in ("packed", "suffix"):
            positions = positions - batch.subject[rows]
        if self.way == "packed":
            return batch.suffix.starts[rows] + positions
        width = (batch.suffix.positions if self.way == "suffix" else batch.input_ids).shape[1]
        return rows * width + positions

    def __call__(self, captured: Capture) -> Tensor:
        """Return the logits at the positions read, `(M, V)`."""
        return self._ways[0][1](captured)

    def check(self, captured: Capture, replayed: Callable[[], Tensor] | None = None) -> Tensor:
        """Compare replayed logits of the unedited model with the captured ones, and fall back to a way that agrees.

        If the way is slower than expected for the model, a warning says so once.

        Args:
            replayed: Replays the capture under an edit that changes nothing; by default, without any edit.

        Returns:
            The replayed logits, `(M, V)`.
        """
        # In half precision, the rounding errors of the layers add up like independent errors. Correct replays were
        # measured at 0.4 to 0.6 of this tolerance, wrong ones at 2 and more.
        rounding = torch.finfo(captured.logits.dtype).eps * self.architecture.num_layers**0.5
        relative = _TOLERANCE.get(captured.logits.dtype, rounding)
        if captured.logits.dtype == torch.float32:
            relative = max(relative, _MATMUL_TOLERANCE[matmul_precision()])
        tolerance = relative * captured.logits.abs().max().item()
        replayed = replayed or (lambda: self(captured))
        reason = None
        while self.way != "whole":
            try:
                logits = replayed()
                difference = (logits.detach() - captured.logits).abs().max().item()
            except torch.OutOfMemoryError:  # slower ways need more
                raise
            except NO_CACHE as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if difference <= tolerance:
                    self._warn_if_slow(reason)
                    return logits
                problem = f"they differ by {difference:.1e}"
                del logits  # this frees the autograd graph too
            logger.info(
                "Replay %r does not reproduce the logits of %s (%s).", self.way, type(self.model).__name__, problem
            )
            if self.way != "packed" or may_pack(self.model):  # without packing, `suffix` is the expected way
                reason = problem
            self._attention = None
            self._ways.pop(0)
        self._warn_if_slow(reason)
        return replayed()

    def _warn_if_slow(self, reason: str | None) -> None:
        """Warn once per model about a slow way and the reason for it; None if the way is as fast as expected."""
        topic = f"replay by {self.way}"
        if reason is None or topic in self.architecture.warned:
            return
        self.architecture.warned.add(topic)
        extra_work, faster_way = _SLOWER[self.way]
        logger.warning(
            "Editing and evaluating %s take longer than usual: %s, because %s does not reproduce its logits (%s). "
            "Results are the same.",
            type(self.model).__name__,
            extra_work,
            faster_way,
            reason,
        )

    def _whole(self, captured: Capture) -> Tensor:
        batch = captured.batch
        with reading_logits(self.model, batch.read_rows, batch.read_positions) as logits_of:
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            return logits_of(output)

    def _layers(self, captured: Capture) -> Tensor:
        with self._from_start(captured.hidden, captured.returns_tuple):
            return self._whole(captured)

    def _packed(self, captured: Capture) -> Tensor:
        batch, suffix = captured.batch, captured.batch.suffix
        if not may_pack(self.model):
            raise ValueError("the model does not take position_ids, or does not use scaled_dot_product_attention")
        rows, steps = suffix.real.nonzero(as_tuple=True)
        positions = suffix.positions[rows, steps]
        device = captured.hidden.device
        hidden = captured.hidden[rows.to(device), positions.to(device)]
        read = self.reads(batch)
        layers = {
            index: self.architecture.layer(self.model, index)
            for index in range(self.start, self.architecture.num_layers)
        }
        with (
            self._from_start(hidden[None], captured.returns_tuple),
            reading_logits(self.model, torch.zeros_like(read), read) as logits_of,
            self._packed_attention(captured).in_layers(layers),
        ):
            output = self.model(
                input_ids=batch.input_ids[rows, positions][None],
                attention_mask=torch.ones_like(positions)[None],
                position_ids=positions[None],
                use_cache=False,
            )
            return logits_of(output)

    def _packed_attention(self, captured: Capture) -> PackedAttention:
        if self._attention is None or self._attention[0] is not captured:
            if captured.cache is None:
                raise ValueError("the model has no cache of keys and values")
            suffix = captured.batch.suffix
            self._attention = captured, PackedAttention(captured.cache, suffix.real, suffix.seen)
        return self._attention[1]

    def _suffix(self, captured: Capture) -> Tensor:
        from transformers import DynamicCache

        batch, suffix = captured.batch, captured.batch.suffix
        if captured.cache is None:
            raise ValueError("the model has no cache of keys and values")
        positions, prefix = suffix.positions, suffix.seen.shape[1]
        mask = torch.cat([suffix.seen, suffix.real], dim=1).to(batch.attention_mask.dtype)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids.gather(1, positions), "attention_mask": mask}
        if takes_positions(self.model):
            inputs["position_ids"] = positions
        past = DynamicCache()
        for layer, (keys, values) in enumerate(captured.cache):
            past.update(keys[:, :, :prefix], values[:, :, :prefix], layer)
        index = positions[:, :, None].expand(-1, -1, captured.hidden.shape[-1])
        hidden = captured.hidden.gather(1, index.to(captured.hidden.device))
        read = batch.read_positions - batch.subject[batch.read_rows]
        with (
            self._from_start(hidden, captured.returns_tuple),
            reading_logits(self.model, batch.read_rows, read) as logits_of,
        ):
            return logits_of(self.model(**inputs, **cache_argument(self.model, past), use_cache=True))

    @contextmanager
    def _from_start(self, hidden: Tensor, returns_tuple: int) -> Iterator[None]:
        """Skip the layers before `start`, and give `hidden` to that layer."""
        layers = [self.architecture.layer(self.model, index) for index in range(self.start)]

        def identity(*args: Any, **kwargs: Any) -> Any:
            unchanged = hidden_argument(args, kwargs)
            return (unchanged, *[None] * (returns_tuple - 1)) if returns_tuple else unchanged

        def substitute(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            replaced = hidden_argument(args, kwargs)
            kwargs = {name: hidden if value is replaced else value for name, value in kwargs.items()}
            return tuple(hidden if value is replaced else value for value in args), kwargs

        forwards = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts a forward on the instance
        handle = self.architecture.layer(self.model, self.start).register_forward_pre_hook(substitute, with_kwargs=True)
        try:
            for layer in layers:
                layer.forward = identity  # type: ignore[method-assign]
            yield
        finally:
            handle.remove()
            for layer, forward in zip(layers, forwards, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward


def may_pack(model: nn.Module) -> bool:
    """Return whether a packed replay is worth trying; `Replayer.check` finds out whether it works."""
    # transformers has no public name for this setting. If the private one disappears, packing is always tried.
    return takes_positions(model) and getattr(model.config, "_attn_implementation", "sdpa") == "sdpa"


def takes_positions(model: nn.Module) -> bool:
    """Return whether the model's forward takes `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters
