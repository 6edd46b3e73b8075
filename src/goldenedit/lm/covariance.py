"""Statistics of text by layer: the text they are computed on, and the files they are cached in."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

from torch import Tensor, nn

from goldenedit.cache import cache_dir, is_kept
from goldenedit.config import EditConfig
from goldenedit.editors.gated import InputMoments
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.sampling import sample_continuations
from goldenedit.lm.statistics import (
    check_widths,
    gradient_moments,
    input_moments,
    load_second_moment,
    load_tensors,
    save_second_moment,
    save_tensors,
    second_moments,
)
from goldenedit.parallel import Processes
from goldenedit.records import read_records
from goldenedit.requests import proxy_facts

logger = logging.getLogger(__name__)

_VERSION = 3  # of the choice of text and of the computation on it
GROUP_BYTES = 768 << 20  # of the statistics of layers that are computed in one pass
_OPENING_TOKENS = 8
_SAMPLED_TOKENS = 24  # sampled after each opening


def key_statistics(
    lm: TokenizedModel,
    layers: Sequence[int],
    config: EditConfig,
    processes: Processes | None = None,
) -> dict[int, KeyStatistics]:
    """Return the key statistics of layers. Those that are not cached are computed in one pass, all in memory.

    Args:
        layers: Layers to return statistics of.
        config: Source and amount of text, ridge and seed.
        processes: Processes that ask for the same layers and share the work. Defaults to all that hold the model.

    Raises:
        ValueError: `config.covariance` names no known source, its text is empty, or the keys of fused experts are too
            wide.
    """
    if config.covariance == "identity":
        return dict.fromkeys(layers, KeyStatistics(None))
    processes = lm.processes if processes is None else processes
    paths = {layer: _cache_path(lm, layer, config) for layer in layers}
    with processes.together():
        moments = {layer: moment for layer, path in paths.items() if (moment := load_second_moment(path)) is not None}
        # Machines may have different caches.
        missing = sorted(set().union(*processes.gather({layer for layer in layers if layer not in moments})))
        check_widths(lm, missing)
        if missing:
            texts = _texts(lm, config, processes)
            computed = second_moments(lm, texts, missing, lm.text_tokens(config), processes=processes, hold_keys=True)
            for layer, moment in computed.items():
                save_second_moment(paths[layer], moment)
            moments |= computed
            _warn_of_little_text(computed)
    return {layer: KeyStatistics.of(moments[layer], config.ridge) for layer in layers}


def _warn_of_little_text(moments: Mapping[int, Tensor]) -> None:
    """Log a warning if there are fewer tokens than a key has dimensions: then most directions were never seen."""
    tokens, width = min((moment.shape for moment in moments.values()), key=lambda shape: shape[0] / shape[1])
    if tokens < width:
        logger.warning(
            "The key statistics are of %d tokens of text, but keys have %d dimensions. Edits then change more of other "
            "text. Use more text (EditConfig.covariance, covariance_tokens).",
            tokens,
            width,
        )


def output_gradient_moments(lm: TokenizedModel, layers: Sequence[int], config: EditConfig) -> dict[int, Tensor]:
    """Return `E[g g^T]`, `(d_out, d_out)`, of layers on the text of their key statistics.

    Those that are not cached are computed in one pass. See `goldenedit.lm.statistics.gradient_moments`.

    Raises:
        ValueError: `config.covariance` names no known source or 'identity', or its text is empty.
    """
    if config.covariance == "identity":
        raise ValueError(
            "EditConfig.covariance 'identity' has no text to take gradients on. Set it to a source of text."
        )
    paths = {layer: _cache_path(lm, layer, config, "output_gradients") for layer in layers}
    processes = lm.processes
    with processes.together():
        moments = {layer: moment for layer, path in paths.items() if (moment := load_second_moment(path)) is not None}
        # Machines may have different caches.
        missing = sorted(set().union(*processes.gather({layer for layer in layers if layer not in moments})))
        if missing:
            texts = _texts(lm, config, processes)
            computed = gradient_moments(lm, texts, missing, lm.text_tokens(config), config.seed)
            for layer, moment in computed.items():
                save_second_moment(paths[layer], moment)
            moments |= computed
    return moments


def mlp_moments(lm: TokenizedModel, sites: Mapping[int, nn.Module], config: EditConfig) -> dict[int, InputMoments]:
    """Return the moments of the inputs and of the neurons of MLPs on the text of the key statistics, by layer.

    Those that are not cached are computed in one pass. See `goldenedit.lm.statistics.input_moments`.

    Raises:
        ValueError: `config.covariance` names no known source or 'identity', or its text is empty.
    """
    names = ("mean", "second_moment", "energy")
    paths = {layer: _cache_path(lm, layer, config, "mlp_moments") for layer in sites}
    processes = lm.processes
    with processes.together():
        found = {
            layer: InputMoments(*tensors) for layer, path in paths.items() if (tensors := load_tensors(path, names))
        }
        # Machines may have different caches.
        missing = sorted(set().union(*processes.gather({layer for layer in sites if layer not in found})))
        if missing:
            of_layers = {layer: sites[layer] for layer in missing}
            texts = _texts(lm, config, processes)
            (computed,) = processes.map(  # rounding must not make processes choose different neurons
                lambda _: input_moments(lm, texts, of_layers, lm.text_tokens(config)), [None]
            )
            for layer, moments in computed.items():
                save_tensors(paths[layer], vars(moments))
            found |= computed
    return found


def _cache_path(lm: TokenizedModel, layer: int, config: EditConfig, kind: str = "key_statistics") -> Path:
    """Return the file that a second moment of a layer is cached in."""
    draws = config.covariance == "sampled" or kind == "output_gradients"  # texts, or labels
    source = {
        "text": source_name(config.covariance),
        "tokens": lm.text_tokens(config),
        "seed": config.seed if draws else None,
    }
    key = lm.cache_key(_VERSION, module=lm.architecture.down_projections[layer], **source)
    return cache_dir() / kind / f"{key}.safetensors"


class StreamedStatistics(Mapping[int, KeyStatistics]):
    """Key statistics by layer, read from the cache at each access, because those of all layers may not fit in memory.

    They are computed in groups of consecutive layers, with a pass over the text for each group. Where the cache cannot
    store them, those of one group stay in memory: layers are mostly read in order.

    Attributes:
        in_memory: The statistics that stay in memory, by layer.
    """

    def __init__(self, lm: TokenizedModel, layers: Sequence[int], config: EditConfig) -> None:
        self._lm, self._config, self._layers = lm, config, list(layers)
        self._groups = _groups(lm, layers, config)
        self.in_memory: dict[int, KeyStatistics] = {}
        cached_here = [is_kept(_cache_path(lm, layer, config)) for layer in layers]
        cached = [all(by_process) for by_process in zip(*lm.processes.gather(cached_here), strict=True)]
        missing = {layer for layer, is_cached in zip(layers, cached, strict=True) if not is_cached}
        for group in self._groups:
            if of_group := [layer for layer in group if layer in missing]:
                self._hold_uncached(key_statistics(lm, of_group, config))

    def __getitem__(self, layer: int) -> KeyStatistics:
        if layer in self.in_memory:
            return self.in_memory[layer]
        # Each process reads the layers that it works on.
        this_process = Processes()
        if is_kept(_cache_path(self._lm, layer, self._config)):
            return key_statistics(self._lm, [layer], self._config, this_process)[layer]
        (group,) = (group for group in self._groups if layer in group)
        found = key_statistics(self._lm, group, self._config, this_process)
        self._hold_uncached(found)
        return found[layer]

    def _hold_uncached(self, statistics: Mapping[int, KeyStatistics]) -> None:
        uncached = {
            layer: of_layer
            for layer, of_layer in statistics.items()
            if not is_kept(_cache_path(self._lm, layer, self._config))
        }
        if uncached:
            self.in_memory = uncached

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _groups(lm: TokenizedModel, layers: Sequence[int], config: EditConfig) -> list[list[int]]:
    """Return consecutive layers whose statistics take at most `GROUP_BYTES` together, or one layer alone."""
    groups: list[list[int]] = []
    free, tokens = 0, lm.text_tokens(config)
    for layer in sorted(layers):
        width = lm.architecture.shape(lm.model, layer)[1]
        size = 4 * width * min(width, tokens)  # float32
        if size > free:
            groups.append([])
            free = GROUP_BYTES
        groups[-1].append(layer)
        free -= size
    return groups


def source_name(covariance: str) -> str:
    """Return the name of a source of text in cache keys; for a file, its path, size and modification time."""
    path = Path(covariance)
    if path.is_file():
        status = path.stat()
        return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    return covariance


def _texts(lm: TokenizedModel, config: EditConfig, processes: Processes) -> Sequence[str]:
    """Return the text of statistics, the same in all processes that ask for it together."""
    tokens = lm.text_tokens(config)
    if config.covariance != "sampled":
        (texts,) = processes.map(lambda _: list(islice(dataset_texts(config.covariance), tokens)), [None])
        return texts
    key = tokens, config.seed
    if not all(processes.gather(key in lm.sampled)):
        lm.sampled[key] = sampled_texts(lm, *key, processes)
    return lm.sampled[key]


def sampled_texts(lm: TokenizedModel, tokens: int, seed: int, processes: Processes | None = None) -> list[str]:
    """Return texts of about `tokens` tokens in all, which the model writes after the openings of proxy prompts.

    The prompts bring in names and relations of many kinds. Without them a model rarely writes about these.

    Args:
        processes: Processes that make this call together and share the work. Defaults to this one alone.
    """
    prompts = [prompt for fact in proxy_facts() for prompt in (fact.text, *fact.paraphrases, *fact.neighborhood)]
    # Openings of equal length form one batch. They end anywhere in a phrase, so the model continues all kinds of text.
    cut = [ids[:_OPENING_TOKENS] for ids in lm.tokenizer(prompts)["input_ids"] if len(ids) >= _OPENING_TOKENS]
    count = math.ceil(tokens / (_OPENING_TOKENS + _SAMPLED_TOKENS))
    openings = [str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in islice(cycle(cut), count)]
    return sample_continuations(lm, openings, _SAMPLED_TOKENS, seed, processes=processes)


def dataset_texts(name: str) -> Iterable[str]:
    """Yield the texts of a `.txt` file (one text per line), a JSON or CSV file, or a dataset on the Hub.

    The text of a record is its field `text` or, without that, its longest string.

    Raises:
        ValueError: The file or dataset does not exist, or the file is damaged.
    """
    path = Path(name)
    if path.is_file():
        yield from (_text_of(record.content) for record in read_records(path, plain_text=True))
        return
    from datasets import load_dataset

    try:
        records = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # datasets raises many kinds of errors for missing data
        raise ValueError(
            f"EditConfig.covariance {name!r} is neither an existing file nor a dataset that can be loaded ({error}). "
            "Use 'sampled', 'identity', a file of texts, or the name of a dataset."
        ) from error
    yield from map(_text_of, records)


def _text_of(record: object) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        return max((value for value in record.values() if isinstance(value, str)), key=len, default="")
    return ""
