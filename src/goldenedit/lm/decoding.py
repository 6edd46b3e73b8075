"""Greedy texts of a model, in batches of similar length, until each text ends.

A row leaves its batch when its text ends. Rows of different lengths are padded on the left, and rows that begin with
the same tokens run these once. Whether a model then gives the same logits as for each row alone is checked with its
first batch, and again when rows have much more padding. If it does not, shared beginnings run with each row, or only
rows of equal length run together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import tqdm

from goldenedit.architecture.caching import cache_argument, cache_of
from goldenedit.architecture.hooks import evaluating, reading_logits
from goldenedit.architecture.replay import NO_CACHE, takes_positions
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.sampling import continuation
from goldenedit.lm.tokens import prompt_tokens

logger = logging.getLogger(__name__)

_SHARED = 16  # a common beginning of at least so many tokens, in at least so many rows, runs once
_SHARING = 3
_TOKENS = 1 << 15  # largest number of tokens of a batch, with those to be written: what its cache has room for
_TOLERANCE = 1e-3  # largest difference of logits that counts as rounding, relative to the largest logit


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a prompt.

    Attributes:
        tokens: The tokens after the prompt, without the token that ends a text.
        text: Their text, with the space between it and the prompt.
        finished: Whether the model ended the text itself.
    """

    tokens: tuple[int, ...]
    text: str
    finished: bool


Ends = Callable[[str], bool]  # whether a text needs no more tokens
Within = Callable[[Sequence[int]], AbstractContextManager[None]]


@dataclass
class _Row:
    """One prompt, and the tokens that the model has written after it."""

    index: int
    ids: list[int]
    new: list[int] = field(default_factory=list)
    finished: bool = False  # the model ended its text
    done: bool = False  # or no more tokens are needed


