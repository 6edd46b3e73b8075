"""What an edit does to the neurons of the model, and whether its listed facts explain it: see `goldenedit.audit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from goldenedit.architecture.neurons import Neurons, find_neurons
from goldenedit.config import EditConfig
from goldenedit.editing.answering import answer_gates, texts_about
from goldenedit.editing.calls import facts_to_keep
from goldenedit.editing.gates import Gates, Spare, gates_of
from goldenedit.editing.rows import subjects_of
from goldenedit.editors import LowRankDelta
from goldenedit.editors.gated import InputMoments
from goldenedit.lm import LanguageModel

if TYPE_CHECKING:
    from goldenedit.model import EditModel
    from goldenedit.storage.folder import Edit

# Largest acceptable `unexplained`. An edit of SmolLM2 has 1e-6 in float32, and 0.05 with rows computed in 16 bits.
# A gate that opens at another subject too has 0.3.
UNEXPLAINED = 0.2
ROUNDING = 1e-6  # relative size of what is no change
_LEAST_WEIGHT = 1e-2


@dataclass(frozen=True)
class Rewriting:
    """What an edit does to the neurons of one layer.

    Attributes:
        layer: The layer.
        neurons: How they are computed.
        rewritten: Those whose gates it changes.
        down: Path of the down projection.
        answers: Whether they give answers, one for each fact. Otherwise they respond to subjects, one to each.
    """

    layer: int
    neurons: Neurons
    rewritten: list[int]
    down: str
    answers: bool

    @property
    def maps(self) -> set[str]:
        """The maps that compute the neurons: of the gates, and of the ups where there are any."""
        up = self.neurons.up
        return {self.neurons.gate.path} if up is None else {self.neurons.gate.path, up.path}

    def rows(self, path: str) -> set[int]:
        """Return the rows of a map that belong to the rewritten neurons."""
        blocks = [block for block in (self.neurons.gate, self.neurons.up) if block is not None and block.path == path]
        return {block.offset + neuron for block in blocks for neuron in self.rewritten}


def rewritings(model: EditModel, edit: Edit) -> list[Rewriting]:
    """Return what an edit does to the neurons of its layers, ascending; empty if it rewrites none.

    The layer of the answers is left out where the edit changes no gates: older edits have none.
    """
    architecture = model.architecture
    if set(edit.deltas) <= set(architecture.down_projections.values()):
        return []
    configs = [config for config in edit.configs if config.editor.gates]
    of_configs = (_layer_of_answers(config, architecture.num_layers) for config in configs)
    answering = {layer for layer in of_configs if layer is not None}
    listed = {layer for config in configs for layer in config.target_layers}
    found = []
    with model.disable_adapter():
        for layer in sorted((listed | answering) & set(architecture.down_projections)):
            neurons = find_neurons(model.lm.model, architecture, layer)
            if neurons is None or (layer not in listed and neurons.gate.path not in edit.deltas):
                continue
            gate = neurons.gate
            changed = _changed_rows(edit.deltas[gate.path]) if gate.path in edit.deltas else []
            rewritten = [row - gate.offset for row in changed if 0 <= row - gate.offset < gate.count]
            down = architecture.down_projections[layer]
            found.append(Rewriting(layer, neurons, rewritten, down, layer in answering))
    return found if any(of_layer.maps & set(edit.deltas) for of_layer in found) else []


def _layer_of_answers(config: EditConfig, num_layers: int) -> int | None:
    if config.target_layers:
        with suppress(ValueError):  # the config may be a stranger's
            return config.layer_of_answers(num_layers)
    return None


def _changed_rows(delta: LowRankDelta) -> list[int]:
    """Return the rows of a matrix that a delta changes."""
    return (delta.row_norms > ROUNDING * delta.norm).nonzero()[:, 0].tolist()


def doubts_about_neurons(
    edit: Edit, layers: Sequence[Rewriting], down_projections: set[str], is_gated: bool
) -> dict[str, str]:
    """Return warnings about neurons that the listed facts do not account for, by the path of a map.

    Args:
        is_gated: Whether all of the edit rewrites neurons. Otherwise the down projections have other changes too.
    """
    subjects = len(subjects_of([fact.request for fact in edit.facts]))
    doubts = {}
    for of_layer in layers:
        gate = of_layer.neurons.gate.path
        count, counted = (len(edit.facts), "facts") if of_layer.answers else (subjects, "subjects")
        if len(of_layer.rewritten) > count:
            doubts[gate] = (
                f"{gate} rewrites {len(of_layer.rewritten)} neurons, but the number of listed {counted} is {count}"
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


def unexplained_neurons(
    model: EditModel, edit: Edit, config: EditConfig, previous: Sequence[Edit], layers: Sequence[Rewriting]
) -> dict[str, float]:
    """Return the share of the change of each map that the listed facts do not explain.

    Args:
        model: The model, with exactly the previous edits active, as when the edit was made.
        config: How the edit was made.
        previous: The edits before it.
        layers: The layers whose neurons it rewrites.
    """
    requests = [fact.request for fact in edit.facts]
    lm = model.lm
    with model.disable_adapter():
        contexts = lm.contexts(config)
        sites = {of_layer.layer: lm.model.get_submodule(of_layer.neurons.gate.path) for of_layer in layers}
        moments = lm.mlp_moments(config, sites)
        texts = texts_about(lm, requests, config, contexts, facts_to_keep(previous, requests))
    spare = {of_layer.layer: _spare(model, of_layer, moments[of_layer.layer]) for of_layer in layers}
    of_subjects = [of_layer for of_layer in layers if not of_layer.answers]
    of_answers = [of_layer for of_layer in layers if of_layer.answers]
    first = [requests[group[0]] for group in texts.groups]
    mentions = [subject.mentions for subject in texts.subjects]
    free = [spare[of_layer.layer] for of_layer in of_subjects]
    gates = gates_of(lm, first, mentions, free, config.seed)
    shares = _shares(lm, edit, of_subjects, gates)
    if len(first) > 1 and max(shares.values(), default=0.0) > UNEXPLAINED:
        # The rows of a subject depend on the other subjects of its batch, and the edit may join edits of one each.
        alone = [gates_of(lm, [one], [rows], free, config.seed) for one, rows in zip(first, mentions, strict=True)]
        gates = _beside(gates, alone)
        shares = _shares(lm, edit, of_subjects, gates)

    every = range(len(first))
    names = [request.subject for request in first]

    def answering(subjects: Sequence[int], beside: Sequence[Sequence[str]] | None = None) -> list[Gates]:
        markers = _markers(lm, edit, of_subjects, gates, subjects, len(first))
        marked = partial(lm.architecture.adding_deltas, lm.model, markers)
        asked = [texts.subjects[subject] for subject in subjects]
        return [answer_gates(lm, asked, spare[of_layer.layer], marked, beside) for of_layer in of_answers]

    # Rows of answers depend on the other subjects that had markers. Which ones is not recorded: all others, those that
    # come before, as in edits that were made one after another and joined, or none, as in those that were made apart.
    others: list[Callable[[], list[Gates]]] = [lambda: answering(every, [() for _ in every])]
    if len(first) > 1:
        others.append(lambda: answering(every, [[*names[:place], *texts.subjects[place].beside] for place in every]))
        others += [partial(answering, [subject], [()]) for subject in every]
    answers = answering(every)
    of_facts = _shares(lm, edit, of_answers, answers)
    for further in others:
        if max(of_facts.values(), default=0.0) <= UNEXPLAINED:
            break
        answers = _beside(answers, [further()])
        of_facts = _shares(lm, edit, of_answers, answers)
    return shares | of_facts


def _spare(model: EditModel, of_layer: Rewriting, moments: InputMoments) -> Spare:
    """Return the neurons that an edit rewrites as those that may be rewritten."""
    height = model.architecture.shape(model.lm.model, of_layer.layer)[0]
    columns = torch.zeros(height, len(of_layer.rewritten))  # what the neurons add does not matter
    return Spare(of_layer.layer, of_layer.neurons, of_layer.rewritten, columns, moments)


def _beside(gates: Sequence[Gates], others: Sequence[Sequence[Gates]]) -> list[Gates]:
    """Return the gates of each layer with further ones of the same layer."""
    return [first.beside(*rest) for first, *rest in zip(gates, *others, strict=True)]


def _shares(lm: LanguageModel, edit: Edit, layers: Sequence[Rewriting], gates: Sequence[Gates]) -> dict[str, float]:
    """Return the share of the change of each map that the rows of `gates` do not explain."""
    shares = {}
    for of_layer, new in zip(layers, gates, strict=True):
        if not 0 < len(of_layer.rewritten) <= len(new.gates):
            continue
        for path, expected in new.deltas(lm, _nearest(edit, of_layer, new)).items():
            if path in edit.deltas:
                delta = edit.deltas[path]
                is_down = path == of_layer.down
                shares[path] = (
                    _outside(delta.transposed, of_layer.rewritten) if is_down else _unexplained_rows(delta, expected)
                )
    return shares


def _nearest(edit: Edit, of_layer: Rewriting, gates: Gates) -> list[int]:
    """Return whose gate is most like that of each rewritten neuron."""
    changes = functional.normalize(_rows(edit.deltas[of_layer.neurons.gate.path], of_layer), dim=1)
    return (changes @ functional.normalize(gates.gates, dim=1).T).argmax(1).tolist()


def _rows(delta: LowRankDelta, of_layer: Rewriting) -> Tensor:
    """Return the change of the gates of the rewritten neurons."""
    return delta.B[[of_layer.neurons.gate.offset + neuron for neuron in of_layer.rewritten]] @ delta.A


def _markers(
    lm: LanguageModel,
    edit: Edit,
    layers: Sequence[Rewriting],
    gates: Sequence[Gates],
    subjects: Sequence[int],
    count: int,
) -> dict[str, LowRankDelta]:
    """Return the changes for some subjects, as they were before the edit was combined with others at a weight.

    Args:
        layers: The layers whose neurons respond to subjects.
        gates: By layer, the gates of all subjects, once or several times.
        subjects: The subjects.
        count: Number of all subjects.
    """
    changes: dict[str, LowRankDelta] = {}
    for of_layer, new in zip(layers, gates, strict=True):
        gate, down = (edit.deltas.get(path) for path in (of_layer.neurons.gate.path, of_layer.down))
        if gate is None or down is None or not of_layer.rewritten:
            continue
        found = zip(of_layer.rewritten, _nearest(edit, of_layer, new), strict=True)
        chosen = {neuron: member for neuron, member in found if member % count in subjects}
        if not chosen:
            continue
        own, members = replace(of_layer, rewritten=list(chosen)), list(chosen.values())
        new = replace(new, spare=replace(new.spare, free=own.rewritten))
        expected = new.deltas(lm, members)[of_layer.neurons.gate.path].A[: len(members)]
        weights = (_rows(gate, own) * expected).sum(1) / expected.square().sum(1)
        columns = down.B @ down.A[:, own.rewritten]
        values = of_layer.neurons.response * columns / weights.clamp_min(_LEAST_WEIGHT)
        changes |= new.deltas(lm, members, values)
    return changes


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
    shares = (changes - factors[:, None] * new).norm(dim=1) / changes.norm(dim=1).clamp_min(tiny)
    return max(shares.nan_to_num(1.0).max().item(), _outside(delta, rows.tolist()))  # markers may be of any size


def _outside(delta: LowRankDelta, rows: Sequence[int]) -> float:
    """Return the share of a change that is in other rows."""
    squares = delta.row_norms.square()
    other = 1 - squares[list(rows)].sum().item() / max(squares.sum().item(), torch.finfo(squares.dtype).tiny)
    return math.sqrt(other) if other > ROUNDING else 0.0
