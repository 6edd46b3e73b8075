"""Measure the cost of a computation: seconds, and floating-point operations, which do not depend on the machine.

torch has no public way to observe the operators that run, so this module uses private names. They are looked up when
something is first measured. An operator that this version of torch does not have, or calls with other arguments, is not
counted. Nothing else depends on these names.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

logger = logging.getLogger(__name__)

_ROWS, _TIMED = 64, 0.2  # tokens of most runs of an edit, and seconds
_WIDEST = 4096  # wider maps are no faster, and may not fit into memory


@dataclass(frozen=True)
class Cost:
    """Seconds, and floating-point operations of products, attention, Cholesky factors, eigenvectors and solves."""

    seconds: float = 0.0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.flops + other.flops)


class _NoCounter:
    """Counts nothing; used if torch has no `TorchDispatchMode`."""

    flops = 0

    def __enter__(self) -> _NoCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


@cache
def _counter_class() -> type[Any]:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        logger.debug("Floating-point operations are not counted: %s", error)
        return _NoCounter

    class Counter(TorchDispatchMode):
        """Counts operations by torch's own formulas and those of this file.

        torch's `FlopCounterMode` also tracks modules, which fails with `torch.autograd.grad`.

        Attributes:
            flops: Number of floating-point operations that ran in this context.
        """

        def __init__(self) -> None:
            super().__init__()
            self.flops = 0
            self._formulas = _formulas()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            formula = self._formulas.get(getattr(func, "overloadpacket", None))
            if formula is not None:
                try:
                    self.flops += formula(*args, **kwargs, out_val=result)
                except Exception as error:  # the formula expects other arguments; the operator itself has run
                    logger.debug("A call of %s is not counted (%s: %s).", func, type(error).__name__, error)
            return result

    return Counter


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count scores and weighted sum; in some versions, torch's own formula fails for keys with fewer heads."""
    batch, heads, length, width = query.shape
    return int(2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1]))


