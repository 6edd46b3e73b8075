"""The predicted response of a fact's prompts to an edit of a layer; `key_response.py` has the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goldenedit.architecture.hooks import recording, watching_gradients
from goldenedit.config import EditConfig
from goldenedit.editing.training import answer_nll
from goldenedit.formats import Pair
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, encode
from goldenedit.requests import EditRequest

# Fitted to margins (in nats) after single edits of 8 packaged facts. Their mean was 9.2 on SmolLM2 up to layer 22 and
# 8.1 on Gemma up to layer 15. In later layers the reach limits them (SmolLM2, layer 25: 4.7 measured, 4.6 predicted).
MARGIN = 9.0
OVERSHOOT = 2.0


@dataclass(frozen=True)
class Response:
    """The predicted response of P prompts to an edit of one fact: its prompt, its paraphrases and preserved prompts.

    Attributes:
        margins: `m(x)` before the edit, `(P,)`.
        certainty: Logit of `p(new | prompt)` before the edit, from the mean NLL of the answer's tokens.
        activations: `act(x)` by layer, `(P,)`.
        slope: `||v0|| ||g||` by layer: change of the margin in nats if the value changes by its own length.
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
    """Return the logit of a probability, given its negative logarithm."""
    return -nll.double().expm1().log().item()


def respond(
    lm: LanguageModel,
    fact: EditRequest,
    detectors: Mapping[int, Tensor],
    preserved: Sequence[Pair],
) -> Response:
    """Return the predicted response of the prompts of a fact to an edit of each layer.

    Args:
        detectors: `a` of each layer, `(d_in,)`.
        preserved: Prompts whose answers must stay, with these answers.

    Raises:
        ValueError: An output or gradient is not finite.
    """
    layers = {lm.architecture.down_projection(lm.model, layer): layer for layer in detectors}
    modules = {str(layer): module for module, layer in layers.items()}
    rows = _rows(lm, fact, preserved)
    subject = rows[0].subject
    with torch.no_grad(), recording(modules) as record:
        nll = answer_nll(lm, rows, "masked").cpu()
    counts = _counted_tokens(rows[::2], max(len(row.input_ids) for row in rows))
    activations = {}
    for layer, a in detectors.items():
        keys = lm.architecture.keys(lm.model, layer, record.calls[str(layer)]).unflatten(0, (len(rows), -1))
        responses = (keys[::2] @ a.to(keys)).abs().cpu()  # the keys of a prompt are the same before both answers
        strongest = responses.masked_fill(~counts, 0.0).amax(1)
        activations[layer] = (strongest / strongest[0].clamp_min(torch.finfo(strongest.dtype).tiny)).clamp(max=1)
    slope = dict.fromkeys(detectors, 0.0)  # stays 0 in the last layer, whose value no other token reads

    def add_slope(module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        g = gradient.view(2, -1, gradient.shape[-1])[:, subject].float().sum(0)
        v0 = record.outputs[str(layers[module])].view(2, -1, len(g))[0, subject].float()
        slope[layers[module]] = (v0.norm() * g.norm()).item()

    with (
        recording(modules) as record,
        watching_gradients(lm.architecture.layer(lm.model, 0), layers, add_slope) as roots,
    ):
        new, old = answer_nll(lm, rows[:2], "masked")
        torch.autograd.grad(old - new, roots, allow_unused=True)
    slopes = torch.tensor(list(slope.values()))
    if not (nll.isfinite().all() and slopes.isfinite().all()):
        raise ValueError("A gradient of the key response is not finite. Load the model in float32 or bfloat16.")
    return Response(nll[1::2] - nll[::2], _logit(nll[0]), activations, slope)


def _counted_tokens(rows: Sequence[Row], length: int) -> Tensor:
    """Return which tokens count for `act(x)`, `(P, length)`: in the edited prompt only the edited one.

    The first token of a text does not count. It is an attention sink, whose key resembles only other first tokens.
    """
    subject = rows[0].subject
    inside = torch.tensor([[min(subject, 1) <= token < row.target[0] for token in range(length)] for row in rows])
    inside[0] = torch.arange(length) == subject
    return inside


def _rows(lm: LanguageModel, fact: EditRequest, preserved: Sequence[Pair]) -> list[Row]:
    """Return the rows of prompt, paraphrases and preserved prompts, each with the new and then with the old answer."""
    longest = lm.max_length
    assert fact.target_true is not None
    rows = []
    for prompt, old in [*((text, fact.target_true) for text in (fact.text, *fact.paraphrases)), *preserved]:
        for answer in (fact.target_new, old):
            end = fact.subject_end if prompt == fact.text else None
            rows.append(encode(lm.tokenizer, prompt, answer, end, longest))
    return rows
