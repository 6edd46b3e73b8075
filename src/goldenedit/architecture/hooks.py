"""Context managers that read and change the activations and gradients of a running model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.products import faster_products
from goldenedit.architecture.quantized import giving_backward, keeping_integers

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a module's forward


class _ForwardEnded(Exception):
    """Ends a forward early, once it has computed what is needed."""


@contextmanager
def stop_forward() -> Iterator[Callable[[], None]]:
    """Yield a function that ends the forward running inside this context when a hook calls it.

    Example:
        ```python
        with stop_forward() as stop, recording({"layer": layer}) as record:
            handle = layer.register_forward_hook(lambda *_: stop())
            model(**inputs)  # layers after `layer` do not run
        ```
    """

    def stop() -> None:
        raise _ForwardEnded

    with suppress(_ForwardEnded):
        yield stop


class Record:
    """The inputs, outputs and call arguments of modules, by the name each was recorded under."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}


def first_tensor(value: Any) -> Tensor:
    """Return the hidden state of a layer's input or output: the tensor itself, or the first tensor of a sequence."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        for item in value:
            if isinstance(item, Tensor):
                return item
    raise TypeError(f"Expected a tensor or a sequence that contains one, got {type(value).__name__}.")


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a module."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError("The module was called without a hidden state.")


def inputs_at(call: Call, tokens: Tensor | None = None) -> Tensor:
    """Return the hidden state among the arguments of a call, token after token, `(n, d)` float32.

    Args:
        tokens: `(n,)`, indices into all tokens of the call, in order; None for all tokens.
    """
    hidden = hidden_argument(*call).detach()
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return (hidden if tokens is None else hidden[tokens.to(hidden.device)]).float()


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
        additions: `(tokens, vectors)` for each module. `tokens` `(B,)` are indices into the output's tokens, flattened
            row by row; `vectors` is `(B, d_out)`.
    """

    def hook(tokens: Tensor, vectors: Tensor) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Not in place: the autograd graph needs the original output.
            flat = output.view(-1, output.shape[-1])
            return flat.index_add(0, tokens.to(output.device), vectors.to(output.device, output.dtype)).view_as(output)

        return add

    with ExitStack() as stack:
        for module, (tokens, vectors) in additions.items():
            stack.callback(module.register_forward_hook(hook(tokens, vectors)).remove)
        yield


