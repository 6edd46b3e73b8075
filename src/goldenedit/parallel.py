"""One job in several processes, each with the whole model: under `accelerate launch` or `torchrun`.

LGA, key statistics and sweeps share their work among the processes of the default group, and every process has the
whole result. The library starts no group: a program does, by accelerate's `Accelerator()` or `PartialState()`, and so
does the command line. As with all that processes do together, each of them must then make the same calls.

What fails in one process, in whatever way, fails in all of them with its message (`Processes.together`). A process
that is killed can tell nobody: `torchrun` and `accelerate launch` end the others then. Without such a launcher, they
raise an error once the connection is seen to be lost (with gloo at once), or the timeout of their group has passed.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=BaseException)

_KNOWN_TO_ALL = "known_to_all_processes"  # attribute of an exception that no process is waiting to hear of


@dataclass(frozen=True)
class Processes:
    """The processes that share a job; by default this one alone.

    Attributes:
        index: Number of this process.
        count: Number of all.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's items."""
        return items[self.index :: self.count]

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes.

        Raises:
            RuntimeError: Another process failed before it came here, see `together`.
        """
        if self.count == 1:
            return [value]
        parts = self._exchange(value, None)
        for rank, (_, failure) in enumerate(parts):
            if failure is not None:
                raise _known_to_all(failure.error(rank, self.count))
        return [part for part, _ in parts]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what fails in one process fail in all of them, which otherwise would wait for it.

        All processes enter this context and leave it together. Those inside it that do not fail hear of it where they
        next exchange something, at the latest at its end. Contexts may lie one in the other.

        Raises:
            ValueError: Another process raised one.
            OSError: Another process raised one.
            RuntimeError: Another process failed in any other way: it ran out of memory, or was interrupted.
        """
        if self.count == 1:
            yield
            return
        try:
            yield
        except BaseException as error:  # the others wait for a process that was interrupted too
            if not getattr(error, _KNOWN_TO_ALL, False):
                self._tell(error)
            raise
        self.gather(None)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function to all items, each in one process, and return the results of all of them in order.

        What the function raises in one of the processes is raised in all of them, see `together`. It must exchange
        nothing itself.
        """
        with self.together():
            parts = self.gather([function(item) for item in self.share(items)])
        return [parts[index % self.count][index // self.count] for index in range(len(items))]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, which have one shape; the tensor itself is used up.

        Raises:
            RuntimeError: Another process failed before it came here, see `together`.
        """
        if self.count == 1:
            return tensor
        # NCCL sums what is on accelerators and nothing else.
        here = tensor.is_cpu and not any(name in distributed.get_backend_config() for name in ("gloo", "mpi"))
        moved = tensor.to(torch.accelerator.current_accelerator()) if here else tensor
        self.gather(None)  # a sum cannot say that one process failed
        distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def _tell(self, error: BaseException) -> None:
        """Tell the other processes, wherever they next exchange something, how this one failed."""
        if isinstance(error, _OUT_OF_MEMORY):  # telling takes some memory itself
            traceback.clear_frames(error.__traceback__)
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        try:
            self._exchange(None, _Failure.of(error))
        except RuntimeError as lost:  # they are gone themselves
            logger.warning("The other processes could not be told of the failure of this one: %s", lost)
        _known_to_all(error)

    def _exchange(self, value: Any, failure: _Failure | None) -> list[tuple[Any, _Failure | None]]:
        """Return what each process brings: a value, or how it failed."""
        parts: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(parts, (value, failure))
        except BaseException as error:  # the others are in the same exchange: there is no other way to tell them
            _known_to_all(error)
            raise
        return parts


_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class _Failure:
    """How a process failed, in words: not every exception can be sent to another process.

    Attributes:
        kind: Name of the exception's class.
        message: What it said.
        raised_as: Class of the exception that the other processes raise.
        out_of_memory: Whether there was no memory left.
    """

    kind: str
    message: str
    raised_as: type[Exception]
    out_of_memory: bool

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        known = (kind for kind in (ValueError, OSError) if isinstance(error, kind))  # which callers catch
        return cls(type(error).__name__, str(error), next(known, RuntimeError), isinstance(error, _OUT_OF_MEMORY))

    def error(self, rank: int, count: int) -> Exception:
        """Return what the others raise when the process of this rank has failed so."""
        who = f"The process of rank {rank}, one of {count},"
        if self.out_of_memory:
            return self.raised_as(
                f"{who} ran out of memory ({self.message}). Each process holds the whole model: start fewer of them on "
                "a device, load the model in bfloat16, or edit fewer facts at once (EditConfig.batch_size)."
            )
        said = f": {self.message}" if self.message else ""
        return self.raised_as(f"{who} failed with {self.kind}{said}")


def _known_to_all(error: Failure) -> Failure:
    """Mark an exception as one that all processes know of, and return it."""
    setattr(error, _KNOWN_TO_ALL, True)
    return error


def processes_of(model: nn.Module) -> Processes:
    """Return the processes that each have this model; this one alone where there is no group, or they share a model."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Processes()
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):  # tensor parallel, or FSDP
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


class Shared(Protocol):
    """What several processes have a copy of."""

    @property
    def processes(self) -> Processes:
        """These processes."""


Model = TypeVar("Model", bound=Shared)


def failing_together(
    function: Callable[Concatenate[Model, Parameters], Result],
) -> Callable[Concatenate[Model, Parameters], Result]:
    """Let a function of a model, which all processes that have it call, fail in all of them where it fails in one."""

    @wraps(function)
    def wrapped(lm: Model, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with lm.processes.together():
            return function(lm, *args, **kwargs)

    return wrapped


def join_processes() -> tuple[Processes, torch.device | None]:
    """Join the processes that a launcher started this program with: what a program does, and no library.

    Returns:
        The processes, and the device of this one; None where it is alone, and may choose.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(), None
    from accelerate import PartialState

    # Without accelerators it must be told to take notice of other processes; these wait as long as it takes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    return Processes(state.process_index, state.num_processes), state.device
