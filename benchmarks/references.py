"""Slow reference implementations that compute like the code of the papers, with the same results as the library.

They edit one fact at a time. Every step runs the whole model over all tokens, with logits of the full vocabulary at
every position. Edits are written into the weights, and copies of the weights undo them. Constants and tokens are those
of the library, so that a comparison only shows the difference in computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit import EditConfig, EditRequest
from goldenedit.lm.tokens import encode, encode_request, pad, padding_id


def r_rome(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    down_projection: str,
    request: EditRequest,
    contexts: Sequence[str],
    inverse: Tensor,
    config: EditConfig,
) -> tuple[Tensor, int]:
    """Return R-ROME's change of weights as published, `(d_out, d_in)`, and the number of steps for its value.

    Args:
        down_projection: Path of the edited linear map.
        contexts: Prefixes to the prompt, the first of them empty.
        inverse: `(d_in, d_in)`, inverse of the second moment of keys, with its ridge.
        config: Its `steps`, `lr`, `kl_factor`, `weight_decay`, `clamp` and `stop_loss` are used.
    """
    module = model.get_submodule(down_projection)
    rows = [encode_request(tokenizer, request, request.target_new, prefix) for prefix in contexts]
    rows.append(encode(tokenizer, f"{request.subject} is a", subject_end=len(request.subject)))
    batch = pad(rows, padding_id(tokenizer), torch.device("cpu"))
    everyone = torch.arange(len(rows))
    # Next token to be predicted at each position of the answer, -100 at all others.
    targets = torch.full_like(batch.input_ids, -100)
    for index, row in enumerate(rows[:-1]):
        positions = torch.tensor(row.target)
        targets[index, positions - 1] = batch.input_ids[index, positions]
    mask = targets != -100

    seen: dict[str, Tensor] = {}
    delta: Tensor | None = None

    def hook(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["key"], seen["value"] = args[0].detach(), output.detach()
        if delta is None:
            return output
        changed = output.clone()
        changed[everyone, batch.subject] += delta
        return changed

    def log_probs() -> Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.log_softmax(-1)

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            essence = log_probs()[-1, rows[-1].last]
        value_norm = seen["value"][everyone, batch.subject][:-1].norm(dim=-1).mean()
        delta = torch.zeros(seen["value"].shape[-1], requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=config.lr)
        taken = 0
        for _ in range(config.steps):
            optimizer.zero_grad()
            found = log_probs()
            picked = found.gather(2, targets.clamp(min=0)[..., None])[..., 0]
            nll = (-(picked * mask).sum(1) / mask.sum(1).clamp(min=1))[:-1].mean()
            now = found[-1, rows[-1].last]
            kl = (now.exp() * (now - essence)).sum()
            decay = delta.norm() / value_norm**2
            loss = nll + config.kl_factor * kl + config.weight_decay * decay
            if nll < config.stop_loss:
                break
            loss.backward()
            optimizer.step()
            taken += 1
            with torch.no_grad():
                norm = delta.norm()
                if norm > config.clamp * value_norm:
                    delta *= config.clamp * value_norm / norm
        change, delta = delta.detach(), None
        with torch.no_grad():  # the keys, by a forward of their own
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        key = seen["key"][everyone, batch.subject][:-1].mean(0).double()
    finally:
        handle.remove()
    direction = inverse @ key
    return torch.outer(change.double(), direction / (direction @ key)).float(), taken


def weight_gradient_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    mlp_linears: dict[int, tuple[str, ...]],
    num_layers: int,
    facts: Sequence[EditRequest],
    loss: str = "sequence",
) -> Tensor:
    """Return LGA's scores by its formula: two weight gradients per fact, and one dot product per matrix."""
    weights = {layer: [model.get_submodule(path).weight for path in paths] for layer, paths in mlp_linears.items()}
    flat = [weight.requires_grad_() for found in weights.values() for weight in found]
    scores = torch.zeros(num_layers, dtype=torch.float64)
    for fact in facts:
        gradients = []
        for answer in (fact.target_true, fact.target_new):
            row = encode(tokenizer, fact.text, answer)
            ids = torch.tensor([row.input_ids])
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            positions = torch.arange(1, ids.shape[1]) if loss == "sequence" else torch.tensor(row.target)
            mean = -log_probs[positions - 1, ids[0, positions]].mean()
            gradients.append(dict(zip(map(id, flat), torch.autograd.grad(mean, flat), strict=True)))
        for layer, found in weights.items():
            scores[layer] += sum((gradients[0][id(w)] * gradients[1][id(w)]).double().sum() for w in found)
    model.requires_grad_(False)
    return scores
