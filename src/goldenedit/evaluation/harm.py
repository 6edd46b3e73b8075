"""What else an edit changed: greedy continuations, next-token distributions on plain text, and the rest of a subject.

The base model writes each continuation once. An edited model writes the same one if, and only if, its first choice
after each token is the base model's, and both end the text or neither does. So it does not generate: one forward over
prompt and continuation tells. The layers before the edit run once for the base model and all edited states.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.hooks import evaluating
from goldenedit.architecture.replay import Replayer, capture
from goldenedit.evaluation.texts import unrelated_questions
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import conversation, rendered
from goldenedit.lm.tokens import Row, pad, prompt_tokens
from goldenedit.requests import EditRequest
from goldenedit.subjects import find_subject

KINDS = {
    "neighbors": "prompts about other subjects of the same kind",
    "subject": "other questions about the edited subject",
    "unrelated": "questions that have nothing to do with the fact",
}
# Questions that fit any subject, and that no single fact answers.
_ABOUT_SUBJECT = (
    "What is {} known for?",
    "What do people like about {}?",
    "When did {} begin?",
    "Can you describe {} in one sentence?",
)
_LOGITS = 1 << 26  # largest number of logits of a batch, over all positions read
_TOKENS = 1 << 15  # largest number of tokens of a batch

State = Callable[[], AbstractContextManager[None]]  # switches a state of the model on


@dataclass(frozen=True)
class Other:
    """A prompt whose answer an edit should not change.

    Attributes:
        fact: The fact's number, or -1 for a prompt that belongs to no fact.
        kind: One of `KINDS`.
        prompt: What the model reads.
        question: The prompt without the wrapping of a chat.
    """

    fact: int
    kind: str
    prompt: str
    question: str


@dataclass(frozen=True)
class Compared:
    """The next-token distributions of a model at the positions of one row, compared with the base model's.

    Attributes:
        same: Whether the first choices agree, for each position.
        kl: KL divergence of the model from the base model in nats, for each position.
    """

    same: tuple[bool, ...]
    kl: tuple[float, ...]


def other_prompts(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], neighbors: int | None = None
) -> list[Other]:
    """Return the prompts that edits of these facts should not change: those of the facts, and packaged ones.

    A prompt of `locality` that names the subject is about the subject, any other is unrelated.

    Args:
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
    """
    others = [
        other for index, request in enumerate(requests) for other in _of_fact(tokenizer, index, request, neighbors)
    ]
    others += [Other(-1, "unrelated", asking(tokenizer, text), text) for text in unrelated_questions()]
    return list(dict.fromkeys(others))


def _of_fact(
    tokenizer: PreTrainedTokenizerBase, index: int, request: EditRequest, neighbors: int | None
) -> Iterator[Other]:
    as_asked = rendered(tokenizer, request)
    for prompt, text in list(zip(as_asked.neighborhood, request.neighborhood, strict=True))[:neighbors]:
        yield Other(index, "neighbors", prompt, text)
    for (prompt, _), (text, _) in zip(as_asked.locality, request.locality, strict=True):
        place = find_subject(text, request.subject)
        yield Other(index, "subject" if place is not None and place.whole else "unrelated", prompt, text)
    for template in _ABOUT_SUBJECT:
        text = template.format(re.sub(r"^The (?=[A-Z])", "the ", request.subject))
        yield Other(index, "subject", asking(tokenizer, text), text)


def asking(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return a question as the model is asked: in its chat template, or as `Q: ...` without one."""
    if getattr(tokenizer, "chat_template", None):
        return conversation(tokenizer, [{"role": "user", "content": question}])
    return f"Q: {question}\nA:"


def continuation_row(lm: LanguageModel, prompt: str, tokens: Sequence[int], finished: bool = False) -> Row:
    """Return a prompt with the tokens that the base model writes after it. These are the row's target.

    Args:
        finished: Whether the base model ends the text there. Then the choice after the last token is compared as well.
    """
    ids = prompt_tokens(lm.tokenizer, prompt)
    written = [*tokens, lm.padding_id] if finished else list(tokens)  # the last token is never read
    return Row(
        (*ids, *written),
        subject=-1,
        target=tuple(range(len(ids), len(ids) + len(written))),
        last=len(ids) + len(written) - 1,
    )


def text_rows(lm: LanguageModel, texts: Sequence[str], most: int = 512) -> list[Row]:
    """Return plain texts as rows. Each token after the first is compared, up to `most` tokens of a text."""
    longest = min(most, lm.max_length or most)
    rows = []
    for text in texts:
        ids = tuple(prompt_tokens(lm.tokenizer, text)[:longest])
        if len(ids) > 1:
            rows.append(Row(ids, subject=-1, target=tuple(range(1, len(ids))), last=len(ids) - 1))
    return rows


@torch.no_grad()
def compare(
    lm: LanguageModel,
    rows: Sequence[Row],
    start: int,
    base: State,
    states: Mapping[str, State],
    description: str = "Comparing texts",
) -> dict[str, list[Compared]]:
    """Compare the distributions that predict the target of each row in some states of the model with the base model's.

    Args:
        rows: Token rows with targets.
        start: First layer with an edit in any of the states.
        base: Returns a context in which the model is the base model.
        states: Returns a context for each state, by its name.
        description: What the progress bar says.
    """
    replay = Replayer(lm.model, lm.architecture, start, whole_rows=True)
    vocabulary: int = lm.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    compared: dict[str, dict[int, Compared]] = {name: {} for name in states}
    is_checked = False
    with evaluating(lm.model), tqdm(total=len(rows), desc=description, unit="text", leave=False) as progress:
        for members in _batches(order, rows, _LOGITS // vocabulary):
            batch = pad([rows[index] for index in members], lm.padding_id, lm.device)
            with base():
                captured = capture(lm.model, lm.architecture, start, batch, {}, use_cache=False)
                if not is_checked:
                    replay.check(captured.select(torch.arange(min(2, len(members)), device=captured.hidden.device)))
                    is_checked = True
            expected = captured.logits.float().log_softmax(-1)
            for name, state in states.items():
                with state():
                    logits = replay(captured)
                same, kl = _differences(expected, logits)
                sizes = [len(rows[index].target) for index in members]
                for index, agree, divergence in zip(members, same.split(sizes), kl.split(sizes), strict=True):
                    compared[name][index] = Compared(tuple(agree.tolist()), tuple(divergence.tolist()))
            progress.update(len(members))
    return {name: [by_row[index] for index in range(len(rows))] for name, by_row in compared.items()}


def _differences(expected: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether first choices agree and the KL divergences, `(M,)` each, for log probabilities `(M, V)`."""
    log_probs = logits.float().log_softmax(-1)
    kl = (expected.exp() * (expected - log_probs)).sum(-1).clamp(min=0)
    return (expected.argmax(-1) == log_probs.argmax(-1)).cpu(), kl.cpu()


def _batches(order: Sequence[int], rows: Sequence[Row], most: int, largest: int = 64) -> Iterator[list[int]]:
    """Yield rows, the shortest first, in batches with at most `most` target tokens."""
    batch: list[int] = []
    size = 0
    for index in order:
        tokens = (len(batch) + 1) * len(rows[index].input_ids)
        if batch and (size + len(rows[index].target) > most or len(batch) >= largest or tokens > _TOKENS):
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += len(rows[index].target)
    if batch:
        yield batch
