"""Training of changes beside frozen down projections, which all editors that train share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, hidden_argument, reading_logits
from goldenedit.architecture.replay import Batch, Replayer, capture
from goldenedit.devices import execution_device
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.record import AnswerLoss
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import end_token
from goldenedit.lm.tokens import Row, encode, pad
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class Training:
    """Options of the training of a change.

    Attributes:
        loss: `masked`: cross entropy of each token of the answer after the tokens before it. `last`: cross entropy of
            all tokens of the answer at the last token of the prompt. `ended`: as `masked`, with the token that ends the
            answer as its last token.
        epochs: Largest number of passes over the requests.
        lr: Learning rate.
        stop_loss: No step is taken for a batch whose mean loss is below this, and training stops when the mean loss of
            a pass is. With penalties, steps along these go on to the last pass.
        batch: Requests of a step, shuffled before each pass; None for all requests in each step.
        rehearsal: Earlier requests of a pass, as a share of the number of requests. Each pass draws others, shuffled
            among the requests, so that the cost of a batch does not grow with the number of earlier ones.
        seed: Seed of the shuffling and the drawing.
    """

    loss: AnswerLoss
    epochs: int
    lr: float
    stop_loss: float
    batch: int | None = None
    rehearsal: float = 0.0
    seed: int = 0


class Change(Protocol):
    """A trained function of a module's input, which is added to the module's output."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters to train."""

    def to(self, device: torch.device) -> Any:
        """Move the parameters to a device."""

    def constrain(self) -> None:
        """Project the parameters onto the allowed set, after each step."""

    def change(self) -> LowRankDelta | Tensor:
        """Return the change of the matrix, `(d_out, d_in)` or its factors."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what is added to the module's output, `(..., d_out)`."""


@runtime_checkable
class Penalized(Protocol):
    """A change with a term of its own in the loss."""

    def penalty(self) -> Tensor:
        """Return what is added to the loss of each step, a scalar that depends on the parameters."""


def train(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    changes: Mapping[int, Change],
    options: Training,
    batch_size: int = 16,
    earlier: Sequence[EditRequest] = (),
) -> int:
    """Train the changes of layers with Adam, and return the number of steps taken.

    Args:
        changes: Change of the down projection of each layer.
        options: Loss, learning rate, batches and stopping rule.
        batch_size: Requests per forward. Each step uses the summed gradients of its batch.
        earlier: Requests that were trained before and are rehearsed. They do not count for the stopping rule.

    Raises:
        ValueError: A request cannot be tokenized, the model has no token that ends an answer, or the loss is not
            finite.
    """
    rows = answer_rows(lm, requests, options.loss)
    learned = answer_rows(lm, earlier, options.loss) if options.rehearsal else []
    generator = torch.Generator().manual_seed(options.seed)
    modules = {lm.architecture.down_projection(lm.model, layer): change for layer, change in changes.items()}
    trained = _Trained(lm, changes, options.lr)
    with (
        evaluating(lm.model),
        torch.enable_grad(),
        _added(modules),
        tqdm(total=options.epochs, desc="Training", leave=False) as bar,
    ):
        for _ in range(options.epochs):
            total = 0.0
            drawn = _drawn(learned, math.ceil(options.rehearsal * len(rows)), generator)
            of_pass = [*rows, *drawn]
            for batch in _batches(len(of_pass), options.batch, generator):
                drawn_rows = [of_pass[index] for index in batch]
                losses, gradients = _losses(lm, drawn_rows, options, trained.parameters, batch_size)
                if not math.isfinite(sum(losses)):
                    raise ValueError(
                        f"The training loss is not finite at step {trained.steps}. Lower EditConfig.finetune_lr."
                    )
                total += sum(loss for index, loss in zip(batch, losses, strict=True) if index < len(rows))
                trained.step(gradients)
            # Penalties take back what the answers do not need, in the passes that are left.
            if total / len(rows) < options.stop_loss and not trained.penalties:
                break
            bar.update()
    return trained.steps


