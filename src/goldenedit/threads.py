"""Threads of one model: many may run it at once, and one may change it alone.

An edit switches adapters on and off while it works. A thread that ran the model meanwhile would read the base model's
answers, or a half-built adapter. So it waits, and so does an edit while other threads run the model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class ModelLock:
    """A lock with readers, which run a model, and one writer, which changes it. A thread may hold it more than once.

    Copies and pickles of it are new locks, because a copied model is another one.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._readers: Counter[int] = Counter()  # by thread
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0  # writers, before whom no new reader begins

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model inside this context, beside other threads that run it."""
        me = get_ident()
        with self._changed:
            if self._writer != me and not self._readers[me]:
                self._changed.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._changed.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the model inside this context, while no other thread runs or changes it.

        Raises:
            RuntimeError: This thread is running the model, so it would wait for itself.
        """
        me = get_ident()
        with self._changed:
            if self._writer != me:
                if self._readers[me]:
                    raise RuntimeError("The model cannot be changed while it runs, as from a hook.")
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._writer is None and not +self._readers)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()  # readers wait for it, if it was interrupted
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                self._changed.notify_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def alone(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method of an EditModel wait until no other thread runs or changes the model."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with args[0].threads.changing():  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return run
