"""Key response: S of an edit at each layer, predicted from which prompts answer to its key, without a trial edit.

An idea of this project, which joins key selectivity with what gradients say of efficacy. An editor of rank one adds
`r a^T` to the weight `W` of a layer: whatever key `k'` a token brings, its value moves by `(a . k') r`. As `r` is
optimized until the edited prompt gives the new answer, a prompt with a token whose key is as strong as the fact's own,
`k`, is taken to be pushed towards that answer as far as the edited prompt is:

    m(x)      = log p(new | x) - log p(old | x), mean over each answer's tokens
    act(x)    = min(1, max over tokens t of x of |a . k_t(x)| / |a . k|)
    reach     = OVERSHOOT clamp ||v0|| ||g||
    edited(x) = m(x) + act(x) max(0, min(MARGIN - m(prompt), reach))

`a` comes from the configured editor, contexts and covariance, and `g` is the gradient of `m(prompt)` by the value `v0`
at the last token of the subject: a layer that can no longer steer the answer has a short reach. What is predicted are
the efficacy E, where the logit of the new answer moves by the reach or to where the optimization stops, paraphrases P,
neighbors N (other subjects) and locality L (other prompts about the subject):

    E = sigmoid(max(c, min(logit(exp(-stop_loss)), c + reach))),  c = logit p(new | prompt)
    P = mean sigmoid(edited(x)),  N, L = mean sigmoid(-edited(x))

The score is the mean of the S that four public datasets would be given, or those of them that there are prompts for:

    CounterFact: H(E, P, N)    zsRE: H(E, P, L)    WikiRecent: H(E, L)    WikiCounterfact: H(E, L)

with H the harmonic mean. One forward of all prompts serves all layers, and one backward of the edited one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, outside_inference_mode, recording, watching_gradients
from goldenedit.config import EditConfig
from goldenedit.editing.keys import context_keys, fact_keys
from goldenedit.editing.training import answer_nll
from goldenedit.editors import FactKeys, KeyStatistics, Problem
from goldenedit.evaluation.scores import harmonic_mean
from goldenedit.formats import Pair
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import greedy_answer
from goldenedit.lm.tokens import Row, encode
from goldenedit.requests import ChatText, EditRequest
from goldenedit.subjects import replace_subject

# Nats. Both are what single edits of 8 packaged facts left at the edited prompt, mean over layers: a margin of 9.2 on
# SmolLM2 up to layer 22 and of 8.1 on Gemma up to 15; behind them it falls as this reach says (at 25 4.7, by it 4.6).
MARGIN = 9.0
OVERSHOOT = 2.0

# Asked of any subject. Not all make sense of each, and one may ask for what is edited, which all layers share.
PROPERTIES = (
    *("name", "type", "country", "language", "location", "place of origin", "date of birth"),
    *("history", "founder", "owner", "color", "official website"),
)
_ASKED = 5


@selector("key_response", depends_on=("edit",))
@outside_inference_mode()
def key_response_scores(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    config: EditConfig,
    statistics: Mapping[int, KeyStatistics] | None = None,
    neighbors: int = 5,
) -> Tensor:
    """Return the predicted S of each layer, `(num_layers,)` float64; NaN where a layer has no statistics.

    Args:
        facts: The proxy set. The old answer of those that have none is what the model says, and facts that the model
            already answers so are skipped; facts without locality are asked for other properties of their subject,
            those in a chat for what other facts are about.
        config: The editor and its constants; editors that insert no values are taken for R-ROME.
        statistics: Key statistics of the layers to be scored; by default of all, each read when it is needed.
        neighbors: Use the first so many neighborhood prompts of each fact.

    Raises:
        ValueError: No fact has prompts whose answers must stay, or an output or gradient is not finite.
    """
    if statistics is None:
        statistics = lm.streamed_statistics(config)
    layers = sorted(statistics)
    parts: dict[int, dict[str, list[float]]] = {layer: defaultdict(list) for layer in layers}
    with evaluating(lm.model), tqdm(total=len(facts), desc="Key response", unit="fact", leave=False) as progress:
        known = [there for fact in facts if (there := _with_old_answer(lm, fact)) is not None]
        if not known:
            raise ValueError("Key response needs facts whose new answer is not what the model says.")
        detectors = _detectors(lm, known, config, statistics)
        for index, fact in enumerate(known):
            same = _said(lm, [prompt for prompt, _ in fact.locality] or other_prompts(fact, facts))
            kept = {
                "neighbors": [(prompt, str(fact.target_true)) for prompt in fact.neighborhood[:neighbors]],
                "locality": [(prompt, word) for prompt, word in same if not fact.target_new.startswith(word)],
            }
            own = {layer: found[index] for layer, found in detectors.items()}
            response = respond(lm, fact, own, [pair for of in kept.values() for pair in of])
            sizes = {"paraphrase": len(fact.paraphrases)} | {part: len(of) for part, of in kept.items()}
            for layer in layers:
                parts[layer]["efficacy"].append(response.efficacy(layer, config))
                margins = response.edited(layer, config)[1:].split(list(sizes.values()))
                for part, of_prompts in zip(sizes, margins, strict=True):
                    if len(of_prompts):
                        parts[layer][part].append((-of_prompts if part in kept else of_prompts).sigmoid().mean().item())
            progress.update()
    scores = torch.full((lm.architecture.num_layers,), torch.nan, dtype=torch.float64)
    for layer, of_layer in parts.items():
        scores[layer] = score_of({part: fmean(shares) for part, shares in of_layer.items()})
    return scores


def _with_old_answer(lm: LanguageModel, fact: EditRequest) -> EditRequest | None:
    """Return the fact with what the model says as its old answer, None where that is nothing or the new one."""
    if fact.target_true:
        return fact
    with suppress(ValueError):
        return replace(fact, target_true=greedy_answer(lm, fact.text))
    return None


def score_of(means: Mapping[str, float]) -> float:
    """Return the mean S of the datasets whose prompts there are, from the shares that answer as they should."""
    asked = tuple(part for part in ("efficacy", "paraphrase") if part in means)
    datasets = [(*asked, "neighbors"), (*asked, "locality"), ("efficacy", "locality"), ("efficacy", "locality")]
    scores = [harmonic_mean([means[part] for part in parts]) for parts in datasets if parts[-1] in means]
    if not scores:
        raise ValueError("Key response needs facts with neighbors or locality.")
    return fmean(scores)


@dataclass(frozen=True)
class Response:
    """How the prompts of one fact answer to an edit of it: its own, its paraphrases, and those that must stay.

    Attributes:
        margins: `m(x)` before the edit, `(P,)`.
        certainty: Logit of `p(new | prompt)` before the edit, mean over the answer's tokens.
        activations: `act(x)` by layer, `(P,)`.
        slope: `||v0|| ||g||` by layer: nats that the margin moves when the value moves by its own length.
    """

    margins: Tensor
    certainty: float
    activations: dict[int, Tensor]
    slope: dict[int, float]

    def edited(self, layer: int, config: EditConfig) -> Tensor:
        """Return the margins after an edit of the layer, `(P,)`."""
        push = max(0.0, min(MARGIN - self.margins[0].item(), self._reach(layer, config)))
        return self.margins + self.activations[layer] * push

    def efficacy(self, layer: int, config: EditConfig) -> float:
        """Return the probability of the new answer at the edited prompt after an edit of the layer."""
        stop = _logit(torch.tensor(config.stop_loss))
        return (
            torch.tensor(max(self.certainty, min(stop, self.certainty + self._reach(layer, config)))).sigmoid().item()
        )

    def _reach(self, layer: int, config: EditConfig) -> float:
        return OVERSHOOT * config.clamp * self.slope[layer]


def _logit(nll: Tensor) -> float:
    """Return the logit of the probability whose negative logarithm this is."""
    return -nll.double().expm1().log().item()


def respond(
    lm: LanguageModel,
    fact: EditRequest,
    detectors: Mapping[int, Tensor],
    kept: Sequence[Pair],
) -> Response:
    """Return how the prompts of a fact answer to an edit of each layer.

    Args:
        detectors: `a` of each layer, `(d_in,)`.
        kept: Prompts whose answers must stay, with these answers.
    """
    layers = {lm.architecture.down_projection(lm.model, layer): layer for layer in detectors}
    modules = {str(layer): module for module, layer in layers.items()}
    rows = _rows(lm, fact, kept)
    subject = rows[0].subject
    with torch.no_grad(), recording(modules) as record:
        nll = answer_nll(lm, rows, "masked").cpu()
    asking = _asking(rows[::2], max(len(row.input_ids) for row in rows))
    activations = {}
    for layer, a in detectors.items():
        keys = lm.architecture.keys(lm.model, layer, record.calls[str(layer)]).unflatten(0, (len(rows), -1))
        answers = (keys[::2] @ a.to(keys)).abs().cpu()  # a prompt's keys are the same before either answer
        answers = answers.masked_fill(~asking, 0.0).amax(1)
        activations[layer] = (answers / answers[0].clamp_min(torch.finfo(answers.dtype).tiny)).clamp(max=1)
    slope = dict.fromkeys(detectors, 0.0)  # no token reads the last layer's value

    def take(module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        g = gradient.view(2, -1, gradient.shape[-1])[:, subject].float().sum(0)
        v0 = record.outputs[str(layers[module])].view(2, -1, len(g))[0, subject].float()
        slope[layers[module]] = (v0.norm() * g.norm()).item()

    with (
        recording(modules) as record,
        watching_gradients(lm.architecture.layer(lm.model, 0), layers, take) as roots,
    ):
        new, old = answer_nll(lm, rows[:2], "masked")
        torch.autograd.grad(old - new, roots, allow_unused=True)
    steepest = torch.tensor(list(slope.values()))
    if not (nll.isfinite().all() and steepest.isfinite().all()):
        raise ValueError("A gradient of the key response is not finite: load the model in float32 or bfloat16.")
    return Response(nll[1::2] - nll[::2], _logit(nll[0]), activations, slope)


def _asking(rows: Sequence[Row], length: int) -> Tensor:
    """Return which tokens ask for the answer, `(P, length)`: of the edited prompt the one whose value is edited.

    The first token of a text is an attention sink, whose key is like no other but those of other first tokens.
    """
    subject = rows[0].subject
    inside = torch.tensor([[min(subject, 1) <= token < row.target[0] for token in range(length)] for row in rows])
    inside[0] = torch.arange(length) == subject
    return inside


def other_prompts(fact: EditRequest, facts: Sequence[EditRequest]) -> list[str]:
    """Return prompts for other properties of the fact's subject, in the form in which benchmarks of locality ask them.

    With the subject last its key can tell which property is asked for. A chat's words are those of its template: what
    is asked of the fact's subject there are prompts of other facts, each of another relation.
    """
    draw = random.Random(fact.text)
    if not isinstance(fact.text, ChatText):
        return [f"The {one} of {fact.subject} is" for one in draw.sample(PROPERTIES, _ASKED)]
    prompts: dict[str, str] = {}
    for other in draw.sample(list(facts), len(facts)):
        if other.relation is not None and other.relation != fact.relation and len(prompts) < _ASKED:
            text = other.text
            asked = replace_subject(text, other.subject, fact.subject)
            prompts.setdefault(other.relation, ChatText(asked, text.joint) if isinstance(text, ChatText) else asked)
    return list(prompts.values())


def _said(lm: LanguageModel, prompts: Sequence[str]) -> list[Pair]:
    """Return prompts with the word that the model itself goes on with, where there is one."""
    pairs = []
    for prompt in prompts:
        with suppress(ValueError):
            pairs.append((prompt, greedy_answer(lm, prompt, 1)))
    return pairs


def _rows(lm: LanguageModel, fact: EditRequest, kept: Sequence[Pair]) -> list[Row]:
    """Return the rows of prompt, paraphrases and what must stay, each with the new and then with the old answer."""
    longest = lm.max_length
    assert fact.target_true is not None
    rows = []
    for prompt, old in [*((text, fact.target_true) for text in (fact.text, *fact.paraphrases)), *kept]:
        for answer in (fact.target_new, old):
            end = fact.subject_end if prompt == fact.text else None
            rows.append(encode(lm.tokenizer, prompt, answer, end, longest))
    return rows


def _detectors(
    lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig, statistics: Mapping[int, KeyStatistics]
) -> dict[int, Tensor]:
    """Return `a` of each fact by layer, `(N, d_in)`; the statistics of one layer are looked at after the other."""
    layers, contexts = sorted(statistics), lm.contexts(config)
    if config.editor.learns != "values":
        config = replace(config, method="r-rome", options={})
    keys_of = []
    for fact in facts:  # one by one: the keys of all facts in all contexts would be large
        keys = context_keys(lm, [fact], layers, contexts)
        keys_of.append(fact_keys(lm, [fact], layers, keys, config))
    return {
        layer: torch.stack([detector(of_fact[layer][0], config, of_layer) for of_fact in keys_of])
        for layer in layers
        for of_layer in (statistics[layer],)
    }


def detector(fact: FactKeys, config: EditConfig, statistics: KeyStatistics) -> Tensor:
    """Return `a`, `(d_in,)`: how much of its value the configured editor adds for each key."""
    change = config.solve(Problem([fact], torch.ones(1, 1), statistics))
    return (change if isinstance(change, Tensor) else change.dense())[0]
