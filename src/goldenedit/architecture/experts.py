"""Mixture-of-experts layers that fuse the matrices of all experts into one parameter.

All down projections of such a layer together are one linear map. Let `g_te` be the router's weight for expert `e` at
token `t`, and `h_te` the input of that expert's down projection. Then

    out_t = sum_e g_te W_e h_te + rest_t = [W_1 ... W_E] k_t + rest_t,    k_t = concat_e(g_te h_te)

where `rest_t` does not depend on any `W_e`. The output is linear in the fused parameter, and `k_t` is the key of an
edit. It is zero for the experts that the router did not pick.

No implementation returns `k_t`, but gradients give it exactly: the gradient of coordinate `i` of token `i`'s output
with respect to row `i` of `W_e` is `g_ie h_ie`. One backward pass therefore computes the keys of `d_model` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import Call, hidden_argument

# Largest relative error at which an output counts as linear in a parameter: the error of rounding.
_LINEAR = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class FusedExperts:
    """Where a layer keeps its routed experts.

    Attributes:
        site: Path of the module that outputs one vector per token, the sum over the experts.
        weights: Paths of its fused parameters; the down projection is last.
    """

    site: str
    weights: tuple[str, ...]

    def shape(self, model: nn.Module) -> tuple[int, int]:
        """Return the shape `(d_out, experts * d_ff)` of all down projections side by side."""
        experts, d_out, d_ff = expert_matrices(model, self.weights[-1]).shape
        return d_out, experts * d_ff

    def count(self, model: nn.Module) -> int:
        """Return the number of experts."""
        return len(fused_parameter(model, self.weights[-1]))

    def keys(self, model: nn.Module, call: Call, tokens: Tensor | None = None) -> Tensor:
        """Return the keys of the given tokens, `(n, experts * d_ff)` float32.

        Args:
            call: Arguments of a call of the site.
            tokens: `(n,)`, indices into all tokens of the call, in order; None for all tokens.
        """
        if tokens is None:
            args, kwargs = call
            tokens = torch.arange(hidden_argument(args, kwargs)[..., 0].numel())
        width = self.shape(model)[0]
        keys = []
        for chunk in tokens.split(width):
            (gradient,) = self.gradients(model, call, chunk, torch.eye(len(chunk), width), self.weights[-1:])
            rows = _oriented(gradient, model, self.weights[-1])[:, : len(chunk)]
            keys.append(rows.transpose(0, 1).flatten(1).float())
        return torch.cat(keys)

    def gradients(
        self, model: nn.Module, call: Call, tokens: Tensor, slopes: Tensor, weights: tuple[str, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gradients with respect to fused parameters, each in the parameter's shape.

        Args:
            call: Arguments of a call of the site.
            tokens: `(n,)`, the tokens to backpropagate from, as indices into all tokens of the call, in order.
            slopes: `(n, d_out)`, the gradient with respect to the site's output at these tokens.
            weights: Paths of the parameters; by default all fused parameters.
        """
        site = _plain(model.get_submodule(self.site))
        args, kwargs = _at_tokens(call, tokens)
        parameters = [fused_parameter(model, path) for path in weights or self.weights]
        trainable = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                output = site.forward(*args, **kwargs)  # `site(...)` would run hooks meant for the model's own forwards
            return torch.autograd.grad(output, parameters, slopes.to(output).view_as(output))
        finally:
            for parameter, requires_grad in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(requires_grad)

    @contextmanager
    def adding_delta(self, model: nn.Module, A: Tensor, B: Tensor) -> Iterator[None]:
        """Add `B @ A` to the down projections inside this context, without writing to the weights."""
        path = self.weights[-1]
        matrices = expert_matrices(model, path)
        delta = (B.to(matrices) @ A.to(matrices)).unflatten(1, (len(matrices), -1)).transpose(0, 1)
        with _replaced(model, path, _oriented(matrices + delta, model, path)):
            yield


def is_fused(model: nn.Module, path: str) -> bool:
    """Return whether a path names a fused parameter of the model rather than a module."""
    with suppress(AttributeError):
        return fused_parameter(model, path).ndim == 3
    return False


def fused_parameter(model: nn.Module, path: str) -> nn.Parameter:
    """Return the base model's parameter at a path, also where PEFT has wrapped its module.

    Raises:
        AttributeError: There is no parameter at the path.
    """
    owner, _, name = path.rpartition(".")
    parameter = getattr(_plain(model.get_submodule(owner)), name)
    if not isinstance(parameter, nn.Parameter):
        raise AttributeError(f"{path} is not a parameter")
    return parameter


def expert_matrices(model: nn.Module, path: str) -> Tensor:
    """Return a view of the matrices of all experts in a fused parameter, `(experts, d_out, d_in)`."""
    return _oriented(fused_parameter(model, path).detach(), model, path)


