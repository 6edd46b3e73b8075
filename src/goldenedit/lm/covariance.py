"""Which text the key statistics come from, and where they are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from goldenedit.cache import cache_dir, is_kept
from goldenedit.config import EditConfig
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.sampling import sample_continuations
from goldenedit.lm.statistics import check_widths, load_second_moment, save_second_moment, second_moments
from goldenedit.parallel import Processes
from goldenedit.records import read_records
from goldenedit.requests import proxy_facts

_VERSION = 2  # of which text is taken, and of what is computed on it
_OPENING_TOKENS = 8
_SAMPLED_TOKENS = 24  # drawn behind each opening


def key_statistics(
    lm: TokenizedModel,
    layers: Sequence[int],
    config: EditConfig,
    processes: Processes | None = None,
) -> dict[int, KeyStatistics]:
    """Return the key statistics of each wanted layer; what is not cached is computed in one pass.

    Args:
        processes: Those that want the same layers, and share what is computed; by default all that have the model.

    Raises:
        ValueError: `config.covariance` is no known source or has no text, or the keys of experts are too wide for it.
    """
    if config.covariance == "identity":
        return dict.fromkeys(layers, KeyStatistics(None))
    processes = lm.processes if processes is None else processes
    paths = {layer: _cached(lm, layer, config) for layer in layers}
    with processes.together():
        moments = {layer: moment for layer, path in paths.items() if (moment := load_second_moment(path)) is not None}
        # Caches may differ between machines.
        missing = sorted(set().union(*processes.gather({layer for layer in layers if layer not in moments})))
        check_widths(lm, missing)
        if missing:
            (texts,) = processes.map(lambda _: _texts(lm, config), [None])  # the same for all
            found = second_moments(lm, texts, missing, config.covariance_tokens, processes=processes)
            for layer, moment in found.items():
                save_second_moment(paths[layer], moment)
            moments |= found
    return {layer: KeyStatistics(moments[layer], config.ridge) for layer in layers}


def _cached(lm: TokenizedModel, layer: int, config: EditConfig) -> Path:
    """Return the file that the second moment of a layer is kept in."""
    seed = config.seed if config.covariance == "sampled" else None
    source = {"text": source_name(config.covariance), "tokens": config.covariance_tokens, "seed": seed}
    key = lm.cache_key(_VERSION, module=lm.architecture.down_projections[layer], **source)
    return cache_dir() / "key_statistics" / f"{key}.safetensors"


class StreamedStatistics(Mapping[int, KeyStatistics]):
    """The key statistics of layers, read from the cache at each access and not held: those of all layers are large.

    Where the cache cannot be written they are held all the same: computing them again for each layer takes minutes.
    """

    def __init__(self, lm: TokenizedModel, layers: Sequence[int], config: EditConfig) -> None:
        self._layers = list(layers)
        # Each process reads the layers that it works on.
        alone = Processes()
        self._read = lambda wanted: key_statistics(lm, wanted, config, alone)
        paths = {layer: _cached(lm, layer, config) for layer in layers}
        there = [is_kept(paths[layer]) for layer in layers]
        known = [all(found) for found in zip(*lm.processes.gather(there), strict=True)]
        missing = [layer for layer, is_known in zip(layers, known, strict=True) if not is_known]
        self._held: dict[int, KeyStatistics] = {}
        if missing:
            computed = key_statistics(lm, missing, config)  # in one pass
            self._held = {layer: _in_memory(computed[layer]) for layer in missing if not is_kept(paths[layer])}

    def __getitem__(self, layer: int) -> KeyStatistics:
        return self._held[layer] if layer in self._held else self._read([layer])[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _in_memory(statistics: KeyStatistics) -> KeyStatistics:
    """Return statistics as they are when they are read from the cache: not on an accelerator."""
    moment = statistics.second_moment
    return statistics if moment is None else KeyStatistics(moment.cpu(), statistics.ridge)


def source_name(covariance: str) -> str:
    """Return what names the text of a covariance in a cache: its source, with size and time of a file."""
    path = Path(covariance)
    if path.is_file():
        status = path.stat()
        return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    return covariance


def _texts(lm: TokenizedModel, config: EditConfig) -> Sequence[str]:
    if config.covariance == "sampled":
        return sampled_texts(lm, config.covariance_tokens, config.seed)
    return list(islice(dataset_texts(config.covariance), config.covariance_tokens))


def sampled_texts(lm: TokenizedModel, tokens: int, seed: int) -> list[str]:
    """Return texts of about `tokens` tokens that the model itself wrote, each begun by a prompt of the proxy set.

    The prompts bring names and relations of many kinds, which a model left to itself writes about rarely.
    """
    prompts = [prompt for fact in proxy_facts() for prompt in (fact.text, *fact.paraphrases, *fact.neighborhood)]
    # Cut to one length: then all of them are one batch, and the model begins in the middle of a phrase as in its end.
    cut = [ids[:_OPENING_TOKENS] for ids in lm.tokenizer(prompts)["input_ids"] if len(ids) >= _OPENING_TOKENS]
    count = min(len(cut), math.ceil(tokens / (_OPENING_TOKENS + _SAMPLED_TOKENS)))
    openings = [str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in cut[:count]]
    rounds = math.ceil(tokens / (count * (_OPENING_TOKENS + _SAMPLED_TOKENS)))
    return [text for turn in range(rounds) for text in sample_continuations(lm, openings, _SAMPLED_TOKENS, seed + turn)]


def dataset_texts(name: str) -> Iterable[str]:
    """Yield the texts of a dataset: a `.txt` (a text a line), `.json` or `.jsonl` file, or a name on the Hub.

    Of each record the field `text` is taken, or else its longest string.

    Raises:
        ValueError: There is no such file or dataset, or the file is damaged.
    """
    path = Path(name)
    if path.is_file():
        yield from (_text_of(record.content) for record in read_records(path, plain_text=True))
        return
    from datasets import load_dataset

    try:
        records = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # datasets raises many kinds for one thing: there is no such data
        raise ValueError(
            f"EditConfig.covariance {name!r} is neither 'sampled', 'identity', a file, nor a dataset that can be "
            f"loaded ({error})."
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
