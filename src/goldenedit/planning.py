"""What an edit costs, by the config of a model alone: peak memory and operations of each phase, before any work.

Bytes and floating-point operations (FLOPs; a multiplication and an addition are two) follow from these sizes:

    L layers    d width of the hidden state    m width of the keys: of the down projection's input, `d_in`
    P  weights of the linear maps of a layer   V vocabulary    a  width of the attention's output, heads x head size
    c  keys and values kept per token          e bytes of a number in the model's precision
    n  tokens, T tokens of a row               r positions whose logits are read

Forwards, over l layers. Weights are frozen, so a backward multiplies by each of them once, as the forward does:

    forward FLOPs          l (2 n P + 4 n T a) + 2 r V d
    backward FLOPs         l (2 n P + 10 n T a) + 2 r V d
    forward bytes          n (4 d + 3 m) e                one layer at a time
    gradients' bytes       l n (16 d + 4 m) e             what autograd keeps, as in editing/budget.py
    cache bytes            n c e                          keys and values of all layers

Phases, where k is the number of layers that they read, F facts of the proxy set, b tokens of a batch of text:

    layer selection, LGA   bytes  gradients' bytes of 8 rows + 8 n (d + m), float32 copies at one map, + 16 r V
                           FLOPs  forward and backward of 2 F rows + F T^2 2 (sum of the widths of the MLP's maps)
    key statistics         bytes  8 k m^2, sums and means in float32 side by side + m^2; before, 4 k m^2 + a forward
                           FLOPs  sampling n tokens + forward of n tokens + 2 k n m^2
                           kept   4 k m^2; none where they are streamed from the cache
    solve                  bytes  36 m^2: the second moment, and in float64 its copy, the ridge, their sum, the factor
                           FLOPs  m^3 / 3 (Cholesky), or 9 m^3 (eigenvectors, for editors with a null space)
                           kept   8 k m^2, the factors
    selection by auto      bytes  48 m^2 + 4 F L m (keys and detectors) + inputs and outputs of all down projections
    selection by selectivity      the same with 36 m^2
    MLP statistics         bytes  8 k d^2, or 4 k d^2 + 8 d^2 + a forward that records 2 k b (d + m) e + 4 b (d + 2 m)
                           FLOPs  sampling n tokens + forward of n tokens + 2 k n d^2
                           kept   4 k d^2
    spare neurons          bytes  8 d m, or (2 e + 20) r V to compare distributions on text
                           FLOPs  k (sampling + 9 forwards over r tokens, 8 of them from the layer on)
    wordings               bytes  cache bytes + (e + 4) V for each row
                           FLOPs  forward of the prompts and of what the model writes behind them
    gates                  bytes  112 d^2 (moments of five kinds of wording in float64) + 4 n d, inputs on all texts
                           FLOPs  forwards + 2 n d^2 + 2/3 d^3 for each of the regressions
    markers                bytes  48 d^2 (inverse in float64) + cache + gradients' bytes + (3 e + 12) r V
                           FLOPs  2 d^3 + steps of forward and backward, up to the layer for answers, and on kept text
    values                 bytes  of a fact: cache + gradients' bytes from the edited layer on + (3 e + 28) r V
                           FLOPs  forward of all rows + steps of forward and backward, all rows in each: an upper bound

The edit's file has factors of one rank R in float32, `4 R (d_in + d_out)` bytes and a header for each changed map.

What a fact's texts have in tokens depends on the tokenizer. `_Text` has what was counted for one with a vocabulary of
49,152 and a chat template. Where a selector will choose the layers, they are taken to be the first ones, which cost the
most. Statistics in the cache cost nothing; here nothing is cached.
"""

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
from goldenedit.editing.budget import AT_MOST, LOGITS, MLP_WIDTHS, SHARE, WIDTHS, free_memory
from goldenedit.lm.statistics import WIDEST_EXPERTS
from goldenedit.units import flops_of, size_of

_BATCH = 2048  # tokens of a forward over text
_SAMPLED_ROWS, _SAMPLED_LENGTH, _SAMPLED_NEW = 128, 32, 24  # of a batch of sampled text
_COMPARED, _CANDIDATES = 320, 8  # tokens of text, and neurons whose removal is compared on them
_LGA_ROWS = 8
_MARKER_STEPS, _FIRST_MARKER_STEPS, _POLISH = 10, 35, 12
_KINDS = 5  # of wordings
_HEADER = 240  # bytes of the names of two factors in a file
_STREAMED = {"auto", "key_response", "selectivity", "sweep"}  # selectors that read the key statistics of all layers


