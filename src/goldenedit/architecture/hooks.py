"""Context managers that read and change what flows through a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class _ForwardEnded(Exception):
    """Ends a forward that has delivered all that was asked of it."""


@contextmanager
def stop_forward() -> Iterator[Callable[[], None]]:
    """Yield a function that, called in a hook, ends the forward running inside this context.

    Example:
        ```python
        with stop_forward() as stop, recording({"layer": layer}) as record:
            handle = layer.register_forward_hook(lambda *_: stop())
            model(**inputs)  # layers behind `layer` do not run
        ```
    """

    def stop() -> None:
        raise _ForwardEnded

    with suppress(_ForwardEnded):
        yield stop


class Record:
    """Inputs and outputs of modules, by the name they were recorded under."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}


def first_tensor(value: Any) -> Tensor:
    """Return the hidden state in what a layer takes or returns: a tensor, or the first tensor of a sequence."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        for item in value:
            if isinstance(item, Tensor):
                return item
    raise TypeError(f"Expected a tensor or a sequence with one, got {type(value).__name__}.")


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a module."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError("The module was called without a hidden state.")


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[Record]:
    """Record the input and the output of each module in `modules` during the forwards inside this context.

    Outputs are cloned: some models (Falcon) add to the output of a projection in place.
    """
    record = Record()

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            record.inputs[name] = hidden_argument(args, kwargs).detach()
            record.outputs[name] = first_tensor(output).detach().clone()

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield record


@contextmanager
def adding(additions: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add vectors to the outputs of modules, one vector a row, each at one position.

    Args:
        additions: For each module `(positions, vectors)`: `positions` `(B,)` token indices, `vectors` `(B, d_out)`.
            The output may be `(B, T, d_out)` or flattened, `(B * T, d_out)`.
    """

    def hook(positions: Tensor, vectors: Tensor) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            rows = torch.arange(len(positions), device=output.device)
            shaped = output.view(len(positions), -1, output.shape[-1])
            # Out of place: the graph of the step needs the output as it was.
            added = shaped.index_put(
                (rows, positions.to(output.device)), vectors.to(output.device, output.dtype), accumulate=True
            )
            return added.view_as(output)

        return add

    with ExitStack() as stack:
        for module, (positions, vectors) in additions.items():
            stack.callback(module.register_forward_hook(hook(positions, vectors)).remove)
        yield


@contextmanager
def reading_logits(model: nn.Module, rows: Tensor, positions: Tensor) -> Iterator[Callable[[Any], Tensor]]:
    """Make the language-model head compute logits only at `(rows[m], positions[m])`.

    Yields:
        A function that turns the model's output into those logits, `(M, V)`, in the dtype of the model.
    """
    gathered = False

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal gathered
        gathered = True
        hidden = args[0]
        picked = hidden[rows.to(hidden.device), positions.to(hidden.device)]
        return (picked.unsqueeze(0), *args[1:])

    def logits_of(output: Any) -> Tensor:
        if gathered:
            return output.logits[0]
        device = output.logits.device
        return output.logits[rows.to(device), positions.to(device)]

    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        yield logits_of
        return
    handle = head.register_forward_pre_hook(gather)
    try:
        yield logits_of
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, then give each module back the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