def _oriented(tensor: Tensor, model: nn.Module, path: str) -> Tensor:
    """Convert between a parameter's stored shape and `(experts, d_out, d_in)`, in either direction, as PEFT does."""
    owner = _plain(model.get_submodule(path.rpartition(".")[0]))
    return tensor.transpose(1, 2) if getattr(owner, "is_transposed", False) else tensor


def find_experts(model: nn.Module, layers: Mapping[int, str], ids: Tensor) -> dict[int, FusedExperts]:
    """Find the fused experts of each layer: a parameter, and a module whose output is linear in it.

    If several parameters of a layer qualify, the last one is used. It belongs to the routed experts, also if shared
    experts are fused as well. Layers without fused experts are left out.

    Args:
        layers: Path of each layer to search, by its index.
        ids: `(1, T)`, tokens to run.
    """
    fused = {
        index: [f"{layer}.{name}" for name, parameter in named if _is_candidate(parameter)]
        for index, layer in layers.items()
        if (named := list(model.get_submodule(layer).named_parameters()))
    }
    enclosing = {name: _enclosing(name, layers[index]) for index, names in fused.items() for name in names}
    if not enclosing:
        return {}
    calls = _calls(model, {site for sites in enclosing.values() for site in sites}, ids)
    experts = {}
    for index, names in fused.items():
        for down in reversed(names):
            # Inner modules return before outer ones, so the first match is the innermost module.
            sites = (name for name in calls if name in enclosing[down])
            site = next((site for site in sites if _is_down(model, site, down, calls[site])), None)
            if site is not None:
                weights = [name for name in names if name.startswith(f"{site}.") and name != down]
                experts[index] = FusedExperts(site, (*weights, down))
                break
    return experts


def _calls(model: nn.Module, paths: Collection[str], ids: Tensor) -> dict[str, Call]:
    """Return the arguments of each module that returns a tensor, in the order in which the modules return."""
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                calls[name] = args, kwargs

        return keep

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True).remove)
        model(input_ids=ids, use_cache=False)
    return calls


def _is_candidate(parameter: nn.Parameter) -> bool:
    readable = parameter.is_floating_point() and parameter.element_size() > 1 and not parameter.is_meta
    return parameter.ndim == 3 and len(parameter) > 1 and readable


def _enclosing(parameter: str, layer: str) -> list[str]:
    """Return the paths of the modules inside a layer that contain a parameter, the outermost first."""
    names = parameter.removeprefix(f"{layer}.").split(".")
    return [f"{layer}.{'.'.join(names[:end])}" for end in range(1, len(names))]


@torch.no_grad()
def _is_down(model: nn.Module, site: str, parameter: str, call: Call) -> bool:
    """Return whether a module's output is linear in a parameter for each token: `out - out(W=0) = W k`."""
    experts = FusedExperts(site, (parameter,))
    module, (args, kwargs) = model.get_submodule(site), call
    try:
        hidden = hidden_argument(args, kwargs)
        width, matrices = hidden.shape[-1], expert_matrices(model, parameter)
        if matrices.shape[1] != width:
            return False
        keys = experts.keys(model, call)
        odd_tokens = torch.arange(1, len(keys), 2)
        output = module.forward(*args, **kwargs)
        with _replaced(model, parameter, torch.zeros_like(fused_parameter(model, parameter))):
            rest = module.forward(*args, **kwargs)
        contribution = (output - rest).reshape(-1, width).float()
        keys_by_expert = keys.unflatten(1, (len(matrices), -1)).unbind(1)
        expected = sum(key @ matrix.float().T for key, matrix in zip(keys_by_expert, matrices, strict=True))
        odd_keys = experts.keys(model, call, odd_tokens)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # e.g. it needs whole sequences
        return False
    tolerance = _LINEAR.get(hidden.dtype, 5e-2)
    is_linear = (contribution - expected).abs().max() <= tolerance * contribution.abs().max()
    is_per_token = (odd_keys - keys[odd_tokens]).abs().max() <= tolerance * keys.abs().max()
    return bool(contribution.any() and is_linear and is_per_token)


@contextmanager
def _replaced(model: nn.Module, path: str, tensor: Tensor) -> Iterator[None]:
    owner, _, name = path.rpartition(".")
    module, original = _plain(model.get_submodule(owner)), fused_parameter(model, path)
    try:
        setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        yield
    finally:
        setattr(module, name, original)


def _at_tokens(call: Call, tokens: Tensor) -> Call:
    """Return the arguments of a call, restricted to the given tokens."""
    args, kwargs = call
    lead = hidden_argument(args, kwargs).shape[:-1]

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead:
            return value
        picked = value.detach().flatten(0, len(lead) - 1)[tokens.to(value.device)]
        return picked.unflatten(0, (*[1] * (len(lead) - 1), -1))

    return tuple(pick(value) for value in args), {name: pick(value) for name, value in kwargs.items()}


def _plain(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)  # PEFT wraps modules that carry adapters
