"""Causal tracing, the published selector: which layer's clean hidden state restores the answer?

Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262), section 2. The subject's
embeddings are corrupted with noise of three times their standard deviation. Then one hidden state, at the last token of
the subject, is restored. The indirect effect of its layer is the gain in the answer's probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating, first_tensor, reading_logits
from goldenedit.architecture.replay import Batch
from goldenedit.config import EditConfig
from goldenedit.devices import execution_device
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import greedy_answer
from goldenedit.lm.tokens import encode, pad, subject_span, subject_tokens, target_ids
from goldenedit.requests import EditRequest

_NOISE = 3.0  # standard deviations of the subjects' embeddings


@selector("causal_tracing", paper="arXiv 2202.05262, section 2", depends_on=("seed",))
def causal_tracing(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> Tensor:
    """Return how much of the answer's probability the clean hidden state of each layer restores.

    See `causal_tracing_scores`.
    """
    return causal_tracing_scores(lm, facts, seed=config.seed)


@torch.no_grad()
def causal_tracing_scores(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    draws: int = 3,
    seed: int = 0,
) -> Tensor:
    """Return the average indirect effect of each layer's hidden state, `(num_layers,)` float64.

    Args:
        facts: The proxy set. Without `target_true` the model's own greedy answer is traced.
        draws: Number of noise samples for each fact.
        seed: Seed of the noise.

    Raises:
        ValueError: There are no facts, or one cannot be tokenized.
    """
    if not facts:
        raise ValueError("Causal tracing got no facts. Pass at least one.")
    embeddings = lm.model.get_input_embeddings()  # type: ignore[operator]
    device = lm.device
    deviation = _NOISE * _embedding_deviation(embeddings, lm.tokenizer, facts)
    generator = torch.Generator().manual_seed(seed)
    effects = torch.zeros(lm.architecture.num_layers, dtype=torch.float64)
    layers = [lm.architecture.layer(lm.model, index) for index in range(lm.architecture.num_layers)]
    with evaluating(lm.model), tqdm(total=len(facts), desc="Causal tracing", unit="fact", leave=False) as progress:
        for fact in facts:
            old_answer = fact.target_true or fact.joined(greedy_answer(lm, fact.text))
            row = encode(lm.tokenizer, fact.text, old_answer, fact.subject_end, lm.max_length)
            batch = pad([row] * draws, lm.padding_id, device)
            targets = target_ids([row] * draws, device)
            span = subject_span(lm.tokenizer, fact.text, fact.subject_start, fact.subject_end)
            clean: dict[nn.Module, Tensor] = {}
            with _recording_hidden(layers, clean, row.subject):
                _probability(lm.model, batch, targets)
            noise = torch.randn(draws, len(span), embeddings.weight.shape[1], generator=generator) * deviation
            with _corrupting(embeddings, span, noise):
                corrupted = _probability(lm.model, batch, targets)
                for index, layer in enumerate(layers):
                    with _restoring(layer, clean[layer], row.subject):
                        effects[index] += (_probability(lm.model, batch, targets) - corrupted).double().cpu()
            progress.update()
    return effects / len(facts)


def _embedding_deviation(
    embeddings: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[EditRequest]
) -> float:
    """Return the standard deviation of the embeddings of the subjects' tokens."""
    ids: list[int] = []
    for fact in facts:
        ids += subject_tokens(tokenizer, fact.text, fact.subject_start, fact.subject_end)
    return float(embeddings(torch.tensor([ids], device=execution_device(embeddings))).float().std())  # type: ignore[arg-type]


def _probability(model: nn.Module, batch: Batch, targets: Tensor) -> Tensor:
    """Return the probability of the answer: geometric mean over its tokens, arithmetic mean over rows."""
    with reading_logits(model, batch.read_rows, batch.read_positions) as logits_of:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        log_probs = logits_of(output).float().log_softmax(-1)
    target_log_probs = log_probs.gather(1, targets[:, None].to(log_probs.device))[:, 0]
    return target_log_probs.view(len(batch.input_ids), -1).mean(1).exp().mean()


@contextmanager
def _recording_hidden(layers: Sequence[nn.Module], hidden: dict[nn.Module, Tensor], position: int) -> Iterator[None]:
    """Record the hidden state after each layer at one position."""

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden[module] = first_tensor(output)[:, position].clone()

    with _hooked([(layer, record) for layer in layers]):
        yield


@contextmanager
def _corrupting(embeddings: nn.Module, span: Sequence[int], noise: Tensor) -> Iterator[None]:
    """Add noise to the embeddings of the tokens in `span`."""

    def corrupt(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[:, list(span)] += noise.to(output)
        return output

    with _hooked([(embeddings, corrupt)]):
        yield


@contextmanager
def _restoring(layer: nn.Module, clean: Tensor, position: int) -> Iterator[None]:
    """Replace the hidden state after a layer at one position by `clean`."""

    def restore(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_tensor(output).clone()
        hidden[:, position] = clean
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with _hooked([(layer, restore)]):
        yield


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
