"""Neurons that respond to subjects: which ones are rewritten, and the changes of weights that rewrite them.

The maths is in `goldenedit.editors.gated`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import adding_delta, evaluating, inputs_at, recording, stop_forward
from goldenedit.architecture.layers import linear_shape, plain_weight
from goldenedit.architecture.neurons import GATE, Neurons, find_neurons
from goldenedit.cache import cache_dir, is_kept, keep
from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.devices import execution_device
from goldenedit.editing.keys import beginnings
from goldenedit.editing.values import SubjectRows
from goldenedit.editors import LowRankDelta
from goldenedit.editors.gated import SUBJECT_WEIGHTS, InputMoments, gate_rows
from goldenedit.evaluation.harm import State, compare, text_rows
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.covariance import sampled_texts
from goldenedit.lm.statistics import padded
from goldenedit.lm.tokens import Row, subject_tokens
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)

_ALIKE = 64  # other subjects that end in the same token
_SPARE = 32  # one in so many neurons of a layer may be rewritten
_ROWS = 32  # of a forward
_NEAREST = 16  # further hardly used neurons, to compare with
_BIAS = 0.05  # largest difference of what neurons respond at a subject, from biases, to take one for another
_VERSION = 1  # of this measurement
_CANDIDATES = 8  # hardly used neurons whose removal is measured
_TEXT_TOKENS = 320  # that it is measured on
_TOLD = 0.5  # response of a neuron from which on it is a subject's
_LOUD = 4.0  # a gate that is so much longer than those of other hardly used neurons may be an edit's


@dataclass(frozen=True)
class Spare:
    """The neurons of a layer that may be rewritten.

    Attributes:
        layer: The layer.
        neurons: How they are computed.
        free: Their numbers, the least used first.
        columns: `(d_out, len(free))`, what each of them adds to the output of the layer.
        moments: Moments of the MLP on other text.
    """

    layer: int
    neurons: Neurons
    free: Sequence[int]
    columns: Tensor
    moments: InputMoments


@dataclass(frozen=True)
class Gates:
    """Neurons of one layer for N subjects.

    Attributes:
        spare: The neurons that may be rewritten; those of a change are the first.
        gates: `(N, d)`, the rows of their gates, which respond to each subject.
        ups: `(N, d)`, the rows by which they multiply these responses.
        everywhere: `(N, d)`, the rows that respond to all tokens.
    """

    spare: Spare
    gates: Tensor
    ups: Tensor
    everywhere: Tensor

    @classmethod
    def of(cls, spare: Spare, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Gates:
        """Return neurons from the three rows of each."""
        return cls(spare, *(torch.stack(same) for same in zip(*rows, strict=True)))

    def beside(self, *others: Gates) -> Gates:
        """Return these neurons with those of others behind them."""
        every = (self, *others)
        return Gates(
            self.spare,
            torch.cat([of.gates for of in every]),
            torch.cat([of.ups for of in every]),
            torch.cat([of.everywhere for of in every]),
        )

    def detectors(self, subjects: Sequence[int]) -> Tensor:
        """Return what the neurons of subjects add to the key that their values are inserted under, `(n, d_ff)`."""
        chosen = torch.tensor(self.spare.free[: len(subjects)])
        return nn.functional.one_hot(chosen, self.spare.neurons.count).float() / self.spare.neurons.response

    def deltas(
        self, lm: LanguageModel, subjects: Sequence[int], values: Tensor | None = None
    ) -> dict[str, LowRankDelta]:
        """Return the changes that give each subject a neuron, by module path.

        Args:
            subjects: Indices of subjects.
            values: `(d_out, n)`, what their neurons add to the output of the layer; None for nothing.
        """
        neurons, chosen = self.spare.neurons, self.spare.free[: len(subjects)]
        columns = -neurons.response * self.spare.columns[:, : len(subjects)]
        columns = columns if values is None else columns + values.to(columns)
        down = lm.architecture.down_projections[self.spare.layer]
        changes = {down: LowRankDelta(self.detectors(subjects), columns)}
        members = list(subjects)
        e = self.everywhere[members]
        rows = [(neurons.gate, GATE * self.gates[members])]
        if neurons.up is not None:
            rows.append((neurons.up, self.ups[members] / GATE))
        for of, new in rows:
            current = [of.read(lm.model, neuron) for neuron in chosen]
            biases = torch.tensor([bias for _, bias in current])
            A = new - biases[:, None] * e - torch.stack([row.cpu() for row, _ in current])
            change = LowRankDelta(A, torch.cat([of.output(lm.model, neuron) for neuron in chosen], 1))
            changes[of.path] = changes[of.path].beside(change) if of.path in changes else change
        return changes


def known_neurons(
    lm: LanguageModel, config: EditConfig, layers: Sequence[int]
) -> dict[int, tuple[Neurons, InputMoments]]:
    """Return how the neurons of layers are computed, and their moments on other text, by layer.

    The moments of all layers are computed in one pass, which processes share, and kept by `lm`. Layers whose neurons
    an edit with this config does not rewrite are left out.

    Args:
        lm: The model, with its edits off.
    """
    if not config.editor.gates or config.covariance == "identity" or config.regularizer is not None:
        return {}
    if config.target_modules is not None:  # the user says which maps may change
        return {}
    found = {layer: find_neurons(lm.model, lm.architecture, layer) for layer in layers}
    neurons = {layer: of_layer for layer, of_layer in found.items() if of_layer is not None}
    moments = lm.mlp_moments(config, {layer: lm.model.get_submodule(of.gate.path) for layer, of in neurons.items()})
    return {layer: (of_layer, moments[layer]) for layer, of_layer in neurons.items()}


def spare_neurons(
    lm: LanguageModel,
    config: EditConfig,
    counts: Mapping[int, int],
    edits: Collection[Mapping[str, LowRankDelta]] = (),
) -> list[Spare] | None:
    """Return the neurons that an edit may rewrite, by layer, or None if a layer has none of this form, or too few.

    Args:
        lm: The model, with its edits off.
        counts: How many neurons are needed, by layer, ascending.
        edits: The deltas of the edits that the model carries. Their neurons are not rewritten.
    """
    known = known_neurons(lm, config, list(counts))
    if len(known) < len(counts):
        return None
    spare = []
    for layer, (of_layer, moments) in known.items():
        count = counts[layer]
        used = {neuron for deltas in edits for neuron in rewritten(of_layer, deltas)}
        most = of_layer.count // _SPARE - len(used)
        if count > most:
            logger.info(
                "Layer %d has %d neurons to spare, and the edit needs %d: the values are inserted without.",
                layer,
                max(most, 0),
                count,
            )
            return None
        dtype: torch.dtype = lm.model.dtype  # type: ignore[assignment]
        down = _columns(lm.architecture.down_projection(lm.model, layer), dtype)
        order = (down.square().sum(0) * moments.energy).argsort().tolist()
        nearest = [neuron for neuron in order if neuron not in used][: count + _NEAREST]
        lengths = torch.stack([of_layer.gate.read(lm.model, neuron)[0].norm() for neuron in nearest]).tolist()
        loud = _LOUD * median(lengths)
        free = [neuron for neuron, length in zip(nearest, lengths, strict=True) if length <= loud]
        free = _least_missed(lm, layer, free[:_CANDIDATES], down, config.seed) + free[_CANDIDATES:]
        free = free[:count]
        spare.append(Spare(layer, of_layer, free, down[:, free], moments))
    if any(len(of_layer.free) < counts[of_layer.layer] for of_layer in spare):
        return None
    return spare


def _least_missed(lm: LanguageModel, layer: int, neurons: Sequence[int], down: Tensor, seed: int) -> list[int]:
    """Return neurons in the order of what their removal changes: the mean root of the KL divergence on text.

    What a neuron adds to the layer is a poor guide: some that add little, or rarely something, move much. The root is
    about the change of the logits, by which a first choice may flip; the mean of the divergence hangs on few tokens.

    Args:
        neurons: The neurons to compare.
        down: `(d_out, d_ff)`, the weight of the down projection.
    """
    path = cache_dir() / "spare_neurons" / f"{lm.cache_key(_VERSION, layer=layer, neurons=neurons, seed=seed)}.json"
    if is_kept(path):
        with suppress(OSError, ValueError):
            order: list[int] = json.loads(path.read_text(encoding="utf-8"))
            if sorted(order) == sorted(neurons):
                return order
    module, width = lm.architecture.down_projection(lm.model, layer), down.shape[1]

    def without(neuron: int) -> State:
        unit = nn.functional.one_hot(torch.tensor([neuron]), width).float()
        return lambda: adding_delta(module, unit, -down[:, [neuron]])

    with phase("spare neurons"):
        rows = text_rows(lm, sampled_texts(lm, _TEXT_TOKENS, seed + 1))
        states = {str(neuron): without(neuron) for neuron in neurons}
        compared = compare(lm, rows, layer, nullcontext, states, "Spare neurons")
    sums = {neuron: sum(kl**0.5 for row in compared[str(neuron)] for kl in row.kl) for neuron in neurons}
    order = sorted(neurons, key=sums.__getitem__)
    keep(path, json.dumps(order).encode())
    return order


def rewritten(neurons: Neurons, deltas: Mapping[str, LowRankDelta]) -> list[int]:
    """Return the neurons of a layer whose gates an edit changes."""
    if neurons.gate.path not in deltas:
        return []
    lengths = deltas[neurons.gate.path].row_norms
    # Combinations of edits by singular values change all other rows by rounding.
    rows = (lengths > 1e-3 * lengths.max()).nonzero()[:, 0] - neurons.gate.offset
    return [row for row in rows.tolist() if 0 <= row < neurons.count]


def moved(
    lm: LanguageModel,
    config: EditConfig,
    deltas: Mapping[str, LowRankDelta],
    edits: Mapping[str, Mapping[str, LowRankDelta]],
    occupied: Collection[Mapping[str, LowRankDelta]] = (),
) -> tuple[dict[str, LowRankDelta], list[str]]:
    """Return an edit that rewrites no neurons of other edits: those that it shares with them are moved to free ones.

    A change is added to what the model has. The changes of one neuron by two edits add up to the neuron of neither.

    Args:
        lm: The model, with its edits off.
        config: Where text comes from, to tell which neurons are free.
        deltas: The edit.
        edits: The deltas of the other edits, by name.
        occupied: Further deltas, whose neurons are not free.

    Returns:
        The edit, and the names of edits whose neurons it still rewrites, because no others are free or have such
        biases, or because the changes of several neurons share a rank.
    """
    result, stuck = dict(deltas), set()
    downs = {layer: path for layer, path in lm.architecture.down_projections.items() if path in deltas}
    if not any((deltas.keys() - downs.values()) & other.keys() for other in edits.values()):
        return result, []
    for layer in downs:
        neurons = find_neurons(lm.model, lm.architecture, layer)
        if neurons is None:
            continue
        members = set(rewritten(neurons, deltas))
        shared = {name: members & set(rewritten(neurons, other)) for name, other in edits.items()}
        if not (clashes := sorted(set().union(*shared.values()))):
            continue
        spare = spare_neurons(lm, config, {layer: len(clashes)}, [deltas, *edits.values(), *occupied])
        changes = None if spare is None else _moved(lm, spare[0], deltas, clashes)
        if changes is None:
            stuck |= {name for name, of_edit in shared.items() if of_edit}
        else:
            result |= changes
    return result, sorted(stuck)


def _moved(
    lm: LanguageModel, spare: Spare, deltas: Mapping[str, LowRankDelta], neurons: Sequence[int]
) -> dict[str, LowRankDelta] | None:
    """Return the changes of a layer with some neurons in the places of free ones; None where that is not possible."""
    down = lm.architecture.down_projections[spare.layer]
    columns = _columns(lm.architecture.down_projection(lm.model, spare.layer), lm.model.dtype)  # type: ignore[arg-type]
    units = {spare.neurons.gate: 1 / GATE} | ({} if spare.neurons.up is None else {spare.neurons.up: GATE})
    changes = {path: deltas.get(path) for path in [down, *(rows.path for rows in units)]}
    for old, new in zip(neurons, spare.free, strict=True):
        for rows, unit in units.items():
            (row, bias), (other_row, other_bias) = rows.read(lm.model, old), rows.read(lm.model, new)
            if abs(bias - other_bias) * unit > _BIAS:
                return None
            places = rows.offset + old, rows.offset + new
            changes[rows.path] = _row_moved(changes[rows.path], *places, (row - other_row).cpu())
        change = changes[down]
        of_columns = None if change is None else change.transposed
        of_columns = _row_moved(of_columns, old, new, columns[:, old] - columns[:, new])
        changes[down] = None if of_columns is None else of_columns.transposed
    found = {path: change for path, change in changes.items() if change is not None}
    return found if len(found) == len(changes) else None


def _row_moved(change: LowRankDelta | None, old: int, new: int, difference: Tensor) -> LowRankDelta | None:
    """Return a change with its row `old` at `new` instead, plus a difference; None if the row shares its ranks."""
    if change is None:
        return None
    own = [rank for rank in change.B[old].nonzero()[:, 0].tolist() if change.B[:, rank].count_nonzero() == 1]
    if not own:
        return None
    A, B = change.A.float().clone(), change.B.float().clone()
    B[new, own], B[old, own] = B[old, own], torch.zeros(len(own))
    A[own[0]] += difference / B[new, own[0]]
    return LowRankDelta(A, B).balanced()


def gates_of(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[SubjectRows],
    spare: Sequence[Spare],
    seed: int,
    together: bool = True,
) -> list[Gates]:
    """Return neurons that respond to each of N subjects, by layer.

    Args:
        requests: A request about each subject.
        texts: The texts of each subject.
        spare: The neurons that may be rewritten, by layer.
        seed: Seed of the choice of other subjects.
        together: Whether the subjects are edited together, so that no neuron may respond to another of them.
    """
    sites = [lm.model.get_submodule(of_layer.neurons.gate.path) for of_layer in spare]
    here: list[list[Tensor]] = []  # by subject and layer
    elsewhere: list[list[Tensor]] = []
    for request, subject in zip(requests, texts, strict=True):
        rows = subject.rows
        inputs = inputs_of(lm, [list(row.input_ids) for row in rows], sites)
        ids = _subject_ids(lm, request)
        ends, others = _mentions(rows, len(ids))
        alike = _inputs_alike(lm, ids, sites, seed)
        here.append([of_layer[ends] for of_layer in inputs])
        elsewhere.append([torch.cat([of_layer[others], more]) for of_layer, more in zip(inputs, alike, strict=True)])
    gates = []
    for index, of_layer in enumerate(spare):
        rows_of = []
        for place, own in enumerate(here):
            rest = [of[index] for other, of in enumerate(here) if other != place] if together else []
            silent = torch.cat([elsewhere[place][index], *rest])
            w, e = gate_rows([own[index]], [([silent], -1.0)], of_layer.moments, SUBJECT_WEIGHTS)
            rows_of.append((w, 2 * e - w, e))
        gates.append(Gates.of(of_layer, rows_of))
    return gates


def are_told(
    lm: LanguageModel, texts: Sequence[SubjectRows], spare: Spare, edits: Collection[Mapping[str, LowRankDelta]]
) -> list[bool]:
    """Return whether neurons of active edits respond to each of N subjects already, which then have a marker.

    Args:
        texts: The texts of each subject.
        spare: The first layer whose neurons respond to subjects.
        edits: The deltas of the active edits.
    """
    neurons = sorted({neuron for deltas in edits for neuron in rewritten(spare.neurons, deltas)})
    if not neurons:
        return [False] * len(texts)
    rows = spare.neurons.gate.read_all(lm.model, neurons)[0].cpu() / GATE
    site = lm.model.get_submodule(spare.neurons.gate.path)
    told = []
    for subject in texts:
        (inputs,) = inputs_of(lm, [list(row.input_ids) for row in subject.rows], [site])
        starts = list(accumulate((len(row.input_ids) for row in subject.rows), initial=0))
        ends = [start + row.subject for start, row in zip(starts, subject.rows, strict=False)]
        told.append(bool((inputs[ends].cpu() @ rows.T).mean(0).max() > _TOLD))
    return told


@contextmanager
def rewriting(lm: LanguageModel, gates: Sequence[Gates], subjects: Sequence[int]) -> Iterator[None]:
    """Run the model as if subjects had their neurons, with values of zero, inside this context."""
    changed = [of_layer.deltas(lm, subjects) for of_layer in gates] if subjects else []
    deltas = {path: delta for of_layer in changed for path, delta in of_layer.items()}
    with lm.architecture.adding_deltas(lm.model, deltas):
        yield


@torch.no_grad()
def _columns(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight of a linear map, `(d_out, d_in)` float32. If it is quantized, it runs in a precision."""
    weight = plain_weight(module)
    if weight is not None:
        return weight.float().cpu()
    height, width = linear_shape(module)
    columns = torch.empty(height, width)
    device = execution_device(module)
    for start in range(0, width, 512):
        units = nn.functional.one_hot(torch.arange(start, min(start + 512, width), device=device), width)
        units = units.to(dtype)
        columns[:, start : start + len(units)] = (module(units) - module(0 * units[:1])).T.float().cpu()
    return columns


