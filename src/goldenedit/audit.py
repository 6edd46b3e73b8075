"""Check that an edit does what it lists and nothing else: measure its facts, and compare its factors with their keys.

An editor that inserts values under keys changes `W` by `Delta = B A`. It computes the span of the rows of `A` from the
keys of the facts alone; the values do not matter. The audit computes the rows for the listed facts again. With `V` an
orthonormal basis of them,

    unexplained = ||Delta (I - V V^T)||_F / ||Delta||_F

is the share of the change that no listed fact explains. It is computed for the first layer of an edit only, because the
keys of later layers depend on the values inserted in earlier ones.

An editor that rewrites neurons (`goldenedit.editors.gated`) changes up to three maps of a layer: the rows of gates and
ups, and the columns of the down projection. The new rows of a neuron follow from its subject; the values do not matter
here either. The audit computes the rows for the listed subjects again. In the maps of gates and ups, it compares the
change of each rewritten neuron with that of the subject that the neuron responds to, and `unexplained` is the largest
share of a change that is left. In the down projection, the columns of the rewritten neurons are explained. This holds
for all layers, because the rows of all layers are computed before a value is inserted. Such an edit may rewrite one
neuron for each listed subject and layer, and change nothing else.

`unexplained` is not available for fine-tuned edits, which have no such rows, and on machines where the base model
samples other context texts, which change the rows.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from goldenedit.architecture.layers import weight_of
from goldenedit.architecture.neurons import Neurons, find_neurons
from goldenedit.config import EditConfig
from goldenedit.editing.calls import facts_about_subjects
from goldenedit.editing.gates import Gates, Spare, gates_of
from goldenedit.editing.prepared import subject_keys, subject_texts
from goldenedit.editing.rows import subjects_of
from goldenedit.editors import LowRankDelta, Problem
from goldenedit.editors.gated import InputMoments
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.storage.folder import joined_state

if TYPE_CHECKING:
    from goldenedit.model import EditModel
    from goldenedit.storage.folder import Edit, EditedFact

logger = logging.getLogger(__name__)

# Largest acceptable `unexplained`. An edit of SmolLM2 has 1e-6 in float32, and 0.05 with rows computed in 16 bits.
# A gate that opens at another subject too has 0.3.
UNEXPLAINED = 0.2
_MAX_TOKENS = 100_000
_ROUNDING = 1e-6  # relative size of what is no change


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


@dataclass(frozen=True)
class _Rewriting:
    """What an edit does to the neurons of one layer.

    Attributes:
        layer: The layer.
        neurons: How they are computed.
        rewritten: Those whose gates it changes.
        down: Path of the down projection.
    """

    layer: int
    neurons: Neurons
    rewritten: list[int]
    down: str

    @property
    def maps(self) -> set[str]:
        """The maps that compute the neurons: of the gates, and of the ups where there are any."""
        up = self.neurons.up
        return {self.neurons.gate.path} if up is None else {self.neurons.gate.path, up.path}

    def rows(self, path: str) -> set[int]:
        """Return the rows of a map that belong to the rewritten neurons."""
        blocks = [block for block in (self.neurons.gate, self.neurons.up) if block is not None and block.path == path]
        return {block.offset + neuron for block in blocks for neuron in self.rewritten}


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
    layers = _rewritings(model, edit) if is_key_based else []
    is_gated = bool(layers) and all(config.editor.gates for config in edit.configs)
    shares = _unexplained_shares(model, edit, previous, layers if is_gated else []) if is_key_based else {}
    down_projections = set(model.architecture.down_projections.values())
    doubts = _doubts_about_neurons(edit, layers, down_projections, is_gated)
    of_neurons = {path for of_layer in layers for path in of_layer.maps}
    for path, delta in edit.deltas.items():
        rank = int((delta.svd()[1] > _ROUNDING * delta.norm).sum())
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
    model: EditModel, edit: Edit, previous: Sequence[Edit], layers: Sequence[_Rewriting]
) -> dict[str, float]:
    """Return the share of each change that the listed facts do not explain, for the maps where it can be computed.

    Args:
        layers: The layers whose neurons the edit rewrites; empty for an edit that inserts values under keys.
    """
    if edit.config is None:  # it joins edits with different configs
        return {}
    try:
        if layers:
            return _unexplained_neurons(model, edit, edit.config, previous, layers)
        rows = _rows(model, edit, edit.config, previous)
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
    if config.covariance not in ("sampled", "identity") or config.covariance_tokens > _MAX_TOKENS:
        return False
    return config.contexts * config.context_length <= _MAX_TOKENS and edit.contexts_hash == model.contexts_hash(config)


def _rows(model: EditModel, edit: Edit, config: EditConfig, previous: Sequence[Edit]) -> dict[str, Tensor]:
    """Return the rows that the editor computes from the facts' keys, by module; empty if they cannot be computed."""
    if not _can_be_repeated(model, edit, config):
        return {}
    requests = [fact.request for fact in edit.facts]
    config = copy.deepcopy(config)
    config.target_layer = config.target_layers[:1]  # the keys of later layers depend on the change in this one
    layers = config.target_layers
    with model.disable_adapter():
        contexts = model.lm.contexts(config)
        statistics = model.lm.statistics(config, layers)
        texts = subject_texts(model.lm, requests, config, contexts, joint=True)
    with _only(model, previous):  # as when the edit was made: rewritten neurons change keys of their own layer
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


