"""The value optimization that all editors share which insert values: many subjects in one batch.

Meng et al. 2022 (arXiv 2202.05262), equation 4: find a vector `delta` to add to the value at the last token of the
subject. With it the model gives the new answers, and what it says about the rest of the subject stays the same:

    loss = mean over facts and wordings NLL(answer | wording)
         + sum over kept texts weight * KL(p_edited || p_original)
         + weight_decay * ||delta|| / ||v0||^2

The paper has one fact per subject and one kept text, `"{subject} is a"`. All facts about one subject have the same key,
so they share one `delta` here. `||v0||` is the mean over wordings, because a subject's value at the very start of a
sequence is often unusual.

The mean over wordings hides a wording in which the fact does not hold, and a mean over tokens a name that is broken in
its middle. So the wordings weigh as the softmax of their losses, except with the published optimizer, and a subject is
finished once the least likely token of the new answer is likely in every wording; the other terms do not vanish. It
goes on for a few more steps, and of the values that give the new answers the one that changes the kept texts least is
taken. The decay is then a multiple of `||delta|| / ||v0||`, so that it means the same for every model.

The finished edit does not add `delta` at one token. It adds `delta` times `d . k` at every token, where `d` is the
detector that the editor inserts it with and `k` the key there: 1 on average at the subject, not 0 elsewhere. With
`detectors` the values are optimized under just this change. Then a fact holds as well after the insertion as before it,
and what falls out behind other mentions of the subject counts too.

PMET (Li et al. 2024, arXiv 2308.08742) also optimizes a vector on the output of attention, and does not store it: what
attention contributes to the answer need not go into the MLP.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import adding, adding_products, evaluating, outside_inference_mode, recording
from goldenedit.architecture.replay import Batch, Capture, Replayer, capture, may_pack
from goldenedit.devices import return_free_memory
from goldenedit.editing.budget import groups_by_length
from goldenedit.editors.regularizers import norm_preserving
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, pad, target_ids

logger = logging.getLogger(__name__)

_MOST_TIMES = 4  # a subject with several facts takes so many times the steps of one fact
_HARDEST = 20.0  # nats: no wording weighs more for being further off than this
_DECAY_UNIT = 0.04  # of the decay, instead of 1 / ||v0||, which is 0.03 on SmolLM2 and 8 on a tiny model
_EVERY = 4  # steps, of which one runs all rows; the others leave out wordings that are easy, and half of what is kept
_EASY = 0.5  # of the stop loss: the weakest token of an easy wording
_POLISH = 12  # further steps of a finished subject
_MOMENTUM = 0.7
_SHORTEST = 0.15  # of the first step's length


class NotFiniteError(ValueError):
    """The loss of an optimization is not a number."""


@dataclass(frozen=True)
class ValueOptions:
    """Constants of the optimization, see `EditConfig` and `Editor.vectors`."""

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    stop_loss: float
    vectors: tuple[str, ...] = ("mlp",)
    optimizer: str = "adam"
    keeps_norm: bool = False


@dataclass(frozen=True)
class AnswerRow:
    """A prompt with the answer that the edited model should give.

    Attributes:
        row: Its tokens.
        core: Places of the new answer itself among the target's tokens. It weighs as much as all other tokens of the
            answer, which the model says anyway.
        strength: The part of the value that is to give the answer.
    """

    row: Row
    core: range
    strength: float = 1.0

    @property
    def weights(self) -> list[float]:
        """Weight of each token of the answer in the loss of the row."""
        rest = len(self.row.target) - len(self.core)
        return [1 / (len(self.core) if place in self.core else rest) for place in range(len(self.row.target))]


@dataclass(frozen=True)
class KeptRow:
    """A text about the subject whose next-token distributions, at the positions it reads, stay as they are.

    Attributes:
        row: Its tokens.
        weight: Weight of the mean KL divergence over its positions.
    """

    row: Row
    weight: float


@dataclass(frozen=True)
class SubjectRows:
    """The texts of one subject. All its facts share one value.

    Attributes:
        answers: By fact, its prompt with the new answer in each wording; the bare prompt comes first.
        kept: What must stay the same.
        name: What error messages call the subject and its new answers.
    """

    answers: Sequence[Sequence[AnswerRow]]
    kept: Sequence[KeptRow]
    name: str

    @property
    def rows(self) -> list[Row]:
        """All rows: those with answers, fact by fact, then the kept ones."""
        answers = [answer.row for of_fact in self.answers for answer in of_fact]
        return answers + [kept.row for kept in self.kept]

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
    detectors: Sequence[Tensor] | None = None,
    flatness: Tensor | None = None,
) -> Values:
    """Optimize the values of all subjects, up to `batch_size` of them in one batch. The subjects stay independent.

    Processes that each hold the model share the batches (see `goldenedit.parallel`).

    Args:
        subjects: The texts of each subject.
        layers: The layers to edit, ascending. The deltas of several layers are optimized together.
        options: Constants. If `vectors` names attention, its outputs are optimized too, and only the values of the
            MLPs are returned (PMET).
        batch_size: Largest number of subjects of a batch.
        detectors: By layer `(N, d_in)`. The delta of a subject is then not added at its last token but as the finished
            edit adds it: at each token, from there on, times the product of its detector and the key.
        flatness: `(sites, d_model, d_model)`, see `_descent`.

    Raises:
        ValueError: A loss is not finite.
    """
    order = sorted(range(len(subjects)), key=lambda index: subjects[index].length)
    most_rows = max(len(subject.rows) for subject in subjects)

    def split(indices: list[int], padded: bool) -> list[list[int]]:
        sorted_lengths = [subjects[index].length for index in indices]
        slices = groups_by_length(sorted_lengths, most_rows, batch_size, lm.device, padded)
        return [indices[members] for members in slices]

    def of_group(members: list[int]) -> Values:
        found = None if detectors is None else [of_layer[members] for of_layer in detectors]
        values = _optimize(lm, _Group(lm, [subjects[index] for index in members]), layers, options, found, flatness)
        progress.update(len(members))
        return_free_memory()
        return values

    with (
        evaluating(lm.model),
        torch.enable_grad(),  # the caller may have disabled gradients
        tqdm(total=len(subjects), desc="Values", unit="edit", disable=len(subjects) == 1, leave=False) as progress,
    ):
        padded = not may_pack(lm.model)
        first, *groups = split(order, padded)
        results = [of_group(first)]
        if padded != (results[0].replay != "packed"):  # the replay does not pack as expected: split the rest again
            groups = split([index for later in groups for index in later], not padded)
        results += lm.processes.map(of_group, groups)
    ranks = sorted(range(len(order)), key=order.__getitem__)  # back to the order of the subjects
    steps = [step for result in results for step in result.steps]
    probabilities = [values for result in results for values in result.target_probability]
    keys_by_layer = [
        [keys for of_group in of_layer for keys in of_group]
        for of_layer in zip(*(r.keys for r in results), strict=True)
    ]
    return Values(
        delta=torch.cat([result.delta for result in results])[ranks],
        keys=[[of_layer[rank] for rank in ranks] for of_layer in keys_by_layer],
        steps=[steps[index] for index in ranks],
        target_probability=[probabilities[index] for index in ranks],
        replay=results[0].replay,
    )


def joined(parts: Sequence[Values]) -> Values:
    """Return the results of several optimizations as one."""
    return Values(
        delta=torch.cat([part.delta for part in parts]),
        keys=[[keys for part in parts for keys in part.keys[layer]] for layer in range(len(parts[0].keys))],
        steps=[step for part in parts for step in part.steps],
        target_probability=[of_subject for part in parts for of_subject in part.target_probability],
        replay=parts[0].replay,
    )


class _Group:
    """The rows of subjects that are optimized in one batch, R in all, which read M positions.

    Attributes:
        owners: `(R,)`, the subject of each row.
        bare: `(F,)`, the row of each fact's bare prompt.
        shares: `(R,)`, the weight of each row in the mean over the answers of its subject; 0 for a kept row.
        kept: `(R,)`, the weight of each kept row; 0 for a row with an answer.
        turn: `(R,)`, the number of each kept row among those of its subject, from 1 on.
        strengths: `(R,)`, the part of the value that is added in each row.
        weights: `(M,)`, the weight of each token of an answer in its row; 0 for a kept row.
        core: `(M,)`, whether each token belongs to the new answer itself.
    """

    def __init__(self, lm: LanguageModel, subjects: Sequence[SubjectRows]) -> None:
        device = lm.device
        self.subjects = subjects
        rows = [subject.rows for subject in subjects]
        flat = [row for of_subject in rows for row in of_subject]
        self.batch = pad(flat, lm.padding_id, device)
        self.targets = target_ids(flat, device)
        owners: list[int] = []
        bare: list[int] = []
        shares: list[float] = []
        kept: list[float] = []
        weights: list[float] = []
        core: list[bool] = []
        turn: list[int] = []
        strengths: list[float] = []
        for index, subject in enumerate(subjects):
            owners += [index] * len(rows[index])
            for of_fact in subject.answers:
                bare.append(len(shares))
                shares += [1 / (len(of_fact) * len(subject.answers))] * len(of_fact)
                kept += [0.0] * len(of_fact)
                strengths += [answer.strength for answer in of_fact]
                for answer in of_fact:
                    weights += answer.weights
                    core += [place in answer.core for place in range(len(answer.row.target))]
            shares += [0.0] * len(subject.kept)
            strengths += [1.0] * len(subject.kept)
            kept += [row.weight for row in subject.kept]
            turn += [0] * (len(kept) - len(subject.kept) - len(turn)) + list(range(1, len(subject.kept) + 1))
            reads = sum(len(row.row.reads) for row in subject.kept)
            weights += [0.0] * reads
            core += [False] * reads
        self.owners, self.bare = torch.tensor(owners, device=device), torch.tensor(bare, device=device)
        self.shares, self.kept = torch.tensor(shares, device=device), torch.tensor(kept, device=device)
        self.turn, self.strengths = torch.tensor(turn, device=device), torch.tensor(strengths, device=device)
        self.weights, self.core = torch.tensor(weights, device=device), torch.tensor(core, device=device)

    def turns(self, step: int) -> Tensor:
        """Return which kept rows a step runs that does not run all rows, `(R,)`: every second one of each subject."""
        return (self.kept > 0) & (self.turn % 2 == step % 2)

    def per_subject(self, rows: Tensor, of_rows: Tensor) -> Tensor:
        """Return the sums of values of some rows, by subject, `(N,)`."""
        return of_rows.new_zeros(len(self.subjects)).index_add(0, self.owners[rows], of_rows)


class _Losses:
    """The terms of the loss for some rows of a group.

    Args:
        rows: Indices of the rows, in order.
        original: `(M, V)`, log probabilities of the model before the edit, at all positions of the group.
        hardest: Whether the wordings with the largest losses weigh most. Otherwise all weigh alike, as published.
    """

    def __init__(self, group: _Group, rows: Tensor, original: Tensor, hardest: bool) -> None:
        self.hardest = hardest
        self.weakest = torch.zeros(len(rows), device=rows.device)
        # Where some of the kept rows are left out, the others stand for them.
        shares = [
            group.per_subject(of, group.kept[of]) for of in (torch.arange(len(group.kept), device=rows.device), rows)
        ]
        self.standing = shares[0] / shares[1].clamp_min(1e-30)
        batch, is_read = group.batch.select(rows)
        self.group, self.rows = group, rows
        self.read_rows, self.count = batch.read_rows, len(rows)
        self.targets, self.original = group.targets[is_read], original[is_read]
        self.weights, self.core = group.weights[is_read], group.core[is_read]
        self.reads = torch.zeros_like(rows).index_add(0, self.read_rows, torch.ones_like(self.read_rows))

    def __call__(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return by subject `(N,)` the loss of the answers, what they lack, and the KL divergence of the kept rows.

        What the answers lack is the NLL of the least likely token of the new answer, in the wording that lacks most,
        or, as published, its mean over wordings.

        Args:
            log_probs: `(M, V)`.
        """
        group, rows, zeros = self.group, self.rows, log_probs.new_zeros(self.count)
        nll = -log_probs.gather(1, self.targets[:, None])[:, 0]
        of_rows = zeros.index_add(0, self.read_rows, nll * self.weights)
        weakest = zeros.scatter_reduce(0, self.read_rows, nll.detach() * self.core, "amax")
        self.weakest = weakest
        if self.hardest:  # the gradient of log sum exp, which is a smooth maximum
            shares = group.shares[rows] * of_rows.detach().clamp(max=_HARDEST).exp()
            shares = shares / group.per_subject(rows, shares).clamp_min(1e-30)[group.owners[rows]]
            lacking = zeros.new_zeros(len(group.subjects)).scatter_reduce(0, group.owners[rows], weakest, "amax")
        else:
            shares = group.shares[rows]
            lacking = group.per_subject(rows, shares * weakest)
        answers = group.per_subject(rows, shares * of_rows)
        # Positions of kept rows only: the divergence needs the whole vocabulary.
        of_kept = (group.kept[rows] > 0)[self.read_rows].nonzero()[:, 0]
        kept_probs = log_probs[of_kept]
        changed = (kept_probs.exp() * (kept_probs - self.original[of_kept])).sum(-1)
        sums = zeros.index_add(0, self.read_rows[of_kept], changed) / self.reads
        return answers, lacking, self.standing * group.per_subject(rows, group.kept[rows] * sums)


