"""Facts with optimized values and keys, and the deltas an editor makes of them. Nothing here writes to the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.answering import AskedTexts, texts_about
from goldenedit.editing.gated import GatedFacts, marker_start, neurons_for, prepare_gated
from goldenedit.editing.gates import Spare
from goldenedit.editing.keys import contrast_count, keys_at_ends, weighted_contrasts, with_contrasts
from goldenedit.editing.rows import batch_size_of, kept_rows, subject_key, subject_rows, subjects_of
from goldenedit.editing.values import SubjectRows, ValueOptions, Values, optimize_values
from goldenedit.editing.wordings import worded
from goldenedit.editors import FactKeys, KeyStatistics, LowRankDelta, Problem
from goldenedit.editors.regularizers import prune, rect, sphere
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.statistics import check_widths
from goldenedit.requests import EditRequest

_FEW = 8  # subjects whose neurons are rewritten together, though each is edited alone


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
        method: The editor under whose change the values were optimized; None if they were added at the subjects.
        detectors: By layer `(N, d_in)`, the detector of each subject under that editor; None without one.
        gated: The neurons that tell the facts, for an editor that rewrites neurons.
    """

    lm: LanguageModel
    requests: Sequence[EditRequest]
    subjects: Sequence[Sequence[int]]
    layers: Sequence[int]
    values: Values
    vectors: tuple[str, ...]
    method: str | None = None
    detectors: Sequence[Tensor] | None = None
    gated: GatedFacts | None = None
    _contrasts: dict[tuple[object, ...], list[list[Tensor] | None]] = field(default_factory=dict, repr=False)
    _keys: dict[tuple[object, ...], dict[int, list[FactKeys]]] = field(default_factory=dict, repr=False)

    def keys(self, config: EditConfig) -> dict[int, list[FactKeys]]:
        """Return the keys of each fact as the configured editor reads them, by layer. Results are cached."""
        contrast_constants = (contrast_count(config), config.contrast_weight, config.seed)
        constants = (*contrast_constants, "anchor" in config.editor.reads, config.anchor_bare_prompt)
        if contrast_constants not in self._contrasts:
            with phase("contrast keys"):
                self._contrasts[contrast_constants] = weighted_contrasts(
                    self.lm,
                    [rendered(self.lm.tokenizer, self.requests[group[0]]) for group in self.subjects],
                    self.layers,
                    config,
                )
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
        if editor.vectors != self.vectors or (self.gated is not None and config.method != self.method):
            raise ValueError(
                f"The values were not optimized for the editor {config.method!r}. Call prepare_facts with its config."
            )
        chosen = range(len(self.requests)) if chosen is None else chosen
        subjects = [place for place, group in enumerate(self.subjects) if set(group) & set(chosen)]
        if self.gated is not None:
            order = [fact for group in self.subjects for fact in group]
            facts = [place for place, fact in enumerate(order) if fact in set(chosen)]
            return Changes(self.gated.deltas(self.lm, subjects, facts), *self._of_facts(chosen))
        deltas, state, errors = {}, {}, []
        for index, (layer, keys) in enumerate(self.keys(config).items()):
            path = self.lm.architecture.down_projections[layer]
            previous = (remembered or {}).get(f"keys/{path}") if editor.remembers_keys else None
            residuals = self.values.delta[subjects, index].T
            problem = Problem([keys[subject] for subject in subjects], residuals, statistics[layer], previous=previous)
            change: LowRankDelta | Tensor
            if self.detectors is not None and config.method == self.method:
                change = LowRankDelta(self.detectors[index][subjects].float(), residuals)
            else:
                change = config.solve(problem)
            self._check_change(
                change, config, layer, [self.requests[self.subjects[subject][0]] for subject in subjects]
            )
            delta, error = stored(self.lm, change, layer, config)
            deltas[path] = delta
            errors.append(error)
            if editor.remembers_keys:
                state[f"keys/{path}"] = problem.keys
        return Changes(deltas, *self._of_facts(chosen), state, max(errors))

    def _of_facts(self, chosen: Sequence[int]) -> tuple[list[float], list[int]]:
        """Return the probability before the edit, and the steps, of some facts."""
        places = {
            fact: (subject, place) for subject, group in enumerate(self.subjects) for place, fact in enumerate(group)
        }
        before = [self.values.target_probability[places[fact][0]][places[fact][1]] for fact in chosen]
        return before, [self.values.steps[places[fact][0]] for fact in chosen]

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
    if config.regularizer not in (None, "nas"):
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


