"""Facts with neurons of their own: the marker of each subject, the answer of each fact, and the changes they make.

The maths is in `goldenedit.editors.gated`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers.utils.logging import tqdm

from goldenedit.architecture.neurons import GATE
from goldenedit.cache import cache_dir, is_kept, keep
from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.answering import AskedTexts, answer_gates, texts_about
from goldenedit.editing.gates import Gates, Spare, are_told, gates_of, rewriting, rewritten, spare_neurons
from goldenedit.editing.markers import first_marker, optimize_marker
from goldenedit.editing.rows import batch_size_of
from goldenedit.editing.values import ValueOptions, Values, joined, optimize_values
from goldenedit.editing.wordings import rephrasings_of
from goldenedit.editors import LowRankDelta
from goldenedit.lm import LanguageModel
from goldenedit.lm.covariance import source_name
from goldenedit.requests import EditRequest, proxy_facts

_VERSION = 1  # of the first marker, of the packaged texts and of the constants that it depends on
_FIRST_RELATION = "citizenship"  # of the packaged fact whose subject has it
_FEW = 8  # texts that it is optimized on
_MARKER_OPTIONS = (
    "covariance_tokens", "contexts", "context_length", "phrasings", "kept_questions", "kept_factor",
    "kl_factor", "lr", "clamp", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class GatedFacts:
    """Facts of N subjects, F in all, with the neurons that tell them.

    Attributes:
        gates: By target layer, the neurons that respond to the subjects.
        markers: `(N, m, d_model)`, what they write; zeros for a subject that has a marker already.
        answering: The neurons that respond where the answers are due.
        answers: Results of the optimization of what these write, with the facts as its subjects.
    """

    gates: Sequence[Gates]
    markers: Tensor
    answering: Gates
    answers: Values

    def deltas(self, lm: LanguageModel, subjects: Sequence[int], facts: Sequence[int]) -> dict[str, LowRankDelta]:
        """Return the changes that insert some facts, by module path.

        Args:
            subjects: Their subjects.
            facts: The facts, subject by subject.

        Raises:
            ValueError: A value is not finite.
        """
        answers = self.answers.delta[facts, 0].T
        if not answers.isfinite().all():
            raise ValueError(f"A value of layer {self.answering.spare.layer} is not finite. Lower EditConfig.lr.")
        changes = marking(lm, self.gates, subjects, self.markers[subjects])
        changes |= self.answering.deltas(lm, facts, answers)
        return {path: delta.balanced() for path, delta in changes.items()}


def marking(
    lm: LanguageModel, gates: Sequence[Gates], subjects: Sequence[int], markers: Tensor
) -> dict[str, LowRankDelta]:
    """Return the changes that give each subject its neurons with a marker, by module path.

    A subject whose marker is zero gets none.

    Args:
        gates: By target layer, the neurons.
        subjects: Indices of subjects.
        markers: `(n, m, d_model)`.
    """
    places = [place for place, marker in enumerate(markers) if marker.any()]
    if not places:
        return {}
    members = [subjects[place] for place in places]
    changes: dict[str, LowRankDelta] = {}
    for index, of_layer in enumerate(gates):
        changes |= of_layer.deltas(lm, members, markers[places, index].T)
    return changes


def neurons_for(
    lm: LanguageModel,
    config: EditConfig,
    subjects: int,
    facts: int,
    edits: Collection[Mapping[str, LowRankDelta]] = (),
) -> list[Spare] | None:
    """Return the neurons that an edit may rewrite: by target layer, and last those for answers. None if there are none.

    Args:
        lm: The model, with its edits off.
        config: The editor and its layers.
        subjects: Number of subjects.
        facts: Number of facts.
        edits: The deltas of the edits that the model carries. Their neurons are not rewritten.

    Raises:
        ValueError: The layer for answers does not come behind the edited layers.
    """
    answers = config.layer_of_answers(lm.architecture.num_layers) if config.editor.gates else None
    if answers is None:
        return None
    return spare_neurons(lm, config, dict.fromkeys(config.target_layers, subjects) | {answers: facts}, edits)


def marker_start(lm: LanguageModel, config: EditConfig) -> Tensor | None:
    """Return what markers start from, `(m, d_model)`: the marker of a packaged fact's subject, from the cache or now.

    None, which is noise, if the model cannot read the texts about this fact.

    Args:
        lm: The model, with its edits off.
        config: The editor and its layers, of which each has neurons to spare.
    """
    options = {name: getattr(config, name) for name in _MARKER_OPTIONS}
    options |= {"covariance": source_name(config.covariance), "layers": config.target_layers}
    options["answers"] = config.layer_of_answers(lm.architecture.num_layers)
    key = lm.cache_key(_VERSION, **options)
    path = cache_dir() / "markers" / f"{key}.safetensors"
    if is_kept(path):
        with suppress(OSError, SafetensorError, KeyError):
            return load(path.read_bytes())["marker"]
    spare = neurons_for(lm, config, 1, 1)
    assert spare is not None
    *of_subject, of_answers = spare
    with phase("first marker"):
        request = next(fact for fact in proxy_facts() if fact.relation == _FIRST_RELATION and rephrasings_of(fact))
        try:
            (subject,) = texts_about(lm, [request], config, lm.contexts(config)).subjects
        except ValueError:  # its context is too short, or its tokenizer does not know the names
            return None
        gates = gates_of(lm, [request], [subject.mentions], of_subject, config.seed)
        reader = lm.model.get_submodule(of_answers.neurons.gate.path)
        with rewriting(lm, gates, [0]):
            marker = first_marker(
                lm,
                subject.due[:_FEW],
                subject.kept[:_FEW],
                config.target_layers,
                [of_layer.detectors([0]) for of_layer in gates],
                reader,
                of_answers.moments,
                config.lr,
                config.clamp,
                config.seed,
            )
    keep(path, save({"marker": marker}))
    return marker


def prepare_gated(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    texts: AskedTexts,
    options: ValueOptions,
    spare: Sequence[Spare],
    together: bool,
    start: Tensor | None,
    active: Collection[Mapping[str, LowRankDelta]] = (),
) -> GatedFacts:
    """Find the neurons, the markers and the answers of facts, in the model as it is now.

    Args:
        together: Whether all subjects are edited in one edit. Otherwise each is edited alone.
        start: What markers start from, see `marker_start`.
        active: The deltas of the active edits. Their neurons stay closed at the new subjects.

    Raises:
        ValueError: A request cannot be served. The message names it.
    """
    *of_subjects, of_answers = spare
    with phase("gates"):
        first = [requests[group[0]] for group in texts.groups]
        mentions = [subject.mentions for subject in texts.subjects]
        gates = gates_of(lm, first, mentions, of_subjects, config.seed, together)
        has_marker = are_told(lm, mentions, of_subjects[0], active)
    every = range(len(texts.groups))
    calls: list[Sequence[int]] = [every] if together else [[subject] for subject in every]
    reader = lm.model.get_submodule(of_answers.neurons.gate.path)
    others = _gates_of_edits(lm, of_answers, active)
    markers: list[Tensor] = []
    answering: list[Gates] = []
    answers: list[Values] = []
    with tqdm(total=len(every), desc="Subjects", unit="subject", disable=len(every) == 1, leave=False) as progress:
        for call in calls:
            of_call = torch.zeros(len(call), len(gates), lm.architecture.shape(lm.model, of_answers.layer)[0])
            new = [subject for subject in call if not has_marker[subject]]
            with phase("markers"), rewriting(lm, gates, new):
                detectors = [of_layer.detectors(new) for of_layer in gates] if new else []

                def marker_of(place: int, new: Sequence[int] = new, detectors: Sequence[Tensor] = detectors) -> Tensor:
                    asked = texts.subjects[new[place]]
                    marker = optimize_marker(
                        lm,
                        asked.due,
                        asked.kept,
                        config.target_layers,
                        [of_layer[place : place + 1] for of_layer in detectors],
                        reader,
                        of_answers.moments,
                        options.lr,
                        options.clamp,
                        start,
                        asked.leaks,
                        others,
                    )
                    progress.update()
                    return marker.cpu()

                for subject, marker in zip(new, lm.processes.map(marker_of, range(len(new))), strict=True):
                    of_call[call.index(subject)] = marker
            marked = partial(lm.architecture.adding_deltas, lm.model, marking(lm, gates, call, of_call))
            with phase("gates"):
                of_facts = answer_gates(lm, [texts.subjects[subject] for subject in call], of_answers, marked)
            with marked():
                taught = [rows for subject in call for rows in texts.subjects[subject].taught]
                facts = range(len(taught))
                with phase("values"), lm.architecture.adding_deltas(lm.model, of_facts.deltas(lm, facts)):
                    batch_size = batch_size_of(lm, config, taught, [of_answers.layer])
                    detectors = [of_facts.detectors(facts)]
                    answers.append(optimize_values(lm, taught, [of_answers.layer], options, batch_size, detectors))
            markers.append(of_call)
            answering.append(of_facts)
    return GatedFacts(gates, torch.cat(markers), answering[0].beside(*answering[1:]), joined(answers))


def _gates_of_edits(lm: LanguageModel, spare: Spare, edits: Collection[Mapping[str, LowRankDelta]]) -> Tensor | None:
    """Return the rows of the gates of answers that active edits have, `(n, d)`; None if they have none.

    The rows respond with 1 where the answers are due.
    """
    neurons = sorted({neuron for deltas in edits for neuron in rewritten(spare.neurons, deltas)})
    return spare.neurons.gate.read_all(lm.model, neurons)[0].cpu() / GATE if neurons else None
