"""What an edit needs to know of the base model, found once: contexts, key statistics, perplexity."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.layers import Architecture
from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.contexts import sample_contexts
from goldenedit.editing.covariance import key_statistics
from goldenedit.editing.statistics import KeyStatistics
from goldenedit.evaluation.perplexity import perplexity, sample_texts
from goldenedit.storage.fingerprint import Hashed


class BaseFacts:
    """Contexts, key statistics and perplexity of a base model, each found when first asked for with these options.

    Every method takes the base model with its edits switched off.
    """

    def __init__(self, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, weights: Hashed) -> None:
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.weights = weights
        self.fingerprint = weights.fingerprint
        self._contexts: dict[tuple[int, int, int], list[str]] = {}
        self._statistics: dict[tuple[object, ...], KeyStatistics] = {}
        self._perplexity: float | None = None

    def contexts(self, base: nn.Module, config: EditConfig) -> list[str]:
        """Return the prefixes to prompts."""
        key = (config.contexts, config.context_length, config.seed)
        if key not in self._contexts:
            with phase("contexts"):
                self._contexts[key] = sample_contexts(base, self.tokenizer, *key)
        return self._contexts[key]

    def statistics(self, base: nn.Module, config: EditConfig) -> dict[int, KeyStatistics]:
        """Return the key statistics of the target layers; those that are missing are computed in one pass."""
        options = (config.covariance, config.covariance_tokens, config.ridge, config.seed)
        missing = [layer for layer in config.target_layers if (layer, *options) not in self._statistics]
        if missing:
            with phase("key statistics"):
                found = key_statistics(base, self.architecture, self.tokenizer, missing, config, self.fingerprint)
            self._statistics |= {(layer, *options): statistics for layer, statistics in found.items()}
        return {layer: self._statistics[(layer, *options)] for layer in config.target_layers}

    def perplexity(self, base: nn.Module) -> float:
        """Return the perplexity on plain statements."""
        if self._perplexity is None:
            self._perplexity = perplexity(base, self.tokenizer, sample_texts())
        return self._perplexity
