"""Facts with optimized values and keys, and the deltas an editor makes of them. Nothing here writes to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.budget import facts_at_once
from goldenedit.editing.keys import contrast_count, weighted_contrasts, with_contrasts
from goldenedit.editing.values import ValueOptions, Values, optimize_values
from goldenedit.editors import FactKeys, KeyStatistics, LowRankDelta, Problem
from goldenedit.editors.regularizers import prune, rect, sphere
from goldenedit.lm import LanguageModel
from goldenedit.lm.statistics import check_widths
from goldenedit.lm.tokens import encode_request
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class Changes:
    """The result of an editor on a batch of facts.

    Attributes:
        deltas: Change of each edited module, by module path.
        probability_before: Probability of each new answer before the edit (geometric mean over its tokens).
        steps: Optimizer steps of each fact.
        state: What the editor keeps for later edits.
        relative_error: Largest relative error, in the Frobenius norm, of storing a dense change with low rank.
    """

    deltas: dict[str, LowRankDelta]
    probability_before: list[float]
    steps: list[int]
    state: dict[str, Tensor] = field(default_factory=dict)
    relative_error: float = 0.0


@dataclass(frozen=True)
class PreparedFacts:
    """Facts with optimized values and keys at some layers. Editors turn any subset of them into deltas.

    Attributes:
        lm: The model.
        requests: The facts.
        layers: The layers to edit, ascending.
        values: Results of the value optimization.
        vectors: The modules whose outputs were optimized, see `Editor.vectors`.
    """

    lm: LanguageModel
    requests: Sequence[EditRequest]
    layers: Sequence[int]
    values: Values
    vectors: tuple[str, ...]
    _contrasts: dict[tuple[object, ...], list[list[Tensor] | None]] = field(default_factory=dict, repr=False)
    _keys: dict[tuple[object, ...], dict[int, list[FactKeys]]] = field(default_factory=dict, repr=False)

    def keys(self, config: EditConfig) -> dict[int, list[FactKeys]]:
        """Return the keys of each fact as the configured editor reads them, by layer. Results are cached."""
        contrast_constants = (contrast_count(config), config.contrast_weight, config.seed)
        constants = (*contrast_constants, "anchor" in config.editor.reads, config.anchor_bare_prompt)
        if contrast_constants not in self._contrasts:
            with phase("contrast keys"):
                self._contrasts[contrast_constants] = weighted_contrasts(self.lm, self.requests, self.layers, config)
        if constants not in self._keys:
            contrasts = self._contrasts[contrast_constants]
            self._keys[constants] = with_contrasts(self.layers, self.values.keys, contrasts, config)
        return self._keys[constants]

    def changes(
        self,
        config: EditConfig,
        statistics: Mapping[int, KeyStatistics],
        remembered: Mapping[str, Tensor] | None = None,
        chosen: Sequence[int] | None = None,
    ) -> Changes:
        """Return the changes that insert facts.

        Args:
            config: The editor and its constants.
            statistics: Key statistics, by layer.
            remembered: State of earlier edits.
            chosen: Indices of the facts to insert; all by default.

        Raises:
            ValueError: The values were optimized for another kind of editor, the change has a wrong shape, or it is
                not finite. The message names the fact.
        """
        editor = config.editor
        if editor.vectors != self.vectors:
            raise ValueError(
                f"The values were not optimized for the editor {config.method!r}. Call prepare_facts with its config."
            )
        chosen = range(len(self.requests)) if chosen is None else chosen
        deltas, state, errors = {}, {}, []
        for index, (layer, keys) in enumerate(self.keys(config).items()):
            path = self.lm.architecture.down_projections[layer]
            previous = (remembered or {}).get(f"keys/{path}") if editor.remembers_keys else None
            residuals = self.values.delta[list(chosen), index].T
            problem = Problem([keys[fact] for fact in chosen], residuals, statistics[layer], previous=previous)
            change = config.solve(problem)
            self._check_change(change, config, layer, [self.requests[fact] for fact in chosen])
            delta, error = stored(self.lm, change, layer, config)
            deltas[path] = delta
            errors.append(error)
            if editor.remembers_keys:
                state[f"keys/{path}"] = problem.keys
        before = [self.values.target_probability[fact] for fact in chosen]
        return Changes(deltas, before, [self.values.steps[fact] for fact in chosen], state, max(errors))

    def _check_change(
        self, change: LowRankDelta | Tensor, config: EditConfig, layer: int, requests: Sequence[EditRequest]
    ) -> None:
        """Raise ValueError if a change does not have the shape of the matrix, or is not finite."""
        check_shape(self.lm, change, config, layer)
        if isinstance(change, Tensor):
            not_finite = torch.stack([~change.isfinite().all()])
        else:
            not_finite = ~(change.A.isfinite().all(1) & change.B.isfinite().all(0))
        if not_finite.any():
            is_by_fact = len(not_finite) == len(requests)
            fact = repr(requests[int(torch.argmax(not_finite.int()))].subject) if is_by_fact else "the batch"
            remedy = "Raise EditConfig.ridge" if "ridge" in config.editor.reads else "Check the editor's constants"
            raise ValueError(f"The edit of {fact} at layer {layer} is not finite. {remedy}.")


def check_shape(lm: LanguageModel, change: LowRankDelta | Tensor, config: EditConfig, layer: int) -> None:
    """Raise ValueError if a change does not have the shape of the matrix of its layer."""
    shape = lm.architecture.shape(lm.model, layer)
    change_shape = tuple(change.shape) if isinstance(change, Tensor) else (change.B.shape[0], change.A.shape[1])
    if change_shape != shape:
        raise ValueError(
            f"The editor {config.method!r} returned a change of shape {change_shape} for a matrix of shape {shape}. "
            "Return (d_out, d_in)."
        )


def check_editable(lm: LanguageModel, config: EditConfig, layers: Sequence[int]) -> None:
    """Raise ValueError if the configured editor cannot change one of the layers."""
    if "attention" in config.editor.vectors:
        for layer in layers:
            lm.architecture.attention_output(lm.model, layer)
    if fused := [layer for layer in layers if layer in lm.architecture.experts]:
        problem = f"Layer {fused[0]} keeps its experts as one parameter ({lm.architecture.down_projections[fused[0]]})"
        if config.editor.learns != "values":
            raise ValueError(
                f"{problem}, which EditConfig.method {config.method!r} cannot train. Use an editor that inserts values "
                "under keys, such as 'r-rome'."
            )
        if config.regularizer is not None:
            raise ValueError(
                f"{problem}, which EditConfig.regularizer {config.regularizer!r} does not support. Set it to None."
            )
        if config.covariance != "identity":
            check_widths(lm, fused)


def stored(
    lm: LanguageModel, change: LowRankDelta | Tensor, layer: int, config: EditConfig
) -> tuple[LowRankDelta, float]:
    """Apply the config's regularizer to a change, and return the factors to store with their relative error.

    Args:
        change: Factors, or a dense change `(d_out, d_in)`.

    Returns:
        Factors of equal norms, and the relative error of storing a dense change with low rank.
    """
    if config.regularizer is not None:
        weight = lm.architecture.weight(lm.model, layer).cpu()
        if config.regularizer == "rect":
            change = rect(change.dense() if isinstance(change, LowRankDelta) else change, weight)
        else:
            regularize = prune if config.regularizer == "prune" else sphere
            if isinstance(change, LowRankDelta):
                change = regularize(change, weight)
            else:
                change = regularize(LowRankDelta.from_dense(change)[0], weight).dense()
    if isinstance(change, LowRankDelta):
        delta, error = change.balanced(), 0.0
    else:
        delta, error = LowRankDelta.from_dense(change, config.dense_tolerance)
    experts = lm.architecture.experts
    return replace(delta, experts=experts[layer].count(lm.model) if layer in experts else 1), error


def prepare_facts(
    lm: LanguageModel, requests: Sequence[EditRequest], config: EditConfig, contexts: Sequence[str]
) -> PreparedFacts:
    """Optimize the values that make the model give each new answer, and find the keys to insert them under.

    Args:
        contexts: Prefixes of each prompt, the first of them empty.

    Raises:
        ValueError: A request cannot be served. The message names it.
    """
    layers = config.target_layers
    options = ValueOptions(
        steps=config.steps,
        lr=config.lr,
        kl_factor=config.kl_factor,
        weight_decay=config.weight_decay,
        clamp=config.clamp,
        stop_loss=config.stop_loss,
        vectors=config.editor.vectors,
    )
    if isinstance(config.batch_size, int):
        batch_size = config.batch_size
    else:
        batch_size = _batch_size(lm, requests, layers, contexts)
    with phase("values"):
        values = optimize_values(lm, requests, layers, contexts, options, batch_size)
    facts = PreparedFacts(lm, requests, layers, values, config.editor.vectors)
    facts.keys(config)  # runs the model now; solving does not run it
    return facts


def _batch_size(
    lm: LanguageModel, requests: Sequence[EditRequest], layers: Sequence[int], contexts: Sequence[str]
) -> int:
    longest_context = max(contexts, key=len)
    rows = [encode_request(lm.tokenizer, request, request.target_new, longest_context) for request in requests]
    return facts_at_once(
        lm.model,
        layers=lm.architecture.num_layers - layers[0],
        mlp_width=lm.architecture.shape(lm.model, layers[0])[1],
        rows=len(contexts) + 1,
        tokens=max(len(row.input_ids) for row in rows),
        answer_tokens=max(len(row.target) for row in rows),
    )
