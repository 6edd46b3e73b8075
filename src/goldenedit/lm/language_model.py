"""A causal LM as editing sees it: the model, its tokenizer, and what is computed from them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture import Architecture
from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editors import KeyStatistics
from goldenedit.editors.gated import InputMoments
from goldenedit.editors.statistics import UnreadStatistics
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.covariance import (
    StreamedStatistics,
    key_statistics,
    mlp_moments,
    output_gradient_moments,
    source_name,
)
from goldenedit.lm.decoding import Continuation, Ends, greedy
from goldenedit.lm.perplexity import perplexity, sample_texts
from goldenedit.lm.sampling import sample_contexts
from goldenedit.requests import ChatText
from goldenedit.storage.fingerprint import Hashed

_FLAT_TOKENS = 2_000  # of text for output gradients of editors that insert values, which need them coarsely


class LanguageModel(TokenizedModel):
    """A causal LM of transformers with its tokenizer, its architecture, and what edits need of it.

    Contexts, key statistics, perplexity and answers are computed at the first call for each set of options, then kept.
    They describe the unedited model: the caller switches all edits off before asking for them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        architecture: Paths of the layers and of their parts. By default two tiny forwards find them.
        weights: Hashes of the weights. By default they are computed.
        beside: A short name for the adapters on the model that are not edits.

    Example:
        ```python
        >>> from goldenedit.lm import LanguageModel
        >>> lm = LanguageModel(model, tokenizer)
        >>> lm.architecture.down_projections[3]
        'model.layers.3.mlp.down_proj'
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        architecture: Architecture | None = None,
        weights: Hashed | None = None,
        beside: str = "",
    ) -> None:
        super().__init__(model, tokenizer, architecture, weights, beside)
        self._contexts: dict[tuple[int, int, int], list[str]] = {}
        self._statistics: dict[tuple[object, ...], KeyStatistics] = {}
        self._output_gradients: dict[tuple[object, ...], Tensor] = {}
        self._mlp_moments: dict[tuple[object, ...], InputMoments] = {}
        self._streamed: dict[tuple[object, ...], StreamedStatistics] = {}
        self._perplexity: float | None = None
        self._answers: dict[tuple[str, bool, int, Ends | None], Continuation] = {}

    def contexts(self, config: EditConfig) -> list[str]:
        """Return the prefixes of prompts that a config asks for. The first one is empty."""
        key = (config.contexts, config.context_length, config.seed)
        if key not in self._contexts:
            with phase("contexts"):
                self._contexts[key] = sample_contexts(self, *key)
        return self._contexts[key]

    def statistics(self, config: EditConfig, layers: Sequence[int]) -> dict[int, KeyStatistics]:
        """Return the key statistics of layers. Those that are missing are computed in one pass.

        For an editor that does not read key statistics, nothing is computed.
        """
        if _inserts_without_statistics(config):
            return dict.fromkeys(layers, UnreadStatistics())
        options = self._statistics_options(config)
        missing = [layer for layer in layers if (layer, *options) not in self._statistics]
        if missing:
            with phase("key statistics"):
                computed = key_statistics(self, missing, config)
            self._statistics |= {(layer, *options): statistics for layer, statistics in computed.items()}
        return {layer: self._statistics[(layer, *options)] for layer in layers}

    def streamed_statistics(
        self, config: EditConfig, layers: Sequence[int] | None = None, *, for_editor: bool = False
    ) -> Mapping[int, KeyStatistics]:
        """Return the key statistics of layers, by default of all. Each is read at access and not kept in memory.

        Args:
            config: Source and amount of text, ridge and seed.
            layers: Layers to return statistics of.
            for_editor: Whether the config's editor is to read them. For one that reads none, nothing is computed.
        """
        layers = sorted(self.architecture.down_projections) if layers is None else layers
        if for_editor and _inserts_without_statistics(config):
            return dict.fromkeys(layers, UnreadStatistics())
        options = self._statistics_options(config)
        key = (tuple(layers), *options)
        if key not in self._streamed:
            streamed = self._streamed[key] = StreamedStatistics(self, layers, config)
            # `statistics` need not compute those again that the cache could not store.
            self._statistics |= {(layer, *options): statistics for layer, statistics in streamed.in_memory.items()}
        return self._streamed[key]

    def output_gradients(self, config: EditConfig, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the second moment of the output gradients of layers on the text of the key statistics, by layer.

        For an editor that does not read them, nothing is computed. Those that insert values read them, unless the text
        is the identity, or the layer has fused experts, whose outputs are not those of a module.
        """
        inserts = config.editor.learns == "values" and config.flat_directions and config.optimizer == "normalized"
        possible = config.covariance != "identity" and not set(layers) & set(self.architecture.experts)
        plain = config.editor.vectors == ("mlp",) and config.editor.reads_statistics
        if not config.editor.reads_output_gradients and not (inserts and possible and plain):
            return {}
        if inserts:
            config = replace(config, covariance_tokens=min(self.text_tokens(config), _FLAT_TOKENS))
        options = self._statistics_options(config)
        missing = [layer for layer in layers if (layer, *options) not in self._output_gradients]
        if missing:
            with phase("output gradients"):
                computed = output_gradient_moments(self, missing, config)
            self._output_gradients |= {(layer, *options): moment for layer, moment in computed.items()}
        return {layer: self._output_gradients[(layer, *options)] for layer in layers}

    def _statistics_options(self, config: EditConfig) -> list[object]:
        """Return the options that key statistics depend on."""
        return [source_name(config.covariance), self.text_tokens(config), config.ridge, config.seed]

    def mlp_moments(self, config: EditConfig, sites: Mapping[int, nn.Module]) -> dict[int, InputMoments]:
        """Return the moments of MLPs on the text of the key statistics. See `goldenedit.lm.covariance.mlp_moments`."""
        options = [source_name(config.covariance), self.text_tokens(config), config.seed]
        missing = {layer: site for layer, site in sites.items() if (layer, *options) not in self._mlp_moments}
        if missing:
            with phase("MLP statistics"):
                computed = mlp_moments(self, missing, config)
            self._mlp_moments |= {(layer, *options): moments for layer, moments in computed.items()}
        return {layer: self._mlp_moments[(layer, *options)] for layer in sites}

    def answers(self, prompts: Sequence[str], max_new_tokens: int, ends: Ends | None) -> list[Continuation]:
        """Return the greedy continuation of each prompt. See `goldenedit.lm.decoding.greedy` for the arguments."""
        keys = [(prompt, isinstance(prompt, ChatText), max_new_tokens, ends) for prompt in prompts]
        missing = dict.fromkeys(key for key in keys if key not in self._answers)
        if missing:
            by_key = {key: prompt for key, prompt in zip(keys, prompts, strict=True)}
            written = greedy(
                self, [by_key[key] for key in missing], max_new_tokens, ends, description="Asking the base model"
            )
            self._answers |= dict(zip(missing, written, strict=True))
        return [self._answers[key] for key in keys]

    def perplexity(self) -> float:
        """Return the perplexity of the model on plain statements."""
        if self._perplexity is None:
            self._perplexity = perplexity(self, sample_texts())
        return self._perplexity


def _inserts_without_statistics(config: EditConfig) -> bool:
    """Return whether the config's editor inserts values and reads no key statistics."""
    return config.editor.learns == "values" and not config.editor.reads_statistics
