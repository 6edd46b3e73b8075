"""Key selectivity: how strongly an edit made at a layer answers to paraphrases, and how strongly to neighbors.

An idea of this project, from forward passes alone. With `u = C^-1 k*` the direction that an edit of the fact adds a
value along (ROME's, at the last token of the subject),

    para(l)  = mean over paraphrases of (u . k_paraphrase) / (u . k*)
    neigh(l) = mean over neighbors of max over tokens |u . k_t| / (u . k*)
    score(l) = para(l) - neigh(l)

It says nothing of whether a layer can still steer the answer: late layers can be selective and of no use.
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
    """Return the selectivity of all layers that can be edited; see `selectivity_scores`."""
    return selectivity_scores(lm, facts, lm.streamed_statistics(config))


@torch.no_grad()
def selectivity_scores(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    statistics: Mapping[int, KeyStatistics],
) -> Tensor:
    """Return the selectivity of each layer, `(num_layers,)` float64; NaN where a layer has no down projection.

    Args:
        facts: The proxy set; facts without paraphrases that name the subject, or without neighbors, are passed by.
        statistics: Key statistics of the layers to be scored; each is asked for once.

    Raises:
        ValueError: No fact has both paraphrases and neighbors.
    """
    layers = sorted(statistics)
    usable = [fact for fact in facts if fact.neighborhood and any(fact.subject in text for text in fact.paraphrases)]
    if not usable:
        raise ValueError("Selectivity needs facts with paraphrases that name the subject, and with neighbors.")
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
                found = (
                    lm.architecture.keys(lm.model, layer, record.calls[str(layer)]).cpu().unflatten(0, (len(rows), -1))
                )
                sums[index] += _selectivity(
                    found, batch.subject.cpu(), batch.attention_mask.cpu(), paraphrases, directions[index][number]
                )
            progress.update()
    scores = torch.full((lm.architecture.num_layers,), torch.nan, dtype=torch.float64)
    scores[layers] = sums / len(usable)
    return scores


def _rows(lm: LanguageModel, fact: EditRequest) -> tuple[list[Row], int]:
    """Return the rows of the prompt, the paraphrases and the neighbors, and the number of paraphrases."""
    longest = lm.max_length
    places = [(text, find_subject(text, fact.subject)) for text in fact.paraphrases]
    named = [(text, place.start + len(fact.subject)) for text, place in places if place is not None]
    rows = [encode(lm.tokenizer, fact.text, None, fact.subject_end, longest)]
    rows += [encode(lm.tokenizer, text, None, end, longest) for text, end in named]
    rows += [encode(lm.tokenizer, text, max_length=longest) for text in fact.neighborhood]
    return rows, len(named)


def _selectivity(keys: Tensor, subject: Tensor, mask: Tensor, paraphrases: int, u: Tensor) -> float:
    """Return `para - neigh` of one fact at one layer from the keys `(rows, T, d_in)` of all its rows."""
    at_subject = keys[torch.arange(1 + paraphrases), subject[: 1 + paraphrases]]
    u = u.cpu()
    own = u @ at_subject[0].double()
    para = (at_subject[1:].double() @ u / own).mean()
    neighbors = (keys[1 + paraphrases :].double() @ u / own).abs()
    real = mask[1 + paraphrases :].bool()
    real[:, 0] = False  # the first token is an attention sink: its key is like no other
    return (para - neighbors.masked_fill(~real, 0.0).amax(1).mean()).item()
