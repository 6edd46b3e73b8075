"""The sizes of a causal LM, by its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from goldenedit.architecture.layers import linear_shape
from goldenedit.architecture.shapes import cache_width, model_without_weights, read_shapes


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal LM, by the names of `goldenedit.planning`.

    Attributes:
        layers: `L`.
        width: `d`.
        key_width: `m`, the largest of all layers.
        mlp_widths: Widths of the inputs and outputs of the linear maps of an MLP, summed.
        neurons: `(d_in, d_out)` of the maps before the down projection; empty if the layers have no such maps.
        linear_weights: `P`, the mean of all layers.
        attention_width: `a`.
        cache_width: `c`, of all layers.
        vocabulary: `V`.
        editable: The layers that can be edited.
        weights: Bytes of the weights by dtype, such as `{"bfloat16": 16_060_522_496}`.
        experts: Number of fused experts of a layer, 1 without.
    """

    layers: int
    width: int
    key_width: int
    mlp_widths: int
    neurons: tuple[tuple[int, int], ...]
    linear_weights: int
    attention_width: int
    cache_width: int
    vocabulary: int
    editable: tuple[int, ...]
    weights: dict[str, int]
    experts: int = 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def element(self) -> int:
        """`e`, bytes of a number in the precision that most weights have."""
        name = max(self.weights, key=lambda dtype: self.weights[dtype])
        return max(2, _dtype(name).itemsize)  # quantized weights are multiplied in half precision

    @property
    def computed_in(self) -> torch.dtype:
        """The precision that most weights are multiplied in; half precision for quantized ones."""
        dtype = _dtype(max(self.weights, key=lambda name: self.weights[name]))
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16

    def in_precision(self, dtype: str) -> Shape:
        """Return the same model with its floating-point weights in another precision."""
        size = _dtype(dtype).itemsize
        floating = {name: size_of for name, size_of in self.weights.items() if _dtype(name).is_floating_point}
        others = {name: size_of for name, size_of in self.weights.items() if name not in floating}
        return replace(
            self, weights={**others, dtype: sum(of // _dtype(name).itemsize * size for name, of in floating.items())}
        )

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        target_modules: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Shape:
        """Return the sizes of the causal LM of a config.

        Args:
            target_modules: The down projections chosen by hand, as in `read_architecture`.
            dtype: Precision of the weights; by default the one that the config names, or float32.

        Raises:
            UnsupportedArchitectureError: The model cannot be edited, or does not run without weights.
        """
        model = model_without_weights(config, dtype)
        architecture = read_shapes(model, target_modules)
        of_layers = [_linear_weights(architecture.layer(model, index)) for index in range(architecture.num_layers)]
        shapes = {layer: architecture.shape(model, layer) for layer in architecture.down_projections}
        last = max(shapes, key=lambda layer: shapes[layer][1])
        fused = architecture.experts.get(last)
        maps = [] if fused else [model.get_submodule(path) for path in architecture.mlp_linears[last]]
        outputs = [model.get_submodule(path) for path in architecture.attention_outputs.values()]
        attention = max((linear_shape(module)[1] for module in outputs), default=0)
        cached = cache_width(model)
        vocabulary, _ = model.get_input_embeddings().weight.shape  # type: ignore[operator]
        return cls(
            layers=architecture.num_layers,
            width=shapes[last][0],
            key_width=shapes[last][1],
            mlp_widths=sum(sum(linear_shape(module)) for module in maps) or sum(shapes[last]),
            neurons=tuple(linear_shape(module)[::-1] for module in maps[:-1]),
            linear_weights=sum(of_layers) // len(of_layers),
            attention_width=attention,
            cache_width=2 * attention * architecture.num_layers if cached is None else cached,
            vocabulary=vocabulary,
            editable=tuple(architecture.down_projections),
            weights=bytes_by_dtype(model),
            experts=fused.count(model) if fused else 1,
        )


def _linear_weights(layer: nn.Module) -> int:
    """Return the number of weights of the linear maps and fused experts of a layer."""
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim in (2, 3))


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the weights of each dtype, by its name."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.nbytes
    return sizes


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
