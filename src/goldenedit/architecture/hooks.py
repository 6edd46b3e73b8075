"""Context managers that read and change what flows through a model while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.products import faster_products
from goldenedit.architecture.quantized import giving_backward, keeping_integers

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a module was called with


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
    """Inputs and outputs of modules, and all they were called with, by the name they were recorded under."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
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
            record.calls[name] = args, kwargs
            record.inputs[name] = hidden_argument(args, kwargs).detach()
            record.outputs[name] = first_tensor(output).detach().clone()

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield record


@contextmanager
def adding(additions: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add vectors to the outputs of modules, each at one token.

    Args:
        additions: For each module `(tokens, vectors)`: `tokens` `(B,)` indices into all tokens of the output, row after
            row, and `vectors` `(B, d_out)`.
    """

    def hook(tokens: Tensor, vectors: Tensor) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Out of place: the graph of the step needs the output as it was.
            flat = output.view(-1, output.shape[-1])
            return flat.index_add(0, tokens.to(output.device), vectors.to(output.device, output.dtype)).view_as(output)

        return add

    with ExitStack() as stack:
        for module, (tokens, vectors) in additions.items():
            stack.callback(module.register_forward_hook(hook(tokens, vectors)).remove)
        yield


@contextmanager
def watching_gradients(
    first_layer: nn.Module, modules: Collection[nn.Module], take: Callable[[nn.Module, Tensor, Tensor], None]
) -> Iterator[list[Tensor]]:
    """Call `take(module, input, gradient of the output)` for each module as a backward pass reaches it.

    Weights may be frozen: the graph starts at what enters `first_layer`. Differentiate the loss by the tensors of the
    list that is yielded, which are there once the model has run, and no parameter gets a `.grad`.
    """
    roots: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs = args[0].detach()

        # A hook on the tensor as it is now: it fires with this output's own gradient, whatever is added in place later,
        # and what it needs is used at once, so that no layer's gradient outlives its layer.
        def reached(gradient: Tensor) -> None:
            take(module, held.pop(), gradient)

        held = [inputs]
        output.register_hook(reached)

    def require_gradient(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = hidden_argument(args, kwargs)
        root = given.detach().requires_grad_()
        roots.append(root)
        kwargs = {name: root if value is given else value for name, value in kwargs.items()}
        return tuple(root if value is given else value for value in args), kwargs

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        stack.callback(first_layer.register_forward_pre_hook(require_gradient, with_kwargs=True).remove)
        stack.enter_context(torch.enable_grad())
        yield roots


@contextmanager
def adding_delta(module: nn.Module, A: Tensor, B: Tensor) -> Iterator[None]:
    """Add the low-rank change `B @ A` of its weight to what a linear map says; `A` `(r, d_in)`, `B` `(d_out, r)`."""

    def add(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        return output + x @ A.to(x).T @ B.to(x).T

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


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
def outside_inference_mode() -> Iterator[None]:
    """Leave the caller's `torch.inference_mode()` inside this context; a function may be decorated with it.

    No graph takes in what is made in that mode, now or later: neither what is differentiated here, nor factors and
    statistics that are kept. Gradients stay off but for who switches them on.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, uncompiled, with frozen weights and by the fastest products of the same precision.

    Then give each module back what it had.

    Modules that keep integers for weights are told that they train: bitsandbytes' maps otherwise turn to kernels
    without a backward on CPUs (4 bit), or round each token by what the others are (8 bit). Dropout is in none of them.
    """
    # For gradients of weights, which nothing here asks for, autograd would keep the input of every linear map. By name:
    # accelerate puts another parameter in the place of one that it offloads.
    trained = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    modes = {module: module.training for module in model.modules()}
    # Compiled code passes hooks by that came after it, and compiling the hooks would take longer than running them.
    compiled = "torch._dynamo" in sys.modules or not _has_dynamo()
    model.eval()
    for module in keeping_integers(model):
        module.training = True
    try:
        for module, name in trained:
            getattr(module, name).requires_grad_(False)
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance, giving_backward(model), faster_products(model):
            yield
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_()
        for module, training in modes.items():
            module.training = training


@cache
def _has_dynamo() -> bool:
    """Tell whether torch's compiler has the private name by which it is known to be unused, and so not worth waking."""
    return find_spec("torch._dynamo") is not None
