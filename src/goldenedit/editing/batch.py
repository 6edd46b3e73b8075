"""One batch of facts, for any editor: check it, compute what the editor needs, and return its changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.answering import texts_about
from goldenedit.editing.gated import marker_start, neurons_for
from goldenedit.editing.learn import TextStatistics, learn_facts
from goldenedit.editing.prepared import (
    Changes,
    check_editable,
    prepare_neurons,
    prepare_subjects,
    subject_texts,
)
from goldenedit.editing.rows import subjects_of
from goldenedit.editing.wordings import spelled
from goldenedit.editors import LowRankDelta
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.perplexity import perplexity, sample_texts, text_kl
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)


def changes_of_batch(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    remembered: Mapping[str, Tensor],
    without_edits: Callable[[], AbstractContextManager[None]],
    earlier: Sequence[EditRequest] = (),
    edits: Collection[Mapping[str, LowRankDelta]] = (),
    active: Collection[Mapping[str, LowRankDelta]] = (),
) -> Changes:
    """Return the change of weights that serves all requests.

    Args:
        lm: The model, with its active edits in effect.
        config: The editor, the layers and the constants.
        remembered: What the editors of the active edits remember.
        without_edits: Returns a context that switches the edits off, for statistics of the unedited model.
        earlier: Facts of the active edits. They are kept: a new value serves those about its subject too.
        edits: The deltas of all edits that the model carries, whose neurons are not rewritten.
        active: Those of the active edits among them.

    Raises:
        ValueError: The editor cannot change these layers, or a request cannot be served.
    """
    check_editable(lm, config, config.target_layers)  # before anything takes time
    if config.editor.learns != "values":
        with without_edits():
            text = TextStatistics.read_by(lm, config)
        with phase("training"):
            return _learned(lm, requests, config, remembered, text, earlier, active)
    with without_edits():
        # Statistics first: processes share them, and would wait for a process that failed while sampling contexts.
        spare = neurons_for(lm, config, len(subjects_of(requests)), len(requests), edits)
        statistics = {} if spare is not None else lm.statistics(config, config.target_layers)
        output_gradients = {} if spare is not None else lm.output_gradients(config, config.target_layers)
        contexts = lm.contexts(config)
        start = None if spare is None else marker_start(lm, config)
        with phase("wordings"):
            if spare is not None:
                texts = texts_about(lm, requests, config, contexts, earlier)
            else:
                subjects = subject_texts(lm, requests, config, contexts, earlier, joint=True)
    if spare is not None:
        prepared = prepare_neurons(lm, requests, config, texts, spare, start, active=active)
    else:
        prepared = prepare_subjects(
            lm, requests, config, subjects, statistics, remembered, output_gradients=output_gradients
        )
    for (first, *_), delta, steps in zip(prepared.subjects, prepared.values.delta, prepared.values.steps, strict=True):
        if spare is None and steps and not delta.any():
            logger.warning(
                "The edit of %r at layer %s changes nothing: no later layer attends to the subject's value, or options "
                "hold it in its place. Edit an earlier layer (EditConfig.layer), or lower kl_factor and weight_decay.",
                requests[first].subject,
                config.target_layers,
            )
    with phase("solve"):
        return prepared.changes(config, statistics, remembered)


def _learned(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    remembered: Mapping[str, Tensor],
    text: TextStatistics,
    earlier: Sequence[EditRequest],
    active: Collection[Mapping[str, LowRankDelta]],
) -> Changes:
    """Return the changes of an editor that learns. Further prompts of a request are learned as facts of their own."""
    further = [
        replace(request, prompt=prompt, subject=spelled(prompt, request.subject), prompts=())
        for request in requests
        if request.messages is None
        for prompt in request.prompts
    ]
    rows = [rendered(lm.tokenizer, request) for request in [*requests, *further]]
    changes = learn_facts(lm, rows, config, remembered, text, earlier, active)
    count = len(requests)
    return replace(changes, probability_before=changes.probability_before[:count], steps=changes.steps[:count])


def check_harm(
    lm: LanguageModel, name: str, config: EditConfig, without_edits: Callable[[], AbstractContextManager[None]]
) -> None:
    """Raise ValueError if the active edits harm plain statements more than a config allows.

    Args:
        lm: The model, with its active edits in effect.
        name: The newest edit.
        without_edits: Returns a context that switches all edits off.
    """
    if (most := config.max_perplexity_ratio) is not None:
        with without_edits():
            before = lm.perplexity()
        after = perplexity(lm, sample_texts())
        if not after <= most * before:
            raise ValueError(
                f"With edit {name!r} perplexity on plain statements is {after:.2f}, against {before:.2f} for the base "
                f"model. That is more than EditConfig.max_perplexity_ratio={most} allows, so the edit was undone."
            )
    if (most := config.max_text_kl) is not None:
        kl = text_kl(lm, sample_texts(), without_edits)
        if not kl <= most:
            raise ValueError(
                f"With edit {name!r} the KL divergence from the base model on plain statements is {kl:.4f} a token. "
                f"That is more than EditConfig.max_text_kl={most} allows, so the edit was undone."
            )
