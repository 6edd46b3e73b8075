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
from goldenedit.devices import execution_device
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
    steps = 0
    modules = {lm.architecture.down_projection(lm.model, layer): change for layer, change in changes.items()}
    for module, change in modules.items():
        change.to(execution_device(module))
    parameters = [parameter for change in changes.values() for parameter in change.parameters()]
    penalties = [change.penalty for change in changes.values() if isinstance(change, Penalized)]
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
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
                losses, gradients = _losses(lm, [of_pass[index] for index in batch], options, parameters, batch_size)
                if not math.isfinite(sum(losses)):
                    raise ValueError(f"The training loss is not finite at step {steps}. Lower EditConfig.finetune_lr.")
                total += sum(loss for index, loss in zip(batch, losses, strict=True) if index < len(rows))
                if not gradients and not penalties:
                    continue
                optimizer.zero_grad()
                for parameter, gradient in zip(parameters, gradients, strict=False):
                    parameter.grad = gradient
                for penalty in penalties:
                    penalty().backward()
                optimizer.step()
                for change in changes.values():
                    change.constrain()
                steps += 1
            # Penalties take back what the answers do not need, in the passes that are left.
            if total / len(rows) < options.stop_loss and not penalties:
                break
            bar.update()
    return steps


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
    device = lm.device
    batch = pad(rows, lm.padding_id, device)
    positions = batch.read_positions
    if loss == "last":  # the prompt's last token is the one before the answer's first
        positions = torch.tensor([row.target[0] - 1 for row in rows], device=device)[batch.read_rows]
    with reading_logits(lm.model, batch.read_rows, positions) as logits_of:
        output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = logits_of(output).float()
    targets = torch.tensor([token for row in rows for token in row.target_ids], device=logits.device)
    token_nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    owners = batch.read_rows.to(logits.device)
    lengths = torch.bincount(owners, minlength=len(rows))
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
