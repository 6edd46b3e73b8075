"""Key selectivity: how strongly an edit at a layer responds to paraphrases, compared with neighbors.

This selector is new in this project, and needs only forward passes. Let `u = C^-1 k*` be the direction in key space
along which ROME adds the value of a fact, at the last token of the subject:

    para(l)  = mean over paraphrases of (u . k_paraphrase) / (u . k*)
    neigh(l) = mean over neighbors of max over tokens |u . k_t| / (u . k*)
    score(l) = para(l) - neigh(l)

It does not measure whether a layer can still change the answer: late layers can be selective and yet useless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, recording
from goldenedit.config import EditConfig
from goldenedit.editing.keys import subject_keys
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, encode, pad
from goldenedit.requests import EditRequest
from goldenedit.subjects import find_subject


@selector("selectivity", depends_on=("covariance",))
def selectivity(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> Tensor:
    """Return how much more an edit at each layer responds to paraphrases than to neighbors.

    See `selectivity_scores`.
    """
    return selectivity_scores(lm, facts, lm.streamed_statistics(config))


@torch.no_grad()
def selectivity_scores(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    statistics: Mapping[int, KeyStatistics],
) -> Tensor:
    """Return the selectivity of each layer, `(num_layers,)` float64, NaN for layers without statistics.

    Args:
        facts: The proxy set. Facts without neighbors, or without paraphrases that name the subject, are skipped.
        statistics: Key statistics of the layers to score. Each is read once.

    Raises:
        ValueError: No fact has both paraphrases and neighbors.
    """
    layers = sorted(statistics)
    usable = [fact for fact in facts if fact.neighborhood and any(fact.subject in text for text in fact.paraphrases)]
    if not usable:
        raise ValueError(
            "No proxy fact can be used for selectivity. Add facts with neighbors and with paraphrases that name the "
            "subject."
        )
    sums = torch.zeros(len(layers), dtype=torch.float64)
    modules = {str(layer): lm.architecture.down_projection(lm.model, layer) for layer in layers}
    keys = subject_keys(lm, usable, layers)
    directions = [statistics[layer].solve(of_layer.T).T for layer, of_layer in zip(layers, keys, strict=True)]  # u
    with evaluating(lm.model), tqdm(total=len(usable), desc="Selectivity", unit="fact", leave=False) as progress:
        for number, fact in enumerate(usable):
            rows, paraphrases = _rows(lm, fact)
            batch = pad(rows, lm.padding_id, lm.device)
            with recording(modules) as record:
                lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            for index, layer in enumerate(layers):
                prompt_keys = lm.architecture.keys(lm.model, layer, record.calls[str(layer)]).cpu()
                prompt_keys = prompt_keys.unflatten(0, (len(rows), -1))
                subject, mask = batch.subject.cpu(), batch.attention_mask.cpu()
                sums[index] += _selectivity(prompt_keys, subject, mask, paraphrases, directions[index][number])
            progress.update()
    scores = torch.full((lm.architecture.num_layers,), torch.nan, dtype=torch.float64)
    scores[layers] = sums / len(usable)
    return scores


def _rows(lm: LanguageModel, fact: EditRequest) -> tuple[list[Row], int]:
    """Return the rows of prompt, paraphrases that name the subject and neighbors, and the number of paraphrases."""
    longest = lm.max_length
    places = [(text, find_subject(text, fact.subject)) for text in fact.paraphrases]
    subject_ends = [(text, place.start + len(fact.subject)) for text, place in places if place is not None]
    rows = [encode(lm.tokenizer, fact.text, None, fact.subject_end, longest)]
    rows += [encode(lm.tokenizer, text, None, end, longest) for text, end in subject_ends]
    rows += [encode(lm.tokenizer, text, max_length=longest) for text in fact.neighborhood]
    return rows, len(subject_ends)


def _selectivity(keys: Tensor, subject: Tensor, mask: Tensor, paraphrases: int, u: Tensor) -> float:
    """Return `para - neigh` of one fact at one layer, from the keys `(rows, T, d_in)` of all its rows."""
    at_subject = keys[torch.arange(1 + paraphrases), subject[: 1 + paraphrases]]
    u = u.cpu()
    at_prompt = u @ at_subject[0].double()
    para = (at_subject[1:].double() @ u / at_prompt).mean()
    neighbors = (keys[1 + paraphrases :].double() @ u / at_prompt).abs()
    counts = mask[1 + paraphrases :].bool()
    counts[:, 0] = False  # the first token is an attention sink, whose key is unlike all others
    return (para - neighbors.masked_fill(~counts, 0.0).amax(1).mean()).item()
