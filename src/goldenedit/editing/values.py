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
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import adding, evaluating, outside_inference_mode, recording
from goldenedit.architecture.replay import Batch, Capture, Replayer, capture, may_pack
from goldenedit.editing.budget import groups_by_length
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, pad, target_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValueOptions:
    """Constants of the optimization, see `EditConfig` and `Editor.vectors`."""

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    stop_loss: float
    vectors: tuple[str, ...] = ("mlp",)


@dataclass(frozen=True)
class SubjectRows:
    """The texts of one subject. All its facts share one value.

    Attributes:
        answers: By fact, its prompt with the new answer in each wording, with the weight of each; the bare prompt
            comes first.
        kept: Texts about the subject whose next-token distributions stay as they are, with the weight of each.
        name: What error messages call the subject.
    """

    answers: Sequence[Sequence[tuple[Row, float]]]
    kept: Sequence[tuple[Row, float]]
    name: str

    @property
    def rows(self) -> list[Row]:
        """All rows: those with answers, fact by fact, then the kept ones."""
        return [row for of_fact in (*self.answers, self.kept) for row, _ in of_fact]

    @property
    def length(self) -> int:
        """The most tokens that a replay runs of one of the rows."""
        return max(max(row.reads) + 1 - row.subject for row in self.rows)


@dataclass(frozen=True)
class Values:
    """Results of the optimization for N subjects at m layers.

    Attributes:
        delta: `(N, m, d_model)` float32, the vectors to add to the values.
        keys: By layer and subject `(rows with answers, d_in)` float32, the keys, in the order of `SubjectRows.answers`.
        steps: Optimizer steps of each subject.
        target_probability: By subject and fact, the probability of the target at its bare prompt before the edit
            (geometric mean over tokens).
        replay: How the model was run again: `packed`, `suffix`, `layers` or `whole`.
    """

    delta: Tensor
    keys: list[list[Tensor]]
    steps: list[int]
    target_probability: list[list[float]]
    replay: str


@outside_inference_mode()
def optimize_values(
    lm: LanguageModel,
    subjects: Sequence[SubjectRows],
    layers: Sequence[int],
    options: ValueOptions,
    batch_size: int = 8,
) -> Values:
    """Optimize the values of all subjects, up to `batch_size` of them in one batch. The subjects stay independent.

    Args:
        subjects: The texts of each subject.
        layers: The layers to edit, ascending. The deltas of several layers are optimized together.
        options: Constants. If `vectors` names attention, its outputs are optimized too, and only the values of the
            MLPs are returned (PMET).
        batch_size: Largest number of subjects of a batch.

    Raises:
        ValueError: A loss is not finite.
    """
    order = sorted(range(len(subjects)), key=lambda index: subjects[index].length)
    most_rows = max(len(subject.rows) for subject in subjects)

    def split(indices: list[int], padded: bool) -> list[list[int]]:
        sorted_lengths = [subjects[index].length for index in indices]
        slices = groups_by_length(sorted_lengths, most_rows, batch_size, lm.device, padded)
        return [indices[members] for members in slices]

    results: list[Values] = []
    with (
        evaluating(lm.model),
        torch.enable_grad(),  # the caller may have disabled gradients
        tqdm(total=len(subjects), desc="Values", unit="edit", disable=len(subjects) == 1, leave=False) as progress,
    ):
        padded = not may_pack(lm.model)
        groups = split(order, padded)
        while groups:
            members = groups.pop(0)
            results.append(_optimize(lm, _Group(lm, [subjects[index] for index in members]), layers, options))
            progress.update(len(members))
            if padded != (results[-1].replay != "packed"):  # the replay does not pack as expected: split the rest again
                padded = not padded
                groups = split([index for later in groups for index in later], padded)
    ranks = sorted(range(len(order)), key=order.__getitem__)  # back to the order of the subjects
    steps = [step for result in results for step in result.steps]
    probabilities = [values for result in results for values in result.target_probability]
    keys_by_layer = zip(*(result.keys for result in results), strict=True)
    return Values(
        delta=torch.cat([result.delta for result in results])[ranks],
        keys=[[[keys for group in of_layer for keys in group][rank] for rank in ranks] for of_layer in keys_by_layer],
        steps=[steps[index] for index in ranks],
        target_probability=[probabilities[index] for index in ranks],
        replay=results[0].replay,
    )


