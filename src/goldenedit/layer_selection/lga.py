"""Layer Gradient Analysis: find the golden layer from gradients, without a trial edit.

"Golden Layers and Where to Find Them" (arXiv 2602.20207), as reconstructed from its abstract and from sources that
quote the formula; the full text was not at hand:

    score(l) = sum_i < grad_{theta_l} loss(Q_i + K_i),  grad_{theta_l} loss(Q_i + K'_i) >
    golden layer = argmax of score over the layers that pass a Tukey filter

with prompt `Q`, old answer `K`, new answer `K'`, and `theta_l` the MLP weights of layer `l` without biases.

No weight gradient is ever formed. For a linear map `y = x W^T` the gradient of a sequence is `sum_t delta_t x_t^T`, so

    < grad_W, grad'_W > = sum_{t,s} (delta_t . delta'_s) (x_t . x'_s)

needs only the inputs `x` and the output gradients `delta` of the two sequences ("ghost gradients"). Fused experts hand
their inputs out to nobody: only there are gradients formed, those of one layer and one pair at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.experts import FusedExperts
from goldenedit.architecture.hooks import (
    Call,
    evaluating,
    outside_inference_mode,
    reading_logits,
    recording,
    watching_gradients,
)
from goldenedit.architecture.layers import Architecture
from goldenedit.devices import input_device
from goldenedit.editing.contexts import continuation
from goldenedit.editing.rows import Row, context_length, encode, pad, padding_id, prompt_tokens
from goldenedit.parallel import Processes, processes_of
from goldenedit.requests import EditRequest

Loss = Literal["sequence", "answer"]


@outside_inference_mode()
def lga_scores(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditRequest],
    loss: Loss = "sequence",
    batch_size: int = 4,
) -> Tensor:
    """Return the LGA score of each layer, `(num_layers,)` float64; NaN where a layer has no MLP to score.

    Under `accelerate launch` or torchrun the facts are shared among the processes (see `goldenedit.parallel`).

    Args:
        facts: The proxy set. Facts without `target_true` are scored against the model's own greedy answer.
        loss: Mean cross entropy over all tokens of the sequence, or over those of the answer.
        batch_size: Facts a forward and backward; each is two rows. More take more memory, and little less time.

    Raises:
        ValueError: There are no facts, a fact cannot be tokenised, or a gradient is not finite.
    """
    if not facts:
        raise ValueError("LGA needs at least one fact.")
    processes = processes_of(model)
    pairs = _encode_pairs(model, tokenizer, facts, processes)
    pairs.sort(key=lambda pair: len(pair[0].input_ids))
    scores = torch.full((architecture.num_layers,), torch.nan, dtype=torch.float64)
    scores[list(architecture.mlp_linears)] = 0.0
    linears = {
        model.get_submodule(path): layer
        for layer, paths in architecture.mlp_linears.items()
        for path in ((architecture.experts[layer].site,) if layer in architecture.experts else paths)
    }
    starts = processes.share(range(0, len(pairs), batch_size))
    own = sum(len(pairs[start : start + batch_size]) for start in starts)
    with evaluating(model), tqdm(total=own, desc="Layer gradients", unit="fact", leave=False) as progress:
        for start in starts:
            group = pairs[start : start + batch_size]
            rows = [row for pair in group for row in pair]
            for layer, dot in _gradient_dots(model, tokenizer, architecture, linears, rows, loss):
                scores[layer] += dot
            progress.update(len(group))
    scores = processes.total(scores)
    if scores.isinf().any() or scores[list(architecture.mlp_linears)].isnan().any():
        raise ValueError("A gradient of LGA is not finite: load the model in float32 or bfloat16.")
    return scores


def tukey_filter(scores: Tensor, kappa: float = 1.0) -> Tensor:
    """Return which scores lie in `[Q1 - kappa * IQR, Q3 + kappa * IQR]`, with linear quantiles; NaN never does.

    Layers with massive activations score far above all others and are never the best to edit: the filter drops them.

    Args:
        kappa: Width of the fence in interquartile ranges; infinity keeps every layer.
    """
    known = scores[~scores.isnan()]
    if kappa == float("inf"):
        return ~scores.isnan()
    q1, q3 = torch.quantile(known, torch.tensor([0.25, 0.75], dtype=known.dtype))
    fence = kappa * (q3 - q1)
    return (scores >= q1 - fence) & (scores <= q3 + fence)


def golden_layer(scores: Tensor, kappa: float = 1.0) -> int:
    """Return the layer of the largest score that passes the Tukey filter.

    Raises:
        ValueError: No score does: there is none, or none is finite.
    """
    passed = tukey_filter(scores, kappa) & scores.isfinite()
    if not passed.any():
        raise ValueError("No layer has a finite score: load the model in float32 or bfloat16, or name the layer.")
    return int(scores.masked_fill(~passed, -torch.inf).argmax())


def _encode_pairs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[EditRequest], processes: Processes
) -> list[tuple[Row, Row]]:
    longest = context_length(model.config)
    answers = processes.map(
        lambda fact: fact.target_true or fact.joined(greedy_answer(model, tokenizer, fact.text)), facts
    )
    pairs = []
    for fact, old in zip(facts, answers, strict=True):
        pairs.append(
            (
                encode(tokenizer, fact.text, old, max_length=longest),
                encode(tokenizer, fact.text, fact.target_new, max_length=longest),
            )
        )
    return pairs


@torch.no_grad()
def greedy_answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = 4) -> str:
    """Return what the model itself answers, greedily, up to `tokens` tokens or the end of the line."""
    device = input_device(model)
    ids = torch.tensor([prompt_tokens(tokenizer, prompt)], device=device)
    length = ids.shape[1]
    with evaluating(model):
        for _ in range(tokens):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    answer = continuation(tokenizer, ids[0].tolist(), length).strip().split("\n")[0]
    if not answer:
        raise ValueError(f"The model has no answer to {prompt!r}: give the fact a target_true.")
    return answer


def _gradient_dots(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    linears: dict[nn.Module, int],
    rows: list[Row],
    loss: Loss,
) -> list[tuple[int, float]]:
    """Return `(layer, sum over pairs of the gradients' dot product)` for each linear map; rows come in pairs."""
    batch = pad(rows, padding_id(tokenizer), input_device(model))
    mask = batch.attention_mask.bool()
    dots: list[tuple[int, float]] = []
    experts = {str(layer): module for module, layer in linears.items() if layer in architecture.experts}

    def take(module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        layer = linears[module]
        if layer in architecture.experts:
            call = record.calls[str(layer)]
            dots.append((layer, _expert_dot(architecture.experts[layer], model, call, gradient, mask)))
        else:
            dots.append((layer, _ghost_dot(inputs, gradient, mask)))

    if loss == "answer":
        read_rows, read_positions = batch.read_rows, batch.read_positions
    else:
        read_rows, read_positions = mask[:, 1:].nonzero().T  # logits at t predict token t + 1
    targets = batch.input_ids[read_rows, read_positions + 1]
    with (
        recording(experts) as record,
        watching_gradients(architecture.layer(model, 0), linears, take) as roots,
        reading_logits(model, read_rows, read_positions) as logits_of,
    ):
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        token_loss = nn.functional.cross_entropy(
            logits_of(output).float(), targets.to(output.logits.device), reduction="none"
        )
        weights = 1.0 / torch.bincount(read_rows, minlength=len(rows))[read_rows].to(token_loss)
        torch.autograd.grad((token_loss * weights).sum(), roots, allow_unused=True)
    return dots


def _ghost_dot(inputs: Tensor, gradients: Tensor, mask: Tensor) -> float:
    """Return `sum over pairs, t, s of (delta_t . delta'_s)(x_t . x'_s)`, rows `2i` and `2i + 1` being a pair."""
    count, length = mask.shape
    mask = mask.to(inputs.device)[..., None]
    x = inputs.view(count, length, -1).float() * mask
    delta = gradients.view(count, length, -1).float() * mask
    dots = (delta[::2] @ delta[1::2].mT) * (x[::2] @ x[1::2].mT)
    return dots.double().sum().item()


def _expert_dot(experts: FusedExperts, model: nn.Module, call: Call, gradient: Tensor, mask: Tensor) -> float:
    """Return the sum over pairs of the dot product of gradients by all fused parameters of a layer."""
    slopes = gradient.reshape(-1, gradient.shape[-1])
    tokens = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    dot = 0.0
    for pair in range(0, len(mask), 2):
        own = [tokens[row][mask[row]] for row in (pair, pair + 1)]
        old, new = (experts.gradients(model, call, some, slopes[some.to(slopes.device)]) for some in own)
        for a, b in zip(old, new, strict=True):  # expert by expert: a product of all would be as large as their weights
            dot += sum((x.float() * y.float()).sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))
    return dot