@contextmanager
def adding_products(additions: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add to the output of linear maps, at each token, a vector times the product of a detector and the input there.

    Args:
        additions: `(detectors, vectors)` for each module, `(n, d_in)` and `(n, d_out)`: one of each for each token of
            the input, flattened row by row.
    """

    def hook(detectors: Tensor, vectors: Tensor) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            factors = (inputs * detectors.to(inputs)).sum(-1, keepdim=True)
            return output + (factors * vectors.to(output)).view_as(output)

        return add

    with ExitStack() as stack:
        for module, (detectors, vectors) in additions.items():
            stack.callback(module.register_forward_hook(hook(detectors, vectors)).remove)
        yield


@contextmanager
def watching_gradients(
    first_layer: nn.Module, modules: Collection[nn.Module], take: Callable[[nn.Module, Tensor, Tensor], None]
) -> Iterator[list[Tensor]]:
    """Call `take(module, input, output_gradient)` for each module when a backward pass reaches it.

    Weights may be frozen: the graph starts at the input of `first_layer`. The yielded list is filled when the model
    runs. Differentiate the loss with respect to its tensors, so that no parameter gets a `.grad`.
    """
    roots: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs = args[0].detach()

        # The hook is on the tensor as it is now, so it gets the gradient of this output, also where the model adds to
        # the tensor in place later. It frees the input after use, so that no input outlives its layer's backward.
        def take_gradient(gradient: Tensor) -> None:
            take(module, pending.pop(), gradient)

        pending = [inputs]
        output.register_hook(take_gradient)

    def require_gradient(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = hidden_argument(args, kwargs)
        root = hidden.detach().requires_grad_()
        roots.append(root)
        kwargs = {name: root if value is hidden else value for name, value in kwargs.items()}
        return tuple(root if value is hidden else value for value in args), kwargs

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        stack.callback(first_layer.register_forward_pre_hook(require_gradient, with_kwargs=True).remove)
        stack.enter_context(torch.enable_grad())
        yield roots


@contextmanager
def adding_delta(module: nn.Module, A: Tensor, B: Tensor) -> Iterator[None]:
    """Run a linear map as if `B @ A` were added to its weight; `A` is `(r, d_in)`, `B` is `(d_out, r)`."""

    def add(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        return output + x @ A.to(x).T @ B.to(x).T

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def adding_delta_by_row(module: nn.Module, factors: Sequence[tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """Run a linear map as if each row of the batch had a change `B @ A` of its own; None for a row without one."""
    rows: dict[tuple[int, int], list[int]] = {}  # rows with the same factors share a product
    for row, pair in enumerate(factors):
        if pair is not None:
            rows.setdefault((id(pair[0]), id(pair[1])), []).append(row)
    groups = [(*factors[members[0]], members) for members in rows.values()]  # type: ignore[misc]

    def add(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(len(factors), -1, args[0].shape[-1])  # some models pass the tokens of all rows as one list
        changed = output.reshape(len(factors), -1, output.shape[-1]).clone()
        for A, B, members in groups:
            changed[members] += x[members] @ A.to(x).T @ B.to(x).T
        return changed.view(output.shape)

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reading_logits(model: nn.Module, rows: Tensor, positions: Tensor) -> Iterator[Callable[[Any], Tensor]]:
    """Make the language-model head compute logits only at the positions `(rows[m], positions[m])`.

    Yields:
        A function that takes the model's output and returns these logits, `(M, V)`, in the model's dtype.
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
    """Leave the caller's `torch.inference_mode()` inside this context, or for the calls of a decorated function.

    Autograd can never use tensors created in that mode: neither those that are differentiated here, nor the factors
    and statistics that are kept for later. Gradients stay disabled until code inside the context enables them.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def token_embeddings(model: nn.Module) -> Any:
    """Return the module that embeds a model's tokens; None if the model has no one vocabulary, as those of images."""
    with suppress(AttributeError, NotImplementedError):  # no model of transformers, or none of text alone
        return model.get_input_embeddings()  # type: ignore[operator]
    return None


@contextmanager
def _knowing_tokens(model: nn.Module) -> Iterator[None]:
    """Raise ValueError inside this context where the model reads a token that it has no embedding of."""
    embeddings = token_embeddings(model)
    if not isinstance(embeddings, nn.Embedding):
        yield
        return

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        known = embeddings.num_embeddings
        highest = int(args[0].max()) if args and args[0].numel() else 0
        if highest >= known:
            raise ValueError(
                f"A text has the token {highest}, but the model has embeddings of {known} tokens. Pass the model's own "
                "tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
            )

    handle = embeddings.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model uncompiled, without dropout, with frozen weights and with the fastest products of its precision.

    The training mode of each module and the `requires_grad` of each parameter are restored afterwards. A token without
    an embedding raises ValueError: on a GPU it would end the process.

    Modules with integer weights are set to training mode. In evaluation mode, bitsandbytes uses kernels without a
    backward on CPUs (4 bit), or makes the rounding of a token depend on the other tokens (8 bit). These modules
    have no dropout.
    """
    # Weights are frozen because autograd would otherwise keep the input of every linear map for their gradients.
    # Parameters are found by name: accelerate replaces the parameters that it offloads by other objects.
    trained = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    modes = {module: module.training for module in model.modules()}
    # Compiled code ignores hooks that were registered later, and compiling the hooks takes longer than running them.
    compiled = "torch._dynamo" in sys.modules or not _has_dynamo()
    model.eval()
    for module in keeping_integers(model):
        module.training = True
    try:
        for module, name in trained:
            getattr(module, name).requires_grad_(False)
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance, giving_backward(model), faster_products(model), _knowing_tokens(model):
            yield
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_()
        for module, training in modes.items():
            module.training = training


@cache
def _has_dynamo() -> bool:
    """Return whether `torch._dynamo` exists; while this private module is not imported, nothing has been compiled."""
    return find_spec("torch._dynamo") is not None
