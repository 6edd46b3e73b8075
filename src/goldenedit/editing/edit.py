"""One batch of facts, from requests to deltas: the way of the data, nothing of it written into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.budget import facts_at_once
from goldenedit.editing.keys import contrast_count, weighed_contrasts, with_contrasts
from goldenedit.editing.values import ValueOptions, Values, optimize_values
from goldenedit.editors import FactKeys, KeyStatistics, LowRankDelta, Problem
from goldenedit.editors.regularizers import prune, rect
from goldenedit.lm import LanguageModel
from goldenedit.lm.statistics import check_widths
from goldenedit.lm.tokens import encode_request
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class Changes:
    """What an editor made of a batch of facts.

    Attributes:
        deltas: Change of each edited module, by its path.
        probability_before: Probability of each new answer before (geometric mean over its tokens).
        steps: Optimizer steps of each fact.
        state: What the editor remembers for later edits.
        relative_error: What storing a dense change as one of low rank costs, in the Frobenius norm.
    """

    deltas: dict[str, LowRankDelta]
    probability_before: list[float]
    steps: list[int]
    state: dict[str, Tensor] = field(default_factory=dict)
    relative_error: float = 0.0


@dataclass(frozen=True)
class PreparedFacts:
    """Facts with their values and keys at some layers, from which the deltas of any of them follow by any editor.

    Attributes:
        lm: The model that they were found in.
        requests: The facts.
        layers: The layers that are edited, ascending.
        values: What the value optimization found.
        vectors: Whose outputs were optimized, see `Editor.vectors`.
    """

    lm: LanguageModel
    requests: Sequence[EditRequest]
    layers: Sequence[int]
    values: Values
    vectors: tuple[str, ...]
    _contrasts: dict[tuple[object, ...], list[list[Tensor] | None]] = field(default_factory=dict, repr=False)
    _keys: dict[tuple[object, ...], dict[int, list[FactKeys]]] = field(default_factory=dict, repr=False)

    def keys(self, config: EditConfig) -> dict[int, list[FactKeys]]:
        """Return what the configured editor reads of each fact's keys, by layer; computed once for these constants."""
        of_contrast = (contrast_count(config), config.contrast_weight, config.seed)
        constants = (*of_contrast, "anchor" in config.editor.reads, config.anchor_bare_prompt)
        if of_contrast not in self._contrasts:
            with phase("contrast keys"):
                self._contrasts[of_contrast] = weighed_contrasts(self.lm, self.requests, self.layers, config)
        if constants not in self._keys:
            contrasts = self._contrasts[of_contrast]
            self._keys[constants] = with_contrasts(self.layers, self.values.keys, contrasts, config)
        return self._keys[constants]

    def changes(
        self,
        config: EditConfig,
        statistics: Mapping[int, KeyStatistics],
        remembered: Mapping[str, Tensor] | None = None,
        chosen: Sequence[int] | None = None,
    ) -> Changes:
        """Return the change that inserts the facts `chosen`, by default all of them.

        Args:
            config: The editor and its constants.
            statistics: Key statistics, by layer.
            remembered: State of the edits made before.
            chosen: Indices of facts.

        Raises:
            ValueError: The values were optimized for another kind of editor, or its delta has a wrong shape, or a
                factor is not finite; the message names the fact.
        """
        editor = config.editor
        if editor.vectors != self.vectors:
            raise ValueError(f"These values were not optimized for the editor {config.method!r}: prepare them for it.")
        chosen = range(len(self.requests)) if chosen is None else chosen
        deltas, state, errors = {}, {}, []
        for index, (layer, keys) in enumerate(self.keys(config).items()):
            path = self.lm.architecture.down_projections[layer]
            previous = (remembered or {}).get(f"keys/{path}") if editor.remembers_keys else None
            residuals = self.values.delta[list(chosen), index].T
            problem = Problem([keys[fact] for fact in chosen], residuals, statistics[layer], None, previous)
            change = config.solve(problem)
            self._check(change, config, layer, [self.requests[fact] for fact in chosen])
            delta, error = stored(self.lm, change, layer, config)
            deltas[path] = delta
            errors.append(error)
            if editor.remembers_keys:
                state[f"keys/{path}"] = problem.keys
        before = [self.values.target_probability[fact] for fact in chosen]
        return Changes(deltas, before, [self.values.steps[fact] for fact in chosen], state, max(errors))

    def _check(
        self, change: LowRankDelta | Tensor, config: EditConfig, layer: int, requests: Sequence[EditRequest]
    ) -> None:
        """Raise ValueError where a change is of another shape than the matrix, or not finite."""
        check_shape(self.lm, change, config, layer)
        if isinstance(change, Tensor):
            bad = torch.stack([~change.isfinite().all()])
        else:
            bad = ~(change.A.isfinite().all(1) & change.B.isfinite().all(0))
        if bad.any():
            about = repr(requests[int(torch.argmax(bad.int()))].subject) if len(bad) == len(requests) else "the batch"
            remedy = "raise EditConfig.ridge" if "ridge" in config.editor.reads else "look at the editor's constants"
            raise ValueError(f"The edit of {about} at layer {layer} is not finite: {remedy}.")


