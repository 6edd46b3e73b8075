"""The value optimization that ROME, R-ROME, MEMIT, EMMET, PMET and AlphaEdit share, for many facts side by side.

Meng et al. 2022 (arXiv 2202.05262), equation 4: find the vector `delta` that, added to the value at the last token of
the subject, makes the model answer the new target and leaves what it says the subject *is* as it was:

    loss = mean over contexts NLL(target | context + prompt)
         + kl_factor * KL(p_edited("{subject} is a") || p_original)
         + weight_decay * ||delta|| / ||v0||^2

`||v0||` is the mean over contexts: at the very start of a sequence a subject's value is often unlike itself. A fact is
finished once the first term is small: the others do not vanish, and would keep a finished fact moving.

PMET (Li et al. 2024, arXiv 2308.08742) optimizes a vector on the attention's output beside it, and drops
that one: what the attention can say of the fact need not go into the MLP.
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
    """Constants of the optimization; see `EditConfig` for what each does, and `Editor.vectors`."""

    steps: int
    lr: float
    kl_factor: float
    weight_decay: float
    clamp: float
    stop_loss: float
    vectors: tuple[str, ...] = ("mlp",)


@dataclass(frozen=True)
class Values:
    """What the optimization found for N facts at m layers.

    Attributes:
        delta: `(N, m, d_model)` float32, to be added to the values.
        keys: By layer `(N, contexts, d_in)` float32, keys in each context, that of the bare prompt first.
        steps: Optimizer steps of each fact.
        target_probability: Probability of each target at its bare prompt before the edit (geometric mean over tokens).
        replay: The way the model was run again: `packed`, `suffix`, `layers` or `whole`.
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
    """Optimize the values of all requests, up to `batch_size` side by side; each is independent of the others.

    Args:
        layers: The layers that are edited, ascending. With several, their deltas are optimized together.
        contexts: Prefixes to each prompt, the first of them empty.
        options: Constants; with vectors of attention its outputs are optimized as well, and the values of the MLPs
            alone are returned (PMET).

    Raises:
        ValueError: A request cannot be tokenized as it must be, or its optimization leaves the finite numbers.
    """
    # Everything is tokenized before anything runs: a bad request costs nothing.
    rows = fact_rows(lm.tokenizer, requests, contexts, lm.max_length)
    lengths = [max(max(row.reads) + 1 - row.subject for row in own) for own in rows]
    order = sorted(range(len(requests)), key=lengths.__getitem__)

    def split(facts: list[int], padded: bool) -> list[list[int]]:
        of_length = [lengths[index] for index in facts]
        slices = groups_by_length(of_length, len(contexts) + 1, batch_size, lm.device, padded)
        return [facts[some] for some in slices]

    results: list[Values] = []
    with (
        evaluating(lm.model),
        torch.enable_grad(),  # the caller may have switched it off
        tqdm(total=len(requests), desc="Values", unit="edit", disable=len(requests) == 1, leave=False) as progress,
    ):
        padded = not may_pack(lm.model)
        groups = split(order, padded)
        while groups:
            some = groups.pop(0)
            group = _Group(lm, [requests[index] for index in some], [rows[index] for index in some])
            results.append(_optimize(lm, group, layers, options))
            progress.update(len(some))
            if padded != (results[-1].replay != "packed"):  # not what was thought
                padded = not padded
                groups = split([index for later in groups for index in later], padded)
    steps = [step for result in results for step in result.steps]
    probabilities = [value for result in results for value in result.target_probability]
    back = sorted(range(len(order)), key=order.__getitem__)
    return Values(
        torch.cat([result.delta for result in results])[back],
        [torch.cat(parts)[back] for parts in zip(*(result.keys for result in results), strict=True)],
        steps=[steps[index] for index in back],
        target_probability=[probabilities[index] for index in back],
        replay=results[0].replay,
    )


def fact_rows(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    max_length: int | None,
) -> list[list[Row]]:
    """Return the rows of each request: one a context, then the row `"{subject} is a"`."""
    return [
        [
            *(encode_request(tokenizer, request, request.target_new, prefix, max_length) for prefix in contexts),
            encode(tokenizer, f"{request.subject} is a", None, len(request.subject), max_length),
        ]
        for request in requests
    ]