@dataclass(frozen=True)
class SubjectTexts:
    """The rows of subjects, with the requests about each.

    Attributes:
        groups: By subject, the indices of its requests.
        rows: By subject, the rows that its value is optimized on.
    """

    groups: Sequence[Sequence[int]]
    rows: Sequence[SubjectRows]


def subject_texts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    contexts: Sequence[str],
    earlier: Sequence[EditRequest] = (),
    joint: bool = False,
) -> SubjectTexts:
    """Return the rows that values are optimized on. The model must be the unedited one: its own answers are read.

    Args:
        requests: The facts, as the user wrote them.
        contexts: Prefixes of each prompt, the first of them empty.
        earlier: Facts of earlier edits, which the values of their subjects serve too.
        joint: Whether all facts about one subject share a value, as in an edit. Otherwise each fact has its own, for
            measurements, and prompts of `locality` are not kept.

    Raises:
        ValueError: A request cannot be tokenized.
    """
    groups = subjects_of(requests) if joint else [[index] for index in range(len(requests))]
    facts = [[requests[index] for index in group] for group in groups]
    if joint:
        for of_subject in facts:
            key = subject_key(of_subject[0])
            of_subject += [request for request in earlier if subject_key(request) == key]
    kept = kept_rows(lm, facts, config, locality=joint)
    flat = [request for of_subject in facts for request in of_subject]
    others = iter(worded(lm, flat) if config.phrasings == "auto" else [[]] * len(flat))
    rows = [
        subject_rows(lm, of_subject, contexts, [next(others) for _ in of_subject], kept_of_subject)
        for of_subject, kept_of_subject in zip(facts, kept, strict=True)
    ]
    return SubjectTexts(groups, rows)


def prepare_facts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    contexts: Sequence[str],
    joint: bool = False,
    statistics: Mapping[int, KeyStatistics] | None = None,
    output_gradients: Mapping[int, Tensor] | None = None,
) -> PreparedFacts:
    """Optimize the values that make the unedited model give each new answer, and find the keys to insert them under.

    Arguments are as in `subject_texts`.

    Raises:
        ValueError: A request cannot be served. The message names it.
    """
    subjects = len(subjects_of(requests)) if joint else min(len(requests), _FEW)
    facts = len(requests) if joint else subjects
    spare = None if statistics is None else neurons_for(lm, config, subjects, facts)
    if spare is None and statistics is not None and not joint:
        spare = neurons_for(lm, config, 1, 1)
    if spare is not None:
        return prepare_neurons(
            lm,
            requests,
            config,
            texts_about(lm, requests, config, contexts, (), joint),
            spare,
            marker_start(lm, config),
            joint,
        )
    texts = subject_texts(lm, requests, config, contexts, joint=joint)
    return prepare_subjects(lm, requests, config, texts, statistics, {}, joint, output_gradients)


def prepare_neurons(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    texts: AskedTexts,
    spare: Sequence[Spare],
    start: Tensor | None,
    together: bool = True,
    active: Collection[Mapping[str, LowRankDelta]] = (),
) -> PreparedFacts:
    """Find the neurons that tell facts, in the model as it is now. See `prepare_gated`."""
    options = _value_options(config)
    # The answers are optimized in a model with markers, which may say something else.
    asked = [(rendered(lm.tokenizer, request).text, request.target_new) for request in requests]
    before = [answer.probability for answer in likelihoods(lm, asked)]
    gated = prepare_gated(lm, requests, config, texts, options, spare, together, start, active)
    answers = gated.answers
    places = iter(range(len(requests)))
    of_subjects = [[next(places) for _ in group] for group in texts.groups]
    values = Values(
        delta=gated.markers,
        keys=[],
        steps=[max(answers.steps[place] for place in members) for members in of_subjects],
        target_probability=[[before[request] for request in group] for group in texts.groups],
        replay=answers.replay,
    )
    return PreparedFacts(
        lm, requests, texts.groups, config.target_layers, values, options.vectors, config.method, gated=gated
    )


def _value_options(config: EditConfig) -> ValueOptions:
    return ValueOptions(
        steps=config.steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        clamp=config.clamp,
        stop_loss=config.stop_loss,
        vectors=config.editor.vectors,
        optimizer=config.optimizer,
        keeps_norm=config.regularizer == "nas",
    )


