"""One job in several processes, each with the whole model: under `accelerate launch` or `torchrun`.

LGA, key statistics and sweeps share their work among the processes of the default group, and every process has the
whole result. The library starts no group: a program does, by accelerate's `Accelerator()` or `PartialState()`, and so
does the command line. As with all that processes do together, each of them must then make the same calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        """Return the values of all processes."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function to all items, each in one process, and return the results of all of them in order.

        Raises:
            ValueError: The function raised it in one of the processes; it is raised in all of them.
        """
        own: list[Result] = []
        failure: ValueError | None = None
        try:
            own.extend(map(function, self.share(items)))
        except ValueError as error:
            if self.count == 1:
                raise
            failure = error
        found = self.gather((own, failure))
        for _, failure in found:
            if failure is not None:
                raise failure
        return [found[index % self.count][0][index // self.count] for index in range(len(items))]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, which have one shape; the tensor itself is used up."""
        if self.count == 1:
            return tensor
        # NCCL sums what is on accelerators and nothing else.
        here = tensor.is_cpu and not any(name in distributed.get_backend_config() for name in ("gloo", "mpi"))
        moved = tensor.to(torch.accelerator.current_accelerator()) if here else tensor
        distributed.all_reduce(moved)
        return moved.to(tensor.device)


def processes_of(model: nn.Module) -> Processes:
    """Return the processes that each have this model; this one alone where there is no group, or they share a model."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Processes()
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):  # tensor parallel, or FSDP
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


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
