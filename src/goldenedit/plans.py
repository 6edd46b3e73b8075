"""What an edit will cost, whether that fits a machine, and with which settings it would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from goldenedit.architecture.sizes import Shape, bytes_by_dtype
from goldenedit.config import EditConfig
from goldenedit.cost import product_speed
from goldenedit.editing.budget import free_memory
from goldenedit.planning import STREAMED, Phase, Work
from goldenedit.units import flops_of, size_of


@dataclass(frozen=True)
class Plan:
    """What an edit will cost. Memory is an estimate; `benchmarks/plan.py` compares it with what is measured.

    Attributes:
        shape: The sizes of the model.
        config: The config of the edit.
        facts: Number of facts.
        phases: The phases, in order.
        edit_bytes: Size of the edit's weights on disk.
        notes: What the plan leaves out.
    """

    shape: Shape
    config: EditConfig
    facts: int
    phases: tuple[Phase, ...]
    edit_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations of all phases."""
        return sum(phase.flops for phase in self.phases)

    @cached_property
    def peak_bytes(self) -> int:
        """Peak of memory with the weights, if all is in one memory."""
        return self.shape.weight_bytes + max(kept + phase.bytes for kept, phase in self._with_kept())

    @cached_property
    def accelerator_bytes(self) -> int:
        """Peak of the memory of an accelerator that holds the model."""
        return self.shape.weight_bytes + max(phase.bytes - phase.host_bytes for phase in self.phases)

    @cached_property
    def host_bytes(self) -> int:
        """Peak of main memory if an accelerator holds the model."""
        return max(kept + phase.host_bytes for kept, phase in self._with_kept())

    def seconds(self) -> float:
        """Return how long the phases take on the CPU, if nothing is cached: their operations at the speed of a product.

        The speed of one map of an MLP is measured on this machine as it is now. What Python takes is left out, so a
        model of a few million weights takes longer.
        """
        return self.flops / product_speed(self.shape.width, self.shape.key_width, self.shape.computed_in)

    def _with_kept(self) -> Iterator[tuple[int, Phase]]:
        kept = 0
        for phase in self.phases:
            yield kept, phase
            kept += phase.kept_bytes

    def fits(self, memory: int, accelerator: int | None = None) -> bool:
        """Return whether the edit fits into memory.

        Args:
            memory: Bytes of free main memory.
            accelerator: Bytes of free memory of an accelerator that is to hold the model; None for a CPU alone.
        """
        if accelerator is None:
            return self.peak_bytes <= memory
        return self.accelerator_bytes <= accelerator and self.host_bytes <= memory

    def remedies(self, memory: int, accelerator: int | None = None) -> list[str]:
        """Return the settings with which the edit fits, each alone; else all of them together, if that is enough.

        Arguments are as in `fits`. The list is empty if the edit fits already, or if no setting helps.
        """
        if self.fits(memory, accelerator):
            return []
        free = memory if accelerator is None else accelerator
        options = _remedies(self.shape, self.config)

        def planned(*chosen: _Remedy) -> Plan:
            shape, config = self.shape, self.config
            for remedy in chosen:
                shape, config = remedy.change(shape, config)
            return plan_of(shape, config, self.facts, free)

        alone = [remedy.words for remedy in options if planned(remedy).fits(memory, accelerator)]
        if alone:
            return alone
        taken: list[_Remedy] = []
        for remedy in options:  # the least loss first
            if planned(*taken, remedy).peak_bytes < planned(*taken).peak_bytes:
                taken.append(remedy)
            if taken and planned(*taken).fits(memory, accelerator):
                return [" and ".join(remedy.words for remedy in taken)]
        return []

    def __str__(self) -> str:
        """Return the plan as lines of text."""
        lines = [f"weights: {size_of(self.shape.weight_bytes)}"]
        lines += [f"{phase.name}: {size_of(phase.bytes)}, {flops_of(phase.flops)}" for phase in self.phases]
        lines.append(f"peak: {size_of(self.peak_bytes)}, {flops_of(self.flops)}")
        lines.append(f"edit on disk: {size_of(self.edit_bytes)}")
        return "\n".join([*lines, *self.notes])


