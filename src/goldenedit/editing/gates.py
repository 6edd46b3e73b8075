"""Neurons that respond to subjects: which ones are rewritten, and the changes of weights that rewrite them.

The maths is in `goldenedit.editors.gated`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import adding_delta, evaluating, hidden_argument, recording, stop_forward
from goldenedit.architecture.layers import linear_shape, plain_weight
from goldenedit.architecture.neurons import GATE, Neurons, find_neurons
from goldenedit.config import EditConfig
from goldenedit.devices import execution_device
from goldenedit.editing.keys import beginnings
from goldenedit.editing.values import SubjectRows
from goldenedit.editors import LowRankDelta
from goldenedit.editors.gated import InputMoments, gate_rows
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.tokens import subject_tokens
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)

_ALIKE = 64  # other subjects that end in the same token
_SPARE = 32  # one in so many neurons of a layer may be rewritten
_ROWS = 32  # of a forward
_NEAREST = 16  # further hardly used neurons, to compare with
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
        here: `(N, d)`, the rows that respond to each subject.
        everywhere: `(N, d)`, the rows that respond to all tokens.
    """

    spare: Spare
    here: Tensor
    everywhere: Tensor

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
        w, e = self.here[members], self.everywhere[members]
        rows = [(neurons.gate, GATE * w)]
        if neurons.up is not None:
            rows.append((neurons.up, (2 * e - w) / GATE))
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
    found = {layer: find_neurons(lm.model, lm.architecture, layer) for layer in layers}
    neurons = {layer: of_layer for layer, of_layer in found.items() if of_layer is not None}
    moments = lm.mlp_moments(config, {layer: lm.model.get_submodule(of.gate.path) for layer, of in neurons.items()})
    return {layer: (of_layer, moments[layer]) for layer, of_layer in neurons.items()}


def spare_neurons(
    lm: LanguageModel,
    config: EditConfig,
    layers: Sequence[int],
    count: int,
    edits: Collection[Mapping[str, LowRankDelta]] = (),
) -> list[Spare] | None:
    """Return the neurons that an edit may rewrite, by layer, or None if a layer has none of this form, or too few.

    Args:
        lm: The model, with its edits off.
        layers: The layers to edit, ascending.
        count: Number of subjects.
        edits: The deltas of the edits that the model carries. Their neurons are not rewritten.
    """
    known = known_neurons(lm, config, layers)
    if len(known) < len(layers):
        return None
    spare = []
    for layer, (of_layer, moments) in known.items():
        used = {neuron for deltas in edits for neuron in rewritten(of_layer, deltas)}
        most = of_layer.count // _SPARE - len(used)
        if count > most:
            logger.info(
                "Layer %d has %d neurons to spare, and %d subjects need one each: the values are inserted without.",
                layer,
                max(most, 0),
                count,
            )
            return None
        down = _columns(lm.architecture.down_projection(lm.model, layer))
        order = (down.square().sum(0) * moments.energy).argsort().tolist()
        nearest = [neuron for neuron in order if neuron not in used][: count + _NEAREST]
        lengths = torch.stack([of_layer.gate.read(lm.model, neuron)[0].norm() for neuron in nearest]).tolist()
        loud = _LOUD * median(lengths)
        free = [neuron for neuron, length in zip(nearest, lengths, strict=True) if length <= loud][:count]
        spare.append(Spare(layer, of_layer, free, down[:, free], moments))
    if any(len(of_layer.free) < count for of_layer in spare):
        return None
    return spare


