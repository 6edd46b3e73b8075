"""The value optimization that ROME, R-ROME, MEMIT, EMMET, PMET and AlphaEdit share, for many facts in one batch.

Meng et al. 2022 (arXiv 2202.05262), equation 4: find a vector `delta` to add to the value at the last token of the
subject. With it the model gives the new answer, and what it says the subject *is* stays the same:

    loss = mean over contexts NLL(target | context + prompt)
         + kl_factor * KL(p_edited("{subject} is a") || p_original)
         + weight_decay * ||delta|| / ||v0||^2

`||v0||` is the mean over contexts, because a subject's value at the very start of a sequence is often unusual. A fact
is finished once the first term is small: the other terms do not vanish, and would keep changing a finished fact.

PMET (Li et al. 2024, arXiv 2308.08742) also optimizes a vector on the output of attention, and does not store it: what
attention contributes to the answer need not go into the MLP.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import adding, evaluating, outside_inference_mode, recording
from goldenedit.architecture.replay import Batch, Capture, Replayer, capture, may_pack
from goldenedit.editing.budget import groups_by_length
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, encode, encode_request, pad, target_ids
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValueOptions:
    """Constants of the optimization, see `EditConfig` and `Editor.vectors`."""

    steps: int
    lr: float
    kl_factor: float
    weight_decay: float
    clamp: float
    stop_loss: float
    vectors: tuple[str, ...] = ("mlp",)


@dataclass(frozen=True)
class Values:
    """Results of the optimization for N facts at m layers.

    Attributes:
        delta: `(N, m, d_model)` float32, the vectors to add to the values.
        keys: By layer `(N, contexts, d_in)` float32, keys in each context, with the bare prompt's key first.
        steps: Optimizer steps of each fact.
        target_probability: Probability of each target at its bare prompt before the edit (geometric mean over tokens).
        replay: How the model was run again: `packed`, `suffix`, `layers` or `whole`.
    """

    delta: Tensor
    keys: list[Tensor]
    steps: list[int]
    target_probability: list[float]
    replay: str


@outside_inference_mode()
def optimize_values(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    contexts: Sequence[str],
    options: ValueOptions,
    batch_size: int = 8,
) -> Values:
    """Optimize the values of all requests, up to `batch_size` of them in one batch. The requests stay independent.

    Args:
        layers: The layers to edit, ascending. The deltas of several layers are optimized together.
        contexts: Prefixes of each prompt, the first of them empty.
        options: Constants. If `vectors` names attention, its outputs are optimized too, and only the values of the
            MLPs are returned (PMET).
        batch_size: Largest number of requests of a batch.

    Raises:
        ValueError: A request cannot be tokenized, or its loss is not finite.
    """
    # All requests are tokenized before the model runs, so that a bad request costs no time.
    rows = fact_rows(lm.tokenizer, requests, contexts, lm.max_length)
    lengths = [max(max(row.reads) + 1 - row.subject for row in of_request) for of_request in rows]
    order = sorted(range(len(requests)), key=lengths.__getitem__)

    def split(indices: list[int], padded: bool) -> list[list[int]]:
        sorted_lengths = [lengths[index] for index in indices]
        slices = groups_by_length(sorted_lengths, len(contexts) + 1, batch_size, lm.device, padded)
        return [indices[members] for members in slices]

    results: list[Values] = []
    with (
        evaluating(lm.model),
        torch.enable_grad(),  # the caller may have disabled gradients
        tqdm(total=len(requests), desc="Values", unit="edit", disable=len(requests) == 1, leave=False) as progress,
    ):
        padded = not may_pack(lm.model)
        groups = split(order, padded)
        while groups:
            members = groups.pop(0)
            group = _Group(lm, [requests[index] for index in members], [rows[index] for index in members])
            results.append(_optimize(lm, group, layers, options))
            progress.update(len(members))
            if padded != (results[-1].replay != "packed"):  # the replay does not pack as expected: split the rest again
                padded = not padded
                groups = split([index for later in groups for index in later], padded)
    steps = [step for result in results for step in result.steps]
    probabilities = [value for result in results for value in result.target_probability]
    ranks = sorted(range(len(order)), key=order.__getitem__)  # back to the order of the requests
    keys_by_layer = zip(*(result.keys for result in results), strict=True)
    return Values(
        delta=torch.cat([result.delta for result in results])[ranks],
        keys=[torch.cat(of_layer)[ranks] for of_layer in keys_by_layer],
        steps=[steps[index] for index in ranks],
        target_probability=[probabilities[index] for index in ranks],
        replay=results[0].replay,
    )


def fact_rows(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    max_length: int | None,
) -> list[list[Row]]:
    """Return the rows of each request: one per context, then the row `"{subject} is a"`."""
    return [
        [
            *(encode_request(tokenizer, request, request.target_new, prefix, max_length) for prefix in contexts),
            encode(tokenizer, f"{request.subject} is a", None, len(request.subject), max_length),
        ]
        for request in requests
    ]


class _Group:
    """The rows of requests that are optimized in one batch, from `fact_rows`."""

    def __init__(
        self,
        lm: LanguageModel,
        requests: Sequence[EditRequest],
        rows: Sequence[Sequence[Row]],
    ) -> None:
        self.requests = requests
        self.rows_each = len(rows[0])
        device = lm.device
        flat_rows = [row for of_request in rows for row in of_request]
        self.batch = pad(flat_rows, lm.padding_id, device)
        self.targets = target_ids(flat_rows, device)

    def rows_of(self, members: Tensor) -> Tensor:
        """Return the indices of the rows of the requests `members`."""
        offsets = torch.arange(self.rows_each, device=members.device)
        return (members[:, None] * self.rows_each + offsets).reshape(-1)

    def nll(self, batch: Batch, targets: Tensor, log_probs: Tensor) -> Tensor:
        """Return the mean NLL of the target's tokens in each context, `(requests, contexts)`."""
        token_nll = -log_probs.gather(1, targets[:, None])[:, 0]
        count = len(batch.input_ids)
        sums = token_nll.new_zeros(count).index_add(0, batch.read_rows, token_nll)
        lengths = token_nll.new_zeros(count).index_add(0, batch.read_rows, torch.ones_like(token_nll))
        return (sums / lengths).view(-1, self.rows_each)[:, :-1]

    def is_essence(self, batch: Batch) -> Tensor:
        """Return which of the logits belong to the rows `"{subject} is a"`."""
        return batch.read_rows % self.rows_each == self.rows_each - 1