def plan(
    model_or_config: nn.Module | PretrainedConfig,
    edit_config: EditConfig | None = None,
    facts: int = 1,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
) -> Plan:
    """Return what an edit will cost, by the config of a model alone. No weights are loaded.

    Args:
        model_or_config: A causal LM of transformers, of which only sizes are read, or its config.
        edit_config: How to edit.
        facts: Number of facts, each about a subject of its own.
        dtype: Precision of the weights; by default that of the model, or the one that the config names.
        memory: Bytes of free memory that `batch_size="auto"` shares; by default those of the CPU.

    Raises:
        UnsupportedArchitectureError: The model cannot be edited, or does not run without weights.
        ValueError: A layer cannot be edited, or the keys of fused experts are too wide for key statistics.
        TypeError: The first argument is neither a model nor a config.

    Example:
        ```python
        >>> from transformers import LlamaConfig
        >>> from goldenedit import EditConfig, plan
        >>> llama3 = LlamaConfig(
        ...     vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, dtype="bfloat16"
        ... )
        >>> plan(llama3, EditConfig(layer="auto")).fits(64 * 10**9)
        False
        ```
    """
    edit_config = edit_config or EditConfig()
    is_config = isinstance(model_or_config, PretrainedConfig)
    config = model_or_config if is_config else getattr(model_or_config, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"Expected a causal LM of transformers or its config, got {type(model_or_config).__name__}. Use "
            "AutoConfig.from_pretrained(name)."
        )
    shape = Shape.of(config, edit_config.target_modules, dtype)
    if isinstance(model_or_config, nn.Module) and dtype is None:
        shape = replace(shape, weights=bytes_by_dtype(model_or_config))
    planned = plan_of(shape, edit_config, facts, memory)
    if is_config and getattr(config, "quantization_config", None) is not None:
        note = "The weights are counted as if they were not quantized."
        return replace(planned, notes=(*planned.notes, note))
    return planned


def plan_of(shape: Shape, config: EditConfig, facts: int = 1, memory: int | None = None) -> Plan:
    """Return what an edit of a model of this shape will cost. See `plan`."""
    free = free_memory(torch.device("cpu")) if memory is None else memory
    work = Work(shape, config, facts, free)
    phases = (*work.selection(), *work.edit())
    return Plan(shape, config, facts, phases, work.edit_bytes, work.notes)


@dataclass(frozen=True)
class _Remedy:
    """A setting that needs less memory."""

    words: str
    change: Callable[[Shape, EditConfig], tuple[Shape, EditConfig]]


def _remedies(shape: Shape, config: EditConfig) -> list[_Remedy]:
    """Return the settings that may help, those that change the edit the least first."""

    def option(**values: Any) -> Callable[[Shape, EditConfig], tuple[Shape, EditConfig]]:
        return lambda shape, config: (shape, replace(config, **values))

    found = []
    if config.batch_size != 1:
        found.append(_Remedy("batch_size=1", option(batch_size=1)))
    if shape.weights.get("float32", 0) + shape.weights.get("float64", 0):
        found.append(_Remedy("dtype=torch.bfloat16", lambda shape, config: (shape.in_precision("bfloat16"), config)))
    if config.kept_questions > 4:
        found.append(_Remedy("kept_questions=4", option(kept_questions=4)))
    if config.layer in STREAMED:
        found.append(_Remedy("layer='lga'", option(layer="lga", target_layer=None)))
    if config.covariance_tokens is None or config.covariance_tokens > 1_000:
        found.append(_Remedy("covariance_tokens=1000", option(covariance_tokens=1_000)))
    if config.covariance != "identity" and config.editor.takes_identity:
        without = " (without neurons for facts)" if config.editor.gates else ""
        found.append(_Remedy(f"covariance='identity'{without}", option(covariance="identity")))
    return found
