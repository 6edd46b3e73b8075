"""Share a job among several processes that each hold the whole model, under `accelerate launch` or `torchrun`.

LGA, key statistics, sweeps and large batches of facts are split among the processes of the default group, and every
process gets the whole result. The library does not start a group. The program does, with accelerate's `Accelerator()`
or `PartialState()`, and so does the command line. As with all collective operations, each process must make the same
calls.

An error in one process is raised in all of them, with its message (`Processes.together`). A process that is killed
cannot notify the others: `torchrun` and `accelerate launch` then end them. Without such a launcher, they raise an error
when the loss of the connection is detected (with gloo, at once) or when the timeout of the group has passed.
"""

from __future__ import annotations

import atexit
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)  # whether this process works on its share of a job
_KNOWN_TO_ALL = "known_to_all_processes"  # attribute of exceptions that all processes have been notified of


@dataclass(frozen=True)
class Processes:
    """The processes that share a job; by default, only the current one.

    Attributes:
        index: Rank of this process.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of the items: every `count`-th one."""
        return items[self.index :: self.count]

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, in the order of their ranks.

        Raises:
            RuntimeError: Another process failed before this call, see `together`.
        """
        if self.count == 1:
            return [value]
        results = self._exchange(value, None)
        for rank, (_, failure) in enumerate(results):
            if failure is not None:
                raise _known_to_all(failure.error(rank, self.count))
        return [gathered for gathered, _ in results]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one process in all processes, which otherwise would wait for it.

        All processes enter and leave this context together. If one of them fails, the others raise an error when they
        next exchange something, at the latest at the end of the context. Contexts may be nested.

        Raises:
            ValueError: Another process raised a ValueError.
            OSError: Another process raised an OSError.
            RuntimeError: Another process failed in any other way, for example ran out of memory or was interrupted.
        """
        if self.count == 1:
            yield
            return
        try:
            yield
        except BaseException as error:  # the others wait also for a process that was interrupted
            if not getattr(error, _KNOWN_TO_ALL, False):
                self._report(error)
            raise
        self.gather(None)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function to all items, each in one of the processes, and return all results in order.

        An error in one process is raised in all of them, see `together`. While the function runs, this process shares
        nothing with the others: for `processes_of` it is alone.
        """
        with self.together():
            alone = _ALONE.set(self.count > 1 or _ALONE.get())
            try:
                own = [function(item) for item in self.share(items)]
            finally:
                _ALONE.reset(alone)
            shares = self.gather(own)
        return [shares[index % self.count][index // self.count] for index in range(len(items))]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, which must have the same shape.

        The tensor may be overwritten.

        Raises:
            RuntimeError: Another process failed before this call, see `together`.
        """
        if self.count == 1:
            return tensor
        # NCCL only sums tensors on accelerators.
        must_move = tensor.is_cpu and not any(name in distributed.get_backend_config() for name in ("gloo", "mpi"))
        total = tensor.to(torch.accelerator.current_accelerator()) if must_move else tensor
        self.gather(None)  # `all_reduce` cannot pass on that a process failed
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def _report(self, error: BaseException) -> None:
        """Send the error of this process to the others, which receive it when they next exchange something."""
        if isinstance(error, _OUT_OF_MEMORY):  # sending needs some memory itself
            traceback.clear_frames(error.__traceback__)
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        try:
            self._exchange(None, _Failure.of(error))
        except RuntimeError as connection_error:  # the others have ended
            logger.warning("The other processes could not be notified of the error in this one: %s", connection_error)
        _known_to_all(error)

    def _exchange(self, value: Any, failure: _Failure | None) -> list[tuple[Any, _Failure | None]]:
        """Return the value or the failure of each process."""
        results: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(results, (value, failure))
        except BaseException as error:  # this exchange was the only way to notify the others, so do not try again
            _known_to_all(error)
            raise
        return results


_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class _Failure:
    """A description of how a process failed, because not every exception can be sent to another process.

    Attributes:
        kind: Name of the exception's class.
        message: The exception's message.
        raised_as: Class of the exception that the other processes raise.
        out_of_memory: Whether the process ran out of memory.
    """

    kind: str
    message: str
    raised_as: type[Exception]
    out_of_memory: bool

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        classes = (kind for kind in (ValueError, OSError) if isinstance(error, kind))  # callers catch these
        return cls(
            kind=type(error).__name__,
            message=str(error),
            raised_as=next(classes, RuntimeError),
            out_of_memory=isinstance(error, _OUT_OF_MEMORY),
        )

    def error(self, rank: int, count: int) -> Exception:
        """Return the exception that the other processes raise after this failure of the process with this rank."""
        process = f"The process with rank {rank} of {count} processes"
        if self.out_of_memory:
            return self.raised_as(
                f"{process} ran out of memory ({self.message}). Each process holds the whole model. Start fewer "
                "processes per device, load the model in bfloat16, or edit fewer facts at once (EditConfig.batch_size)."
            )
        details = f": {self.message}" if self.message else ""
        return self.raised_as(f"{process} failed with {self.kind}{details}")


def _known_to_all(error: Failure) -> Failure:
    """Mark an exception as one that all processes have been notified of, and return it."""
    setattr(error, _KNOWN_TO_ALL, True)
    return error


def processes_of(model: nn.Module) -> Processes:
    """Return the processes that each hold this model.

    Only this one if there is no group, if the model is sharded, or while this process works on its share of a job.
    """
    if _ALONE.get() or not _has_group() or is_sharded(model):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process holds a part of the weights: tensor parallel, or FSDP."""
    if not _has_group():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _has_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class Shared(Protocol):
    """An object that several processes have a copy of."""

    @property
    def processes(self) -> Processes:
        """The processes that have a copy."""


Model = TypeVar("Model", bound=Shared)


def failing_together(
    function: Callable[Concatenate[Model, Parameters], Result],
) -> Callable[Concatenate[Model, Parameters], Result]:
    """Decorate a function that all processes of a model call, so that an error in one is raised in all of them."""

    @wraps(function)
    def wrapped(lm: Model, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with lm.processes.together():
            return function(lm, *args, **kwargs)

    return wrapped


def join_processes() -> tuple[Processes, torch.device | None]:
    """Join the group of processes that a launcher started. Programs call this; the library itself does not.

    Returns:
        The processes and the device of this one. The device is None if there is only one process, which may choose.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(), None
    from accelerate import PartialState

    # Without `cpu=True`, accelerate ignores other processes on machines without accelerators. The long timeout lets
    # processes wait for each other's work.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    # The threads of a group that is still there when the interpreter ends abort the process now and then.
    atexit.register(_leave)
    return Processes(state.process_index, state.num_processes), state.device


def _leave() -> None:
    if _has_group():
        distributed.destroy_process_group()