def _optimize(
    lm: LanguageModel,
    group: _Group,
    layers: Sequence[int],
    options: ValueOptions,
) -> Values:
    """Optimize the values of one batch."""
    sites = [lm.architecture.down_projection(lm.model, layer) for layer in layers]
    if "attention" in options.vectors:
        sites += [lm.architecture.attention_output(lm.model, layer) for layer in layers]
    whole = capture(
        lm.model, lm.architecture, layers[0], group.batch, {str(index): site for index, site in enumerate(sites)}
    )
    replay = Replayer(lm.model, lm.architecture, layers[0])

    count, rows_each = len(group.requests), group.rows_each
    values = torch.stack([_at_subject(group.batch, whole.record.outputs[str(index)]) for index in range(len(sites))], 1)
    v0_norm = values.view(count, rows_each, len(sites), -1)[:, :-1].norm(dim=-1).mean(1)  # (N, sites)
    log_probs = whole.logits.float().log_softmax(-1)
    with torch.no_grad():
        bare_nll = group.nll(group.batch, group.targets, log_probs)[:, 0]
    essence = log_probs[group.is_essence(group.batch)]  # (N, V), after "{subject} is a"

    delta = torch.zeros_like(values[::rows_each]).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=options.lr)
    active = torch.ones(count, dtype=torch.bool, device=delta.device)
    steps = [0] * count
    captured, targets, members = whole, group.targets, active.nonzero()[:, 0]

    for step in range(options.steps):
        if len(members) != int(active.sum()):  # finished facts are not run again
            members = active.nonzero()[:, 0]
            rows = group.rows_of(members)
            captured = whole.select(rows)
            targets = group.targets[group.batch.select(rows)[1]]

        run = partial(_edited, replay, captured, sites, delta[members], rows_each)
        # The first step adds zeros, so its logits must equal the captured ones.
        log_probs = (run() if step else replay.check(captured, run)).float().log_softmax(-1)
        nll = group.nll(captured.batch, targets, log_probs).mean(1)
        edited = log_probs[group.is_essence(captured.batch)]
        kl = (edited.exp() * (edited - essence[members])).sum(-1)
        decay = (delta[members].norm(dim=-1) / v0_norm[members] ** 2).sum(-1)
        loss = nll + options.kl_factor * kl + options.weight_decay * decay
        if not loss.isfinite().all():
            index = int(members[~loss.isfinite()][0])
            raise ValueError(
                f"The optimization for {group.requests[index].subject!r} -> {group.requests[index].target_new!r} is "
                f"not finite at step {step}. Load the model in float32 or bfloat16, or lower EditConfig.lr."
            )
        done = members[nll.detach() < options.stop_loss]
        active[done] = False
        if not active.any():
            break
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        before = delta.detach().clone()
        delta.grad = gradient
        optimizer.step()
        with torch.no_grad():
            norm = delta.norm(dim=-1)
            delta *= (options.clamp * v0_norm / norm.clamp_min(1e-12)).clamp(max=1.0)[..., None]
            delta[~active] = before[~active]  # Adam's momentum would still change finished facts
        for index in active.nonzero()[:, 0].tolist():
            steps[index] += 1
    delta = delta.detach()[:, : len(layers)]  # vectors of attention are not stored
    keys = _keys(replay, whole, layers, sites[: len(layers)], delta, group)
    return Values(
        delta=delta.float().cpu(),
        keys=[of_layer.view(count, rows_each, -1)[:, :-1].float().cpu() for of_layer in keys],
        steps=steps,
        target_probability=(-bare_nll).exp().tolist(),
        replay=replay.way,
    )