def _rewritings(model: EditModel, edit: Edit) -> list[_Rewriting]:
    """Return what an edit does to the neurons of its layers; empty if it rewrites none."""
    architecture = model.architecture
    if set(edit.deltas) <= set(architecture.down_projections.values()):
        return []
    listed = {layer for config in edit.configs if config.editor.gates for layer in config.target_layers}
    found = []
    with model.disable_adapter():
        for layer in sorted(listed & set(architecture.down_projections)):
            neurons = find_neurons(model.lm.model, architecture, layer)
            if neurons is not None:
                gate = neurons.gate
                changed = _changed_rows(edit.deltas[gate.path]) if gate.path in edit.deltas else []
                rewritten = [row - gate.offset for row in changed if 0 <= row - gate.offset < gate.count]
                found.append(_Rewriting(layer, neurons, rewritten, architecture.down_projections[layer]))
    return found if any(of_layer.maps & set(edit.deltas) for of_layer in found) else []


def _changed_rows(delta: LowRankDelta) -> list[int]:
    """Return the rows of a matrix that a delta changes."""
    return (delta.row_norms > _ROUNDING * delta.norm).nonzero()[:, 0].tolist()


def _doubts_about_neurons(
    edit: Edit, layers: Sequence[_Rewriting], down_projections: set[str], is_gated: bool
) -> dict[str, str]:
    """Return warnings about neurons that the listed facts do not account for, by the path of a map.

    Args:
        is_gated: Whether all of the edit rewrites neurons. Otherwise the down projections have other changes too.
    """
    count = len(subjects_of([fact.request for fact in edit.facts]))
    doubts = {}
    for of_layer in layers:
        gate = of_layer.neurons.gate.path
        if len(of_layer.rewritten) > count:
            doubts[gate] = (
                f"{gate} rewrites {len(of_layer.rewritten)} neurons, but the number of listed subjects is {count}"
            )
        for path in of_layer.maps - doubts.keys():
            if path in edit.deltas and not of_layer.rows(path).issuperset(_changed_rows(edit.deltas[path])):
                doubts[path] = f"{path} changes rows of neurons whose gates do not change"
    for path, delta in edit.deltas.items():
        if is_gated and path in down_projections:
            rewritten = {neuron for of_layer in layers if of_layer.down == path for neuron in of_layer.rewritten}
            if not rewritten.issuperset(_changed_rows(delta.transposed)):
                doubts[path] = f"{path} changes columns of neurons whose gates do not change"
    return doubts