def _attention_backward(
    slope: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    # The scores again, then one product each for the gradients of values, attention weights, queries and keys.
    return 5 * _attention(query, key, value) // 2


def _linear(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _cholesky(matrix: torch.Tensor, **_: Any) -> int:
    return matrix.numel() * matrix.shape[-1] // 3


def _cholesky_solve(right: torch.Tensor, factor: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * right.numel() * factor.shape[-1]


def _triangular_solve(factor: torch.Tensor, right: torch.Tensor, **_: Any) -> int:
    return right.numel() * factor.shape[-1]


def _solve(matrix: torch.Tensor, right: torch.Tensor, **_: Any) -> int:
    return 2 * matrix.numel() * matrix.shape[-1] // 3 + 2 * right.numel() * matrix.shape[-1]


def _eigh(matrix: torch.Tensor, *_: Any, **__: Any) -> int:
    return 9 * matrix.numel() * matrix.shape[-1]  # divide and conquer, with eigenvectors


_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_FORMULAS: dict[str, Callable[..., int]] = {
    **{f"aten._scaled_dot_product_{name}": _attention for name in _FUSED},
    **{f"aten._scaled_dot_product_{name}_backward": _attention_backward for name in _FUSED},
    "mkldnn._linear_pointwise": _linear,
    "aten.linalg_cholesky_ex": _cholesky,
    "aten.cholesky_solve": _cholesky_solve,
    "aten.linalg_solve_triangular": _triangular_solve,
    "aten._linalg_solve_ex": _solve,
    "aten._linalg_eigh": _eigh,
}


@cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    """Return the formula for each operator that has one, from torch and from this file."""
    try:
        from torch.utils.flop_counter import flop_registry
    except ImportError as error:
        logger.debug("Floating-point operations of products are not counted: %s", error)
        flop_registry = {}
    formulas: dict[Any, Callable[..., int]] = dict(flop_registry)
    for name, formula in _FORMULAS.items():
        namespace, _, operator_name = name.partition(".")
        operator = getattr(getattr(torch.ops, namespace), operator_name, None)
        if operator is None:
            logger.debug("Calls of %s are not counted: torch has no such operator.", name)
        else:
            formulas[operator] = formula
    return formulas


@contextmanager
def measuring() -> Iterator[Callable[[], Cost]]:
    """Yield a function that returns the cost since the start of this context, up to now or to the end of the context.

    Counting makes small models a few percent slower.

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
    with _counter_class()() as counter:
        yield lambda: Cost((ended[0] if ended else perf_counter()) - started, counter.flops)
    ended.append(perf_counter())


@torch.no_grad()
def product_speed(d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the floating-point operations a second of a linear map on the CPU, as it is now, on a few rows of text.

    It is timed for a fifth of a second.
    """
    d_in, d_out = min(d_in, _WIDEST), min(d_out, _WIDEST)
    x, weight = torch.ones(_ROWS, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
    torch.nn.functional.linear(x, weight)  # the first call is slower
    calls, started, seconds = 0, perf_counter(), 0.0
    while seconds < _TIMED:
        torch.nn.functional.linear(x, weight)
        calls, seconds = calls + 1, perf_counter() - started
    return 2 * _ROWS * d_in * d_out * calls / seconds


PHASES = {  # phases that may take long, in their order, by what they do
    "layer selection": "Finding the layer",
    "key statistics": "Measuring the model on other text",
    "MLP statistics": "Measuring the model on other text",
    "output gradients": "Measuring the model on other text",
    "spare neurons": "Looking for neurons that are hardly used",
    "first marker": "Finding what markers of subjects start from",
    "wordings": "Asking the base model about the subjects",
    "gates": "Teaching when to answer",
    "markers": "Marking the subjects",
    "values": "Teaching the answers",
    "training": "Training",
    "verification": "Asking the model",
    "audit": "Making the change that the listed facts explain",
    "evaluation: base model": "Asking the base model",
    "evaluation: comparison": "Comparing with the base model",
    "evaluation: answers": "Asking the edited model",
}

_phases: ContextVar[dict[str, Cost] | None] = ContextVar("phases", default=None)
_announce: ContextVar[Callable[[str], None] | None] = ContextVar("announce", default=None)


@contextmanager
def profiling() -> Iterator[dict[str, Cost]]:
    """Yield a dict that collects the cost of each phase of the library's work inside this context, by phase name.

    Example:
        ```python
        with profiling() as phases:
            model.edit("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome")
        phases["values"].flops
        ```
    """
    costs: dict[str, Cost] = {}
    token = _phases.set(costs)
    try:
        yield costs
    finally:
        _phases.reset(token)


@contextmanager
def announcing(announce: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the name of each phase that begins in this context."""
    token = _announce.set(announce)
    try:
        yield
    finally:
        _announce.reset(token)


@contextmanager
def showing_phases() -> Iterator[None]:
    """Show which phase runs in a line like a progress bar, on a terminal or in a notebook; not inside `announcing`.

    Elsewhere, as in a file or in a notebook without ipywidgets, each step of a bar below this line would be a line.
    """
    has_widgets = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
    is_seen = sys.stderr.isatty() or has_widgets
    if _announce.get() is not None or not is_seen:
        yield
        return
    from transformers.utils.logging import tqdm  # which imports much

    with tqdm(total=0, desc="Editing", bar_format="{desc} ... {elapsed}", leave=False) as line:

        def show(phase: str) -> None:
            if (text := PHASES.get(phase)) is not None:
                line.set_description_str(text)

        with announcing(show):
            yield


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Record the cost of this context as a phase if `profiling` is active; nested phases count as part of it.

    If `announcing` is active, the phase is told when it begins.
    """
    if (announce := _announce.get()) is not None:
        announce(name)
    costs = _phases.get()
    if costs is None:
        yield
        return
    token = _phases.set(None)
    try:
        with measuring() as cost:
            yield
    finally:
        _phases.reset(token)
    costs[name] = costs.get(name, Cost()) + cost()
