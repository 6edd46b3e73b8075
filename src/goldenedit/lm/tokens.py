"""From texts to token rows, with the position of the subject's last token and those of the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.replay import Batch
from goldenedit.formats.fields import shortened
from goldenedit.requests import Answer, ChatText, EditRequest
from goldenedit.writing import joint_of

_MERGED = (
    "The tokenizer merges the start of the answer {!r} with the end of the prompt {!r}. End the prompt at a token "
    "boundary."
)


@dataclass(frozen=True)
class Row:
    """One token sequence.

    Attributes:
        input_ids: Its tokens, special tokens included.
        subject: Index of the last token of the subject; -1 if the row has no subject.
        target: Indices of the answer's tokens; empty if the row has no answer.
        last: Index of the last token of the text. Some tokenizers append a special token to it.
        kept: Without an answer, the positions whose logits are read; by default the last one.
    """

    input_ids: tuple[int, ...]
    subject: int
    target: tuple[int, ...]
    last: int
    kept: tuple[int, ...] = ()

    @property
    def target_ids(self) -> list[int]:
        """The answer's tokens."""
        return [self.input_ids[index] for index in self.target]

    @property
    def reads(self) -> list[int]:
        """Positions whose logits predict the answer's tokens; without an answer, `kept` or the last position."""
        return [index - 1 for index in self.target] if self.target else list(self.kept or (self.last,))


def with_answer(prompt: str, answer: str) -> str:
    """Join a prompt and its answer as people write them: with a space, or without one where it would be wrong.

    An answer that begins with whitespace keeps it, and an `Answer` carries its own joint. Any other answer follows a
    chat as the chat template writes it, and a plain prompt by the rules of `goldenedit.writing.joint_of`.
    """
    text = prompt + _joint(prompt, answer) + answer
    return ChatText(text) if isinstance(prompt, ChatText) else text


def _joint(prompt: str, answer: str) -> str:
    if isinstance(answer, Answer):
        return answer.joint
    if isinstance(prompt, ChatText):
        return "" if answer[:1].isspace() else prompt.joint
    return joint_of(prompt, answer)


class TooLongError(ValueError):
    """A text has more tokens than the model takes."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str | None = None,
    subject_end: int | None = None,
    max_length: int | None = None,
) -> Row:
    """Tokenize a prompt with its answer, and find the tokens of subject and answer.

    Args:
        prompt: The text before the answer.
        answer: The text after the prompt, joined by `with_answer`.
        subject_end: Index in `prompt` of the first character after the subject.
        max_length: Largest number of tokens that the model takes.

    Raises:
        TooLongError: The row is longer than `max_length`.
        ValueError: The answer has no tokens of its own, or the subject has no token.
    """
    text = prompt if answer is None else with_answer(prompt, answer)
    ids, spans = _tokens_with_spans(tokenizer, text)
    if answer is not None and any(start < len(prompt.rstrip()) and end > len(prompt) for start, end in spans):
        ids, spans = _apart(tokenizer, prompt, text, ids)
    if max_length is not None and len(ids) > max_length:
        raise TooLongError(
            f"{shortened(prompt)} and its answer have {len(ids)} tokens, but the model takes {max_length}. Shorten "
            "them."
        )
    subject = -1
    if subject_end is not None:
        covering = [index for index, (start, end) in enumerate(spans) if start < subject_end <= end]
        if not covering:
            raise ValueError(
                f"The tokenizer has no token for the end of the subject in {prompt!r}. Use another subject."
            )
        subject = covering[-1]
    target = tuple(index for index, (_, end) in enumerate(spans) if end > len(prompt)) if answer is not None else ()
    if answer is not None and not target:
        raise ValueError(f"The answer {answer!r} has no tokens after {prompt!r}. Use another answer.")
    if target and target[0] <= max(subject, 0):
        raise ValueError(_MERGED.format(answer, prompt))
    last = max((index for index, (_, end) in enumerate(spans) if end > 0), default=len(ids) - 1)
    return Row(tuple(ids), subject, target, last)


def encode_request(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    answer: str | None = None,
    context: str = "",
    max_length: int | None = None,
    ends: bool = False,
    shortens: bool = True,
) -> Row:
    """Tokenize a request with a context before its prompt; in a chat, before the words of the user.

    Args:
        ends: Whether the token that ends the turn of a chat belongs to the answer.
        shortens: Whether the context gives way to a request that fits without it.

    Raises:
        ValueError: See `encode`.
    """
    prompt, start = request.text, 0
    if answer is not None:  # fixed before the context is added, which may open a quotation
        end = prompt.end if ends and isinstance(prompt, ChatText) else ""
        answer = Answer(answer + end, _joint(prompt, answer))
    if isinstance(prompt, ChatText):
        start = prompt.context_start
    elif context and is_rendered(tokenizer, prompt):  # behind the line of the role
        begin = len(str(tokenizer.bos_token)) if begins_by_itself(tokenizer, prompt) else 0
        start = max(prompt.rfind("\n", 0, request.subject_start) + 1, begin)
    while True:
        text = prompt[:start] + context + prompt[start:]
        if isinstance(prompt, ChatText):
            text = ChatText(text, prompt.joint)
        try:
            return encode(tokenizer, text, answer, len(context) + request.subject_end, max_length)
        except TooLongError:
            if not context or not shortens:
                raise
            # Of a language without spaces, half of the context goes.
            context = context.partition(" ")[2] if " " in context else context[len(context) // 2 + 1 :]


def begins_by_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text has the token that begins texts already, as the output of a chat template does."""
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def is_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text has special tokens in it, as the output of a chat template does."""
    ids = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token != tokenizer.unk_token_id]
    return tokenizer.decode(ids) != tokenizer.decode(ids, skip_special_tokens=True)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens that the model continues: those of the prompt, without special tokens after it."""
    row = encode(tokenizer, prompt)
    return list(row.input_ids[: row.last + 1])