class _Group:
    """The rows of subjects that are optimized in one batch.

    Attributes:
        owners: `(R,)`, the subject of each row.
        answers: `(R,)`, the weight of each row in the mean over the answers of its subject; 0 for a kept row.
        kept: `(R,)`, the weight of each kept row; 0 for a row with an answer.
        bare: By subject, the row of each fact's bare prompt.
    """

    def __init__(self, lm: LanguageModel, subjects: Sequence[SubjectRows]) -> None:
        device = lm.device
        self.subjects = subjects
        rows = [subject.rows for subject in subjects]
        flat = [row for of_subject in rows for row in of_subject]
        self.batch = pad(flat, lm.padding_id, device)
        self.targets = target_ids(flat, device)
        self.owners = torch.tensor([index for index, of in enumerate(rows) for _ in of], device=device)
        answers: list[float] = []
        scales: list[float] = []
        kept: list[float] = []
        self.bare: list[list[int]] = []
        for subject in subjects:
            bare = []
            for of_fact in subject.answers:
                bare.append(len(answers))
                answers += [1 / (len(of_fact) * len(subject.answers))] * len(of_fact)
                scales += [scale for _, scale in of_fact]
                kept += [0.0] * len(of_fact)
            answers += [0.0] * len(subject.kept)
            scales += [0.0] * len(subject.kept)
            kept += [weight for _, weight in subject.kept]
            self.bare.append(bare)
        self.answers = torch.tensor(answers, device=device)
        self.scales = torch.tensor(scales, device=device)
        self.kept = torch.tensor(kept, device=device)

    def per_subject(self, rows: Tensor, of_rows: Tensor) -> Tensor:
        """Return the sums of values of some rows, by subject."""
        return of_rows.new_zeros(len(self.subjects)).index_add(0, self.owners[rows], of_rows)


def _optimize(lm: LanguageModel, group: _Group, layers: Sequence[int], options: ValueOptions) -> Values:
    """Optimize the values of one batch."""
    sites = [lm.architecture.down_projection(lm.model, layer) for layer in layers]
    if "attention" in options.vectors:
        sites += [lm.architecture.attention_output(lm.model, layer) for layer in layers]
    whole = capture(
        lm.model, lm.architecture, layers[0], group.batch, {str(index): site for index, site in enumerate(sites)}
    )
    replay = Replayer(lm.model, lm.architecture, layers[0])
    every = torch.arange(len(group.owners), device=group.owners.device)
    count, device = len(group.subjects), every.device

    values = torch.stack([_at_subject(group.batch, whole.record.outputs[str(index)]) for index in range(len(sites))], 1)
    v0_norm = torch.stack(
        [group.per_subject(every, group.answers * of_site) for of_site in values.norm(dim=-1).T], 1
    )  # (N, sites)
    original = whole.logits.float().log_softmax(-1)
    with torch.no_grad():
        bare_nll = _row_nll(whole, group.targets, original)[0]

    delta = values.new_zeros(count, *values.shape[1:]).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=options.lr)
    active = torch.ones(count, dtype=torch.bool, device=device)
    steps = [0] * count
    captured, targets, before, rows = whole, group.targets, original, every

    for step in range(options.steps):
        if len(rows) != int(active[group.owners].sum()):  # finished subjects are not run again
            rows = active[group.owners].nonzero()[:, 0]
            captured = whole.select(rows)
            is_read = group.batch.select(rows)[1]
            targets, before = group.targets[is_read], original[is_read]

        run = partial(_edited, replay, captured, sites, delta, group.owners[rows])
        # The first step adds zeros, so its logits must equal the captured ones.
        log_probs = (run() if step else replay.check(captured, run)).float().log_softmax(-1)
        mean_nll, weakest_nll = _row_nll(captured, targets, log_probs)
        changed = (log_probs.exp() * (log_probs - before)).sum(-1)
        loss = group.per_subject(rows, (group.answers * group.scales)[rows] * mean_nll)
        loss = loss + group.per_subject(rows, group.kept[rows] * _row_mean(captured, changed))
        loss = loss + options.weight_decay * (delta.norm(dim=-1) / v0_norm**2).sum(-1)
        if not loss[active].isfinite().all():
            index = int((active & ~loss.isfinite()).nonzero()[0])
            raise ValueError(
                f"The optimization for {group.subjects[index].name} is not finite at step {step}. Load the model in "
                "float32 or bfloat16, or lower EditConfig.lr."
            )
        weakest = group.per_subject(rows, group.answers[rows] * weakest_nll.detach())
        active &= weakest >= options.stop_loss
        if not active.any():
            break
        if os.environ.get("TRACE"):
            rowsmax = [round(float((weakest_nll.detach() * (group.answers[rows] > 0))[group.owners[rows] == i].max()), 2) for i in range(count)]
            keep = group.per_subject(rows, group.kept[rows] * _row_mean(captured, changed))
            print(step, "weak", [round(x, 2) for x in weakest.tolist()], "max", rowsmax, "keep", [round(x, 3) for x in keep.tolist()], "norm/v0", [round(x, 2) for x in (delta.norm(dim=-1) / v0_norm)[:, 0].tolist()], flush=True)
        (gradient,) = torch.autograd.grad(loss[active].sum(), delta)
        if os.environ.get("OPT", "").startswith("ngd"):
            eta, mom = map(float, os.environ["OPT"][4:].split(","))
            with torch.no_grad():
                unit = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                velocity = mom * (velocity if step else 0) + unit
                decay_ = max(0.15, 1 - step / options.steps)
                delta -= eta * decay_ * v0_norm[..., None] * velocity * active[:, None, None]
                norm = delta.norm(dim=-1)
                delta *= (options.clamp * v0_norm / norm.clamp_min(1e-12)).clamp(max=1.0)[..., None]
            for index in active.nonzero()[:, 0].tolist():
                steps[index] += 1
            continue
        previous = delta.detach().clone()
        delta.grad = gradient
        optimizer.step()
        with torch.no_grad():
            norm = delta.norm(dim=-1)
            delta *= (options.clamp * v0_norm / norm.clamp_min(1e-12)).clamp(max=1.0)[..., None]
            delta[~active] = previous[~active]  # Adam's momentum would still change finished subjects
        for index in active.nonzero()[:, 0].tolist():
            steps[index] += 1
    delta = delta.detach()[:, : len(layers)]  # vectors of attention are not stored
    keys = _keys(replay, whole, layers, sites[: len(layers)], delta, group)
    answers = [
        ((group.owners == index) & (group.answers > 0)).nonzero()[:, 0] for index in range(count)
    ]
    return Values(
        delta=delta.float().cpu(),
        keys=[[of_layer[members].float().cpu() for members in answers] for of_layer in keys],
        steps=steps,
        target_probability=[(-bare_nll[bare]).exp().tolist() for bare in group.bare],
        replay=replay.way,
    )


