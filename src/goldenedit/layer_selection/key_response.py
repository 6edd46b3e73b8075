"""Key response: S of an edit at each layer, predicted from keys and gradients without a trial edit.

This selector is new in this project. It combines key selectivity with a prediction of efficacy from gradients. An
editor of rank one adds `r a^T` to the weight `W` of a layer, so that the value of a token with key `k'` changes by
`(a . k') r`. `r` is optimized until the edited prompt gives the new answer. The prediction assumes that another prompt
is pushed towards this answer in proportion to its strongest response to `a`, relative to that of the fact's key `k`:

    m(x)      = log p(new | x) - log p(old | x), mean over each answer's tokens
    act(x)    = min(1, max over tokens t of x of |a . k_t(x)| / |a . k|)
    reach     = OVERSHOOT clamp ||v0|| ||g||
    edited(x) = m(x) + act(x) max(0, min(MARGIN - m(prompt), reach))

`a` follows from the configured editor, contexts and covariance. `g` is the gradient of `m(prompt)` with respect to the
value `v0` at the last token of the subject, so that a layer which hardly influences the answer has a short reach. The
predicted shares are efficacy E, where the logit of the new answer grows by the reach but not beyond the point where the
optimization stops, paraphrases P, neighbors N (other subjects) and locality L (other prompts about the subject):

    E = sigmoid(max(c, min(logit(exp(-stop_loss)), c + reach))),  c = logit p(new | prompt)
    P = mean sigmoid(edited(x)),  N, L = mean sigmoid(-edited(x))

The score is the mean of S on four public datasets, or on those of them that the facts have prompts for:

    CounterFact: H(E, P, N)    zsRE: H(E, P, L)    WikiRecent: H(E, L)    WikiCounterfact: H(E, L)

with H the harmonic mean. One forward of all prompts and one backward of the edited prompt score all layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, outside_inference_mode
from goldenedit.config import EditConfig
from goldenedit.editors import KeyStatistics
from goldenedit.evaluation.scores import harmonic_mean
from goldenedit.layer_scores import selector
from goldenedit.layer_selection.detectors import detectors_by_layer
from goldenedit.layer_selection.prompts import other_prompts, with_next_words, with_old_answer
from goldenedit.layer_selection.response import respond
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest


@selector("key_response", depends_on=("edit", "covariance"))
@outside_inference_mode()
def key_response_scores(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    config: EditConfig,
    statistics: Mapping[int, KeyStatistics] | None = None,
    neighbors: int = 5,
) -> Tensor:
    """Return S of an edit at each layer, predicted from keys and gradients without trial edits.

    Args:
        facts: The proxy set. Without `target_true` the model's own answer is the old answer, and facts the model
            already answers with the new target are skipped. Without locality, prompts for other properties of the
            subject are used (see `other_prompts`).
        config: The editor and its constants. For an editor that does not insert values, R-ROME is used.
        statistics: Key statistics of the layers to score. By default all layers are scored.
        neighbors: Number of neighborhood prompts of each fact, from the first on.

    Returns:
        `(num_layers,)` float64, NaN for layers without statistics.

    Raises:
        ValueError: No fact can be used, no fact has prompts whose answers must stay, or an output or gradient is not
            finite.
    """
    if statistics is None:
        statistics = lm.streamed_statistics(config, for_editor=True)
    layers = sorted(statistics)
    shares: dict[int, dict[str, list[float]]] = {layer: defaultdict(list) for layer in layers}
    with evaluating(lm.model), tqdm(total=len(facts), desc="Key response", unit="fact", leave=False) as progress:
        usable = [complete for fact in facts if (complete := with_old_answer(lm, fact)) is not None]
        if not usable:
            raise ValueError(
                "No proxy fact can be used for the key response: the model gives the new answers already, or none. "
                "Use other facts (EditConfig.proxy)."
            )
        detectors = detectors_by_layer(lm, usable, config, statistics)
        for index, fact in enumerate(usable):
            unrelated = with_next_words(lm, [prompt for prompt, _ in fact.locality] or other_prompts(fact, facts))
            preserved = {
                "neighbors": [(prompt, str(fact.target_true)) for prompt in fact.neighborhood[:neighbors]],
                "locality": [(prompt, word) for prompt, word in unrelated if not fact.target_new.startswith(word)],
            }
            fact_detectors = {layer: of_layer[index] for layer, of_layer in detectors.items()}
            response = respond(lm, fact, fact_detectors, [pair for pairs in preserved.values() for pair in pairs])
            counts = {"paraphrase": len(fact.paraphrases)} | {kind: len(pairs) for kind, pairs in preserved.items()}
            for layer in layers:
                shares[layer]["efficacy"].append(response.efficacy(layer, config))
                margins = response.edited(layer, config)[1:].split(list(counts.values()))
                for kind, of_kind in zip(counts, margins, strict=True):
                    if len(of_kind):
                        right = -of_kind if kind in preserved else of_kind
                        shares[layer][kind].append(right.sigmoid().mean().item())
            progress.update()
    scores = torch.full((lm.architecture.num_layers,), torch.nan, dtype=torch.float64)
    for layer, of_layer in shares.items():
        scores[layer] = score_of({kind: fmean(of_facts) for kind, of_facts in of_layer.items()})
    return scores


def score_of(means: Mapping[str, float]) -> float:
    """Return the mean S over the datasets whose kinds of prompts have a share of right answers in `means`."""
    changed = tuple(kind for kind in ("efficacy", "paraphrase") if kind in means)
    datasets = [(*changed, "neighbors"), (*changed, "locality"), ("efficacy", "locality"), ("efficacy", "locality")]
    scores = [harmonic_mean([means[kind] for kind in kinds]) for kinds in datasets if kinds[-1] in means]
    if not scores:
        raise ValueError("No proxy fact has neighbors or locality, which the key response needs. Add such prompts.")
    return fmean(scores)