def _unexplained_neurons(
    model: EditModel, edit: Edit, config: EditConfig, previous: Sequence[Edit], layers: Sequence[_Rewriting]
) -> dict[str, float]:
    """Return the share of the change of each map that the listed subjects do not explain; empty if it is unknown."""
    if not _can_be_repeated(model, edit, config):
        return {}
    requests = [fact.request for fact in edit.facts]
    lm = model.lm
    with model.disable_adapter():
        contexts = lm.contexts(config)
        sites = {of_layer.layer: lm.model.get_submodule(of_layer.neurons.gate.path) for of_layer in layers}
        moments = lm.mlp_moments(config, sites)
        earlier = facts_about_subjects(previous, requests)
        texts = subject_texts(lm, requests, config, contexts, earlier, joint=True)
    first = [requests[group[0]] for group in texts.groups]
    with _only(model, previous):  # as when the edit was made
        spare = [_spare(model, of_layer, moments[of_layer.layer]) for of_layer in layers]
        gates = gates_of(lm, first, texts.rows, spare, config.seed)
        shares = _shares_of_neurons(lm, edit, layers, gates)
        if len(first) > 1 and max(shares.values(), default=0.0) > UNEXPLAINED:
            # The rows of a subject depend on the other subjects of its batch, and the edit may join edits of one each.
            alone = [
                gates_of(lm, [request], [rows], spare, config.seed)
                for request, rows in zip(first, texts.rows, strict=True)
            ]
            gates = [
                replace(
                    together,
                    here=torch.cat([together.here, *(of_subject[index].here for of_subject in alone)]),
                    everywhere=torch.cat(
                        [together.everywhere, *(of_subject[index].everywhere for of_subject in alone)]
                    ),
                )
                for index, together in enumerate(gates)
            ]
            shares = _shares_of_neurons(lm, edit, layers, gates)
    return shares


def _shares_of_neurons(
    lm: LanguageModel, edit: Edit, layers: Sequence[_Rewriting], gates: Sequence[Gates]
) -> dict[str, float]:
    """Return the share of the change of each map that the rows of `gates` do not explain."""
    shares = {}
    for of_layer, new in zip(layers, gates, strict=True):
        count = len(of_layer.rewritten)
        if not 0 < count <= len(new.here):
            continue
        gate = of_layer.neurons.gate
        delta = edit.deltas[gate.path]
        changes = delta.B[[gate.offset + neuron for neuron in of_layer.rewritten]] @ delta.A
        similarity = functional.normalize(changes, dim=1) @ functional.normalize(new.here, dim=1).T
        for path, expected in new.deltas(lm, similarity.argmax(1).tolist()).items():
            if path in edit.deltas:
                delta = edit.deltas[path]
                of_columns = path == of_layer.down
                shares[path] = (
                    unexplained(delta.A, delta.B, expected.A) if of_columns else _unexplained_rows(delta, expected)
                )
    return shares


def _spare(model: EditModel, of_layer: _Rewriting, moments: InputMoments) -> Spare:
    """Return the neurons that an edit rewrites as those that may be rewritten."""
    height = model.architecture.shape(model.lm.model, of_layer.layer)[0]
    columns = torch.zeros(height, len(of_layer.rewritten))  # what the neurons add does not matter
    return Spare(of_layer.layer, of_layer.neurons, of_layer.rewritten, columns, moments)


def _unexplained_rows(delta: LowRankDelta, expected: LowRankDelta) -> float:
    """Return the largest share of the change of a row that is not the expected change, and of other rows in all.

    An edit may be combined with others at a weight. So each expected row counts with the factor, not negative, that
    explains most.

    Args:
        delta: The change.
        expected: A change of one row for each rank.
    """
    rows = expected.B.argmax(0)
    changes, new = delta.B[rows].double() @ delta.A.double(), expected.A.double()
    tiny = torch.finfo(new.dtype).tiny
    factors = ((changes * new).sum(1) / new.square().sum(1).clamp_min(tiny)).clamp_min(0)
    sizes = changes.norm(dim=1)
    shares = (changes - factors[:, None] * new).norm(dim=1) / sizes.clamp_min(tiny)
    others = max(1 - sizes.square().sum().item() / max(delta.norm**2, tiny), 0.0)
    return max(shares.max().item(), math.sqrt(others) if others > _ROUNDING else 0.0)


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