def prepare_subjects(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    texts: SubjectTexts,
    statistics: Mapping[int, KeyStatistics] | None = None,
    remembered: Mapping[str, Tensor] | None = None,
    together: bool = True,
    output_gradients: Mapping[int, Tensor] | None = None,
) -> PreparedFacts:
    """Optimize the values of subjects, in the model as it is now, and find the keys to insert them under.

    With key statistics, the values are optimized under the change that the editor will make of them
    (see `detectors`). Otherwise they are added at the subjects' last tokens.

    Args:
        statistics: Key statistics, by layer.
        remembered: State of earlier edits.
        together: Whether all subjects will be inserted in one edit. Otherwise each is inserted alone.
        output_gradients: Second moments of the gradients at the outputs on other text, by layer; None or empty for
            values that do not look at other text.

    Raises:
        ValueError: A request cannot be served. The message names it.
    """
    layers = config.target_layers
    options = _value_options(config)
    batch_size = batch_size_of(lm, config, texts.rows, layers)
    flatness = flat_directions([output_gradients[layer] for layer in layers]) if output_gradients else None
    with phase("values"):
        of_edit = None
        is_linear = config.editor.vectors == ("mlp",) and not set(layers) & set(lm.architecture.experts)
        if statistics is not None and is_linear:
            of_edit = detectors(lm, requests, config, texts, statistics, remembered or {}, together)
        values = optimize_values(lm, texts.rows, layers, options, batch_size, of_edit, flatness)
    method = None if of_edit is None else config.method
    facts = PreparedFacts(lm, requests, texts.groups, layers, values, config.editor.vectors, method, of_edit)
    facts.keys(config)  # runs the model now; solving does not run it
    return facts


def subject_keys(
    lm: LanguageModel, requests: Sequence[EditRequest], config: EditConfig, texts: SubjectTexts
) -> dict[int, list[FactKeys]]:
    """Return the keys of each subject in all wordings of its requests, as the editor reads them, by layer."""
    layers = config.target_layers
    rows = [
        [
            list(answer.row.input_ids[: answer.row.subject + 1])
            for answers in subject.answers[: len(group)]  # those of earlier edits come behind
            for answer in answers
        ]
        for subject, group in zip(texts.rows, texts.groups, strict=True)
    ]
    found = keys_at_ends(lm, [row for of_subject in rows for row in of_subject], layers)
    keys = [list(of_layer.split([len(of_subject) for of_subject in rows])) for of_layer in found]
    first = [rendered(lm.tokenizer, requests[group[0]]) for group in texts.groups]
    return with_contrasts(layers, keys, weighted_contrasts(lm, first, layers, config), config)


def flat_directions(moments: Sequence[Tensor], ridge: float = 0.1) -> Tensor:
    """Return `(G / mean eigenvalue + ridge I)^-1` of each second moment `G`, `(m, d, d)` float32."""
    inverses = []
    for moment in moments:
        G = moment.double()
        eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
        mean = G.diagonal().mean().clamp_min(torch.finfo(G.dtype).tiny)  # 0 of a model that is certain of its text
        inverses.append(torch.linalg.inv(G / mean + ridge * eye).float())
    return torch.stack(inverses)


def detectors(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    texts: SubjectTexts,
    statistics: Mapping[int, KeyStatistics],
    remembered: Mapping[str, Tensor],
    together: bool,
) -> list[Tensor]:
    """Return the detectors of each subject, by layer `(N, d_in)`: its edit adds the value times detector times key.

    All editors that insert values are linear in them, `Delta = V D`. So `D` is their change for unit vectors as values.
    It does not depend on the values at the first layer, because an edit does not change the keys of its own layer. At
    later layers, the keys of the unedited model are taken.

    Args:
        together: Whether all subjects are inserted in one edit.
    """
    by_layer = subject_keys(lm, requests, config, texts)
    solved = []
    for layer, facts in by_layer.items():
        path = lm.architecture.down_projections[layer]
        previous = remembered.get(f"keys/{path}") if config.editor.remembers_keys else None
        changes = [
            config.solve(Problem(members, torch.eye(len(members)), statistics[layer], previous=previous))
            for members in ([facts] if together else [[fact] for fact in facts])
        ]
        solved.append(torch.cat([change if isinstance(change, Tensor) else change.dense() for change in changes]))
    return solved