def rewritten(neurons: Neurons, deltas: Mapping[str, LowRankDelta]) -> list[int]:
    """Return the neurons of a layer whose gates an edit changes."""
    if neurons.gate.path not in deltas:
        return []
    rows = deltas[neurons.gate.path].B.abs().amax(1).nonzero()[:, 0] - neurons.gate.offset
    return [row for row in rows.tolist() if 0 <= row < neurons.count]


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
        inputs = _inputs(lm, [list(row.input_ids) for row in rows], sites)
        names = {row.input_ids[row.subject] for row in rows}
        tokens = [token for row in rows for token in row.input_ids]
        ends, start = [], 0
        for row in rows:
            ends.append(start + row.subject)
            start += len(row.input_ids)
        others = [place for place, token in enumerate(tokens) if token not in names]
        alike = _inputs_alike(lm, request, sites, seed)
        here.append([of_layer[ends] for of_layer in inputs])
        elsewhere.append([torch.cat([of_layer[others], more]) for of_layer, more in zip(inputs, alike, strict=True)])
    gates = []
    for index, of_layer in enumerate(spare):
        rows_of = []
        for place, own in enumerate(here):
            rest = [of[index] for other, of in enumerate(here) if other != place] if together else []
            rows_of.append(gate_rows(own[index], torch.cat([elsewhere[place][index], *rest]), of_layer.moments))
        gates.append(Gates(of_layer, torch.stack([w for w, _ in rows_of]), torch.stack([e for _, e in rows_of])))
    return gates


@contextmanager
def rewriting(lm: LanguageModel, gates: Sequence[Gates], subjects: Sequence[int]) -> Iterator[None]:
    """Run the model as if subjects had their neurons, with values of zero, inside this context."""
    with ExitStack() as stack:
        for of_layer in gates:
            for path, delta in of_layer.deltas(lm, subjects).items():
                stack.enter_context(adding_delta(lm.model.get_submodule(path), delta.A, delta.B))
        yield


@torch.no_grad()
def _columns(module: nn.Module) -> Tensor:
    """Return the weight of a linear map, `(d_out, d_in)` float32, quantized or not."""
    weight = plain_weight(module)
    if weight is not None:
        return weight.float().cpu()
    height, width = linear_shape(module)
    columns = torch.empty(height, width)
    device = execution_device(module)
    for start in range(0, width, 512):
        units = nn.functional.one_hot(torch.arange(start, min(start + 512, width), device=device), width)
        dtype = getattr(module, "compute_dtype", None) or torch.get_default_dtype()
        columns[:, start : start + len(units)] = (
            (module(units.to(dtype)) - module(0 * units[:1].to(dtype))).T.float().cpu()
        )
    return columns


def _inputs_alike(lm: LanguageModel, request: EditRequest, sites: Sequence[nn.Module], seed: int) -> list[Tensor]:
    """Return the inputs at the last tokens of other subjects that end in the same token, by layer `(n, d)`."""
    asked = rendered(lm.tokenizer, request)
    ids = subject_tokens(lm.tokenizer, asked.text, asked.subject_start, asked.subject_end)
    starts = beginnings(lm.tokenizer, _ALIKE, seed) if len(ids) > 1 else []
    rows = [[*start, ids[-1]] for start in starts if start[-len(ids) + 1 :] != ids[:-1]]
    if not rows:
        return [torch.zeros(0, linear_shape(site)[1]) for site in sites]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    return [of_layer[ends] for of_layer in _inputs(lm, rows, sites)]


@torch.no_grad()
def _inputs(lm: LanguageModel, rows: Sequence[list[int]], sites: Sequence[nn.Module]) -> list[Tensor]:
    """Return the inputs of linear maps at all tokens of rows, row after row, by map `(tokens, d)` float32."""
    found: list[list[Tensor]] = [[] for _ in sites]
    named = {str(index): site for index, site in enumerate(sites)}
    with evaluating(lm.model):
        for start in range(0, len(rows), _ROWS):
            group = rows[start : start + _ROWS]
            longest = max(map(len, group))
            ids = torch.tensor([row + [lm.padding_id] * (longest - len(row)) for row in group], device=lm.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in group], device=lm.device)
            with stop_forward() as stop, recording(named) as record, ExitStack() as stack:
                stack.callback(sites[-1].register_forward_hook(lambda *_, stop=stop: stop()).remove)
                lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
            read = mask.reshape(-1).nonzero()[:, 0]
            for index in range(len(sites)):
                hidden = hidden_argument(*record.calls[str(index)])
                found[index].append(hidden.reshape(-1, hidden.shape[-1])[read.to(hidden.device)].float().cpu())
    return [torch.cat(of_site) for of_site in found]
