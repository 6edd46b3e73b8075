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
    key statistics         bytes  4 k m min(n, m), sums in float32 or keys, + a forward, or + two copies of a layer's
                           FLOPs  sampling n tokens + forward of n tokens + 2 k n m^2, these without keys
                           kept   4 k m min(n, m); none where they are streamed from the cache, in groups of layers
    detectors              bytes  20 m^2 (Cholesky of the second moment in float64) or 36 m^2 (its eigenvectors); of
                                  keys 20 n^2 or 32 n^2 (of their Gram matrix) + the strongest eigenvectors, 16/3 m n
                           FLOPs  m^3 / 3 or 9 m^3, of keys n^3 / 3 or 9 n^3 + 2 m n^2
                           kept   8 k m^2, the factors, or 8 k n^2
    selection by auto      bytes  detectors + 4 F L m (keys and detectors) + inputs and outputs of all down projections
    MLP statistics         bytes  8 k d^2, or 4 k d^2 + 8 d^2 + a forward that records 2 k b (d + m) e + 4 b (d + 2 m)
                           FLOPs  sampling n tokens + forward of n tokens + 2 k n d^2
                           kept   4 k d^2
    spare neurons          bytes  8 d m, or 4 d m + (2 e + 20) r V to compare distributions on text
                           FLOPs  k (sampling + 9 forwards over r tokens, 8 of them from the layer on)
    wordings               bytes  cache bytes + (4 e + 16) V for each row
                           FLOPs  forward of the prompts and of what the model writes behind them
    gates                  bytes  112 d^2 (moments of five kinds of wording in float64) + 4 n d, inputs on all texts
                           FLOPs  forwards + 2 n d^2 + 2/3 d^3 for each of the regressions
    markers                bytes  48 d^2 (inverse in float64) + cache + gradients' bytes + (3 e + 12) r V
                           FLOPs  2 d^3 + steps of forward and backward, up to the layer for answers, and on kept text
    values                 bytes  of a fact: cache + gradients' bytes from the edited layer on + (3 e + 28) r V
                           FLOPs  forward of all rows + 5/8 of the steps of forward and backward: some leave out rows

The edit's file has factors of one rank R in float32, `4 R (d_in + d_out)` bytes and a header for each changed map.

What a fact's texts have in tokens depends on the tokenizer. `_Text` has what was counted for one with a vocabulary of
49,152 and a chat template. Where a selector will choose the layers, they are taken to be the first ones, which cost the
most. Statistics in the cache cost nothing; here nothing is cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from goldenedit.architecture.sizes import Shape
from goldenedit.config import EditConfig
from goldenedit.editing.budget import AT_MOST, LOGITS, MLP_WIDTHS, SHARE, WIDTHS
from goldenedit.lm.covariance import GROUP_BYTES
from goldenedit.lm.statistics import WIDEST_EXPERTS

_BATCH = 2048  # tokens of a forward over text
_SAMPLED_ROWS, _SAMPLED_LENGTH, _SAMPLED_NEW = 128, 32, 24  # of a batch of sampled text
_COMPARED, _CANDIDATES = 320, 8  # tokens of text, and neurons whose removal is compared on them
_LGA_ROWS = 8
_MARKER_STEPS, _FIRST_MARKER_STEPS, _POLISH = 10, 35, 12
_KINDS = 5  # of wordings
_HEADER = 240  # bytes of the names of two factors in a file
_PACKAGED = 100  # proxy facts
STREAMED = ("auto", "key_response", "selectivity", "sweep")  # selectors that read the key statistics of all layers


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
_RESPONSE = _Text(20, 17, 0, 60)  # its prompt, paraphrases and other prompts, with both answers
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


