"""Mixtures of experts whose matrices are one fused parameter: all down projections together as one linear map.

With `g_te` the weight that the router gives expert `e` at token `t`, and `h_te` what its down projection reads there,

    out_t = sum_e g_te W_e h_te + what no W is in = [W_1 ... W_E] k_t + ...,    k_t = concat_e(g_te h_te)

so the output is linear in the fused parameter, and `k_t` is the key of an edit: zero for experts not picked. No
implementation hands it out, but its gradient is exact: that of coordinate `i` of token `i`'s output by row `i` of `W_e`
is `g_ie h_ie`, so that one backward finds the keys of as many tokens as the model is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import Call, hidden_argument

# Relative error of an output that is called linear in a parameter: of rounding, and no more.
_LINEAR = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class FusedExperts:
    """Where a layer keeps its routed experts.

    Attributes:
        site: Path of the module whose output is one vector for each token, the sum over its experts.
        weights: Paths of its fused parameters, the down projection last.
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
        """Return the keys at some tokens, `(n, experts * d_ff)` float32.

        Args:
            call: Arguments that the site was called with.
            tokens: `(n,)`, indices into all its tokens in their order; None for all.
        """
        if tokens is None:
            tokens = torch.arange(hidden_argument(*call)[..., 0].numel())
        width = self.shape(model)[0]
        found = []
        for some in tokens.split(width):
            (gradient,) = self.gradients(model, call, some, torch.eye(len(some), width), self.weights[-1:])
            rows = _oriented(gradient, model, self.weights[-1])[:, : len(some)]
            found.append(rows.transpose(0, 1).flatten(1).float())
        return torch.cat(found)

    def gradients(
        self, model: nn.Module, call: Call, tokens: Tensor, slopes: Tensor, weights: tuple[str, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gradients by fused parameters, by default by all, each in the parameter's shape.

        Args:
            call: Arguments that the site was called with.
            tokens: `(n,)`, the tokens that count, indices into all tokens in their order.
            slopes: `(n, d_out)`, gradient by the site's output at these tokens.
            weights: Paths of the parameters.
        """
        site = _plain(model.get_submodule(self.site))
        args, kwargs = _at_tokens(call, tokens)
        parameters = [fused_parameter(model, path) for path in weights or self.weights]
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                output = site.forward(*args, **kwargs)  # not called: hooks are for the model's own forwards
            return torch.autograd.grad(output, parameters, slopes.to(output).view_as(output))
        finally:
            for parameter, before in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(before)

    @contextmanager
    def adding_delta(self, model: nn.Module, A: Tensor, B: Tensor) -> Iterator[None]:
        """Use the down projections with the change `B @ A` inside this context; the weights are not written."""
        path = self.weights[-1]
        matrices = expert_matrices(model, path)
        delta = (B.to(matrices) @ A.to(matrices)).unflatten(1, (len(matrices), -1)).transpose(0, 1)
        with _replaced(model, path, _oriented(matrices + delta, model, path)):
            yield


def is_fused(model: nn.Module, path: str) -> bool:
    """Tell whether a path names a fused parameter of the model, and not a module."""
    with suppress(AttributeError):
        return fused_parameter(model, path).ndim == 3
    return False


def fused_parameter(model: nn.Module, path: str) -> nn.Parameter:
    """Return a parameter by its path, whatever adapters are on its module.

    Raises:
        AttributeError: There is none.
    """
    owner, _, name = path.rpartition(".")
    parameter = getattr(_plain(model.get_submodule(owner)), name)
    if not isinstance(parameter, nn.Parameter):
        raise AttributeError(f"{path} is no parameter")
    return parameter


def expert_matrices(model: nn.Module, path: str) -> Tensor:
    """Return the matrix of each expert in a fused parameter, `(experts, d_out, d_in)`, a view."""
    return _oriented(fused_parameter(model, path).detach(), model, path)


def _oriented(tensor: Tensor, model: nn.Module, path: str) -> Tensor:
    """Turn between a parameter's own shape and `(experts, d_out, d_in)`, as PEFT does."""
    owner = _plain(model.get_submodule(path.rpartition(".")[0]))
    return tensor.transpose(1, 2) if getattr(owner, "is_transposed", False) else tensor


def find_experts(model: nn.Module, layers: Mapping[int, str], ids: Tensor) -> dict[int, FusedExperts]:
    """Return the fused experts of those layers that have some, by what their output is linear in.

    Of several, the last is taken: where shared experts are fused as well, they are behind the routed ones.

    Args:
        layers: Paths of the layers to look at.
        ids: `(1, T)`, tokens to run.
    """
    fused = {
        index: [f"{layer}.{name}" for name, parameter in named if _is_candidate(parameter)]
        for index, layer in layers.items()
        if (named := list(model.get_submodule(layer).named_parameters()))
    }
    around = {name: _enclosing(name, layers[index]) for index, names in fused.items() for name in names}
    if not around:
        return {}
    calls = _calls(model, {site for sites in around.values() for site in sites}, ids)
    found = {}
    for index, names in fused.items():
        for down in reversed(names):
            # Modules end from the innermost outwards, so the first to pass is the smallest.
            sites = (name for name in calls if name in around[down])
            site = next((site for site in sites if _is_down(model, site, down, calls[site])), None)
            if site is not None:
                own = [name for name in names if name.startswith(f"{site}.")]
                found[index] = FusedExperts(site, (*(name for name in own if name != down), down))
                break
    return found


def _calls(model: nn.Module, paths: Collection[str], ids: Tensor) -> dict[str, Call]:
    """Return what modules are called with that return a tensor, in the order in which they end."""
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
    whole = parameter.is_floating_point() and parameter.element_size() > 1 and not parameter.is_meta
    return parameter.ndim == 3 and len(parameter) > 1 and whole


def _enclosing(parameter: str, layer: str) -> list[str]:
    """Return the paths of the modules around a parameter, up to its layer."""
    parts = parameter.removeprefix(f"{layer}.").split(".")
    return [f"{layer}.{'.'.join(parts[:end])}" for end in range(1, len(parts))]


@torch.no_grad()
def _is_down(model: nn.Module, site: str, parameter: str, call: Call) -> bool:
    """Tell whether a module's output is linear in a parameter, token by token: `out - out(0) = W k`."""
    experts = FusedExperts(site, (parameter,))
    module = model.get_submodule(site)
    try:
        hidden = hidden_argument(*call)
        width, matrices = hidden.shape[-1], expert_matrices(model, parameter)
        if matrices.shape[1] != width:
            return False
        keys = experts.keys(model, call)
        half = torch.arange(1, len(keys), 2)
        output = module.forward(*call[0], **call[1])
        with _replaced(model, parameter, torch.zeros_like(fused_parameter(model, parameter))):
            rest = module.forward(*call[0], **call[1])
        own = (output - rest).reshape(-1, width).float()
        of_experts = keys.unflatten(1, (len(matrices), -1)).unbind(1)
        expected = sum(key @ matrix.float().T for key, matrix in zip(of_experts, matrices, strict=True))
        apart = experts.keys(model, call, half)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it takes no tokens out of their texts
        return False
    tolerance = _LINEAR.get(hidden.dtype, 5e-2)
    linear = (own - expected).abs().max() <= tolerance * own.abs().max()
    by_token = (apart - keys[half]).abs().max() <= tolerance * keys.abs().max()
    return bool(own.any() and linear and by_token)


@contextmanager
def _replaced(model: nn.Module, path: str, tensor: Tensor) -> Iterator[None]:
    owner, _, name = path.rpartition(".")
    module, own = _plain(model.get_submodule(owner)), fused_parameter(model, path)
    try:
        setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        yield
    finally:
        setattr(module, name, own)


def _at_tokens(call: Call, tokens: Tensor) -> Call:
    """Return the arguments of a call with some of its tokens alone."""
    lead = hidden_argument(*call).shape[:-1]

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead:
            return value
        picked = value.detach().flatten(0, len(lead) - 1)[tokens.to(value.device)]
        return picked.unflatten(0, (*[1] * (len(lead) - 1), -1))

    return tuple(pick(value) for value in call[0]), {name: pick(value) for name, value in call[1].items()}


def _plain(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)  # PEFT wraps modules that carry adapters
