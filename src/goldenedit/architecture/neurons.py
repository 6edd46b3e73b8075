"""How the neurons of an MLP are computed from its input: found by overwriting the outputs of its linear maps.

Neuron `j` is the pair of entry `j` of the down projection's input and column `j` of the down projection. Its value is

    key_j = act(gate_j . x + b_j) * (up_j . x + c_j)    in gated MLPs (Llama, Gemma, Phi-3)
    key_j = act(gate_j . x + b_j)                       in MLPs without gating (GPT-2, OPT, Nemotron)

so a rank-one change of the gate's map and one of the up's map rewrite what neuron `j` detects, and no other neuron.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import evaluating, hidden_argument, outside_inference_mode, stop_forward
from goldenedit.architecture.layers import Architecture, is_linear, linear_shape, plain_weight, probe_ids
from goldenedit.devices import execution_device

GATE = 32.0  # where activations have long reached their asymptotes; a power of two, which every dtype holds exactly
_VALUES = (-GATE, 1 / GATE, GATE / 2, GATE)
_ROUNDING = 2e-2  # relative difference that counts as none: above the rounding of a few operations in bfloat16
_CLOSED = 1e-3  # largest key of a closed gate, relative to the smallest key of an open one


@dataclass(frozen=True)
class NeuronRows:
    """The rows of a linear map that compute one number for each neuron: the gates of the neurons, or their ups.

    Attributes:
        path: Path of the linear map.
        offset: The row of neuron 0. The rows of the other neurons follow it.
        count: Number of neurons.
    """

    path: str
    offset: int
    count: int

    @outside_inference_mode()
    def read(self, model: nn.Module, neuron: int) -> tuple[Tensor, float]:
        """Return the row of a neuron, `(d_in,)` float32, and its bias (0 in maps without biases).

        They are what the model computes with at present: quantized weights are dequantized, offloaded weights are
        loaded, and active adapters count.

        Raises:
            IndexError: The MLP has no such neuron.
        """
        rows, biases = self.read_all(model, [neuron])
        return rows[0], biases[0].item()

    @outside_inference_mode()
    def read_all(self, model: nn.Module, neurons: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows of neurons, `(n, d_in)` float32, and their biases, `(n,)`, as `read` does."""
        indices = torch.tensor([self._index(neuron) for neuron in neurons])
        module = model.get_submodule(self.path)
        weight = plain_weight(module)
        dtype: torch.dtype = model.dtype if weight is None else weight.dtype  # type: ignore[assignment]
        with evaluating(model), torch.enable_grad():
            # A linear map is its bias at zero, and its rows are its gradients, however it stores them.
            zeros = torch.zeros(len(indices), linear_shape(module)[1], dtype=dtype, device=execution_device(module))
            output = module(zeros.requires_grad_())
            biases = output[torch.arange(len(indices), device=output.device), indices.to(output.device)]
            (gradients,) = torch.autograd.grad(biases.sum(), zeros)
        return gradients.float(), biases.detach().float()

    def output(self, model: nn.Module, neuron: int) -> Tensor:
        """Return the unit vector of a neuron's row, `(d_out, 1)`: the factor `B` of a change of this row alone.

        Raises:
            IndexError: The MLP has no such neuron.
        """
        unit = torch.zeros(linear_shape(model.get_submodule(self.path))[0], 1)
        unit[self._index(neuron)] = 1
        return unit

    def _index(self, neuron: int) -> int:
        if not 0 <= neuron < self.count:
            raise IndexError(f"There is no neuron {neuron}: the MLP has {self.count}. Choose one from 0 on.")
        return self.offset + neuron


@dataclass(frozen=True)
class Neurons:
    """How the neurons of an MLP are computed from its input.

    Let `s_j` be the output of row `j` of the gates and `u_j` that of the ups. For clearly positive `s_j`

        key_j = response * (s_j / GATE) ** degree * (GATE * u_j)

    without the last factor where there are no ups. For clearly negative `s_j`, `key_j` is 0.

    Attributes:
        gate: The rows of the gates; they are followed by the activation function.
        up: The rows of the ups, with the same input as the gates; None in MLPs without gating.
        response: The key of a neuron at `s_j = GATE` and `u_j = 1 / GATE`.
        degree: The power with which the key grows: 1 for GELU, SiLU and ReLU, 2 for squared ReLU.
    """

    gate: NeuronRows
    up: NeuronRows | None
    response: float
    degree: int

    @property
    def count(self) -> int:
        """Return the number of neurons, the width of the down projection's input."""
        return self.gate.count