def _mentions(rows: Sequence[Row], length: int) -> tuple[list[int], list[int]]:
    """Return the places of a subject's last token in the joined tokens of rows, at all mentions, and those of others.

    Tokens that equal the subject's last one at other places are neither.

    Args:
        length: Number of tokens of the subject.
    """
    names = {row.input_ids[max(row.subject + 1 - length, 0) : row.subject + 1] for row in rows}
    last = {name[-1] for name in names}
    ends, others, start = [], [], 0
    for row in rows:
        for place, token in enumerate(row.input_ids):
            if any(row.input_ids[max(place + 1 - len(name), 0) : place + 1] == name for name in names):
                ends.append(start + place)
            elif token not in last:
                others.append(start + place)
        start += len(row.input_ids)
    return ends, others


def _subject_ids(lm: LanguageModel, request: EditRequest) -> list[int]:
    asked = rendered(lm.tokenizer, request)
    return subject_tokens(lm.tokenizer, asked.text, asked.subject_start, asked.subject_end)


def _inputs_alike(lm: LanguageModel, ids: Sequence[int], sites: Sequence[nn.Module], seed: int) -> list[Tensor]:
    """Return the inputs at the last tokens of other subjects that end in a subject's last token, by layer `(n, d)`."""
    starts = beginnings(lm.tokenizer, _ALIKE, seed) if len(ids) > 1 else []
    rows = [[*start, ids[-1]] for start in starts if start[-len(ids) + 1 :] != ids[:-1]]
    if not rows:
        return [torch.zeros(0, linear_shape(site)[1]) for site in sites]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    return [of_layer[ends] for of_layer in inputs_of(lm, rows, sites)]


@torch.no_grad()
def inputs_of(lm: LanguageModel, rows: Sequence[list[int]], sites: Sequence[nn.Module]) -> list[Tensor]:
    """Return the inputs of linear maps at all tokens of rows, row after row, by map `(tokens, d)` float32."""
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in sites]
    named = {str(index): site for index, site in enumerate(sites)}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
    with evaluating(lm.model):
        for members in (order[start : start + _ROWS] for start in range(0, len(order), _ROWS)):
            group = [rows[index] for index in members]
            ids, mask = padded(group, lm.padding_id)
            with stop_forward() as stop, recording(named) as record, ExitStack() as stack:
                stack.callback(sites[-1].register_forward_hook(lambda *_, stop=stop: stop()).remove)
                lm.model(input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
            read = mask.reshape(-1).nonzero()[:, 0]
            for index in range(len(sites)):
                inputs = inputs_at(record.calls[str(index)], read).cpu()
                for member, of_row in zip(members, inputs.split([len(row) for row in group]), strict=True):
                    found[index][member] = of_row
    return [torch.cat(of_site) for of_site in found]