class _Group:
    """The rows of requests that are optimized side by side, as `fact_rows` has them."""

    def __init__(
        self,
        lm: LanguageModel,
        requests: Sequence[EditRequest],
        rows: Sequence[Sequence[Row]],
    ) -> None:
        self.requests = requests
        self.rows_each = len(rows[0])
        device = lm.device
        every = [row for own in rows for row in own]
        self.batch = pad(every, lm.padding_id, device)
        self.targets = target_ids(every, device)

    def rows_of(self, members: Tensor) -> Tensor:
        """Return the rows of the requests `members`."""
        each = torch.arange(self.rows_each, device=members.device)
        return (members[:, None] * self.rows_each + each).reshape(-1)

    def nll(self, batch: Batch, targets: Tensor, log_probs: Tensor) -> Tensor:
        """Return the NLL of the target in each row of context, mean over its tokens, `(requests, contexts)`."""
        token_nll = -log_probs.gather(1, targets[:, None])[:, 0]
        count = len(batch.input_ids)
        sums = token_nll.new_zeros(count).index_add(0, batch.read_rows, token_nll)
        lengths = token_nll.new_zeros(count).index_add(0, batch.read_rows, torch.ones_like(token_nll))
        return (sums / lengths).view(-1, self.rows_each)[:, :-1]

    def is_essence(self, batch: Batch) -> Tensor:
        """Return which of the logits read belong to the rows `"{subject} is a"`."""
        return batch.read_rows % self.rows_each == self.rows_each - 1


def _optimize(
    lm: LanguageModel,
    group: _Group,
    layers: Sequence[int],
    options: ValueOptions,
) -> Values:
    sites = [lm.architecture.down_projection(lm.model, layer) for layer in layers]
    if "attention" in options.vectors:
        sites += [lm.architecture.attention_output(lm.model, layer) for layer in layers]
    whole = capture(
        lm.model, lm.architecture, layers[0], group.batch, {str(index): site for index, site in enumerate(sites)}
    )
    replay = Replayer(lm.model, lm.architecture, layers[0])

    count, each = len(group.requests), group.rows_each
    values = torch.stack([_at_subject(group.batch, whole.record.outputs[str(index)]) for index in range(len(sites))], 1)
    v0_norm = values.view(count, each, len(sites), -1)[:, :-1].norm(dim=-1).mean(1)  # (N, sites)
    log_probs = whole.logits.float().log_softmax(-1)
    with torch.no_grad():
        bare_nll = group.nll(group.batch, group.targets, log_probs)[:, 0]
    essence = log_probs[group.is_essence(group.batch)]  # (N, V): what the model says each subject is

    delta = torch.zeros_like(values[::each]).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=options.lr)
    active = torch.ones(count, dtype=torch.bool, device=delta.device)
    steps = [0] * count
    captured, targets, members = whole, group.targets, active.nonzero()[:, 0]

    for step in range(options.steps):
        if len(members) != int(active.sum()):  # finished facts cost nothing more
            members = active.nonzero()[:, 0]
            rows = group.rows_of(members)
            captured = whole.select(rows)
            targets = group.targets[group.batch.select(rows)[1]]

        run = partial(_edited, replay, captured, sites, delta[members], each)
        # The first step adds nothing yet, so it must say what was captured.
        log_probs = (run() if step else replay.check(captured, run)).float().log_softmax(-1)
        nll = group.nll(captured.batch, targets, log_probs).mean(1)
        now = log_probs[group.is_essence(captured.batch)]
        kl = (now.exp() * (now - essence[members])).sum(-1)
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
            delta[~active] = before[~active]  # Adam's momentum would move a finished fact on
        for index in active.nonzero()[:, 0].tolist():
            steps[index] += 1
    delta = delta.detach()[:, : len(layers)]  # what the attention says is not stored
    keys = _keys(replay, whole, layers, sites[: len(layers)], delta, group)
    return Values(
        delta.float().cpu(),
        [of_layer.view(count, each, -1)[:, :-1].float().cpu() for of_layer in keys],
        steps,
        (-bare_nll).exp().tolist(),
        replay.way,
    )


def _at_subject(batch: Batch, tensor: Tensor) -> Tensor:
    """Return a recorded tensor, `(B, T, d)` or `(B * T, d)`, at the subject's last token, `(B, d)` float32.

    It is where the tokens are: layers may be on several devices.
    """
    rows = torch.arange(len(batch.subject), device=tensor.device)
    found = tensor.view(len(rows), -1, tensor.shape[-1])[rows, batch.subject.to(tensor.device)]
    return found.float().to(batch.subject.device)


def _edited(replay: Replayer, captured: Capture, sites: Sequence[nn.Module], delta: Tensor, rows_each: int) -> Tensor:
    """Return the logits with `delta` `(n, sites, d_model)` added to what the sites say of the captured rows."""
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
    """Return the keys of every row, by layer `(B, d_in)`, with the deltas in place: earlier ones move later keys."""
    record, tokens = whole.record, group.batch.flat_subject
    if len(sites) > 1:
        with recording({str(index): site for index, site in enumerate(sites)}) as record:
            _edited(replay, whole, sites, delta, group.rows_each)
        tokens = replay.subjects(whole.batch)
    keys = []
    for index, layer in enumerate(layers):
        found = replay.architecture.keys(replay.model, layer, record.calls[str(index)], tokens)
        keys.append(found.to(tokens.device))  # layers may be on several devices
    return keys
