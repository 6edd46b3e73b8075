"""Find the decoder layers and the MLP down projections of a causal LM, by shape and order of execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.experts import FusedExperts, expert_matrices, find_experts, is_fused
from goldenedit.architecture.hooks import (
    Call,
    adding_delta,
    adding_delta_by_row,
    evaluating,
    hidden_argument,
    inputs_at,
    token_embeddings,
)
from goldenedit.architecture.quantized import is_composite
from goldenedit.devices import execution_device, input_device, onloaded_parameter
from goldenedit.editors import LowRankDelta

_PROBE_TOKENS = 8
_PROBES = 64  # random inputs that tell the size of a quantized weight to a few percent
_NOISED_TOKEN = 1  # not the first, which may be an attention sink; nor the last, as later tokens must see the noise
_MOVED = 1e-3  # relative change that counts as a change: far above rounding, far below the effect of attention


class UnsupportedArchitectureError(ValueError):
    """No decoder layers or no down projections could be found in the model, or it cannot be edited."""


@dataclass(frozen=True)
class Architecture:
    """Where a causal LM keeps the parts that editing needs.

    Attributes:
        layers: Path of the list of decoder layers, such as `"model.layers"`.
        num_layers: Number of decoder layers.
        down_projections: Path of the MLP down projection of each layer that has one. It is a module, or the parameter
            that fuses the down projections of all experts of the layer.
        mlp_linears: Paths of the linear maps of each such MLP, in order of execution, the down projection last.
        attention_outputs: Path of the output projection of each layer's attention: the last linear map of the layer
            whose input mixes positions. Layers without attention are left out.
        experts: The fused experts of each layer whose down projections are one parameter.
        warned: Topics that the user has already been warned about for this model.
    """

    layers: str
    num_layers: int
    down_projections: dict[int, str]
    mlp_linears: dict[int, tuple[str, ...]]
    attention_outputs: dict[int, str] = field(default_factory=dict)
    experts: dict[int, FusedExperts] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set, compare=False, repr=False)

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """Return decoder layer `index`."""
        return model.get_submodule(f"{self.layers}.{index}")

    def layer_of(self, path: str) -> int:
        """Return the index of the layer that contains the module at `path`, 0 if it is outside all layers."""
        inside = path.removeprefix(f"{self.layers}.")
        return 0 if inside == path else int(inside.split(".")[0])

    def down_projection(self, model: nn.Module, index: int) -> nn.Module:
        """Return the down projection of layer `index`, or the module that sums the outputs of its fused experts."""
        fused = self.experts.get(index)
        return model.get_submodule(self.down_projections[index] if fused is None else fused.site)

    def keys(self, model: nn.Module, index: int, call: Call, tokens: Tensor | None = None) -> Tensor:
        """Return the inputs of the down projection of layer `index`, `(n, d_in)` float32.

        Args:
            call: Arguments of a call of the module that `down_projection` returns.
            tokens: `(n,)`, indices into all tokens of the call, in order; None for all tokens.
        """
        if index in self.experts:
            return self.experts[index].keys(model, call, tokens)
        return inputs_at(call, tokens)

    def adding_delta(self, model: nn.Module, index: int, A: Tensor, B: Tensor) -> AbstractContextManager[None]:
        """Add `B @ A` to the down projection of layer `index` inside a context, without writing to the weights."""
        if index in self.experts:
            return self.experts[index].adding_delta(model, A, B)
        return adding_delta(self.down_projection(model, index), A, B)

    @contextmanager
    def adding_deltas(self, model: nn.Module, deltas: Mapping[str, LowRankDelta]) -> Iterator[None]:
        """Add deltas to the maps at their paths inside a context, without writing to the weights."""
        with ExitStack() as stack:
            for path, delta in deltas.items():
                layer = self.layer_of(path)
                if layer in self.experts and path == self.down_projections[layer]:  # no module
                    stack.enter_context(self.adding_delta(model, layer, delta.A, delta.B))
                else:
                    stack.enter_context(adding_delta(model.get_submodule(path), delta.A, delta.B))
            yield

    def takes_rows(self, paths: Iterable[str]) -> bool:
        """Return whether each row of a batch can have deltas of its own at these paths: not those of fused experts."""
        return not any(
            path == self.down_projections[layer] for path in paths if (layer := self.layer_of(path)) in self.experts
        )

    @contextmanager
    def adding_deltas_by_row(self, model: nn.Module, deltas: Sequence[Mapping[str, LowRankDelta]]) -> Iterator[None]:
        """Add to each row of a batch the deltas of its own inside a context, without writing to the weights.

        Args:
            deltas: By row, deltas by path, none of fused experts (see `takes_rows`).
        """
        paths = {path for of_row in deltas for path in of_row}
        with ExitStack() as stack:
            for path in paths:
                factors = [(of_row[path].A, of_row[path].B) if path in of_row else None for of_row in deltas]
                stack.enter_context(adding_delta_by_row(model.get_submodule(path), factors))
            yield

    def attention_output(self, model: nn.Module, index: int) -> nn.Module:
        """Return the output projection of the attention of layer `index`.

        Raises:
            ValueError: The layer has no attention, or its output projection was not found.
        """
        if index not in self.attention_outputs:
            raise ValueError(
                f"No attention output projection was found in layer {index} of {type(model).__name__}, and PMET needs "
                "one. Use another EditConfig.method, such as 'memit'."
            )
        return model.get_submodule(self.attention_outputs[index])

    def shape(self, model: nn.Module, index: int) -> tuple[int, int]:
        """Return the shape `(d_out, d_in)` of the down projection of layer `index`, quantized or not."""
        if index in self.experts:
            return self.experts[index].shape(model)
        return linear_shape(self.down_projection(model, index))

    def weight(self, model: nn.Module, index: int) -> Tensor:
        """Return the weight of the down projection of layer `index` in Linear orientation, `(d_out, d_in)`.

        Raises:
            ValueError: The weight is quantized.
        """
        weight = plain_weight(self.down_projection(model, index))
        if weight is None:
            raise ValueError(
                f"The weight of {self.down_projections[index]} is quantized, and EditConfig.regularizer needs an "
                "unquantized weight. Set regularizer to None, or load the model without quantization."
            )
        return weight

    def check_layer(self, index: int) -> None:
        """Raise ValueError unless layer `index` can be edited."""
        if index not in self.down_projections:
            raise ValueError(
                f"Layer {index} cannot be edited. Of the model's {self.num_layers} decoder layers, those with a down "
                f"projection are {sorted(self.down_projections)}: choose one of them."
            )


def weight_of(model: nn.Module, path: str) -> Tensor | None:
    """Return the weight at a path as one matrix, `(d_out, d_in)`, or None if it is quantized or offloaded.

    The matrices of fused experts are joined side by side.

    Raises:
        AttributeError: The model has no module or parameter at the path.
    """
    if is_fused(model, path):
        return expert_matrices(model, path).transpose(0, 1).flatten(1)
    return plain_weight(model.get_submodule(path))


@torch.no_grad()
def weight_size(model: nn.Module, path: str, d_in: int) -> float:
    """Return the root mean square of the entries of a base weight; of a quantized one, as its outputs tell it."""
    weight = weight_of(model, path)
    if weight is not None:
        return weight.float().square().mean().sqrt().item()
    module = model.get_submodule(path)
    module = getattr(module, "base_layer", module)  # PEFT wraps modules that carry adapters
    noise = torch.randn(_PROBES, d_in, generator=torch.Generator().manual_seed(0))
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    inputs = torch.cat([noise, torch.zeros(1, d_in)]).to(execution_device(module), dtype)
    outputs = module(inputs).float()
    return ((outputs[:-1] - outputs[-1]).square().mean() / d_in).sqrt().item()


def plain_weight(module: nn.Module) -> Tensor | None:
    """Return the weight of a linear map as `(d_out, d_in)`, whatever its stored layout; None if it is quantized."""
    module = getattr(module, "base_layer", module)  # PEFT wraps modules that carry adapters
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        weight = onloaded_parameter(module, "weight")
    if not isinstance(weight, Tensor) or weight.is_meta or is_composite(weight) or not weight.is_floating_point():
        return None
    oriented = weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach()
    return oriented if oriented.shape == linear_shape(module) and weight.element_size() > 1 else None


def is_quantized(module: nn.Module) -> bool:
    """Return whether the weight of a linear map is quantized, that is, cannot be read as a plain matrix."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return plain_weight(module) is None and not (isinstance(weight, Tensor) and weight.is_meta)


