"""Check that an edit does what it lists and nothing else: measure its facts, and compare its factors with their keys.

An editor that inserts values under keys changes `W` by `Delta = B A`. It computes the span of the rows of `A` from the
keys of the facts alone; the values do not matter. The audit computes the rows for the listed facts again. With `V` an
orthonormal basis of them,

    unexplained = ||Delta (I - V V^T)||_F / ||Delta||_F

is the share of the change that no listed fact explains. It is not available for fine-tuned edits, which have no such
rows; on machines where the base model samples other context texts, which change the rows; and for all layers of an edit
but the first, whose keys depend on the values inserted in earlier layers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenedit.architecture.layers import weight_of
from goldenedit.config import EditConfig
from goldenedit.editing.prepared import subject_keys, subject_texts
from goldenedit.editors import Problem
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.chat import rendered
from goldenedit.storage.folder import joined_state

if TYPE_CHECKING:
    from goldenedit.model import EditModel
    from goldenedit.storage.folder import Edit, EditedFact

logger = logging.getLogger(__name__)

# Largest acceptable `unexplained`. An edit of SmolLM2 has 1e-7 in float32, and 0.03 with rows computed in bfloat16.
UNEXPLAINED = 0.2
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
    names = model.active_adapters
    states = [joined_state(model.edits[name] for name in names[:index]) for index in range(len(names))]
    return [_audit(model, model.edits[name], state) for name, state in zip(names, states, strict=True)]


def _audit(model: EditModel, edit: Edit, previous: Mapping[str, Tensor]) -> EditAudit:
    """Audit one edit; `previous` is the joined state of the edits before it."""
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
    rows: dict[str, Tensor] = {}
    if is_key_based and edit.config is not None:  # an edit joined from edits with different configs has none
        try:
            rows = _rows(model, edit, edit.config, previous)
        except (ValueError, IndexError, OverflowError, RuntimeError) as error:  # the constants may be a stranger's
            logger.warning("The rows of edit %r cannot be computed with its config: %s", edit.name, error)
    modules = []
    for path, delta in edit.deltas.items():
        weight = weight_of(model.get_base_model(), path)
        explained_rows = rows.get(path)
        share = None if explained_rows is None else unexplained(delta.A, delta.B, explained_rows)
        modules.append(ModuleAudit(path, _relative(delta.norm, weight), share))
        rank = int((delta.svd()[1] > 1e-6 * delta.norm).sum())
        if is_key_based and rank > len(requests):
            warnings.append(f"{path} changes in {rank} directions, but the number of listed facts is {len(requests)}")
        elif share is not None and share > UNEXPLAINED:
            warnings.append(f"no listed fact explains {share:.0%} of the change of {path}")
    down_projections = set(model.architecture.down_projections.values())
    warnings += [
        f"{path} is not the down projection of a layer" for path in edit.deltas if path not in down_projections
    ]
    probabilities = [fact.probability_after for fact in measured]
    return EditAudit(edit.name, modules, probabilities, warnings, [fact.takes for fact in measured])


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


def _rows(model: EditModel, edit: Edit, config: EditConfig, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows that the editor computes from the facts' keys, by module; empty if they cannot be computed."""
    if config.covariance not in ("sampled", "identity") or config.covariance_tokens > _MAX_TOKENS:
        return {}  # an edit from a stranger must not choose what is loaded from elsewhere, or how long this runs
    if config.contexts * config.context_length > _MAX_TOKENS or edit.contexts_hash != model.contexts_hash(config):
        return {}
    requests = [fact.request for fact in edit.facts]
    config = copy.deepcopy(config)
    config.target_layer = config.target_layers[:1]  # the keys of later layers depend on the change in this one
    layers = config.target_layers
    with model.disable_adapter():
        contexts = model.lm.contexts(config)
        statistics = model.lm.statistics(config, layers)
        texts = subject_texts(model.lm, requests, config, contexts, joint=True)
        facts = subject_keys(model.lm, requests, config, texts)
    rows = {}
    for layer, layer_facts in facts.items():
        path = model.architecture.down_projections[layer]
        previous_keys = previous.get(f"keys/{path}") if config.editor.remembers_keys else None
        # The span of the rows does not depend on the residuals, so use one unit vector per fact.
        delta = config.solve(Problem(layer_facts, torch.eye(len(layer_facts)), statistics[layer], None, previous_keys))
        rows[path] = delta if isinstance(delta, Tensor) else delta.A
    return rows


def _relative(norm: float, weight: Tensor | None) -> float | None:
    if weight is None:
        return None
    weight_norm = weight.float().norm().item()
    return norm / weight_norm if weight_norm > 0 else None
