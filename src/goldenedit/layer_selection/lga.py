"""Layer Gradient Analysis: find the golden layer from gradients, without a trial edit.

"Golden Layers and Where to Find Them" (arXiv 2602.20207), reconstructed from its abstract and from sources that quote
the formula. The full text was not available:

    score(l) = sum_i < grad_{theta_l} loss(Q_i + K_i),  grad_{theta_l} loss(Q_i + K'_i) >
    golden layer = argmax of score over the layers that pass a Tukey filter

with prompt `Q`, old answer `K`, new answer `K'`, and `theta_l` the MLP weights of layer `l` without biases.

No weight gradient is ever formed. For a linear map `y = x W^T` the gradient of a sequence is `sum_t delta_t x_t^T`, so

    < grad_W, grad'_W > = sum_{t,s} (delta_t . delta'_s) (x_t . x'_s)

needs only the inputs `x` and the output gradients `delta` of the two sequences ("ghost gradients"). The inputs of fused
experts cannot be recorded. Only there weight gradients are computed, for one layer and one pair at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
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
from goldenedit.config import EditConfig
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import greedy_answer
from goldenedit.lm.tokens import Row, encode, pad
from goldenedit.parallel import Processes, failing_together
from goldenedit.requests import EditRequest

Loss = Literal["sequence", "answer"]
Sides = Sequence[tuple[int, int]]  # of pairs of gradients: 0 with the old answer, 1 with the new


def lga_scores(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    loss: Loss = "sequence",
    batch_size: int = 4,
) -> Tensor:
    """Return the LGA score of each layer, `(num_layers,)` float64, NaN for layers without an MLP.

    It is the sum over facts of the dot products of `gradient_products`, which has the arguments and errors.
    """
    return gradient_products(lm, facts, loss, batch_size)[..., 0].sum(0)


@failing_together
@outside_inference_mode()
def gradient_products(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    loss: Loss = "sequence",
    batch_size: int = 4,
    with_norms: bool = False,
) -> Tensor:
    """Return for each fact and layer the dot product of the gradients `g` with the old answer and `g'` with the new.

    Under `accelerate launch` or torchrun the processes share the facts (see `goldenedit.parallel`).

    Args:
        facts: The proxy set. Without `target_true` the model's own greedy answer is the old answer.
        loss: Mean cross entropy over all tokens of the sequence, or over the answer's tokens.
        batch_size: Facts per forward and backward, two rows each. Larger batches need more memory and are hardly
            faster.
        with_norms: Whether to return the squares of both norms as well.

    Returns:
        `(facts, num_layers, 1)` float64, or 3 with the norms: `g . g'`, `||g||^2`, `||g'||^2`. NaN for layers without
        an MLP.

    Raises:
        ValueError: There are no facts, a fact cannot be tokenized, or a gradient is not finite.
    """
    if not facts:
        raise ValueError("LGA got no facts. Pass at least one.")
    processes = lm.processes
    pairs = _encode_pairs(lm, facts, processes)
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0].input_ids))
    sides = ((0, 1), (0, 0), (1, 1)) if with_norms else ((0, 1),)
    products = torch.full((len(facts), lm.architecture.num_layers, len(sides)), torch.nan, dtype=torch.float64)
    products[:, list(lm.architecture.mlp_linears)] = 0.0
    linears = {
        lm.model.get_submodule(path): layer
        for layer, paths in lm.architecture.mlp_linears.items()
        for path in ((lm.architecture.experts[layer].site,) if layer in lm.architecture.experts else paths)
    }
    starts = processes.share(range(0, len(pairs), batch_size))
    num_facts = sum(len(order[start : start + batch_size]) for start in starts)
    with evaluating(lm.model), tqdm(total=num_facts, desc="Layer gradients", unit="fact", leave=False) as progress:
        for start in starts:
            group = order[start : start + batch_size]
            rows = [row for index in group for row in pairs[index]]
            for layer, of_pairs in _gradient_products(lm, linears, rows, loss, sides):
                products[group, layer] += of_pairs
            progress.update(len(group))
    products = processes.total(products)
    if products.isinf().any() or products[:, list(lm.architecture.mlp_linears)].isnan().any():
        raise ValueError("A gradient of LGA is not finite. Load the model in float32 or bfloat16.")
    return products


@selector("lga", paper="arXiv 2602.20207", fence=True, depends_on=("lga_loss",), is_shared=True, version=2)
def lga(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> Tensor:
    """Return how well the gradients of old and new answer of each fact agree in each layer, `(facts, num_layers)`.

    See `lga_scores`.
    """
    return gradient_products(lm, facts, config.lga_loss)[..., 0]  # type: ignore[arg-type]


def _encode_pairs(lm: LanguageModel, facts: Sequence[EditRequest], processes: Processes) -> list[tuple[Row, Row]]:
    """Return the rows of each fact with its old and with its new answer."""
    longest = lm.max_length
    old_answers = processes.map(lambda fact: fact.target_true or fact.joined(greedy_answer(lm, fact.text)), facts)
    pairs = []
    for fact, old_answer in zip(facts, old_answers, strict=True):
        old = encode(lm.tokenizer, fact.text, old_answer, max_length=longest)
        new = encode(lm.tokenizer, fact.text, fact.target_new, max_length=longest)
        pairs.append((old, new))
    return pairs


def _gradient_products(
    lm: LanguageModel, linears: dict[nn.Module, int], rows: list[Row], loss: Loss, sides: Sides
) -> list[tuple[int, Tensor]]:
    """Return the layer of each linear map with the dot products of its gradients, `(pairs, len(sides))`.

    Rows `2i` and `2i + 1` are a pair.
    """
    batch = pad(rows, lm.padding_id, lm.device)
    mask = batch.attention_mask.bool()
    products: list[tuple[int, Tensor]] = []
    experts = {str(layer): module for module, layer in linears.items() if layer in lm.architecture.experts}

    def add_dot(module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        layer = linears[module]
        if layer in lm.architecture.experts:
            call = record.calls[str(layer)]
            experts_of_layer = lm.architecture.experts[layer]
            products.append((layer, _expert_products(experts_of_layer, lm.model, call, gradient, mask, sides)))
        else:
            products.append((layer, _ghost_products(inputs, gradient, mask, sides)))

    if loss == "answer":
        read_rows, read_positions = batch.read_rows, batch.read_positions
    else:
        read_rows, read_positions = mask[:, 1:].nonzero().T  # logits at t predict token t + 1
    targets = batch.input_ids[read_rows, read_positions + 1]
    with (
        recording(experts) as record,
        watching_gradients(lm.architecture.layer(lm.model, 0), linears, add_dot) as roots,
        reading_logits(lm.model, read_rows, read_positions) as logits_of,
    ):
        output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        token_loss = nn.functional.cross_entropy(
            logits_of(output).float(), targets.to(output.logits.device), reduction="none"
        )
        weights = 1.0 / torch.bincount(read_rows, minlength=len(rows))[read_rows].to(token_loss)
        torch.autograd.grad((token_loss * weights).sum(), roots, allow_unused=True)
    return products


def _ghost_products(inputs: Tensor, gradients: Tensor, mask: Tensor, sides: Sides) -> Tensor:
    """Return `sum over t, s of (delta_t . delta'_s)(x_t . x'_s)` of each pair, where rows `2i` and `2i + 1` are a pair.

    Args:
        sides: Which two rows of a pair each product is of.
    """
    count, length = mask.shape
    mask = mask.to(inputs.device)[..., None]
    x = inputs.view(count, length, -1).float() * mask
    delta = gradients.view(count, length, -1).float() * mask
    dots = [(delta[a::2] @ delta[b::2].mT) * (x[a::2] @ x[b::2].mT) for a, b in sides]
    return torch.stack([dot.double().sum((1, 2)) for dot in dots], 1).cpu()


def _expert_products(
    experts: FusedExperts, model: nn.Module, call: Call, gradient: Tensor, mask: Tensor, sides: Sides
) -> Tensor:
    """Return the dot products of the gradients of all fused parameters of a layer, of each pair."""
    output_gradients = gradient.reshape(-1, gradient.shape[-1])
    tokens = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    products = torch.zeros(len(mask) // 2, len(sides), dtype=torch.float64)
    for first in range(0, len(mask), 2):
        of_rows = [
            experts.gradients(model, call, of_row, output_gradients[of_row.to(output_gradients.device)])
            for of_row in (tokens[row][mask[row]] for row in (first, first + 1))
        ]
        # One expert at a time, because all gradients are as large as the weights.
        for of_expert in zip(*of_rows, strict=True):
            for column, (a, b) in enumerate(sides):
                products[first // 2, column] += sum(
                    (x.float() * y.float()).sum(dtype=torch.float64).item()
                    for x, y in zip(of_expert[a], of_expert[b], strict=True)
                )
    return products
