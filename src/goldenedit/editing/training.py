"""Train a change of down projections on facts, beside weights that stay frozen: what FT-L, FT-M and LoRA share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, hidden_argument, reading_logits
from goldenedit.devices import execution_device
from goldenedit.editors.record import AnswerLoss
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import Row, encode, pad
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class Training:
    """How a change is trained.

    Attributes:
        loss: `masked`: cross entropy of the answer's tokens, each behind those before it; `last`: of all of them at the
            last token of the prompt.
        steps: Most steps of Adam.
        lr: Learning rate.
        stop_loss: The mean loss below which training ends.
    """

    loss: AnswerLoss
    steps: int
    lr: float
    stop_loss: float


class Change(Protocol):
    """What is trained: a function of the module's input that is added to its output, with parameters of its own."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what is trained."""

    def to(self, device: torch.device) -> Any:
        """Move what is trained."""

    def constrain(self) -> None:
        """Project the parameters onto what is allowed, after each step."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what is added, `(..., d_out)`."""


def train(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    changes: Mapping[int, Change],
    options: Training,
    batch_size: int = 16,
) -> int:
    """Train the changes of some layers by Adam on all requests together, and return the number of steps taken.

    Args:
        changes: What is added to the down projection of each layer.
        options: The loss, and when to stop.
        batch_size: Requests a forward; the gradients of all are added up before a step.

    Raises:
        ValueError: A request cannot be tokenized, or the loss leaves the finite numbers.
    """
    longest = lm.max_length
    rows = [encode(lm.tokenizer, request.text, request.target_new, max_length=longest) for request in requests]
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    modules = {lm.architecture.down_projection(lm.model, layer): change for layer, change in changes.items()}
    for module, change in modules.items():
        change.to(execution_device(module))
    parameters = [parameter for change in changes.values() for parameter in change.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    with (
        evaluating(lm.model),
        torch.enable_grad(),
        _added(modules),
        tqdm(total=options.steps, desc="Training", leave=False) as bar,
    ):
        for step in range(options.steps):
            total = 0.0
            sums = [torch.zeros_like(parameter) for parameter in parameters]
            for group in groups:
                found = answer_nll(lm, group, options.loss).sum() / len(rows)
                for held, gradient in zip(sums, torch.autograd.grad(found, parameters), strict=True):
                    held += gradient
                total += found.item()
            if not torch.tensor(total).isfinite():
                raise ValueError(f"The training loss is not finite at step {step}: lower EditConfig.finetune_lr.")
            if total < options.stop_loss:
                return step
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient
            optimizer.step()
            for change in changes.values():
                change.constrain()
            bar.update()
    return options.steps


def answer_nll(lm: LanguageModel, rows: Sequence[Row], loss: AnswerLoss) -> Tensor:
    """Return the NLL of each row's answer, mean over its tokens, `(B,)`."""
    device = lm.device
    batch = pad(rows, lm.padding_id, device)
    positions = batch.read_positions
    if loss == "last":  # the first token of an answer is predicted at the last of its prompt
        positions = torch.tensor([row.target[0] - 1 for row in rows], device=device)[batch.read_rows]
    with reading_logits(lm.model, batch.read_rows, positions) as logits_of:
        output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = logits_of(output).float()
    wanted = torch.tensor([token for row in rows for token in row.target_ids], device=logits.device)
    token_nll = nn.functional.cross_entropy(logits, wanted, reduction="none")
    owners = batch.read_rows.to(logits.device)
    lengths = torch.bincount(owners, minlength=len(rows))
    return token_nll.new_zeros(len(rows)).index_add(0, owners, token_nll) / lengths


def answer_gradients(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    batch_size: int = 16,
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return what enters and leaves each layer's down projection where answers are predicted, and the gradient there.

    Args:
        layers: The layers, ascending.

    Returns:
        By layer `(inputs (n, d_in), outputs (n, d_out), gradients (n, d_out))` float32, a row for each token of each
        answer; the gradient is by the outputs, of the answers' summed mean cross entropy.
    """
    longest = lm.max_length
    rows = [encode(lm.tokenizer, request.text, request.target_new, max_length=longest) for request in requests]
    found: dict[int, list[list[Tensor]]] = {layer: [] for layer in layers}
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
                    at = tuple(torch.tensor(reads, device=tensor.device).T)
                    of_group.append(tensor.detach().view(len(group), -1, tensor.shape[-1])[at].float().cpu())
                found[layer].append(of_group)
    return {
        layer: (torch.cat(inputs), torch.cat(outputs), torch.cat(slopes))
        for layer, (inputs, outputs, slopes) in ((layer, zip(*parts, strict=True)) for layer, parts in found.items())
    }


def _root(roots: dict[int, tuple[Tensor, Tensor]], layer: int) -> Callable[..., Tensor]:
    """Return a hook that keeps input and output, and puts an output in place that the gradient ends at."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # The path to earlier roots stays: their gradients go through this module.
        kept = output + torch.zeros_like(output, requires_grad=True)
        roots[layer] = (hidden_argument(args, kwargs).detach(), kept)
        return kept.clone()  # some models add to the output of a projection in place

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
