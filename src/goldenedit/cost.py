"""What a computation costs: seconds here, and floating-point operations, which hold on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """Seconds, and floating-point operations of matrix products, convolutions and attention."""

    seconds: float = 0.0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.flops + other.flops)


class _Counter(TorchDispatchMode):
    """torch's own formulas, without the module tree of its `FlopCounterMode`, which refuses `torch.autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count scores and weighted sum; torch's own formula refuses keys with fewer heads in some of its versions."""
    batch, heads, length, width = query.shape
    return int(2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1]))


def _attention_backward(
    slope: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    # Scores once more, then one product each for the gradients of values, weights, queries and keys.
    return 5 * _attention(query, key, value) // 2


_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention for name in _FUSED},
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _attention_backward for name in _FUSED},
}


@contextmanager
def measuring() -> Iterator[Callable[[], Cost]]:
    """Yield a function that tells the cost since the start of this context, or that of all of it once it has ended.

    Counting adds some percent to the seconds of small models. Factorisations and solves are not counted.

    Example:
        ```python
        >>> import torch
        >>> from goldenedit.cost import measuring
        >>> with measuring() as cost:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> cost().flops
        48
        ```
    """
    started = perf_counter()
    ended: list[float] = []
    with _Counter() as counter:
        yield lambda: Cost((ended[0] if ended else perf_counter()) - started, counter.flops)
    ended.append(perf_counter())