def _apart(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, ids: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of a prompt, then those of its answer, where `ids` merge characters of both into one token.

    A model that is asked reads the prompt's own tokens, and its answer begins with a new token.

    Args:
        text: The prompt with its answer.
        ids: Tokens of `text`.
    """
    prompt_ids, spans = _tokens_with_spans(tokenizer, prompt)
    length = len(prompt_tokens(tokenizer, prompt))
    # After a line break no tokenizer treats the answer as the start of a text.
    answer_ids, answer_spans = _tokens_with_spans(tokenizer, ChatText("\n" + text[len(prompt) :]))
    first = next((index for index, (_, end) in enumerate(answer_spans) if end > 1), len(answer_ids))
    apart = [*prompt_ids[:length], *answer_ids[first:]]
    decoded_apart, decoded = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (apart, list(ids)))
    if answer_spans[first][0] < 1 or decoded_apart != decoded:
        raise ValueError(_MERGED.format(text[len(prompt) :], prompt))
    shift = len(prompt) - 1
    return apart, [*spans[:length], *((start + shift, end + shift) for start, end in answer_spans[first:])]


def subject_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, start: int, end: int) -> list[int]:
    """Return the tokens that cover the characters `start:end` of a prompt."""
    ids, spans = _tokens_with_spans(tokenizer, prompt)
    return [ids[index] for index in _touching(spans, start, end)]


def subject_span(tokenizer: PreTrainedTokenizerBase, prompt: str, start: int, end: int) -> list[int]:
    """Return the indices of the tokens that cover the characters `start:end` of a prompt."""
    return _touching(_tokens_with_spans(tokenizer, prompt)[1], start, end)


def _touching(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    return [index for index, (first, last) in enumerate(spans) if first < end and last > start]


def _tokens_with_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of `text` and the characters `(start, end)` each covers; an added special token covers none."""
    chat = isinstance(text, ChatText) or begins_by_itself(tokenizer, text)  # the text contains the special tokens
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
        return list(encoding["input_ids"]), [(int(start), int(end)) for start, end in encoding["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    special = set() if chat else set(tokenizer.all_special_ids)
    plain = [[token for token in ids[:count] if token not in special] for count in range(len(ids) + 1)]
    decoded = [
        str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False))
        for tokens in plain
    ]
    if decoded[-1].strip() != text.strip():
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offsets and does not decode {text!r} to itself, so the tokens of the "
            "subject are unknown. Use a fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    shift = len(text) - len(text.lstrip()) - (len(decoded[-1]) - len(decoded[-1].lstrip()))
    # An incomplete character of several bytes decodes to a replacement character, which does not count.
    lengths = (len(part.rstrip("\ufffd")) + shift for part in decoded)
    ends = accumulate((min(max(length, 0), len(text)) for length in lengths), max)
    spans: list[tuple[int, int]] = []
    visible = 0
    for token, (start, end) in reversed(list(zip(ids, pairwise(ends), strict=True))):
        visible = end if end > start else max(visible, end)  # a token without text belongs to the next character
        spans.append((0, 0) if token in special else (start, visible))
    return ids, spans[::-1]


def pad(rows: Sequence[Row], pad_token_id: int, device: torch.device | str) -> Batch:
    """Pad rows on the right. The batch reads the logits that predict the answers, row by row."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention_mask[index, : len(row.input_ids)] = 1
    reads = [(index, position) for index, row in enumerate(rows) for position in row.reads]
    read_rows, read_positions = torch.tensor(reads).T
    subject = torch.tensor([row.subject for row in rows])
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        subject=subject.to(device),
        read_rows=read_rows.to(device),
        read_positions=read_positions.to(device),
    )


def target_ids(rows: Sequence[Row], device: torch.device | str) -> Tensor:
    """Return the answers' tokens in the order of the logits that `pad` reads; 0 where a row has no answer."""
    tokens = [token for row in rows for token in (row.target_ids or [0] * len(row.reads))]
    return torch.tensor(tokens, device=device)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """Return what users change on a tokenizer: its chat template, its tokens, and those it adds to a text."""
    template = str(getattr(tokenizer, "chat_template", None))
    return template, len(tokenizer), tuple(tokenizer("a b")["input_ids"])


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with. Padding is masked, so any token works."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if isinstance(token, int):
            return token
    return 0


def context_length(config: object) -> int | None:
    """Return the longest sequence a model with this config takes in tokens, or None if the config does not say."""
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