def _row_mean(captured: Capture, of_reads: Tensor) -> Tensor:
    """Return the mean of values over the positions read of each row."""
    rows, count = captured.batch.read_rows, len(captured.batch.input_ids)
    lengths = of_reads.new_zeros(count).index_add(0, rows, torch.ones_like(of_reads))
    return of_reads.new_zeros(count).index_add(0, rows, of_reads) / lengths


def _row_nll(captured: Capture, targets: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the NLL of each row's answer: the mean over its tokens, and that of its least likely token."""
    nll = -log_probs.gather(1, targets[:, None])[:, 0]
    rows, count = captured.batch.read_rows, len(captured.batch.input_ids)
    return _row_mean(captured, nll), nll.new_zeros(count).scatter_reduce(0, rows, nll, "amax", include_self=False)


def _at_subject(batch: Batch, tensor: Tensor) -> Tensor:
    """Return a recorded tensor, `(B, T, d)` or `(B * T, d)`, at the subject's last token, `(B, d)` float32.

    The result is on the device of the batch, because layers may be on several devices.
    """
    rows = torch.arange(len(batch.subject), device=tensor.device)
    at_subject = tensor.view(len(rows), -1, tensor.shape[-1])[rows, batch.subject.to(tensor.device)]
    return at_subject.float().to(batch.subject.device)


def _edited(replay: Replayer, captured: Capture, sites: Sequence[nn.Module], delta: Tensor, owners: Tensor) -> Tensor:
    """Return the logits of captured rows with deltas added to the outputs of the sites at all mentions.

    Args:
        delta: `(N, sites, d_model)`.
        owners: The subject of each row.
    """
    rows, tokens = replay.mentions(captured.batch)
    additions = {site: (tokens, delta[owners[rows], index]) for index, site in enumerate(sites)}
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
            _edited(replay, whole, sites, delta, group.owners)
        tokens = replay.subjects(whole.batch)
    keys = []
    for index, layer in enumerate(layers):
        of_layer = replay.architecture.keys(replay.model, layer, record.calls[str(index)], tokens)
        keys.append(of_layer.to(tokens.device))  # layers may be on several devices
    return keys