def _optimize(
    lm: LanguageModel,
    group: _Group,
    layers: Sequence[int],
    options: ValueOptions,
    detectors: Sequence[Tensor] | None,
    flatness: Tensor | None,
) -> Values:
    """Optimize the values of one batch."""
    sites = [lm.architecture.down_projection(lm.model, layer) for layer in layers]
    if "attention" in options.vectors:
        sites += [lm.architecture.attention_output(lm.model, layer) for layer in layers]
    whole = capture(
        lm.model, lm.architecture, layers[0], group.batch, {str(index): site for index, site in enumerate(sites)}
    )
    replay = Replayer(lm.model, lm.architecture, layers[0])
    count, every = len(group.subjects), torch.arange(len(group.owners), device=group.owners.device)
    device = whole.hidden.device
    edited = Edited(replay, sites, None if detectors is None else [found.to(device) for found in detectors])

    values = torch.stack([at_subject(group.batch, whole.record.outputs[str(index)]) for index in range(len(sites))], 1)
    v0_norm = torch.stack([group.per_subject(every, group.shares * norms) for norms in values.norm(dim=-1).T], 1)
    v0 = torch.zeros_like(values[:count]).index_add(0, group.owners, group.shares[:, None, None] * values)
    original = whole.logits.float().log_softmax(-1)
    hardest = options.optimizer == "normalized"
    losses = _Losses(group, every, original, hardest)

    delta = values.new_zeros(count, *values.shape[1:]).requires_grad_()
    descent = _descent(options, delta, v0_norm, flatness)
    active = torch.ones(count, dtype=torch.bool, device=every.device)
    most = options.steps * torch.bincount(group.owners[group.bare], minlength=count).clamp(max=_MOST_TIMES)
    steps = [0] * count
    captured = whole
    weakest = torch.full((len(group.owners),), math.inf, device=every.device)
    is_whole = torch.ones_like(active)  # whether all rows of a subject are run

    best, least = torch.zeros_like(delta), torch.full((count,), math.inf, device=every.device)
    last = most.clone()  # the step that each subject ends at

    for step in range(int(most.max()) + _POLISH + 1):
        needed = active[group.owners]  # finished subjects are not run again
        is_due = (weakest >= _EASY * options.stop_loss) & (group.shares > 0) | group.turns(step)
        is_whole |= group.per_subject(every, (needed & is_due).float()) == 0
        needed &= is_whole[group.owners] | is_due
        rows = needed.nonzero()[:, 0]
        if not torch.equal(rows, losses.rows):
            captured, losses = whole.select(rows), _Losses(group, rows, original, hardest)
        run = partial(edited, captured, delta, group.owners[losses.rows], group.strengths[losses.rows])
        # The first step adds zeros, so its logits must equal the captured ones.
        log_probs = (run() if step else replay.check(captured, run)).float().log_softmax(-1)
        answers, lacking, kept = losses(log_probs)
        unit = _DECAY_UNIT / v0_norm if hardest else v0_norm**-2
        loss = answers + kept + options.weight_decay * (delta.norm(dim=-1) * unit).sum(-1)
        if not loss[active].isfinite().all():
            index = int((active & ~loss.isfinite()).nonzero()[0])
            raise NotFiniteError(
                f"The optimization for {group.subjects[index].name} is not finite at step {step}. Load the model in "
                "float32 or bfloat16, or lower EditConfig.lr."
            )
        weakest[rows] = losses.weakest
        met = lacking < options.stop_loss
        finished = active & met & is_whole
        if hardest:
            better = finished & (kept.detach() < least)
            best[better], least[better] = delta.detach()[better], kept.detach()[better]
            last = torch.where(finished & (last == most), step + _POLISH if step else 0, last)
            active &= step < last
        else:
            active &= ~finished & (step < last)
        if not active.any():
            break
        is_whole = met | (last != most) if hardest and (step + 1) % _EVERY else torch.ones_like(met)
        (gradient,) = torch.autograd.grad(loss[active].sum(), delta)
        with torch.no_grad():
            moved = descent(gradient, lacking)
            norm = moved.norm(dim=-1)
            moved *= (options.clamp * v0_norm / norm.clamp_min(1e-12)).clamp(max=1.0)[..., None]
            moved = norm_preserving(v0, moved) if options.keeps_norm else moved
            delta[active] = moved[active]  # momentum would still change finished subjects
        for index in active.nonzero()[:, 0].tolist():
            steps[index] += 1
    delta = torch.where((least < math.inf)[:, None, None], best, delta.detach())[
        :, : len(layers)
    ]  # vectors of attention are not stored
    keys = _keys(replay, whole, layers, sites[: len(layers)], delta, group.owners)
    taught = [((group.owners == index) & (group.shares > 0)).nonzero()[:, 0] for index in range(count)]
    nll = -original.gather(1, group.targets[:, None])[:, 0]
    means = nll.new_zeros(len(every)).index_add(0, group.batch.read_rows, nll * group.weights)[group.bare].tolist()
    owners = group.owners[group.bare].tolist()
    return Values(
        delta=delta.float().cpu(),
        keys=[[of_layer[members].float().cpu() for members in taught] for of_layer in keys],
        steps=steps,
        target_probability=[
            [math.exp(-mean) for mean, owner in zip(means, owners, strict=True) if owner == index]
            for index in range(count)
        ],
        replay=replay.way,
    )