def _at_subject(batch: Batch, tensor: Tensor) -> Tensor:
    """Return a recorded tensor, `(B, T, d)` or `(B * T, d)`, at the subject's last token, `(B, d)` float32.

    The result is on the device of the batch, because layers may be on several devices.
    """
    rows = torch.arange(len(batch.subject), device=tensor.device)
    at_subject = tensor.view(len(rows), -1, tensor.shape[-1])[rows, batch.subject.to(tensor.device)]
    return at_subject.float().to(batch.subject.device)


def _edited(replay: Replayer, captured: Capture, sites: Sequence[nn.Module], delta: Tensor, rows_each: int) -> Tensor:
    """Return the logits of captured rows with `delta`, `(n, sites, d_model)`, added to the outputs of the sites."""
    tokens = replay.subjects(captured.batch)
    additions = {site: (tokens, delta[:, index].repeat_interleave(rows_each, 0)) for index, site in enumerate(sites)}
    with adding(additions):
        return replay(captured)


@torch.no_grad()
def _keys(
    replay: Replayer,
    whole: Capture,
    layers: Sequence[int],
    sites: Sequence[nn.Module],
    delta: Tensor,
    group: _Group,
) -> list[Tensor]:
    """Return the keys of all rows, by layer `(B, d_in)`, with the deltas added: those of a layer change later keys."""
    record, tokens = whole.record, group.batch.flat_subject
    if len(sites) > 1:
        with recording({str(index): site for index, site in enumerate(sites)}) as record:
            _edited(replay, whole, sites, delta, group.rows_each)
        tokens = replay.subjects(whole.batch)
    keys = []
    for index, layer in enumerate(layers):
        of_layer = replay.architecture.keys(replay.model, layer, record.calls[str(index)], tokens)
        keys.append(of_layer.to(tokens.device))  # layers may be on several devices
    return keys
