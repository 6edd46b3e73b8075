"""Check that an edit does what it lists and nothing else: measure its facts, and compare its factors with their keys.

An editor that inserts values under keys changes `W` by `Delta = B A`. It computes the span of the rows of `A` from the
keys of the facts alone; the values do not matter. The audit computes the rows for the listed facts again. With `V` an
orthonormal basis of them,

    unexplained = ||Delta (I - V V^T)||_F / ||Delta||_F

is the share of the change that no listed fact explains. It is computed for the first layer of an edit only, because the
keys of later layers depend on the values inserted in earlier ones.

An editor that rewrites neurons (`goldenedit.editors.gated`) changes up to three maps of a layer: the rows of gates and
ups, and the columns of the down projection. In the edited layers, the new rows of a neuron follow from its subject, and
in the layer of the answers from its fact; the values do not matter here either. The audit computes the rows for the
listed facts again. In the maps of gates and ups, it compares the change of each rewritten neuron with that of the
subject or the fact that the neuron responds to, and `unexplained` is the largest share of a change that is left. In the
down projection, the columns of the rewritten neurons are explained. This holds for all layers: the rows for subjects
are computed before a value is inserted, and those for facts with the edit's own markers. Such an edit may
rewrite one neuron for each listed subject in each edited layer, and one for each listed fact in the layer of the
answers, and change nothing else.

`unexplained` is not available for fine-tuned edits, which have no such rows, and on machines where the base model
samples other context texts, which change the rows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenedit.architecture.layers import weight_of
from goldenedit.audit_neurons import (
    ROUNDING,
    UNEXPLAINED,
    Rewriting,
    doubts_about_neurons,
    rewritings,
    unexplained_neurons,
)
from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.prepared import subject_keys, subject_texts
from goldenedit.editors import Problem
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.chat import rendered
from goldenedit.storage.folder import joined_state

if TYPE_CHECKING:
    from goldenedit.model import EditModel
    from goldenedit.storage.folder import Edit, EditedFact

logger = logging.getLogger(__name__)

_MAX_TOKENS = 100_000


@dataclass(frozen=True)
class ModuleAudit:
    """One changed matrix.

    Attributes:
        path: Its path in the base model.
        norm: Frobenius norm of the change, divided by the norm of the base matrix; None if the base matrix is quantized
            or offloaded.
        unexplained: Share of the change that no listed fact explains, in [0, 1]; None if it cannot be computed.
    """

    path: str
    norm: float | None
    unexplained: float | None


@dataclass(frozen=True)
class EditAudit:
    """The audit of one edit.

    Attributes:
        name: Name of the edit.
        modules: The matrices that it changes.
        probabilities: Probability of each new answer, measured now with all edits active.
        warnings: Changes that the listed facts do not explain, and facts that are not answered; empty if the edit
            passes.
        answered: Whether the new answer of each fact takes now (`EditedFact.takes`), whatever the edit lists.
    """

    name: str
    modules: list[ModuleAudit]
    probabilities: list[float]
    warnings: list[str]
    answered: list[bool]


def audit(model: EditModel) -> list[EditAudit]:
    """Audit the active edits of a model: check that they change what they list, and nothing else.

    Raises:
        ValueError: A listed fact cannot be tokenized.
    """
    edits = [model.edits[name] for name in model.active_adapters]
    return [_audit(model, edit, edits[:index]) for index, edit in enumerate(edits)]


def _audit(model: EditModel, edit: Edit, previous: Sequence[Edit]) -> EditAudit:
    """Audit one edit; `previous` are the edits before it."""
    requests = [rendered(model.tokenizer, fact.request) for fact in edit.facts]
    answers = likelihoods(model.lm, [(request.text, request.target_new) for request in requests])
    measured = [
        replace(fact, probability_after=answer.probability, weakest_after=answer.weakest)
        for fact, answer in zip(edit.facts, answers, strict=True)
    ]
    warnings = [
        _unanswered(fact, now) for fact, now in zip(edit.facts, measured, strict=True) if now.failure is not None
    ]
    is_key_based = all(
        config.has_editor and config.editor.learns == "values" and config.regularizer is None for config in edit.configs
    )
    layers = rewritings(model, edit) if is_key_based else []
    is_gated = bool(layers) and all(config.editor.gates for config in edit.configs)
    shares = _unexplained_shares(model, edit, previous, layers if is_gated else []) if is_key_based else {}
    down_projections = set(model.architecture.down_projections.values())
    doubts = doubts_about_neurons(edit, layers, down_projections, is_gated)
    of_neurons = {path for of_layer in layers for path in of_layer.maps}
    for path, delta in edit.deltas.items():
        rank = int((delta.svd()[1] > ROUNDING * delta.norm).sum())
        if path in doubts:
            warnings.append(doubts[path])
        elif is_key_based and not is_gated and path in down_projections and rank > len(requests):
            warnings.append(f"{path} changes in {rank} directions, but the number of listed facts is {len(requests)}")
        elif shares.get(path, 0.0) > UNEXPLAINED:
            warnings.append(f"no listed fact explains {shares[path]:.0%} of the change of {path}")
        elif path not in down_projections | of_neurons:
            what = "a map of an edited MLP" if is_gated else "the down projection of a layer"
            warnings.append(f"{path} is not {what}")
    modules = [
        ModuleAudit(path, _relative(delta.norm, weight_of(model.get_base_model(), path)), shares.get(path))
        for path, delta in edit.deltas.items()
    ]
    probabilities = [fact.probability_after for fact in measured]
    return EditAudit(edit.name, modules, probabilities, warnings, [fact.takes for fact in measured])


def _unexplained_shares(
    model: EditModel, edit: Edit, previous: Sequence[Edit], layers: Sequence[Rewriting]
) -> dict[str, float]:
    """Return the share of each change that the listed facts do not explain, for the maps where it can be computed.

    Args:
        layers: The layers whose neurons the edit rewrites; empty for an edit that inserts values under keys.
    """
    config = edit.config
    if config is None:  # it joins edits with different configs
        return {}
    try:
        if not _can_be_repeated(model, edit, config):
            return {}
        # As when the edit was made: rewritten neurons change keys of their own layer.
        with phase("audit"), _only(model, previous):
            if layers:
                return unexplained_neurons(model, edit, config, previous, layers)
            rows = _rows(model, edit, config, previous)
    except (ValueError, IndexError, OverflowError, RuntimeError) as error:  # the constants may be a stranger's
        logger.warning("The rows of edit %r cannot be computed with its config: %s", edit.name, error)
        return {}
    deltas = {path: delta for path, delta in edit.deltas.items() if path in rows}
    return {path: unexplained(delta.A, delta.B, rows[path]) for path, delta in deltas.items()}


def _unanswered(listed: EditedFact, measured: EditedFact) -> str:
    """Return the warning for a fact that is not answered: as its edit lists, or although it lists another result."""
    text = (
        f"{listed.request.shown!r} -> {listed.request.target_new!r} is not answered: it has a probability of "
        f"{measured.probability_after:.3f}{measured.weakest_note}"
    )
    listed_result = f"the edit lists {listed.probability_after:.3f}{listed.weakest_note}"
    return f"{text}, but {listed_result}" if listed.failure is None else f"{text}; {listed_result}, {listed.failure}"


def unexplained(A: Tensor, B: Tensor, rows: Tensor) -> float:
    """Return the share of `B A` outside the span of `rows`, `||BA (I - V V^T)|| / ||BA||`.

    Args:
        A: `(r, d_in)`.
        B: `(d_out, r)`.
        rows: `(n, d_in)`.
    """
    V = torch.linalg.qr(rows.double().T)[0]
    A, B = A.double(), B.double()
    rest = A - (A @ V) @ V.T
    gram = B.T @ B
    total = ((A @ A.T) * gram).sum()
    return (((rest @ rest.T) * gram).sum().clamp_min(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt().item()


def _can_be_repeated(model: EditModel, edit: Edit, config: EditConfig) -> bool:
    """Return whether this machine computes the rows of an edit from the same texts."""
    # An edit from a stranger must not choose what is loaded from elsewhere, or how long this runs.
    if config.covariance not in ("sampled", "identity") or model.lm.text_tokens(config) > _MAX_TOKENS:
        return False
    return config.contexts * config.context_length <= _MAX_TOKENS and edit.contexts_hash == model.contexts_hash(config)


def _rows(model: EditModel, edit: Edit, config: EditConfig, previous: Sequence[Edit]) -> dict[str, Tensor]:
    """Return the rows that the editor computes from the facts' keys, by module. The previous edits must be active."""
    requests = [fact.request for fact in edit.facts]
    config = copy.deepcopy(config)
    config.target_layer = config.target_layers[:1]  # the keys of later layers depend on the change in this one
    layers = config.target_layers
    with model.disable_adapter():
        contexts = model.lm.contexts(config)
        statistics = model.lm.statistics(config, layers)
        texts = subject_texts(model.lm, requests, config, contexts, joint=True)
    facts = subject_keys(model.lm, requests, config, texts)
    state = joined_state(previous)
    rows = {}
    for layer, layer_facts in facts.items():
        path = model.architecture.down_projections[layer]
        previous_keys = state.get(f"keys/{path}") if config.editor.remembers_keys else None
        # The span of the rows does not depend on the residuals, so use one unit vector per fact.
        delta = config.solve(Problem(layer_facts, torch.eye(len(layer_facts)), statistics[layer], None, previous_keys))
        rows[path] = delta if isinstance(delta, Tensor) else delta.A
    return rows


@contextmanager
def _only(model: EditModel, edits: Sequence[Edit]) -> Iterator[None]:
    """Switch on exactly these edits inside this context."""
    active = model.active_adapters
    model.adapters.activate([edit.name for edit in edits])
    try:
        yield
    finally:
        model.adapters.activate(active)


def _relative(norm: float, weight: Tensor | None) -> float | None:
    if weight is None:
        return None
    weight_norm = weight.float().norm().item()
    return norm / weight_norm if weight_norm > 0 else None
