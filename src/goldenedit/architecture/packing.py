"""Run rows of unequal length as one packed row without padding; only attention sees them as separate rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class PackedAttention(TorchFunctionMode):
    """Splits the packed row in each `scaled_dot_product_attention`, lets each row attend to its own cache, and repacks.

    The model's own attention masks are ignored, and each row is causal. Models that need other masks (sliding windows
    shorter than the rows, distance biases) give other results, and models with another attention function raise.

    Args:
        cache: `(keys, values)` of each layer, `(B, heads, T, d)` each, of all tokens of the rows.
        real: `(B, t)`, which of the `t` slots after the cached prefix hold tokens. The tokens of a row come first.
        seen: `(B, P)`, which of the first `P` cached tokens are the prefix of a row.
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
        prefix = seen[:, None].expand(-1, self._width, -1)
        self._mask = torch.cat([prefix, causal.expand(self._rows, -1, -1)], 2)[:, None]  # (B, 1, t, P + t)
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # cached keys and values, with room for the new ones
        self._layer: int | None = None

    @contextmanager
    def in_layers(self, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Use packed attention in the model's `layers`, by index, inside this context.

        Raises:
            RuntimeError: A layer does not call `scaled_dot_product_attention` exactly once.
        """
        pending = set(layers)
        self._layer = None

        def enter(index: int) -> Callable[..., None]:
            def start_layer(*_: Any) -> None:
                self._layer = index
                pending.discard(index)

            return start_layer

        def leave(*_: Any) -> None:
            if self._layer is not None:
                pending.add(self._layer)
            self._layer = None

        with ExitStack() as stack:
            for index, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(enter(index)).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
            stack.enter_context(self)
            yield
        if pending:
            raise RuntimeError(f"Layer {min(pending)} does not use scaled_dot_product_attention.")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        """Return the attention output of the packed row, `(1, heads, N, d)`."""
        layer, self._layer = self._layer, None
        if layer is None:
            raise RuntimeError("A layer uses attention twice, or attention runs outside the layers.")
        if query.shape[2] != len(self._slots):
            raise RuntimeError(f"A layer uses attention with queries of an unexpected shape, {tuple(query.shape)}.")
        # Layers may be on several devices.
        mask, slots, key_slots = (a.to(query.device) for a in (self._mask, self._slots, self._key_slots))
        if layer not in self._buffers:
            cached_keys, cached_values = self._cache[layer]
            self._buffers[layer] = self._with_room(cached_keys, key), self._with_room(cached_values, value)
        keys, values = (
            buffer.index_copy(0, key_slots, new[0].transpose(0, 1)).unflatten(0, (self._rows, -1)).transpose(1, 2)
            for buffer, new in zip(self._buffers[layer], (key, value), strict=True)
        )
        queries = query[0].transpose(0, 1)
        if self._padded:
            padded = queries.new_zeros(self._rows * self._width, *queries.shape[1:])
            queries = padded.index_copy(0, slots, queries)
        queries = queries.unflatten(0, (self._rows, self._width)).transpose(1, 2)
        options = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **options)
        flat = attended.transpose(1, 2).flatten(0, 1)
        return (flat.index_select(0, slots) if self._padded else flat).transpose(0, 1)[None]

    def _with_room(self, cached: Tensor, new: Tensor) -> Tensor:
        """Return the cached prefix of each row, then zeros for its new tokens, `(B * (P + t), heads, d)`.

        Cached heads are repeated to the number of heads of `new`.
        """
        if cached.shape[2] < self._prefix:
            raise ValueError("the cache does not hold all earlier tokens")
        prefix = cached[:, :, : self._prefix].repeat_interleave(new.shape[1] // cached.shape[1], 1)
        return functional.pad(prefix, (0, 0, 0, self._width)).transpose(1, 2).flatten(0, 1)