def _descent(
    options: ValueOptions, delta: Tensor, v0_norm: Tensor, flatness: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from the gradient, and from what the answers lack, to the next `delta`.

    - `"adam"`: as published.
    - `"normalized"`: steps of length `lr * ||v0||` along the gradient, with momentum, that shorten once little is
      lacking. Adam moves all entries by the same amount, so that its `delta` is longer for the same answers, and what
      an edit does to other text grows with the square of the length. With `flatness`, the steps go where the answers
      gain most for what other text loses: along `G^-1 g` instead of `g` (a natural gradient).

    Args:
        flatness: `(sites, d_model, d_model)`, the inverse of the second moment `G` of the gradients at each site's
            output on other text; None for the identity.
    """
    if options.optimizer == "adam":
        adam = torch.optim.Adam([delta], lr=options.lr)

        def by_adam(gradient: Tensor, lacking: Tensor) -> Tensor:
            before = delta.detach().clone()
            delta.grad = gradient
            adam.step()
            moved = delta.detach().clone()
            delta.data.copy_(before)
            return moved

        return by_adam
    velocity = torch.zeros_like(delta)

    def normalized(gradient: Tensor, lacking: Tensor) -> Tensor:
        flat = gradient if flatness is None else torch.einsum("nld,lde->nle", gradient, flatness.to(gradient))
        flat = flat * v0_norm[..., None]
        unit = flat / flat.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        velocity.mul_(_MOMENTUM).add_(unit)
        length = options.lr * lacking.clamp(_SHORTEST, 1.0)
        return delta.detach() - (length[:, None] * v0_norm)[..., None] * velocity

    return normalized


def at_subject(batch: Batch, tensor: Tensor) -> Tensor:
    """Return a recorded tensor, `(B, T, d)` or `(B * T, d)`, at the subject's last token, `(B, d)` float32.

    The result is on the device of the batch, because layers may be on several devices.
    """
    rows = torch.arange(len(batch.subject), device=tensor.device)
    at_subject = tensor.view(len(rows), -1, tensor.shape[-1])[rows, batch.subject.to(tensor.device)]
    return at_subject.float().to(batch.subject.device)


class Edited:
    """The model with the deltas of subjects in place.

    Args:
        sites: The modules whose outputs change.
        detectors: By site `(N, d_in)`. A delta is added at each token from the subject's last one on, times the product
            of its detector and the input of the site there. None: it is added at the subject's last token.
    """

    def __init__(self, replay: Replayer, sites: Sequence[nn.Module], detectors: Sequence[Tensor] | None) -> None:
        self.replay, self.sites, self.detectors = replay, sites, detectors

    def __call__(self, captured: Capture, delta: Tensor, owners: Tensor, strengths: Tensor | None = None) -> Tensor:
        """Return the logits of captured rows, `(M, V)`.

        Args:
            delta: `(N, sites, d_model)`.
            owners: The subject of each row.
            strengths: The part of the delta that is added in each row; None for all of it.
        """
        of_rows = delta[owners] if strengths is None else delta[owners] * strengths[:, None, None]
        if self.detectors is None:
            tokens = self.replay.subjects(captured.batch)
            adding_deltas = adding({site: (tokens, of_rows[:, index]) for index, site in enumerate(self.sites)})
        else:
            rows = self.replay.rows(captured.batch)
            owners, delta = owners[rows], of_rows[rows] * self.replay.from_subjects(captured.batch)[:, None, None]
            adding_deltas = adding_products(
                {site: (self.detectors[index][owners], delta[:, index]) for index, site in enumerate(self.sites)}
            )
        with adding_deltas:
            return self.replay(captured)


@torch.no_grad()
def _keys(
    replay: Replayer,
    whole: Capture,
    layers: Sequence[int],
    sites: Sequence[nn.Module],
    delta: Tensor,
    owners: Tensor,
) -> list[Tensor]:
    """Return the keys of all rows, by layer `(B, d_in)`, with the deltas added: those of a layer change later keys."""
    record, tokens = whole.record, whole.batch.flat_subject
    if len(sites) > 1:
        with recording({str(index): site for index, site in enumerate(sites)}) as record:
            Edited(replay, sites, None)(whole, delta, owners)
        tokens = replay.subjects(whole.batch)
    keys = []
    for index, layer in enumerate(layers):
        of_layer = replay.architecture.keys(replay.model, layer, record.calls[str(index)], tokens)
        keys.append(of_layer.to(tokens.device))  # layers may be on several devices
    return keys
