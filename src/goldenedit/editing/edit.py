"""One batch of facts, from requests to deltas: the way of the data, nothing of it written into the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.architecture.layers import Architecture
from goldenedit.config import TRAINED, EditConfig
from goldenedit.cost import phase
from goldenedit.editing.budget import facts_at_once
from goldenedit.editing.delta import LowRankDelta
from goldenedit.editing.keys import FactKeys, answered_keys, contrast_keys
from goldenedit.editing.rows import encode_request
from goldenedit.editing.statistics import KeyStatistics, check_widths, relative_contrast
from goldenedit.editing.training import answer_gradients, train
from goldenedit.editing.values import ValueOptions, Values, optimise_values
from goldenedit.editors import EDITORS, SEQUENTIAL, Problem
from goldenedit.editors.finetune import DenseChange, LowRankChange
from goldenedit.editors.regularizers import prune, rect
from goldenedit.editors.ultraedit import RunningMoments, ultraedit
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class Changes:
    """What an editor made of a batch of facts.

    Attributes:
        deltas: Change of each edited module, by its path.
        probability_before: Probability of each new answer before (geometric mean over its tokens).
        steps: Optimiser steps of each fact.
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
    """All that an editor needs of some facts, from which the deltas of any of them follow.

    Attributes:
        requests: The facts.
        values: What the value optimisation found.
        keys: Keys of each fact, by layer.
        modules: Path of the edited module, by layer, and its weight `(d_out, d_in)` where a regulariser asks for it.
        attention: Whether the values were found with the attention's help, as PMET wants them and no other editor.
        experts: The number of experts of each layer whose down projections are one parameter.
    """

    requests: Sequence[EditRequest]
    values: Values
    keys: dict[int, list[FactKeys]]
    modules: dict[int, tuple[str, Tensor | None]]
    attention: bool = False
    experts: dict[int, int] = field(default_factory=dict)

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
            ValueError: A factor is not finite; the message names the fact. Or the values are not those of the editor.
        """
        if self.attention != (config.method == "pmet"):
            raise ValueError(f"These values were not optimised for the editor {config.method!r}: prepare them for it.")
        chosen = range(len(self.requests)) if chosen is None else chosen
        deltas, state, errors = {}, {}, []
        for index, (layer, keys) in enumerate(self.keys.items()):
            path, weight = self.modules[layer]
            facts = [keys[fact] for fact in chosen]
            previous = (remembered or {}).get(f"keys/{path}")
            residuals = self.values.delta[list(chosen), index].T
            found = EDITORS[config.method](Problem(facts, residuals, statistics[layer], config, previous))
            bad = ~(found.A.isfinite().all(1) & found.B.isfinite().all(0))
            if bad.any():
                subject = self.requests[chosen[int(torch.argmax(bad.int()))]].subject
                raise ValueError(f"The edit of {subject!r} at layer {layer} is not finite: raise EditConfig.ridge.")
            whole, error = stored(found, weight, config)
            deltas[path] = replace(whole, experts=self.experts.get(layer, 1))
            errors.append(error)
            if config.method in SEQUENTIAL:
                state[f"keys/{path}"] = answered_keys(facts)
        before = [self.values.target_probability[fact] for fact in chosen]
        return Changes(deltas, before, [self.values.steps[fact] for fact in chosen], state, max(errors))


def check_method(model: nn.Module, architecture: Architecture, config: EditConfig, layers: Sequence[int]) -> None:
    """Raise ValueError where the config cannot change the fused experts of one of the layers."""
    if fused := [layer for layer in layers if layer in architecture.experts]:
        what = f"Layer {fused[0]} keeps its experts as one parameter ({architecture.down_projections[fused[0]]})"
        if config.method in TRAINED:
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
            check_widths(model, architecture, fused)


def stored(change: LowRankDelta | Tensor, weight: Tensor | None, config: EditConfig) -> tuple[LowRankDelta, float]:
    """Apply the config's regulariser; return what is stored, factors of equal norms, and the relative error of that.

    Args:
        change: Factors, or a dense change `(d_out, d_in)`.
        weight: `(d_out, d_in)`, which the regularisers compare with.
    """
    if config.regularizer is not None and weight is not None:
        if config.regularizer == "rect":
            change = rect(change.dense() if isinstance(change, LowRankDelta) else change, weight)
        else:
            change = prune(change if isinstance(change, LowRankDelta) else LowRankDelta.from_dense(change)[0], weight)
    if isinstance(change, LowRankDelta):
        return change.balanced(), 0.0
    return LowRankDelta.from_dense(change, config.dense_tolerance)


def prepare_facts(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    contexts: Sequence[str],
) -> PreparedFacts:
    """Find the values that make the model answer each request, and the keys they are inserted under.

    Raises:
        ValueError: A request cannot be served; the message names it.
    """
    layers = config.target_layers
    options = ValueOptions(
        config.steps, config.lr, config.kl_factor, config.weight_decay, config.clamp, config.stop_loss
    )
    if isinstance(config.batch_size, int):
        batch_size = config.batch_size
    else:
        batch_size = _facts_at_once(model, architecture, tokenizer, requests, layers, contexts)
    attention = config.method == "pmet"
    with phase("values"):
        values = optimise_values(
            model, architecture, tokenizer, requests, layers, contexts, options, batch_size, attention
        )
    with phase("contrast keys"):
        found = fact_keys(model, architecture, tokenizer, requests, config, values.keys)
    modules = {
        layer: (
            architecture.down_projections[layer],
            architecture.weight(model, layer).cpu() if config.regularizer else None,
        )
        for layer in layers
    }
    experts = {layer: architecture.experts[layer].count(model) for layer in layers if layer in architecture.experts}
    return PreparedFacts(requests, values, found, modules, attention, experts)


def fact_keys(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    keys: Sequence[Tensor],
) -> dict[int, list[FactKeys]]:
    """Return what editors know of each fact's keys, by target layer.

    Args:
        keys: By layer `(N, contexts, d_in)`, keys of each fact in each context, that of the bare prompt first.
    """
    layers = config.target_layers
    count = config.contrast if config.contrast_weight > 0 else 0
    contrasts = contrast_keys(model, architecture, tokenizer, requests, layers, count, config.seed)
    anchor = config.anchor_bare_prompt and keys[0].shape[1] > 1  # else the bare key is the mean
    found: dict[int, list[FactKeys]] = {}
    for index, (layer, of_layer) in enumerate(zip(layers, keys, strict=True)):
        found[layer] = []
        for of_fact, contrast in zip(of_layer, contrasts, strict=True):
            weighed = None if contrast is None else relative_contrast(contrast[index], config.contrast_weight)
            # A copy, so that keeping the facts does not keep the keys of all contexts.
            found[layer].append(FactKeys(of_fact[0].clone(), of_fact.mean(0), weighed, anchor))
    return found


def _facts_at_once(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    contexts: Sequence[str],
) -> int:
    longest = max(contexts, key=len)
    rows = [encode_request(tokenizer, request, request.target_new, longest) for request in requests]
    return facts_at_once(
        model,
        layers=architecture.num_layers - layers[0],
        mlp_width=architecture.shape(model, layers[0])[1],
        rows=len(contexts) + 1,
        tokens=max(len(row.input_ids) for row in rows),
        answer_tokens=max(len(row.target) for row in rows),
    )


@outside_inference_mode()
def train_facts(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    remembered: Mapping[str, Tensor],
) -> Changes:
    """Find the change of the editors that need no values and keys: FT-L, FT-M, LoRA and UltraEdit.

    Raises:
        ValueError: A request cannot be served, or the loss leaves the finite numbers.
    """
    before = likelihoods(model, tokenizer, [(request.text, request.target_new) for request in requests])
    find = _ultraedit if config.method == "ultraedit" else _trained
    found, steps, state = find(model, architecture, tokenizer, requests, config, remembered)
    deltas, errors = {}, []
    for layer, change in found.items():
        weight = architecture.weight(model, layer).cpu() if config.regularizer else None
        delta, error = stored(change, weight, config)
        deltas[architecture.down_projections[layer]] = delta
        errors.append(error)
    return Changes(deltas, [math.exp(-one.nll) for one in before], [steps] * len(requests), state, max(errors))


_Found = tuple[dict[int, "LowRankDelta | Tensor"], int, dict[str, Tensor]]


def _ultraedit(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    remembered: Mapping[str, Tensor],
) -> _Found:
    found_at = answer_gradients(model, architecture, tokenizer, requests, config.target_layers)
    features: dict[str, list[Tensor]] = {}
    names = {layer: "moments/{}x{}".format(*architecture.shape(model, layer)) for layer in found_at}
    for layer, (inputs, _, slopes) in found_at.items():  # modules of one shape share their moments
        features.setdefault(names[layer], []).append(torch.cat([inputs, slopes], 1))
    own = {name: RunningMoments.of(torch.cat(parts)) for name, parts in features.items()}
    moments = {
        name: one + RunningMoments.from_columns(remembered[name]) if name in remembered else one
        for name, one in own.items()
    }
    found: dict[int, LowRankDelta | Tensor] = {}
    for layer, (inputs, outputs, slopes) in found_at.items():
        lr, ridge = config.constant("ultraedit_lr"), config.constant("ultraedit_ridge")
        if config.relative_constants:
            d_out, d_in = architecture.shape(model, layer)
            # ||h^||^2 is about d_in, and ||g^|| the root of d_out: the step is then as long as an output.
            lr *= outputs.norm(dim=1).mean().item() / (d_in * d_out**0.5)
            ridge *= inputs.square().sum(1).mean().item()
        found[layer] = ultraedit(inputs, slopes, moments[names[layer]], lr, ridge)
    return found, 1, {name: one.columns() for name, one in own.items()}


def _trained(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    config: EditConfig,
    remembered: Mapping[str, Tensor],
) -> _Found:
    generator = torch.Generator().manual_seed(config.seed)
    changes: dict[int, DenseChange | LowRankChange] = {}
    for layer in config.target_layers:
        d_out, d_in = architecture.shape(model, layer)
        changes[layer] = (
            LowRankChange(d_in, d_out, config.lora_rank, generator)
            if config.method == "lora"
            else DenseChange(d_in, d_out, config.constant("finetune_epsilon") if config.method == "ft-l" else None)
        )
    steps = train(
        model,
        architecture,
        tokenizer,
        requests,
        changes,
        "last" if config.method == "ft-l" else "masked",
        config.finetune_steps,
        config.constant("finetune_lr"),
        config.finetune_stop_loss,
    )
    return {layer: change.change() for layer, change in changes.items()}, steps, {}
