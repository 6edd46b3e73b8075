"""Does an edit do what it says, and no more? Its facts are replayed, and its factors held against their keys.

Editors that insert values under keys change `W` by `B A` with rows of `A` in the span of what they make of the facts'
keys, whatever the values are. So the rows that the listed facts give are computed again, with `V` an orthonormal basis
of them, and

    unexplained = ||Delta (I - V V^T)||_F / ||Delta||_F

is the share of a change that answers to keys of no listed fact. Fine-tuned edits have no such rows, and on a processor
that samples other text from the base model they cannot be computed again. Nor can those of an edit's later layers,
whose keys depend on the values in the earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenedit.architecture.layers import weight_of
from goldenedit.config import EditConfig
from goldenedit.editing.keys import context_keys, fact_keys
from goldenedit.editors import Problem
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.chat import rendered
from goldenedit.storage.folder import joined_state

if TYPE_CHECKING:
    from goldenedit.model import EditModel
    from goldenedit.storage.folder import Edit

# An edit of SmolLM2 has 1e-7 in float32 and 0.03 where rows are found in bfloat16.
UNEXPLAINED = 0.2
_MOST_TOKENS = 100_000
# A fact that is less than half as probable as its edit says is not what the edit does.
FORGOTTEN = 0.5


@dataclass(frozen=True)
class ModuleAudit:
    """One changed matrix.

    Attributes:
        path: Its path in the base model.
        norm: Frobenius norm of the change, relative to that of the base matrix; None where that is quantized or
            offloaded.
        unexplained: Share of the change that no listed fact explains, in [0, 1]; None where it cannot be told.
    """

    path: str
    norm: float | None
    unexplained: float | None


@dataclass(frozen=True)
class EditAudit:
    """One edit: what it changes, and what speaks against it.

    Attributes:
        name: Name of the edit.
        modules: Its matrices.
        probabilities: Probability of each new answer with all edits on, found now.
        warnings: What the listed facts do not explain, in words; empty where all is well.
    """

    name: str
    modules: list[ModuleAudit]
    probabilities: list[float]
    warnings: list[str]


def audit(model: EditModel) -> list[EditAudit]:
    """Look at the active edits of a model: do they do what they list, and only that?

    Raises:
        ValueError: A listed fact cannot be tokenized.
    """
    names = model.active_adapters
    before = [joined_state(model.edits[name] for name in names[:index]) for index in range(len(names))]
    return [_audit(model, model.edits[name], state) for name, state in zip(names, before, strict=True)]


def _audit(model: EditModel, edit: Edit, remembered: Mapping[str, Tensor]) -> EditAudit:
    requests = [rendered(model.tokenizer, fact.request) for fact in edit.facts]
    found = likelihoods(model.lm, [(request.text, request.target_new) for request in requests])
    probabilities = [math.exp(-one.nll) for one in found]
    warnings = []
    for fact, probability in zip(edit.facts, probabilities, strict=True):
        if probability < FORGOTTEN * fact.probability_after:
            warnings.append(
                f"{fact.request.shown!r} -> {fact.request.target_new!r} has a probability of {probability:.3f}, not "
                f"the {fact.probability_after:.3f} that the edit lists"
            )
    by_keys = all(
        config.has_editor and config.editor.learns == "values" and config.regularizer is None for config in edit.configs
    )
    # Edits of different making that are one have no rows of their own.
    rows = _rows(model, edit, edit.config, remembered) if by_keys and edit.config is not None else {}
    modules = []
    for path, delta in edit.deltas.items():
        weight = weight_of(model.get_base_model(), path)
        explained = rows.get(path)
        share = None if explained is None else unexplained(delta.A, delta.B, explained)
        modules.append(ModuleAudit(path, _relative(delta.norm, weight), share))
        effective = int((delta.svd()[1] > 1e-6 * delta.norm).sum())
        if by_keys and effective > len(requests):
            warnings.append(f"{path} changes in {effective} directions, but {len(requests)} facts are listed")
        elif share is not None and share > UNEXPLAINED:
            warnings.append(f"{share:.0%} of the change of {path} answers to none of the listed facts")
    listed = set(model.architecture.down_projections.values())
    warnings += [f"{path} is not the down projection of a layer" for path in edit.deltas if path not in listed]
    return EditAudit(edit.name, modules, probabilities, warnings)


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
    whole = ((A @ A.T) * gram).sum()
    return (((rest @ rest.T) * gram).sum().clamp_min(0) / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt().item()


def _rows(model: EditModel, edit: Edit, config: EditConfig, remembered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows that an editor makes of the facts' keys, by module; none where that cannot be told."""
    if config.covariance not in ("sampled", "identity") or config.covariance_tokens > _MOST_TOKENS:
        return {}  # a stranger's edit is not to choose what is loaded from elsewhere, nor for how long this runs
    if config.contexts * config.context_length > _MOST_TOKENS or edit.contexts_hash != model.contexts_hash(config):
        return {}
    requests = [rendered(model.tokenizer, fact.request) for fact in edit.facts]
    where, layers = model.architecture, config.target_layers[:1]  # the keys of later ones depend on its change
    with model.disable_adapter():
        contexts = model.lm.contexts(config)
        statistics = model.lm.statistics(config, layers)
        keys = context_keys(model.lm, requests, layers, contexts)
        facts = fact_keys(model.lm, requests, layers, keys, config)
    rows = {}
    for layer, of_layer in facts.items():
        path = where.down_projections[layer]
        previous = remembered.get(f"keys/{path}") if config.editor.remembers_keys else None
        # Rows do not depend on the residuals; these are one direction for each fact.
        change = config.solve(Problem(of_layer, torch.eye(len(of_layer)), statistics[layer], None, previous))
        rows[path] = change if isinstance(change, Tensor) else change.A
    return rows


def _relative(norm: float, weight: Tensor | None) -> float | None:
    if weight is None:
        return None
    whole = weight.float().norm().item()
    return norm / whole if whole > 0 else None