def find_neurons(model: nn.Module, architecture: Architecture, layer: int) -> Neurons | None:
    """Find how the neurons of a layer's MLP are computed, with one short forward that ends at the down projection.

    The outputs of the linear maps before the down projection are overwritten with random choices of a few values. If
    each entry of the down projection's input then depends on one or two of these values alone, and in the way that
    `Neurons` states, they are its gate and its up.

    Returns:
        The neurons, or None if the MLP is of another form: fused experts, other wiring, a norm before the down
        projection, or an activation function that is bounded (sigmoid) or leaks for negative inputs (xIELU).

    Example:
        ```python
        >>> from transformers import AutoModelForCausalLM
        >>> from goldenedit.architecture import read_architecture
        >>> from goldenedit.architecture.neurons import find_neurons
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> find_neurons(model, read_architecture(model), 3).gate
        NeuronRows(path='model.layers.3.mlp.gate_proj', offset=0, count=1536)
        ```

    Raises:
        ValueError: The layer cannot be edited.
    """
    architecture.check_layer(layer)
    if layer in architecture.experts:
        return None
    probe = _Probe(model, architecture, layer)
    gate = probe.gate()
    if gate is None:
        return None
    opened = probe.values[gate] == GATE
    up = probe.up(gate, opened)
    scaled = probe.keys if up is None else probe.keys / probe.values[up]
    full, half = _common(scaled[opened]), _common(scaled[probe.values[gate] == GATE / 2])
    if not full or not half or full / half <= 0:
        return None
    degree = math.log2(full / half)
    if round(degree) < 1 or abs(degree - round(degree)) > _ROUNDING:
        return None
    if up is not None and not torch.equal(probe.inputs[gate.path], probe.inputs[up.path]):
        return None
    return Neurons(gate, up, full if up is None else full / GATE, round(degree))


class _Probe:
    """One forward with overwritten outputs before a down projection: the values written, and the keys they gave."""

    def __init__(self, model: nn.Module, architecture: Architecture, layer: int) -> None:
        self.values: dict[NeuronRows, Tensor] = {}  # (tokens, neurons) for each row block of a linear map
        self.inputs: dict[str, Tensor] = {}
        self.keys = torch.empty(0)
        down = architecture.down_projection(model, layer)
        self._count = linear_shape(down)[1]
        self._generator = torch.Generator().manual_seed(0)
        paths = architecture.mlp_linears[layer][:-1]
        if not paths:  # the down projection was chosen by hand
            inside = architecture.layer(model, layer).named_modules()
            prefix = f"{architecture.layers}.{layer}"
            paths = tuple(f"{prefix}.{name}" for name, module in inside if is_linear(module) and module is not down)
        with evaluating(model), torch.no_grad(), stop_forward() as stop, ExitStack() as stack:

            def take_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                keys = hidden_argument(args, kwargs)
                self.keys = keys.reshape(-1, keys.shape[-1]).double().cpu()
                stop()

            for path in paths:
                stack.callback(model.get_submodule(path).register_forward_hook(self._overwrite(path)).remove)
            stack.callback(down.register_forward_pre_hook(take_keys, with_kwargs=True).remove)
            model(input_ids=probe_ids(model), use_cache=False)
        self.values = {rows: values for rows, values in self.values.items() if values.shape == self.keys.shape}

    def _overwrite(self, path: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or output.shape[-1] % self._count:
                return None
            values = torch.tensor(_VALUES)[torch.randint(len(_VALUES), output.shape, generator=self._generator)]
            # From token to token, more gates are closed: a norm over all neurons would show in the keys of open ones.
            shares = torch.linspace(0, 0.9, output[..., 0].numel()).view(*output.shape[:-1], 1)
            values[torch.rand(output.shape, generator=self._generator) < shares] = -GATE
            for offset in range(0, output.shape[-1], self._count):
                block = values[..., offset : offset + self._count]
                self.values[NeuronRows(path, offset, self._count)] = block.reshape(-1, self._count).double()
            self.inputs[path] = args[0].clone()
            return values.to(output)

        return hook

    def gate(self) -> NeuronRows | None:
        """Return the rows that alone decide whether a key is zero."""
        gates = []
        for rows, values in self.values.items():
            closed, opened = self.keys[values == -GATE].abs(), self.keys[values == GATE].abs()
            if len(closed) and len(opened) and closed.max() <= _CLOSED * opened.min() > 0:
                gates.append(rows)
        return gates[0] if len(gates) == 1 else None

    def up(self, gate: NeuronRows, opened: Tensor) -> NeuronRows | None:
        """Return the rows whose outputs are factors of the keys of open gates."""
        others = [(rows, values[opened]) for rows, values in self.values.items() if rows != gate]
        ups = [rows for rows, values in others if _common(self.keys[opened] / values) is not None]
        return ups[0] if len(ups) == 1 else None


def _common(numbers: Tensor) -> float | None:
    """Return the number that all entries are but for rounding, or None if they differ or there are none."""
    if not len(numbers):
        return None
    mean = numbers.mean().item()
    return mean if (numbers - mean).abs().max() <= _ROUNDING * abs(mean) else None
