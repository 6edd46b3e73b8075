"""Rows of unequal length run as one row, without padding: attention alone is given them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self._rows, self._width, self._prefix = len(real), real.shape[1], seen.shape[1]
        rows, steps = real.nonzero(as_tuple=True)
        self._padded = not bool(real.all())
        self._slots = rows * self._width + steps
        self._key_slots = rows * (self._prefix + self._width) + self._prefix + steps
        causal = torch.ones(self._width, self._width, dtype=torch.bool, device=real.device).tril()
        before = seen[:, None].expand(-1, self._width, -1)
        self._mask = torch.cat([before, causal.expand(self._rows, -1, -1)], 2)[:, None]  # (B, 1, t, P + t)
        self._behind: dict[int, tuple[Tensor, Tensor]] = {}  # what is cached, with room for what is new
        self._layer: int | None = None

    @contextmanager
    def among(self, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Run the model's `layers` so. Raises RuntimeError where one of them does not attend exactly once."""
        waiting = set(layers)
        self._layer = None

        def enter(index: int) -> Callable[..., None]:
            def note(*_: Any) -> None:
                self._layer = index
                waiting.discard(index)

            return note

        def leave(*_: Any) -> None:
            if self._layer is not None:
                waiting.add(self._layer)
            self._layer = None

        with ExitStack() as stack:
            for index, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(enter(index)).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
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
        if layer is None:
            raise RuntimeError("A layer attends twice, or something attends outside the layers.")
        if query.shape[2] != len(self._slots):
            raise RuntimeError(f"A layer attends with queries of shape {tuple(query.shape)}.")
        # Layers may be on several devices.
        mask, slots, key_slots = (a.to(query.device) for a in (self._mask, self._slots, self._key_slots))
        if layer not in self._behind:
            cached_keys, cached_values = self._cache[layer]
            self._behind[layer] = self._with_room(cached_keys, key), self._with_room(cached_values, value)
        keys, values = (
            behind.index_copy(0, key_slots, new[0].transpose(0, 1)).unflatten(0, (self._rows, -1)).transpose(1, 2)
            for behind, new in zip(self._behind[layer], (key, value), strict=True)
        )
        queries = query[0].transpose(0, 1)
        if self._padded:
            empty = queries.new_zeros(self._rows * self._width, *queries.shape[1:])
            queries = empty.index_copy(0, slots, queries)
        queries = queries.unflatten(0, (self._rows, self._width)).transpose(1, 2)
        kept = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
        found = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **kept)
        flat = found.transpose(1, 2).flatten(0, 1)
        return (flat.index_select(0, slots) if self._padded else flat).transpose(0, 1)[None]

    def _with_room(self, cached: Tensor, new: Tensor) -> Tensor:
        """Return what is cached of each row and zeros for what is new, `(B * (P + t), heads, d)`, heads as of `new`."""
        if cached.shape[2] < self._prefix:
            raise ValueError("the cache has forgotten tokens")
        before = cached[:, :, : self._prefix].repeat_interleave(new.shape[1] // cached.shape[1], 1)
        return functional.pad(before, (0, 0, 0, self._width)).transpose(1, 2).flatten(0, 1)