def train_each(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    changes: Sequence[Mapping[int, Change]],
    options: Training,
    batch_size: int = 16,
) -> list[int]:
    """Train the changes of requests that are each edited alone, and return the steps taken for each.

    The result is that of `train` for one request after the other, but the requests of a batch share its forwards.

    Args:
        changes: By request, the change of each layer's down projection. All have the same layers.
        options: Loss, learning rate and stopping rule. There is nothing to shuffle or rehearse.
        batch_size: Requests that are trained side by side.

    Raises:
        ValueError: A request cannot be tokenized, the model has no token that ends an answer, or a loss is not finite.
    """
    rows = answer_rows(lm, requests, options.loss)
    steps = [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    with (
        evaluating(lm.model),
        torch.enable_grad(),
        tqdm(total=len(rows), desc="Training", unit="fact", disable=len(rows) == 1, leave=False) as bar,
    ):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            for index, count in _train_side_by_side(lm, rows, changes, members, options):
                steps[index] = count
                bar.update()
    return steps


def _train_side_by_side(
    lm: LanguageModel,
    rows: Sequence[Row],
    changes: Sequence[Mapping[int, Change]],
    members: Sequence[int],
    options: Training,
) -> Iterator[tuple[int, int]]:
    """Train the changes of some requests, and yield the number of steps of each request when it is finished."""
    trained = {index: _Trained(lm, changes[index], options.lr) for index in members}
    modules = {layer: lm.architecture.down_projection(lm.model, layer) for layer in changes[members[0]]}
    with torch.no_grad():  # layers before the changes run only once
        first = min(modules)
        batch = _answers(lm, [rows[index] for index in members], options.loss)
        whole = capture(lm.model, lm.architecture, first, batch, {}, use_cache=False)
        replay = Replayer(lm.model, lm.architecture, first, whole_rows=True)
        replay.check(whole.select(torch.arange(min(2, len(members)), device=whole.hidden.device)))
    active = list(members)
    for _ in range(options.epochs):
        with _added_by_row({modules[layer]: [changes[index][layer] for index in active] for layer in modules}):
            chosen = torch.tensor([members.index(index) for index in active], device=whole.hidden.device)
            losses = _mean_nll(replay(whole.select(chosen)), [rows[index] for index in active])
        if not losses.isfinite().all():
            steps = max(one.steps for one in trained.values())
            raise ValueError(f"The training loss is not finite at step {steps}. Lower EditConfig.finetune_lr.")
        is_learned = [loss < options.stop_loss for loss in losses.tolist()]
        learning = [trained[index] for index, known in zip(active, is_learned, strict=True) if not known]
        parameters = [parameter for one in learning for parameter in one.parameters]
        total = losses[[not known for known in is_learned]].sum()
        gradients = iter(torch.autograd.grad(total, parameters) if parameters else ())
        going_on = []
        for index, known in zip(active, is_learned, strict=True):
            of_index = () if known else [next(gradients) for _ in trained[index].parameters]
            if trained[index].step(of_index):
                going_on.append(index)
            else:
                yield index, trained[index].steps
        active = going_on
        if not active:
            return
    yield from ((index, trained[index].steps) for index in active)


class _Trained:
    """The changes of one edit, their optimizer, and the number of its steps."""

    def __init__(self, lm: LanguageModel, changes: Mapping[int, Change], lr: float) -> None:
        for layer, change in changes.items():
            change.to(execution_device(lm.architecture.down_projection(lm.model, layer)))
        self.changes = list(changes.values())
        self.parameters = [parameter for change in self.changes for parameter in change.parameters()]
        self.penalties = [change.penalty for change in self.changes if isinstance(change, Penalized)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        self.steps = 0

    def step(self, gradients: Sequence[Tensor]) -> bool:
        """Take a step, along the penalties alone without gradients. Return False, and do nothing, without both."""
        if not gradients and not self.penalties:
            return False
        self.optimizer.zero_grad()
        for parameter, gradient in zip(self.parameters, gradients, strict=False):
            parameter.grad = gradient
        for penalty in self.penalties:
            penalty().backward()
        self.optimizer.step()
        for change in self.changes:
            change.constrain()
        self.steps += 1
        return True


def _drawn(rows: Sequence[Row], count: int, generator: torch.Generator) -> list[Row]:
    """Return that many of some rows, drawn anew for each pass; fewer if there are not as many."""
    if not rows or not count:
        return []
    return [rows[index] for index in torch.randperm(len(rows), generator=generator)[:count].tolist()]


def _batches(count: int, size: int | None, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each step of a pass: shuffled batches, or all at once if the size is None."""
    if size is None:
        yield list(range(count))
        return
    order = torch.randperm(count, generator=generator).tolist()
    for start in range(0, count, size):
        yield order[start : start + size]


def _losses(
    lm: LanguageModel, rows: Sequence[Row], options: Training, parameters: Sequence[nn.Parameter], batch_size: int
) -> tuple[list[float], list[Tensor]]:
    """Return the loss of each row, and the gradient of their mean for each parameter; none for no step."""
    losses: list[float] = []
    sums: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        of_rows = answer_nll(lm, rows[start : start + batch_size], options.loss)
        losses += of_rows.tolist()
        is_last = len(losses) == len(rows)
        if is_last and sum(losses) / len(rows) < options.stop_loss:
            return losses, []
        gradients = torch.autograd.grad(of_rows.sum() / len(rows), parameters)
        sums = [old + new for old, new in zip(sums, gradients, strict=True)] if sums else list(gradients)
    return losses, sums


def answer_rows(lm: LanguageModel, requests: Sequence[EditRequest], loss: AnswerLoss) -> list[Row]:
    """Return the tokens of each request and its answer, with the token that ends the answer if the loss counts it.

    Raises:
        ValueError: A request cannot be tokenized, or the model has no token that ends an answer.
    """
    longest = lm.max_length
    rows = [encode(lm.tokenizer, request.text, request.target_new, max_length=longest) for request in requests]
    if loss != "ended":
        return rows
    ended = [_ended(row, end_token(lm.tokenizer, request.text)) for row, request in zip(rows, requests, strict=True)]
    for row, request in zip(ended, requests, strict=True):
        if longest is not None and len(row.input_ids) > longest:
            raise ValueError(
                f"{request.text!r}, its answer and the token that ends it have {len(row.input_ids)} tokens, but the "
                f"model takes {longest}. Shorten them."
            )
    return ended


def _ended(row: Row, end: int) -> Row:
    """Return a row whose answer is followed by its end, and by nothing else."""
    length = row.target[-1] + 1
    return replace(row, input_ids=(*row.input_ids[:length], end), target=(*row.target, length))


def answer_nll(lm: LanguageModel, rows: Sequence[Row], loss: AnswerLoss) -> Tensor:
    """Return the NLL of each row's answer, mean over its tokens, `(B,)`."""
    batch = _answers(lm, rows, loss)
    with reading_logits(lm.model, batch.read_rows, batch.read_positions) as logits_of:
        output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return _mean_nll(logits_of(output), rows)


def _answers(lm: LanguageModel, rows: Sequence[Row], loss: AnswerLoss) -> Batch:
    """Return a batch of rows that reads where the tokens of their answers are predicted."""
    batch = pad(rows, lm.padding_id, lm.device)
    if loss == "last":  # the prompt's last token is the one before the answer's first
        starts = torch.tensor([row.target[0] - 1 for row in rows], device=lm.device)
        batch = replace(batch, read_positions=starts[batch.read_rows])
    return batch


def _mean_nll(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the mean NLL over the tokens of each row's answer, `(B,)`, from the logits that predict them."""
    targets = torch.tensor([token for row in rows for token in row.target_ids], device=logits.device)
    token_nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    lengths = torch.tensor([len(row.target) for row in rows], device=logits.device)
    owners = torch.arange(len(rows), device=logits.device).repeat_interleave(lengths)
    return token_nll.new_zeros(len(rows)).index_add(0, owners, token_nll) / lengths


def answer_gradients(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    batch_size: int = 16,
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return inputs, outputs and gradients of each layer's down projection at the tokens that predict the answers.

    Args:
        layers: The layers, ascending.
        batch_size: Requests per forward.

    Returns:
        By layer `(inputs (n, d_in), outputs (n, d_out), gradients (n, d_out))` float32, one row per token of each
        answer. The gradients are of the sum of the answers' mean cross entropies, with respect to the outputs.
    """
    longest = lm.max_length
    rows = [encode(lm.tokenizer, request.text, request.target_new, max_length=longest) for request in requests]
    of_groups: dict[int, list[list[Tensor]]] = {layer: [] for layer in layers}
    with evaluating(lm.model), torch.enable_grad():
        for start in range(0, len(rows), batch_size):
            group = rows[start : start + batch_size]
            roots: dict[int, tuple[Tensor, Tensor]] = {}
            with ExitStack() as stack:
                for layer in layers:
                    module = lm.architecture.down_projection(lm.model, layer)
                    stack.callback(module.register_forward_hook(_root(roots, layer), with_kwargs=True).remove)
                total = answer_nll(lm, group, "masked").sum()
            gradients = torch.autograd.grad(total, [roots[layer][1] for layer in layers])
            reads = [(index, position) for index, row in enumerate(group) for position in row.reads]
            for layer, gradient in zip(layers, gradients, strict=True):
                of_group = []
                for tensor in (*roots[layer], gradient):
                    group_rows, positions = torch.tensor(reads, device=tensor.device).T
                    by_row = tensor.detach().view(len(group), -1, tensor.shape[-1])
                    of_group.append(by_row[group_rows, positions].float().cpu())
                of_groups[layer].append(of_group)
    answers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for layer, parts in of_groups.items():
        inputs, outputs, output_gradients = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        answers[layer] = (inputs, outputs, output_gradients)
    return answers


def _root(roots: dict[int, tuple[Tensor, Tensor]], layer: int) -> Callable[..., Tensor]:
    """Return a hook that stores a module's input and output, so that gradients of the output can be computed."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # Added, not detached: the gradients of earlier layers go through this module.
        root = output + torch.zeros_like(output, requires_grad=True)
        roots[layer] = (hidden_argument(args, kwargs).detach(), root)
        return root.clone()  # some models add to the output of a projection in place

    return replace


@contextmanager
def _added(changes: Mapping[nn.Module, Change]) -> Iterator[None]:
    def hook(change: Change) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return output + change(hidden_argument(args, kwargs).float()).to(output.dtype)

        return add

    with ExitStack() as stack:
        for module, change in changes.items():
            stack.callback(module.register_forward_hook(hook(change), with_kwargs=True).remove)
        yield


@contextmanager
def _added_by_row(changes: Mapping[nn.Module, Sequence[Change]]) -> Iterator[None]:
    """Add to each row of a batch the outputs of its own change of each module."""

    def hook(of_rows: Sequence[Change]) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            inputs = hidden_argument(args, kwargs).float()
            by_row = inputs.reshape(len(of_rows), -1, inputs.shape[-1])  # some models pass all tokens as one list
            added = torch.stack([change(of_row) for change, of_row in zip(of_rows, by_row, strict=True)])
            return output + added.view(output.shape).to(output.dtype)

        return add

    with ExitStack() as stack:
        for module, of_rows in changes.items():
            stack.callback(module.register_forward_hook(hook(of_rows), with_kwargs=True).remove)
        yield
