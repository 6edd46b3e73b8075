"""A causal LM with its tokenizer and architecture. Everything that runs the model takes one of these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture import Architecture, read_architecture
from goldenedit.cache import cache_key
from goldenedit.config import EditConfig
from goldenedit.devices import input_device
from goldenedit.lm.tokens import context_length, padding_id, tokenizer_state
from goldenedit.parallel import Processes, processes_of
from goldenedit.precision import matmul_precision
from goldenedit.requests import EditRequest, proxy_facts
from goldenedit.storage.fingerprint import Hashed, weight_hashes


class TokenizedModel:
    """A causal LM of transformers, its tokenizer and its architecture.

    Attributes:
        model: The model. Adapters that are active on it take effect.
        tokenizer: Its tokenizer.
        beside: A short name for the adapters on the model that are not edits.
        sampled: Texts that the unedited model wrote, by their tokens and seed. All statistics are of the same texts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        architecture: Architecture | None = None,
        weights: Hashed | None = None,
        beside: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.beside = beside
        self.sampled: dict[tuple[int, int], list[str]] = {}
        self._tokenizer_state = tokenizer_state(tokenizer)
        if architecture is not None:
            self.architecture = architecture
        if weights is not None:
            self.weights = weights

    @cached_property
    def architecture(self) -> Architecture:
        """The paths of the model's layers and of their parts."""
        return read_architecture(self.model)

    @cached_property
    def weights(self) -> Hashed:
        """Hashes of the base weights."""
        return weight_hashes(self.model)

    def tokenizes_with(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether a tokenizer is the one given at the start, as it was then."""
        return tokenizer is self.tokenizer and tokenizer_state(tokenizer) == self._tokenizer_state

    @property
    def fingerprint(self) -> str:
        """A short name for the weights and for the adapters that are active beside them."""
        fingerprint = self.weights.fingerprint
        return cache_key(fingerprint=fingerprint, beside=self.beside) if self.beside else fingerprint

    @property
    def device(self) -> torch.device:
        """The device that the input tokens must be on."""
        return input_device(self.model)

    @property
    def max_length(self) -> int | None:
        """The longest sequence the model takes in tokens, or None if its config does not say."""
        return context_length(self.model.config)

    def text_tokens(self, config: EditConfig) -> int:
        """Return the number of tokens of text for key statistics: the config's, or as many as the widest keys need."""
        widths = [self.architecture.shape(self.model, layer)[1] for layer in self.architecture.down_projections]
        return config.text_tokens(max(widths, default=1))

    @property
    def padding_id(self) -> int:
        """The id of a token to pad with."""
        return padding_id(self.tokenizer)

    @cached_property
    def tokenization(self) -> str:
        """A short name for how the tokenizer splits texts. Cached results of other tokens are not used."""
        template = str(getattr(self.tokenizer, "chat_template", None))
        return cache_key(tokens=self.tokens_of(proxy_facts()), template=template)

    def tokens_of(self, facts: Sequence[EditRequest]) -> str:
        """Return a short name for how the tokenizer splits facts."""
        records = [json.dumps(fact.to_dict(), ensure_ascii=False) for fact in facts]
        return cache_key(ids=self.tokenizer(records)["input_ids"] if records else [])

    def cache_key(self, version: int, **parts: Any) -> str:
        """Return a short name for a result that is computed with this model.

        Args:
            version: Version of the algorithm that computes the result.
            **parts: What else the result depends on, as values that JSON can hold.
        """
        precision = matmul_precision()
        # Only where matrix products are rounded: all machines that do not round share a name.
        rounded = {} if precision == "highest" else {"matmul": precision}
        return cache_key(
            fingerprint=self.fingerprint, tokenization=self.tokenization, version=version, **rounded, **parts
        )

    @property
    def processes(self) -> Processes:
        """The processes that each hold this model and share the work."""
        return processes_of(self.model)
