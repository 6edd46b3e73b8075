"""Find the parts of a causal LM by its config alone: the model has no weights, and its forward computes shapes only.

`read_architecture` adds noise to outputs and looks at which tokens it reaches. Without weights there is nothing to look
at. So this module follows *where noise would go* through one forward on the meta device: each tensor is marked with
whether it depends on a linear map of its layer, and each function of torch passes the marks on. A product of two marked
tensors (`q k^T`, or attention weights times values) mixes positions; so do convolutions and sums along the sequence.
The rules that tell a down projection from an attention output are then the same as in `read_architecture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig

from goldenedit.architecture.caching import cache_of
from goldenedit.architecture.experts import FusedExperts, expert_matrices
from goldenedit.architecture.hooks import hidden_argument
from goldenedit.architecture.layers import (
    Architecture,
    CleanForward,
    UnsupportedArchitectureError,
    assembled,
    chosen_by_hand,
    is_linear,
    linear_shape,
)
from goldenedit.architecture.replay import NO_CACHE

_TOKENS = 8
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"})
_MIXERS = frozenset({"scaled_dot_product_attention", "conv1d", "cumsum", "cumprod", "rfft", "fft", "flip"})
_NUMBERS = frozenset({"item", "__bool__", "__contains__"})


def model_without_weights(config: PretrainedConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the causal LM of a config on the meta device. It takes no memory for weights.

    Args:
        dtype: Precision of the weights; by default the one that the config names, or float32.

    Raises:
        UnsupportedArchitectureError: transformers has no causal LM for the config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32).eval()
    except (ValueError, ImportError) as error:
        raise UnsupportedArchitectureError(
            f"No causal LM can be built from {type(config).__name__} ({error}). Use the config of a causal LM of "
            "transformers."
        ) from error


def cache_width(model: nn.Module) -> int | None:
    """Return how many numbers a model on the meta device keeps per token, the keys and values of all its layers.

    None means that the model has no such cache, or that it does not run without weights.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")  # fewer than any sliding window
    try:
        with torch.no_grad(), _without_experts(model), _Flow():
            past = cache_of(model(input_ids=ids, use_cache=True))
        return sum(layer.keys.numel() + layer.values.numel() for layer in past.layers) // 2
    except (*NO_CACHE, NotImplementedError):
        return None


def read_shapes(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> Architecture:
    """Find decoder layers and down projections of a model on the meta device.

    Args:
        model: A causal LM on the meta device, see `model_without_weights`.
        target_modules: The down projections chosen by hand, as in `read_architecture`.

    Raises:
        UnsupportedArchitectureError: They were not found, or the model does not run without weights.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    flow = _Flow()
    try:
        with torch.no_grad(), _without_experts(model), flow:
            clean = CleanForward(model, linears, ids)
            layers = clean.decoder_layers()
            length = len(list(model.get_submodule(layers).children()))
            found = _Found(clean, flow).run(linears, layers, length)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} does not run without weights ({error}), so its edits cannot be planned. Load the "
            "model and edit it: architectures are found with weights too."
        ) from error
    if target_modules is not None:
        chosen = chosen_by_hand(model, layers, length, target_modules)
        return Architecture(
            layers, length, chosen, {index: (path,) for index, path in chosen.items()}, found.attention_outputs
        )
    mlps = found.mlps
    experts = {
        index: fused
        for index in range(length)
        if index not in mlps and (fused := _experts(model, f"{layers}.{index}", clean)) is not None
    }
    return assembled(model, clean, layers, length, mlps, experts, found.attention_outputs)


class _Flow(TorchFunctionMode):
    """Marks each tensor with whether it depends on a linear map, and with whether positions were mixed since then."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = WeakIdKeyDictionary()  # tensor: mixed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _NUMBERS and any(tensor.is_meta for tensor in _tensors(args)):
            # Models ask, for example, whether nothing is padded. With whole sequences it is true.
            return True
        result = func(*args, **kwargs)
        marked = [tensor for tensor in _tensors((args, kwargs)) if tensor in self.marks]
        if marked:
            mixes = name in _MIXERS or (name in _PRODUCTS and len(marked) > 1)
            mixed = mixes or any(self.marks[tensor] for tensor in marked)
            for tensor in _tensors(result):
                self.marks[tensor] = mixed
        return result

    def mark(self, value: Any, mixed: bool | None) -> None:
        """Mark the tensors in a value; None removes the marks."""
        for tensor in _tensors(value):
            self.marks.pop(tensor, None)
            if mixed is not None:
                self.marks[tensor] = mixed


class _Found:
    """One forward that follows marks: the linear maps of the MLP of each layer, and its attention output."""

    def __init__(self, clean: CleanForward, flow: _Flow) -> None:
        self.clean, self.flow = clean, flow
        self.since_mixer: list[str] = []  # linear maps that ran after the last one that mixed positions
        self.candidates: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
        self.attention_outputs: dict[int, str] = {}

    @property
    def mlps(self) -> dict[int, tuple[str, ...]]:
        """Return the paths of the linear maps of the MLP of each layer that has a dense one, in order of execution."""
        return {index: max(candidates)[1] for index, candidates in sorted(self.candidates.items())}

    def run(self, linears: dict[str, nn.Module], layers: str, length: int) -> _Found:
        model = self.clean.model
        self.flow.marks.clear()
        with ExitStack() as stack:
            for index in range(length):
                layer = f"{layers}.{index}"
                if layer not in self.clean.results:
                    continue
                for name, module in linears.items():
                    if name.startswith(f"{layer}."):
                        width = self.clean.widths[layer]
                        stack.callback(module.register_forward_hook(self._follow(index, name, width)).remove)
                stack.callback(model.get_submodule(layer).register_forward_hook(self._end).remove)
            model(input_ids=self.clean.ids, use_cache=False)
        return self

    def _follow(self, index: int, name: str, width: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or output.numel() != _TOKENS * output.shape[-1]:  # e.g. a router
                return
            mixed = self.flow.marks.get(args[0])
            if output.shape[-1] == width:
                if mixed:
                    self.since_mixer.clear()
                    self.attention_outputs[index] = name
                    self.flow.mark(output, None)
                    return
                if mixed is not None:
                    path = (*self.since_mixer, name)
                    self.candidates.setdefault(index, []).append((linear_shape(module)[1], path))
            self.since_mixer.append(name)
            self.flow.mark(output, bool(mixed))

        return hook

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.since_mixer.clear()
        self.flow.mark(output, None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _fused(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that fuse the matrices of several experts."""
    if hasattr(module, "kernel_size"):  # the kernels of a convolution have three dimensions too
        return []
    named = module.named_parameters(recurse=False)
    return [name for name, parameter in named if parameter.ndim == 3 and len(parameter) > 1]


def _experts(model: nn.Module, layer: str, clean: CleanForward) -> FusedExperts | None:
    """Return the fused experts of a layer that runs: the last ones whose matrices have outputs of the model's width."""
    if layer not in clean.results:
        return None
    for name, module in reversed(list(model.get_submodule(layer).named_modules())):  # shared experts come first
        site = f"{layer}.{name}"
        weights = [f"{site}.{parameter}" for parameter in _fused(module)]
        for down in reversed(weights):
            if expert_matrices(model, down).shape[1] == clean.widths[layer]:
                return FusedExperts(site, (*(path for path in weights if path != down), down))
    return None


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """Replace the forwards of fused experts by the identity: which expert a token runs depends on weights."""

    def identity(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty_like(hidden_argument(args, kwargs))

    owners = [module for module in model.modules() if _fused(module)]
    for module in owners:
        module.forward = identity  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in owners:
            del module.forward