def find_down_projections(model: nn.Module) -> dict[int, str]:
    """Return the path of the MLP down projection of each decoder layer.

    Example:
        ```python
        >>> from transformers import AutoModelForCausalLM
        >>> from goldenedit.architecture import find_down_projections
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> find_down_projections(model)[3]
        'model.layers.3.mlp.down_proj'
        ```

    Raises:
        UnsupportedArchitectureError: No layer has a down projection or fused experts (state-space models).
    """
    return read_architecture(model).down_projections


def read_architecture(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> Architecture:
    """Find decoder layers and down projections with a few short forwards.

    The layer list is the `ModuleList` whose members hold the most executed parameters. Each linear map whose output has
    the model's width is a candidate. Noise is added, at one token, to the outputs of the linear maps that run before
    the candidate. If the candidate's input then changes at *other* tokens, the candidate follows attention, which mixes
    positions. If its input changes at the noised token only, the candidate ends an MLP. The widest such candidate of a
    layer is the layer's down projection.

    Args:
        model: A causal LM of transformers, without PEFT adapters.
        target_modules: The down projections chosen by hand: their paths, or one path with `{}` for the layer index.

    Raises:
        UnsupportedArchitectureError: The layers or down projections were not found, `target_modules` do not match the
            model, or the model is not causal.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    with evaluating(model), torch.no_grad():
        _check_causal(model)
        clean = CleanForward(model, linears)
        layers = clean.decoder_layers()
        length = len(list(model.get_submodule(layers).children()))
        chosen = None if target_modules is None else chosen_by_hand(model, layers, length, target_modules)
        probe = _Probe(clean)
        mlps = probe.run(linears, layers, length)
    if chosen is not None:
        mlp_linears: dict[int, tuple[str, ...]] = {index: (path,) for index, path in chosen.items()}
        _layers_run_once(model, clean, {index: mlp[-1] for index, mlp in mlps.items()})
        return Architecture(layers, length, chosen, mlp_linears, probe.mixers)
    without_mlp = {
        index: path for index in range(length) if index not in mlps and (path := f"{layers}.{index}") in clean.results
    }
    with evaluating(model), torch.no_grad():
        experts = find_experts(model, without_mlp, clean.ids)
    return assembled(model, clean, layers, length, mlps, experts, probe.mixers)


def assembled(
    model: nn.Module,
    clean: CleanForward,
    layers: str,
    length: int,
    mlps: Mapping[int, tuple[str, ...]],
    experts: Mapping[int, FusedExperts],
    attention_outputs: dict[int, str],
) -> Architecture:
    """Return the architecture of the MLPs and fused experts that were found and run once for each token.

    Args:
        layers: Path of the list of decoder layers.
        length: Their number.
        mlps: The paths of the linear maps of dense MLPs, by layer.
        experts: The fused experts of the other layers.
        attention_outputs: The paths of attention outputs, by layer.

    Raises:
        UnsupportedArchitectureError: There are none.
    """
    if not mlps and not experts:
        raise UnsupportedArchitectureError(
            f"No dense down projection and no fused experts were found in any of the {length} layers ({layers}) of "
            f"{type(model).__name__}; state-space models, for example, have none. Name the linear maps to edit by "
            f"hand: EditConfig(target_modules='{layers}.{{}}.path.to.linear'), with {{}} for the layer index."
        )
    sites = {index: mlp[-1] for index, mlp in mlps.items()} | {index: fused.site for index, fused in experts.items()}
    editable = sorted(_layers_run_once(model, clean, sites))
    maps = {**mlps, **{index: fused.weights for index, fused in experts.items()}}
    return Architecture(
        layers,
        length,
        {index: maps[index][-1] for index in editable},
        {index: maps[index] for index in editable},
        attention_outputs,
        {index: experts[index] for index in editable if index in experts},
    )


def _layers_run_once(model: nn.Module, clean: CleanForward, sites: Mapping[int, str]) -> list[int]:
    """Return the layers that run once for each token; raise UnsupportedArchitectureError if there are none."""
    layers = [index for index, site in sites.items() if clean.executed[model.get_submodule(site)] <= 1]
    if sites and not layers:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} runs each of its layers several times for each token, so one change of weights "
            "would act several times. Such models cannot be edited."
        )
    return layers


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map (nn.Linear, Conv1D, quantized), by its attributes and not its name."""
    if next(module.children(), None) is not None or isinstance(module, nn.Embedding):
        return False
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return True
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape `(d_out, d_in)` of a linear map, however it stores its weight."""
    plain: Any = getattr(module, "base_layer", module)  # PEFT wraps modules that carry adapters
    if hasattr(plain, "out_features"):
        return int(plain.out_features), int(plain.in_features)
    rows, columns = plain.weight.shape
    return (columns, rows) if type(plain).__name__ == "Conv1D" else (rows, columns)


def chosen_by_hand(model: nn.Module, layers: str, length: int, target_modules: str | Sequence[str]) -> dict[int, str]:
    """Return the path of the module that `target_modules` names in each layer."""
    if isinstance(target_modules, str):
        candidates = (target_modules.replace("{}", str(index)) for index in range(length))
        paths = [path for path in candidates if _get_submodule(model, path) is not None]
        if not paths:
            raise UnsupportedArchitectureError(
                f"target_modules {target_modules!r} matches no module of the base model."
            )
    else:
        paths = list(target_modules)
    if not paths:
        raise UnsupportedArchitectureError("target_modules is empty. Name the linear maps to edit.")
    by_layer: dict[int, str] = {}
    for path in paths:
        module = _get_submodule(model, path)
        index = path.removeprefix(f"{layers}.").split(".")[0]
        if module is None or not is_linear(module):
            raise UnsupportedArchitectureError(f"Target module {path!r} is not a linear map of the base model.")
        if not path.startswith(f"{layers}.") or not index.isdigit():
            raise UnsupportedArchitectureError(f"Target module {path!r} is not inside the decoder layers, {layers}.")
        by_layer[int(index)] = path
    return dict(sorted(by_layer.items()))


def _get_submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def probe_ids(model: nn.Module) -> Tensor:
    """Return a few tokens to run the model on, `(1, T)`.

    Raises:
        UnsupportedArchitectureError: The model does not take token ids of a single vocabulary.
    """
    embeddings = token_embeddings(model)
    if not hasattr(embeddings, "weight"):
        raise UnsupportedArchitectureError(f"{type(model).__name__} does not take token ids of a single vocabulary.")
    # From the middle of the vocabulary: special tokens sit at its ends.
    size = embeddings.weight.shape[0]
    ids = (size // 2 + torch.arange(_PROBE_TOKENS)) % size
    return ids.unsqueeze(0).to(input_device(model))


def _check_causal(model: nn.Module) -> None:
    """Raise UnsupportedArchitectureError if there are no logits of tokens, or a token changes those before it."""
    ids = probe_ids(model)
    other_last = ids.clone()
    other_last[:, -1] = ids[:, 0]
    logits = [getattr(model(input_ids=tokens, use_cache=False), "logits", None) for tokens in (ids, other_last)]
    highest = int(ids.max())
    if not all(isinstance(found, Tensor) and found.dim() == 3 and found.shape[-1] > highest for found in logits):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no logits for each token. Load the model with its head: "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    before, after = (found[0, :-1].float() for found in logits)  # type: ignore[index]
    if (after - before).abs().max() > _MOVED * before.abs().max():
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is not causal: a token also changes the logits before it. If its config has "
            "is_decoder, load the model with is_decoder=True."
        )


class CleanForward:
    """One forward without noise: how often each module ran, the tensors of linear maps, the outputs of list members."""

    def __init__(self, model: nn.Module, linears: dict[str, nn.Module], ids: Tensor | None = None) -> None:
        self.model = model
        self.ids = probe_ids(model) if ids is None else ids
        self.executed: Counter[nn.Module] = Counter()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.results: dict[str, Any] = {}
        self.widths: dict[str, int] = {}
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_hook(self._count).remove)
            for name, module in linears.items():
                stack.callback(module.register_forward_hook(self._keep(name)).remove)
            for name, members in lists:
                for index, member in enumerate(members):
                    hook = self._keep_result(f"{name}.{index}")
                    stack.callback(member.register_forward_hook(hook, with_kwargs=True).remove)
            model(input_ids=self.ids, use_cache=False)

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.executed[module] += 1

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.inputs[name], self.outputs[name] = args[0].clone(), output.clone()

        return keep

    def _keep_result(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                self.widths[name] = hidden_argument(args, kwargs).shape[-1]
                self.results[name] = _map_tensors(output, torch.clone)
            except TypeError:  # a list of modules that are not layers
                pass

        return keep

    def decoder_layers(self) -> str:
        """Return the path of the list of decoder layers: the one whose members hold the most executed parameters.

        Raises:
            UnsupportedArchitectureError: There is none.
        """
        sizes = {
            name: sum(
                parameter.numel()
                for submodule in set(module.modules()) & self.executed.keys()
                for parameter in submodule.parameters(recurse=False)
            )
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and f"{name}.0" in self.results
        }
        if not sizes or max(sizes.values()) == 0:
            raise UnsupportedArchitectureError(f"{type(self.model).__name__} has no list of decoder layers.")
        return max(sizes, key=lambda name: sizes[name])


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


class _Probe:
    """One forward with noise at one token, to see which linear maps end an MLP and which follow attention."""

    def __init__(self, clean: CleanForward) -> None:
        self.clean = clean
        self.generator = torch.Generator().manual_seed(0)
        self.since_mixer: list[str] = []  # linear maps that ran after the last one that mixed positions
        self.candidates: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
        self.mixers: dict[int, str] = {}  # last linear map of each layer that mixed positions: the attention output

    def run(self, linears: dict[str, nn.Module], layers: str, length: int) -> dict[int, tuple[str, ...]]:
        model = self.clean.model
        with ExitStack() as stack:
            for index in range(length):
                layer = f"{layers}.{index}"
                if layer not in self.clean.results:
                    continue
                for name, module in linears.items():
                    if name.startswith(f"{layer}."):
                        stack.callback(module.register_forward_hook(self._disturb(index, layer, name)).remove)
                stack.callback(model.get_submodule(layer).register_forward_hook(self._restore(layer)).remove)
            model(input_ids=self.clean.ids, use_cache=False)
        return {index: max(candidates)[1] for index, candidates in sorted(self.candidates.items())}

    def _disturb(self, index: int, layer: str, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if name not in self.clean.outputs or output.shape != self.clean.outputs[name].shape:
                return None
            if output.numel() != _PROBE_TOKENS * output.shape[-1]:  # not one row per token: e.g. a router
                return None
            if output.shape[-1] == self.clean.widths[layer]:
                moved = self._moved(name, args[0])
                if moved.sum() > moved[_NOISED_TOKEN]:
                    self.since_mixer.clear()
                    self.mixers[index] = name
                    return self.clean.outputs[name].clone()
                if moved[_NOISED_TOKEN]:
                    self.candidates.setdefault(index, []).append((args[0].shape[-1], (*self.since_mixer, name)))
            self.since_mixer.append(name)
            return self._with_noise(output)

        return hook

    def _restore(self, layer: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.since_mixer.clear()
            return _map_tensors(self.clean.results[layer], torch.clone)

        return hook

    def _moved(self, name: str, now: Tensor) -> Tensor:
        """Return for each token whether the input of `name` differs from the clean forward."""
        before = self.clean.inputs[name].reshape(_PROBE_TOKENS, -1).float()
        change = (now.reshape(_PROBE_TOKENS, -1).float() - before).abs().amax(-1)
        return change > _MOVED * before.abs().amax()

    def _with_noise(self, output: Tensor) -> Tensor:
        noised = output.clone()
        row = noised.view(_PROBE_TOKENS, -1)[_NOISED_TOKEN]
        noise = torch.randn(row.shape, generator=self.generator).to(row.device) * (output.float().std() + 1e-6)
        row += noise.to(row.dtype)
        return noised