def check_shape(lm: LanguageModel, change: LowRankDelta | Tensor, config: EditConfig, layer: int) -> None:
    """Raise ValueError where an editor returned a change of another shape than the matrix of the layer."""
    shape = lm.architecture.shape(lm.model, layer)
    found = tuple(change.shape) if isinstance(change, Tensor) else (change.B.shape[0], change.A.shape[1])
    if found != shape:
        raise ValueError(
            f"The editor {config.method!r} returned a change of shape {found} for a matrix of shape {shape}, "
            "(d_out, d_in)."
        )


def check_editable(lm: LanguageModel, config: EditConfig, layers: Sequence[int]) -> None:
    """Raise ValueError where the configured editor cannot change one of the layers."""
    if "attention" in config.editor.vectors:
        for layer in layers:
            lm.architecture.attention_output(lm.model, layer)
    if fused := [layer for layer in layers if layer in lm.architecture.experts]:
        what = f"Layer {fused[0]} keeps its experts as one parameter ({lm.architecture.down_projections[fused[0]]})"
        if config.editor.learns != "values":
            raise ValueError(
                f"{what}, which EditConfig.method {config.method!r} cannot train: use an editor that inserts values "
                "under keys, such as 'r-rome'."
            )
        if config.regularizer is not None:
            raise ValueError(
                f"{what}, which EditConfig.regularizer {config.regularizer!r} cannot compare a change with: set it to "
                "None."
            )
        if config.covariance != "identity":
            check_widths(lm, fused)


def stored(
    lm: LanguageModel, change: LowRankDelta | Tensor, layer: int, config: EditConfig
) -> tuple[LowRankDelta, float]:
    """Apply the config's regularizer; return what is stored, factors of equal norms, and the relative error of that.

    Args:
        change: Factors, or a dense change `(d_out, d_in)`.
    """
    if config.regularizer is not None:
        weight = lm.architecture.weight(lm.model, layer).cpu()
        if config.regularizer == "rect":
            change = rect(change.dense() if isinstance(change, LowRankDelta) else change, weight)
        else:
            change = prune(change if isinstance(change, LowRankDelta) else LowRankDelta.from_dense(change)[0], weight)
    if not isinstance(change, LowRankDelta):
        return LowRankDelta.from_dense(change, config.dense_tolerance)
    experts = lm.architecture.experts
    return replace(change.balanced(), experts=experts[layer].count(lm.model) if layer in experts else 1), 0.0


def prepare_facts(
    lm: LanguageModel, requests: Sequence[EditRequest], config: EditConfig, contexts: Sequence[str]
) -> PreparedFacts:
    """Find the values that make the model answer each request, and the keys they are inserted under.

    Raises:
        ValueError: A request cannot be served; the message names it.
    """
    layers = config.target_layers
    options = ValueOptions(
        config.steps,
        config.lr,
        config.kl_factor,
        config.weight_decay,
        config.clamp,
        config.stop_loss,
        config.editor.vectors,
    )
    if isinstance(config.batch_size, int):
        batch_size = config.batch_size
    else:
        batch_size = _facts_at_once(lm, requests, layers, contexts)
    with phase("values"):
        values = optimize_values(lm, requests, layers, contexts, options, batch_size)
    facts = PreparedFacts(lm, requests, layers, values, config.editor.vectors)
    facts.keys(config)  # runs the model, which solving does not
    return facts


def _facts_at_once(
    lm: LanguageModel, requests: Sequence[EditRequest], layers: Sequence[int], contexts: Sequence[str]
) -> int:
    longest = max(contexts, key=len)
    rows = [encode_request(lm.tokenizer, request, request.target_new, longest) for request in requests]
    return facts_at_once(
        lm.model,
        layers=lm.architecture.num_layers - layers[0],
        mlp_width=lm.architecture.shape(lm.model, layers[0])[1],
        rows=len(contexts) + 1,
        tokens=max(len(row.input_ids) for row in rows),
        answer_tokens=max(len(row.target) for row in rows),
    )