def greedy(
    lm: TokenizedModel,
    prompts: Sequence[str],
    max_new_tokens: int = 50,
    ends: Ends | None = None,
    batch_size: int = 128,
    description: str = "Asking",
    within: Within | None = None,
) -> list[Continuation]:
    """Return the greedy continuation of each prompt.

    Args:
        lm: The model. Its active adapters take effect.
        prompts: Texts, or chats rendered by `goldenedit.lm.chat`.
        max_new_tokens: Largest number of tokens to write. A text also ends where the model's context does.
        ends: Called with a text after each token; the text needs no more tokens where it returns True.
        batch_size: Largest number of rows of a forward. Batches of long prompts have fewer.
        description: What the progress bar says.
        within: Returns a context for a forward over the prompts with these numbers, in the order of its rows: for
            models that differ by row.

    Raises:
        ValueError: A prompt has no tokens or fills the model's context, or the logits are not finite.

    Example:
        ```python
        >>> from goldenedit.lm.decoding import greedy
        >>> greedy(lm, ["The Eiffel Tower is located in the city of"], max_new_tokens=1)[0].text
        ' Paris'
        ```
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    rows = [_Row(index, prompt_tokens(lm.tokenizer, prompt)) for index, prompt in enumerate(prompts)]
    for row, prompt in zip(rows, prompts, strict=True):
        if not row.ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens. Use another prompt.")
        if lm.max_length is not None and len(row.ids) >= lm.max_length:
            raise ValueError(
                f"{prompt!r} has {len(row.ids)} tokens, but the model takes {lm.max_length} with the answer. Shorten "
                "the prompt."
            )
    decoder = _Decoder(lm, max_new_tokens, ends, within)
    with (
        torch.no_grad(),
        evaluating(lm.model),
        tqdm(total=len(rows), desc=description, unit="text", leave=False) as progress,
    ):
        while pending := [row for row in rows if not row.done]:
            for batch in decoder.batches(pending, batch_size):
                decoder.run(batch, progress.update)
    return [
        Continuation(tuple(row.new), continuation(lm.tokenizer, [*row.ids, *row.new], len(row.ids)), row.finished)
        for row in rows
    ]


class _Decoder:
    """Runs batches of rows, and remembers which ways of batching are exact for the model."""

    def __init__(self, lm: TokenizedModel, max_new_tokens: int, ends: Ends | None, within: Within | None) -> None:
        self.lm = lm
        self.within = within
        self.max_new_tokens = max_new_tokens
        self.ends = ends
        self.end_tokens = _end_tokens(lm)
        self.uses_cache = True
        self.pads = takes_positions(lm.model)
        self.shares = within is None  # shared tokens run for all rows at once
        # The most padding of a row that was checked, by whether the rows shared their beginning.
        self._checked: dict[bool, int] = {}

    def batches(self, pending: Sequence[_Row], batch_size: int) -> Iterator[list[_Row]]:
        """Yield rows to run together: those that share a beginning first, then the shortest.

        It ends early once a batch has shown that another way of batching is needed.
        """
        way = self._way
        can_share = self.pads and self.shares and self.uses_cache
        for group in _sharing(pending) if can_share else ():
            while len(group) >= _SHARING:
                batch = self._first_of(group, batch_size)
                yield batch
                if self._way != way:
                    return
                group = group[len(batch) :]
        left = sorted((row for row in pending if not row.done), key=lambda row: len(row.ids))
        while left:
            batch = self._first_of(left, batch_size)
            yield batch
            if self._way != way:
                return
            left = left[len(batch) :]

    @property
    def _way(self) -> tuple[bool, bool, bool]:
        """How rows are batched."""
        return self.uses_cache, self.pads, self.shares

    def _first_of(self, rows: Sequence[_Row], batch_size: int) -> list[_Row]:
        """Return the first rows that can run together, of rows in ascending order of length."""
        batch = list(rows[:batch_size])
        if not self.pads:
            batch = [row for row in batch if len(row.ids) == len(batch[0].ids)]
        while len(batch) > 1 and len(batch) * (len(batch[-1].ids) + self.max_new_tokens) > _TOKENS:
            batch.pop()  # the longest
        return batch

    def run(self, rows: Sequence[_Row], on_finished: Callable[[int], Any]) -> None:
        """Write the continuations of rows."""
        batch = self._started(rows)
        if batch is None:
            ordered = sorted(rows, key=lambda row: len(row.ids))
            for _, group in groupby(ordered, key=lambda row: 0 if self.pads else len(row.ids)):
                self.run(list(group), on_finished)
            return
        while True:
            going_on = [place for place, row in enumerate(batch.rows) if self._takes(row, batch.logits[place])]
            on_finished(batch.active - len(going_on))
            if not going_on:
                return
            try:
                batch.keep(going_on)
            except NO_CACHE:
                self.uses_cache, batch.past = False, None
                batch.keep(going_on)
            self._step(batch)
            _check_finite(batch.logits)

    def _takes(self, row: _Row, logits: Tensor) -> bool:
        """Add the likeliest token to a row, and return whether the row goes on."""
        if row.done:
            return False
        token = int(logits.argmax())
        row.finished = token in self.end_tokens
        if not row.finished:
            row.new.append(token)
        is_full = len(row.new) >= self.max_new_tokens or len(row.ids) + len(row.new) == self.lm.max_length
        row.done = row.finished or is_full or self._ends(row)
        return not row.done

    def _ends(self, row: _Row) -> bool:
        if self.ends is None:
            return False
        text = str(self.lm.tokenizer.decode(row.new, skip_special_tokens=True))
        return not text.endswith("\ufffd") and self.ends(text)  # the last character may lack bytes

    def _started(self, rows: Sequence[_Row]) -> _Batch | None:
        """Run the prompts. If the model does not give each row its own logits like this, the result is None."""
        shared = self._shared(rows)
        batch = _Batch(self.lm, rows, shared)
        if shared:
            try:
                batch.advance(use_cache=True)
            except NO_CACHE:  # of recurrent models, for example
                self.shares = False
                return None
        else:
            self._step(batch)
        lengths = [len(row.ids) for row in rows]
        padding = max(lengths) - min(lengths)
        # Rows that are a little longer are wrong by a little: the first check may pass by luck.
        if (padding or shared) and padding > 2 * self._checked.get(bool(shared), -1):
            place = lengths.index(min(lengths))  # the row with most padding
            alone = _Batch(self.lm, [rows[place]], 0)
            self._step(alone)
            gap = (alone.logits[0].float() - batch.logits[place].float()).abs().max()
            if not gap <= self._tolerance(alone.logits):
                self.shares, self.pads = self.shares and not shared, self.pads and bool(shared)
                return None
            self._checked[bool(shared)] = padding
        _check_finite(batch.logits)
        return batch

    def _shared(self, rows: Sequence[_Row]) -> int:
        """Return the number of tokens that all rows begin with, 0 if they are not worth running once."""
        text_config = self.lm.model.config.get_text_config()  # type: ignore[operator, union-attr]
        window = getattr(text_config, "sliding_window", None)
        longest = max(len(row.ids) for row in rows) + self.max_new_tokens
        if (
            len(rows) < _SHARING
            or not (self.pads and self.shares and self.uses_cache)
            or (window and longest >= window)
        ):
            return 0  # padding after the shared tokens would push them out of the window
        shortest = min(len(row.ids) for row in rows) - 1  # at least one token of each row is read with the others
        shared = next((place for place in range(shortest) if len({row.ids[place] for row in rows}) > 1), shortest)
        return shared if shared >= _SHARED else 0

    def _step(self, batch: _Batch) -> None:
        """Compute the logits after the last token of each row."""
        if self.uses_cache:
            try:
                self._advance(batch, use_cache=True)
            except NO_CACHE:
                self.uses_cache, batch.past = False, None
        if not self.uses_cache:
            self._advance(batch, use_cache=False)

    def _advance(self, batch: _Batch, use_cache: bool) -> None:
        with nullcontext() if self.within is None else self.within([row.index for row in batch.rows]):
            batch.advance(use_cache)

    def _tolerance(self, logits: Tensor) -> float:
        share = _TOLERANCE if logits.dtype in (torch.float32, torch.float64) else 30 * _TOLERANCE
        return share * float(logits.float().abs().max())


class _Batch:
    """Rows that run together: shared tokens, then padding, then the other tokens of each row.

    Attributes:
        rows: The rows, in the order of the tensors.
        active: The number of rows that go on.
        past: The model's cache.
        logits: `(B, V)`, logits after the last token of each row.
    """

    logits: Tensor

    def __init__(self, lm: TokenizedModel, rows: Sequence[_Row], shared: int) -> None:
        self.lm = lm
        self.rows = list(rows)
        self.active = len(rows)
        self.past: Any = None
        self._shared = shared
        width = max(len(row.ids) for row in rows)
        pads = [width - len(row.ids) for row in rows]
        self._is_padded = any(pads) or shared > 0
        padded = [
            [*row.ids[:shared], *[lm.padding_id] * pad, *row.ids[shared:]] for row, pad in zip(rows, pads, strict=True)
        ]
        self._tokens = torch.tensor(padded, device=lm.device)
        self._mask = torch.ones_like(self._tokens)
        for place, pad in enumerate(pads):
            self._mask[place, shared : shared + pad] = 0

    def advance(self, use_cache: bool) -> None:
        """Read the tokens that were not read yet."""
        model, new = self.lm.model, self._tokens
        if use_cache and self.past is None and self._shared:
            first = model(input_ids=new[:1, : self._shared], use_cache=True, logits_to_keep=1)
            self.past = cache_of(first)
            self.past.batch_repeat_interleave(len(new))
            new = new[:, self._shared :]
        elif use_cache and self.past is not None:
            new = new[:, -1:]
        rows = torch.arange(len(new), device=new.device)
        positions = {}
        if self._is_padded:
            positions["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with reading_logits(model, rows, torch.full_like(rows, new.shape[1] - 1)) as logits_of:
            past = cache_argument(model, self.past)
            output = model(input_ids=new, attention_mask=self._mask, use_cache=use_cache, **past, **positions)
            self.logits = logits_of(output)
        self.past = cache_of(output) if use_cache else None

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows and their newest tokens. Where the cache cannot drop the others, they are ignored."""
        self.active = len(places)
        if len(places) < len(self.rows) and (self.past is None or _can_select(self.past)):
            index = torch.tensor(places)  # on the CPU: the layers of the cache may be on several devices
            if self.past is not None:  # first: if it fails, the rows are as they were
                self.past.batch_select_indices(index)
            self.rows = [self.rows[place] for place in places]
            self._tokens, self._mask = self._tokens[index], self._mask[index]
            if self.past is None:  # some models ignore the mask of a single row
                columns = self._mask.any(0)
                self._tokens, self._mask = self._tokens[:, columns], self._mask[:, columns]
        newest = torch.tensor([[row.new[-1] if row.new else 0] for row in self.rows], device=self._tokens.device)
        self._tokens = torch.cat([self._tokens, newest], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(newest)], dim=1)


def _can_select(past: Any) -> bool:
    """Return whether a cache can drop rows. Layers of linear attention cannot."""
    return isinstance(past, DynamicCache) and all(hasattr(layer, "batch_select_indices") for layer in past.layers)


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise ValueError("The model's logits are not finite. Load it in float32 or bfloat16.")


def _sharing(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Yield groups of rows that begin with the same tokens, each in ascending order of length."""
    by_beginning = sorted(
        (row for row in rows if len(row.ids) > _SHARED), key=lambda row: (row.ids[:_SHARED], len(row.ids))
    )
    for _, group in groupby(by_beginning, key=lambda row: row.ids[:_SHARED]):
        if len(members := list(group)) >= _SHARING:
            yield members


def _end_tokens(lm: TokenizedModel) -> set[int]:
    """Return the tokens that end a text or a turn."""
    owners = (lm.tokenizer, lm.model.config, getattr(lm.model, "generation_config", None))
    tokens: set[int] = set()
    for owner in owners:
        value = getattr(owner, "eos_token_id", None)
        tokens |= set(value) if isinstance(value, list | tuple) else set() if value is None else {value}
    return tokens
