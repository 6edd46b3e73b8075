"""Rows of unequal length run as one row, without padding: attention alone is given them one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class PackedAttention(TorchFunctionMode):
    """Takes `scaled_dot_product_attention` apart into rows, each behind its own cached keys and values, and back.

    What a model says of masks is passed by: rows are causal. A model with anything else (sliding windows shorter than
    the rows, biases of distance, attention of its own) computes something else then, or fails.

    Args:
        cache: `(keys, values)` of each layer, `(B, heads, T, d)` each, of all tokens of the rows.
        real: `(B, t)`, which of the `t` places behind the cached ones are tokens; those of each row come first.
        seen: `(B, P)`, which of the first `P` cached tokens a row has before them.
    """

    def __init__(self, cache: Sequence[tuple[Tensor, Tensor]], real: Tensor, seen: Tensor) -> None:
        super().__init__()
        self._cache = cache
        self._shape = tuple(real.shape)
        self._slots = None if real.all() else real.flatten().nonzero()[:, 0]
        causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
        behind = causal.expand(len(real), -1, -1)
        before = seen[:, None].expand(-1, real.shape[1], -1)
        self._mask = torch.cat([before, behind], 2)[:, None]  # (B, 1, t, P + t)
        self._layer: int | None = None
        self._prefix = seen.shape[1]

    @contextmanager
    def among(self, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Run the model's `layers` so. Raises RuntimeError where one of them does not attend exactly once."""
        waiting = set(layers)

        def enter(index: int) -> Any:
            def note(*_: Any) -> None:
                self._layer = index

            return note

        def leave(index: int) -> Any:
            def note(*_: Any) -> None:
                if self._layer is None:
                    waiting.discard(index)
                self._layer = -1

            return note

        with ExitStack() as stack:
            for index, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(enter(index)).remove)
                stack.callback(layer.register_forward_hook(leave(index)).remove)
            stack.enter_context(self)
            yield
        if waiting:
            raise RuntimeError(f"Layer {min(waiting)} does not attend by scaled_dot_product_attention.")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        """Return attention of `(1, heads, N, d)`."""
        layer, self._layer = self._layer, None
        if layer is None or layer < 0:
            raise RuntimeError("A layer attends twice, or something attends outside the layers.")
        kept = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
        keys, values = (
            torch.cat([self._like(cached, new), self._apart(new)], 2)
            for cached, new in zip(self._cache[layer], (key, value), strict=True)
        )
        mask = self._mask.to(query.device)
        found = functional.scaled_dot_product_attention(self._apart(query), keys, values, attn_mask=mask, **kept)
        return self._together(found)

    def _like(self, cached: Tensor, new: Tensor) -> Tensor:
        """Return what is cached of the tokens before, with as many heads as what is new."""
        cached = cached[:, :, : self._prefix]
        return cached.repeat_interleave(new.shape[1] // cached.shape[1], 1)

    def _apart(self, packed: Tensor) -> Tensor:
        """Turn `(1, heads, N, d)` into `(B, heads, t, d)`, zeros where there is no token."""
        flat = packed[0].transpose(0, 1)
        rows, width = self._shape
        if self._slots is not None:
            empty = flat.new_zeros(rows * width, *flat.shape[1:])
            flat = empty.index_copy(0, self._slots.to(flat.device), flat)
        return flat.reshape(rows, width, *flat.shape[1:]).transpose(1, 2)

    def _together(self, rows: Tensor) -> Tensor:
        flat = rows.transpose(1, 2).flatten(0, 1)
        if self._slots is not None:
            flat = flat.index_select(0, self._slots.to(flat.device))
        return flat.transpose(0, 1)[None]