@dataclass(frozen=True)
class _Text:
    """Rows of text about one fact.

    Attributes:
        rows: Their number.
        length: Tokens of the longest.
        suffix: Tokens that a replay runs, of all rows.
        reads: Positions whose logits are read, of all rows.
    """

    rows: int
    length: int
    suffix: int = 0
    reads: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all rows with padding."""
        return self.rows * self.length

    def some(self, rows: int) -> _Text:
        """Return so many of the rows."""
        return _Text(rows, self.length, self.suffix * rows // self.rows, self.reads * rows // self.rows)


_PROXY = _Text(2, 11)  # a proxy fact with its old and with its new answer
_LONGEST_PROXY = 17
_RESPONSE = _Text(20, 17)  # its prompt, paraphrases and other prompts, with both answers
_DUE = _Text(15, 80, 160, 15)  # wordings that end where an answer is due
_KEPT = _Text(13, 55, 210, 145)  # what must stay the same, with 12 other questions
_TAUGHT = _Text(30, 81, 83, 83)  # wordings with the answer of a fact, for neurons
_WORDED = _Text(24, 83, 340, 200)  # the same with what is kept, for editors that insert values under keys
_PHRASINGS = 7  # of these rows are neither contexts nor kept
_WRITTEN = _Text(30, 55, 0, 400)  # prompts with the model's own answers
_ASKED = _Text(270, 33)  # all texts that neurons are told by


@dataclass(frozen=True)
class Phase:
    """One phase of the work.

    Attributes:
        name: Its name, as `goldenedit edit --profile` prints it.
        bytes: Peak of its memory above what is there before it.
        flops: Floating-point operations.
        host_bytes: The part of `bytes` that is in main memory also if an accelerator runs the model.
        kept_bytes: Bytes that stay until the edit is made. They are in main memory.
    """

    name: str
    bytes: int
    flops: int
    host_bytes: int = 0
    kept_bytes: int = 0


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
    if isinstance(model_or_config, PretrainedConfig):
        shape = Shape.of(model_or_config, edit_config.target_modules, dtype)
    elif isinstance(config := getattr(model_or_config, "config", None), PretrainedConfig):
        shape = Shape.of(config, edit_config.target_modules, dtype)
        if dtype is None:
            shape = replace(shape, weights=bytes_by_dtype(model_or_config))
    else:
        raise TypeError(
            f"Expected a causal LM of transformers or its config, got {type(model_or_config).__name__}. Use "
            "AutoConfig.from_pretrained(name)."
        )
    return plan_of(shape, edit_config, facts, memory)


def plan_of(shape: Shape, config: EditConfig, facts: int = 1, memory: int | None = None) -> Plan:
    """Return what an edit of a model of this shape will cost. See `plan`."""
    free = free_memory(torch.device("cpu")) if memory is None else memory
    work = _Work(shape, config, facts, free)
    phases = (*work.selection(), *work.edit())
    return Plan(shape, config, facts, phases, work.edit_bytes, work.notes)


class _Work:
    """The phases of an edit."""

    def __init__(self, shape: Shape, config: EditConfig, facts: int, free: int) -> None:
        self.shape, self.config, self.facts, self.free = shape, config, facts, free
        self.kept = _KEPT.some(1 + config.kept_questions)
        phrasings = _PHRASINGS if config.phrasings == "auto" else 0
        self.worded = _WORDED.some(config.contexts + phrasings + self.kept.rows)
        self.targets = self._targets()
        self.answers = self._answer_layer()
        self.has_text = config.covariance != "identity" and config.editor.reads_statistics
        if self.has_text and shape.experts > 1 and shape.key_width > WIDEST_EXPERTS:
            raise ValueError(
                f"The keys of all experts of a layer have {shape.key_width} dimensions together, too many for a second "
                f"moment (at most {WIDEST_EXPERTS}). Edit with EditConfig(covariance='identity')."
            )

    def _targets(self) -> list[int]:
        if chosen := self.config.target_layers:
            for layer in chosen:
                if layer not in self.shape.editable:
                    raise ValueError(
                        f"Layer {layer} cannot be edited. Layers with a down projection are "
                        f"{list(self.shape.editable)}: choose one of them."
                    )
            return chosen
        many = self.config.pattern_layers
        counts = {"golden": 1, "upper": 2, "ends": 2, "ladder": many, "window": many, "best": many}
        return list(self.shape.editable[: counts[self.config.pattern]])

    def _answer_layer(self) -> int | None:
        """Return the layer of the neurons that give answers; None if values are inserted under keys."""
        shape, config = self.shape, self.config
        if not config.editor.gates or config.covariance == "identity" or config.regularizer is not None:
            return None
        if config.target_modules is not None or not shape.neurons or self.facts > shape.key_width // 32:
            return None
        found = replace(config, layer=self.targets, target_layer=None, layer_pattern="auto")
        layer = found.layer_of_answers(shape.layers)
        return layer if layer in shape.editable else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out."""
        notes = []
        name = self.config.layer
        if isinstance(name, str) and name not in {"lga", *_STREAMED} and not name.startswith("hub:"):
            notes.append(f"The layer selection by {name!r} is left out.")
        if self.config.editor.learns != "values":
            notes.append(f"The training of the editor {self.config.method!r} is left out.")
        if name == "sweep":
            notes.append("The measurement of the trial edits of the sweep is left out.")
        if self.config.flat_directions:
            notes.append("The output gradients for flat_directions are left out.")
        return tuple(notes)

    @property
    def edit_bytes(self) -> int:
        """Size of the edit's weights on disk."""
        shape, m = self.shape, self.shape.key_width
        down = m + shape.width * shape.experts
        if self.answers is None:
            return len(self.targets) * (4 * self.facts * down + _HEADER)
        # All maps have one rank: llama.cpp knows no other adapters. Gate and up in one map take two ranks each.
        rank = self.facts * max(d_out // m for _, d_out in shape.neurons)
        of_layer = 4 * rank * (down + sum(map(sum, shape.neurons))) + _HEADER * (1 + len(shape.neurons))
        return (len(self.targets) + 1) * of_layer

    # ------------------------------------------------------------------ forwards

    def forward(self, tokens: int, length: int, layers: int, reads: int = 0) -> int:
        """FLOPs of a forward."""
        s = self.shape
        return layers * (2 * tokens * s.linear_weights + 4 * tokens * length * s.attention_width) + self._head(reads)

    def backward(self, tokens: int, length: int, layers: int, reads: int = 0) -> int:
        """FLOPs of the backward of a forward, with frozen weights."""
        s = self.shape
        return layers * (2 * tokens * s.linear_weights + 10 * tokens * length * s.attention_width) + self._head(reads)

    def _head(self, reads: int) -> int:
        return 2 * reads * self.shape.vocabulary * self.shape.width

    def forward_bytes(self, tokens: int) -> int:
        """Bytes of a forward without gradients."""
        return tokens * (4 * self.shape.width + 3 * self.shape.key_width) * self.shape.element

    def gradient_bytes(self, tokens: int, layers: int) -> int:
        """Bytes that autograd keeps of a forward, without logits."""
        s = self.shape
        return layers * tokens * (WIDTHS * s.width + MLP_WIDTHS * s.key_width) * s.element

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of all layers."""
        return tokens * self.shape.cache_width * self.shape.element

    def sampling(self, tokens: int) -> tuple[int, int]:
        """Bytes and FLOPs of sampling a text of so many tokens."""
        s = self.shape
        if self.config.covariance != "sampled":
            return 0, 0
        rows = min(_SAMPLED_ROWS, -(-tokens // _SAMPLED_LENGTH))
        size = self.cache_bytes(rows * _SAMPLED_LENGTH) + rows * s.vocabulary * (s.element + 8)
        return size, self.forward(tokens, _SAMPLED_LENGTH, s.layers, tokens * _SAMPLED_NEW // _SAMPLED_LENGTH)

    # ------------------------------------------------------------------ phases

    def selection(self) -> Iterator[Phase]:
        """Yield the phases that choose the layer."""
        name = self.config.layer
        if name == "lga":
            yield self._lga()
        if name not in _STREAMED:
            return
        count = len(self.shape.editable)
        if self.has_text or (name == "selectivity" and self.config.covariance != "identity"):
            yield replace(self._key_statistics(count), kept_bytes=0)
        if name == "sweep":
            yield from self._sweep(count)
        else:
            yield self._selection_by_keys(count)

    def _lga(self) -> Phase:
        s, facts = self.shape, self.config.proxy_size or 100
        tokens = _LGA_ROWS * _LONGEST_PROXY
        size = self.gradient_bytes(tokens, s.layers) + 8 * tokens * (s.width + s.key_width)
        size += 4 * LOGITS * (tokens - _LGA_ROWS) * s.vocabulary
        if s.experts > 1:  # the gradients of all experts of a layer, of the old and of the new answer
            size += 2 * s.key_width * s.width * s.element
        per_fact = (_PROXY.tokens, _PROXY.length, s.layers, _PROXY.tokens)
        ghosts = 2 * _PROXY.length**2 * s.mlp_widths * s.layers
        return Phase("layer selection", size, facts * (self.forward(*per_fact) + self.backward(*per_fact) + ghosts))

    def _selection_by_keys(self, count: int) -> Phase:
        s, m, facts = self.shape, self.shape.key_width, self.config.proxy_size or 100
        is_auto = self.config.layer != "selectivity"
        keys = 4 * facts * count * m * (3 + self.config.contexts if is_auto else 3)
        recorded = _RESPONSE.tokens * (count * (m + s.width) * s.element + 4 * m)
        solved, flops = self._solve(count) if self.has_text or not is_auto else (0, 0)
        solved += 12 * m**2 if is_auto and solved else 0  # the factor of the layer before
        forwards = self.forward(_RESPONSE.tokens, _RESPONSE.length, s.layers, _RESPONSE.rows * 2)
        forwards += 2 * self.forward(_PROXY.tokens, _PROXY.length, s.layers, 4) if is_auto else 0
        return Phase("layer selection", keys + max(solved, recorded), flops + facts * forwards, keys + solved)

    def _sweep(self, count: int) -> Iterator[Phase]:
        facts = self.config.proxy_size or 100
        if self.answers is not None:
            yield replace(self._mlp_statistics(count), name="MLP statistics of all layers")
        trial = replace(self.config, layer=self.targets[0], target_layer=None, layer_pattern="golden")
        work = _Work(self.shape, trial, facts, self.free)
        phases = [phase for phase in work.edit() if phase.name not in ("MLP statistics", "key statistics", "save")]
        size = max(phase.bytes for phase in phases)
        host = max(phase.host_bytes for phase in phases)
        yield Phase("layer selection", size, count * sum(phase.flops for phase in phases), host)

    def edit(self) -> Iterator[Phase]:
        """Yield the phases of the edit itself."""
        if self.answers is not None:
            yield self._mlp_statistics(len(self.targets) + 1)
            yield self._spare_neurons()
            yield self._first_marker()
            yield self._wordings()
            yield self._gates()
            yield self._markers()
            yield self._values(_TAUGHT, self.answers)
        else:
            if self.has_text:
                yield self._key_statistics(len(self.targets))
                size, flops = self._solve(len(self.targets))
                yield Phase("solve", size, flops, size, 8 * len(self.targets) * self.shape.key_width**2)
            if self.config.editor.learns == "values":
                yield self._wordings()
                yield self._values(self.worded, self.targets[0])
        yield Phase("save", 2 * self.edit_bytes, 0, 2 * self.edit_bytes)

    def _key_statistics(self, count: int) -> Phase:
        s, m, tokens = self.shape, self.shape.key_width, self.config.covariance_tokens
        sampling, flops = self.sampling(tokens)
        batch = min(_BATCH, tokens)
        running = 4 * count * m**2 + self.forward_bytes(batch) + batch * m * (4 + s.element)
        means = 8 * count * m**2 + m**2
        flops += self.forward(tokens, _SAMPLED_LENGTH, s.layers) + 2 * count * tokens * m**2
        kept = 4 * count * m**2
        return Phase("key statistics", max(sampling, running, means), flops, kept + m**2, kept)

    def _solve(self, count: int) -> tuple[int, int]:
        """Bytes of solving with the second moment of one layer, and FLOPs for some layers."""
        m = self.shape.key_width
        has_spectrum = "null_space_threshold" in self.config.editor.fields and self.config.layer != "selectivity"
        return 36 * m**2, count * (9 * m**3 if has_spectrum else m**3 // 3)

    def _mlp_statistics(self, count: int) -> Phase:
        s, d, m, tokens = self.shape, self.shape.width, self.shape.key_width, self.config.covariance_tokens
        sampling, flops = self.sampling(tokens)
        batch = min(_BATCH, tokens)
        recorded = 2 * count * batch * (d + m) * s.element + 4 * batch * (d + 2 * m)
        running = 4 * count * d**2 + 8 * d**2 + self.forward_bytes(batch) + recorded
        flops += self.forward(tokens, _SAMPLED_LENGTH, s.layers) + 2 * count * tokens * d**2
        kept = 4 * count * (d**2 + d + m)
        return Phase("MLP statistics", max(sampling, running, 8 * count * d**2), flops, kept, kept)

    def _spare_neurons(self) -> Phase:
        s, flops = self.shape, 0
        assert self.answers is not None
        for layer in (*self.targets, self.answers):
            flops += self.sampling(_COMPARED)[1] + self.forward(_COMPARED, _SAMPLED_LENGTH, s.layers, _COMPARED)
            flops += _CANDIDATES * self.forward(_COMPARED, _SAMPLED_LENGTH, s.layers - layer, _COMPARED)
        weight = 8 * s.width * s.key_width
        logits = (2 * s.element + 20) * _COMPARED * s.vocabulary
        # The least used neurons are found before their removal is compared; the copy of the weight stays.
        return Phase("spare neurons", max(weight, weight // 2 + logits), flops, weight)

    def _wordings(self) -> Phase:
        s, text = self.shape, _WRITTEN
        size = self.cache_bytes(text.tokens) + text.rows * s.vocabulary * (s.element + 4)
        return Phase("wordings", size, self.facts * self.forward(text.tokens, text.length, s.layers, text.reads))

    def _gates(self) -> Phase:
        s, d, texts = self.shape, self.shape.width, _ASKED
        assert self.answers is not None
        regressions = len(self.targets) + 2 * self.facts
        inputs = 4 * texts.tokens * d
        moments = 8 * d**2 * (2 * _KINDS + 4)
        batch = 32 * _DUE.length
        run = self.forward_bytes(batch) + batch * (d + s.key_width) * s.element
        flops = self.facts * self.forward(texts.tokens, texts.length, self.answers + 1)
        flops += regressions * (2 * texts.tokens * d**2 + 2 * d**3 // 3)
        return Phase("gates", inputs + max(moments, run), flops, inputs + moments)

    def _first_marker(self) -> Phase:
        return replace(
            self._marker(_DUE.some(8), self.kept.some(min(8, self.kept.rows)), _FIRST_MARKER_STEPS), name="first marker"
        )

    def _markers(self) -> Phase:
        marker = self._marker(_DUE, self.kept, _MARKER_STEPS)
        return replace(marker, flops=self.facts * marker.flops)

    def _marker(self, due: _Text, kept: _Text, steps: int) -> Phase:
        s, d, first = self.shape, self.shape.width, self.targets[0]
        assert self.answers is not None
        whitening = 48 * d**2
        size = self.cache_bytes(due.tokens + kept.tokens) + (3 * s.element + 12) * kept.reads * s.vocabulary
        size += self.gradient_bytes(due.suffix, self.answers - first)
        size += self.gradient_bytes(kept.suffix, s.layers - first)
        seen = (due.suffix, due.length, self.answers - first)
        unchanged = (kept.suffix, kept.length, s.layers - first, kept.reads)
        step = self.forward(*seen) + self.backward(*seen) + self.forward(*unchanged) + self.backward(*unchanged)
        before = self.forward(due.tokens, due.length, s.layers) + self.forward(kept.tokens, kept.length, s.layers)
        # The inverse is computed when both captures are there.
        running = size + 4 * d**2
        return Phase("markers", max(running, size + whitening), 2 * d**3 + before + steps * step, whitening)

    def _values(self, text: _Text, first: int) -> Phase:
        s = self.shape
        one = self.cache_bytes(text.tokens) + (3 * s.element + 28) * text.reads * s.vocabulary
        one += self.gradient_bytes(text.suffix, s.layers - first)
        if isinstance(self.config.batch_size, int):
            at_once = min(self.facts, self.config.batch_size)
        else:
            left = max(self.free - s.weight_bytes, 0)
            at_once = max(1, min(self.facts, AT_MOST, int(SHARE * left / one)))
        run = (text.suffix, text.length, s.layers - first, text.reads)
        steps = self.config.steps + _POLISH + 1
        flops = self.forward(text.tokens, text.length, s.layers, text.reads)
        flops += steps * (self.forward(*run) + self.backward(*run))
        return Phase("values", at_once * one, self.facts * flops)


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
    if config.layer in _STREAMED:
        found.append(_Remedy("layer='lga'", option(layer="lga", target_layer=None)))
    if config.covariance_tokens > 1_000:
        found.append(_Remedy("covariance_tokens=1000", option(covariance_tokens=1_000)))
    if config.covariance != "identity" and config.editor.takes_identity:
        without = " (without neurons for facts)" if config.editor.gates else ""
        found.append(_Remedy(f"covariance='identity'{without}", option(covariance="identity")))
    return found