class Work:
    """The phases of an edit of a model of some shape.

    Args:
        facts: Number of facts, each about a subject of its own.
        free: Bytes of free memory that `batch_size="auto"` shares.

    Raises:
        ValueError: A layer cannot be edited, or the keys of fused experts are too wide for key statistics.
    """

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
    def proxy_facts(self) -> int:
        """Number of facts that layers are compared on; of a file it is the most that the config allows."""
        proxy, size = self.config.proxy, self.config.proxy_size
        found = len(proxy) if isinstance(proxy, list) else _PACKAGED if size is None else size
        return found if size is None else min(found, size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out."""
        notes = []
        name = self.config.layer
        if isinstance(name, str) and name not in ("lga", *STREAMED) and not name.startswith("hub:"):
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
        if name not in STREAMED:
            return
        count = len(self.shape.editable)
        if self.has_text or (name == "selectivity" and self.config.covariance != "identity"):
            yield self._streamed_statistics(self.shape.editable)
        if name == "sweep":
            yield from self._sweep(count)
        else:
            yield self._selection_by_keys(count)

    def _lga(self) -> Phase:
        s, facts = self.shape, self.proxy_facts
        tokens = _LGA_ROWS * _LONGEST_PROXY
        size = self.gradient_bytes(tokens, s.layers) + 8 * tokens * (s.width + s.key_width)
        size += 4 * LOGITS * (tokens - _LGA_ROWS) * s.vocabulary
        if s.experts > 1:  # the gradients of all experts of a layer, of the old and of the new answer
            size += 2 * s.key_width * s.width * s.element
        per_fact = (_PROXY.tokens, _PROXY.length, s.layers, _PROXY.tokens)
        ghosts = 2 * _PROXY.length**2 * s.mlp_widths * s.layers
        return Phase("layer selection", size, facts * (self.forward(*per_fact) + self.backward(*per_fact) + ghosts))

    def _selection_by_keys(self, count: int) -> Phase:
        s, m, facts = self.shape, self.shape.key_width, self.proxy_facts
        is_auto = self.config.layer != "selectivity"
        keys = 4 * facts * count * m * (3 + self.config.contexts if is_auto else 3)
        recorded = _RESPONSE.tokens * (count * (m + s.width) * s.element + 4 * m)
        recorded += 4 * LOGITS * _RESPONSE.reads * s.vocabulary if is_auto else 0
        solved, _, flops = self._solve(count) if self.has_text or not is_auto else (0, 0, 0)
        # The model's own next words after other prompts are read at all their tokens.
        reads = _RESPONSE.reads + 3 * _RESPONSE.length if is_auto else _RESPONSE.rows
        forwards = self.forward(_RESPONSE.tokens, _RESPONSE.length, s.layers, reads)
        if is_auto:
            forwards += 2 * self.forward(_PROXY.tokens, _PROXY.length, s.layers, 4)
            length = _PROXY.length + self.config.context_length
            forwards += self.forward(self.config.contexts * length, length, s.layers)
        return Phase("layer selection", keys + max(solved, recorded), flops + facts * forwards, keys + solved)

    def _sweep(self, count: int) -> Iterator[Phase]:
        facts = self.proxy_facts
        if self.answers is not None:
            yield replace(self._mlp_statistics(count), name="MLP statistics of all layers")
        trial = replace(self.config, layer=self.targets[0], target_layer=None, layer_pattern="golden")
        work = Work(self.shape, trial, facts, self.free)
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
                yield self._key_statistics(self.targets)
                size, stays, flops = self._solve(len(self.targets))
                yield Phase("detectors", size, flops, size, len(self.targets) * stays)
            if self.config.editor.learns == "values":
                yield self._wordings()
                yield self._values(self.worded, self.targets[0])
        yield Phase("save", 2 * self.edit_bytes, 0, 2 * self.edit_bytes)

    @property
    def text_tokens(self) -> int:
        """Tokens of text for key statistics."""
        return self.config.text_tokens(self.shape.key_width)

    @property
    def _moment_bytes(self) -> int:
        """Bytes of the key statistics of a layer."""
        return 4 * self.shape.key_width * min(self.text_tokens, self.shape.key_width)

    def _streamed_statistics(self, layers: Sequence[int]) -> Phase:
        """Return the phase that computes statistics in groups of layers, each in a pass up to its last layer."""
        at_once = max(1, GROUP_BYTES // self._moment_bytes)
        groups = [layers[start : start + at_once] for start in range(0, len(layers), at_once)]
        passes = [self._key_statistics(group) for group in groups]
        sampling = self.sampling(self.text_tokens)[1]
        flops = sum(phase.flops for phase in passes) - sampling * (len(groups) - 1)
        largest = max(passes, key=lambda phase: phase.bytes)
        return replace(largest, flops=flops, kept_bytes=0)

    def _key_statistics(self, layers: Sequence[int]) -> Phase:
        s, m, tokens = self.shape, self.shape.key_width, self.text_tokens
        sampling, flops = self.sampling(tokens)
        batch = min(_BATCH, tokens)
        kept = len(layers) * self._moment_bytes
        running = kept + self.forward_bytes(batch) + batch * m * (4 + s.element)
        written = kept + 2 * self._moment_bytes
        flops += self.forward(tokens, _SAMPLED_LENGTH, max(layers) + 1)
        flops += 2 * len(layers) * tokens * m**2 if tokens >= m else 0
        return Phase("key statistics", max(sampling, running, written), flops, written, kept)

    def _solve(self, count: int) -> tuple[int, int, int]:
        """Bytes of solving with the statistics of one layer, those that stay, and FLOPs for some layers."""
        m, tokens = self.shape.key_width, self.text_tokens
        has_spectrum = "null_space_threshold" in self.config.editor.fields and self.config.layer != "selectivity"
        order = min(tokens, m)
        flops = 9 * order**3 if has_spectrum else order**3 // 3
        if tokens >= m:
            return (36 if has_spectrum else 20) * m**2, 8 * m**2, count * flops
        strongest = 16 * m * tokens // 3 if has_spectrum else 0
        held = self._moment_bytes + (32 if has_spectrum else 16) * tokens**2 + strongest
        return held, 8 * tokens**2, count * (flops + 2 * m * tokens**2)

    def _mlp_statistics(self, count: int) -> Phase:
        s, d, m, tokens = self.shape, self.shape.width, self.shape.key_width, self.text_tokens
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
        size = self.cache_bytes(text.tokens) + 4 * text.rows * s.vocabulary * (s.element + 4)
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
        # Of four steps one runs all rows, and the others about half of them. Many facts need fewer steps.
        steps = (self.config.steps + _POLISH + 1) * 5 / 8
        flops = self.forward(text.tokens, text.length, s.layers, text.reads)
        flops += int(steps * (self.forward(*run) + self.backward(*run)))
        return Phase("values", at_once * one, self.facts * flops)
