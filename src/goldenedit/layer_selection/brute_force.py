"""Brute force: edit facts at every layer and look. What the other selectors are measured by, and far dearer.

A cell is one editor at one layer on some facts. Cells are kept as they come, a JSON line each, so that a sweep that was
stopped goes on where it was. Values are optimised side by side, and once for all editors that share them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.architecture.layers import Architecture
from goldenedit.cache import cache_key, going_on_without
from goldenedit.config import TRAINED, EditConfig
from goldenedit.cost import Cost, measuring
from goldenedit.editing.base_facts import BaseFacts
from goldenedit.editing.covariance import LazyStatistics, source_name
from goldenedit.editing.delta import LowRankDelta
from goldenedit.editing.edit import PreparedFacts, check_method, prepare_facts, train_facts
from goldenedit.editing.statistics import KeyStatistics
from goldenedit.evaluation.counterfact import likelihoods_of_fact
from goldenedit.evaluation.evaluate import Observed, matches_of, observe
from goldenedit.evaluation.scores import (
    FactLikelihoods,
    FactMatches,
    harmonic_mean,
    probability_scores,
    token_match_scores,
)
from goldenedit.parallel import Processes, processes_of
from goldenedit.precision import matmul_precision
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)

# What an edit at a given layer does not depend on.
_IRRELEVANT = (
    *("method", "layer", "layer_pattern", "pattern_layers", "target_layer", "layer_scores", "proxy", "proxy_size"),
    *("lga_loss", "tukey_kappa", "batch_size", "max_perplexity_ratio"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one fact, in the families of scores that it has prompts for.

    Attributes:
        matches: Token match, which every fact has.
        likelihoods: NLLs of new and old answer, where the fact has paraphrases and neighbours to compare them on.
    """

    matches: FactMatches
    likelihoods: FactLikelihoods | None = None

    @property
    def score(self) -> float:
        """Mean of this fact's scores: to find its own best layer by, where a harmonic mean would mostly be 0."""
        if self.likelihoods is not None:
            scores = probability_scores([self.likelihoods])
            parts = [scores.efficacy, scores.paraphrase, scores.neighborhood]
        else:
            matched = token_match_scores([self.matches])
            parts = [matched.rewrite, matched.rephrase, matched.locality]
        return fmean(part for part in parts if part is not None)


def edit_score(outcomes: Sequence[Outcome]) -> float:
    """Return S of some edits: the harmonic mean of ES, PS and NS, or of rewrite, rephrase and locality.

    The first where every fact has likelihoods, the second, of those that there are, elsewhere.
    """
    likelihoods = [one.likelihoods for one in outcomes if one.likelihoods is not None]
    if len(likelihoods) == len(outcomes):
        score = probability_scores(likelihoods).score
        assert score is not None  # such facts have paraphrases and neighbours
        return score
    matched = token_match_scores([one.matches for one in outcomes])
    return harmonic_mean([part for part in (matched.rewrite, matched.rephrase, matched.locality) if part is not None])


@dataclass(frozen=True)
class Cell:
    """One editor at one layer: what became of each fact, and what it cost to find out."""

    method: str
    layer: int
    outcomes: list[Outcome]
    cost: Cost

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cell:
        """Read a cell as `dataclasses.asdict` wrote it."""
        outcomes = [
            Outcome(FactMatches(**one["matches"]), one["likelihoods"] and _likelihoods(one["likelihoods"]))
            for one in record["outcomes"]
        ]
        return cls(record["method"], record["layer"], outcomes, Cost(**record["cost"]))


def _likelihoods(record: Mapping[str, Any]) -> FactLikelihoods:
    pairs = {name: [tuple(pair) for pair in record[name]] for name in ("paraphrases", "neighborhood")}
    return FactLikelihoods(tuple(record["rewrite"]), **pairs, paraphrase_accuracy=record["paraphrase_accuracy"])


class CellStore:
    """Cells in a JSON-lines file, found again by a key of all that they depend on.

    Args:
        path: The file that new cells are added to.
        others: Files to read as well: those of other processes.
        is_cache: Whether cells are kept to save time and nothing else: where the files cannot be read or written, a
            warning says so, instead of an error.
    """

    def __init__(self, path: Path, others: Iterable[Path] = (), is_cache: bool = False) -> None:
        self.path = path
        self.is_cache = is_cache
        self.cells: dict[str, Cell] = {}
        for file in {path, *others}:
            with self._access(file, "read"):
                self._read(file)

    def add(self, key: str, cell: Cell, about: Mapping[str, Any]) -> None:
        """Keep a cell, with what a reader of the file should know of it."""
        self.cells[key] = cell
        with self._access(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **about, **asdict(cell)}) + "\n")

    def _access(self, file: Path, access: str) -> AbstractContextManager[None]:
        return going_on_without(file, access) if self.is_cache else nullcontext()

    def _read(self, file: Path) -> None:
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                self.cells[record["key"]] = Cell.from_dict(record)
            except (ValueError, KeyError, TypeError):  # a process that was killed leaves half a line
                logger.warning("Line %d of %s is no cell: it is measured again.", number, file)
        if text and not text.endswith("\n") and file == self.path:
            with file.open("a", encoding="utf-8") as end:
                end.write("\n")


def sweep(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditRequest],
    config: EditConfig,
    base_facts: BaseFacts,
    store: CellStore,
    methods: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    together: Collection[str] = (),
    neighbors: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[tuple[str, int], Cell]:
    """Edit the facts at each layer with each editor, and return what became of them by editor and layer.

    Under `accelerate launch` or torchrun the layers are shared among the processes (see `goldenedit.parallel`).

    Args:
        model: The model, without edits.
        config: Constants of the editors.
        store: Where cells are taken from and kept; each process adds to a file of its own.
        methods: Editors; by default the config's.
        layers: Layers; by default all that can be edited.
        together: Editors that insert all facts at once, as batches are; the others each fact alone.
        neighbors: Use the first so many neighbourhood prompts of each fact; None for all.
        about: What a reader of the store should know of these cells.

    Returns:
        Cells by editor and layer; those of layers that an editor failed at are not there, and a warning says why.

    Raises:
        ValueError: A fact cannot be tokenised, or an editor fails at every layer.
    """
    methods = list(methods) or [config.method]
    layers = sorted(architecture.down_projections) if layers is None else layers
    wanted: dict[tuple[str, int], tuple[str, EditConfig]] = {}
    for layer, method in product(layers, methods):
        own = replace(config, method=method, layer=layer, layer_pattern="golden")
        key = _key(facts, own, architecture, base_facts.fingerprint, neighbors, method in together)
        wanted[method, layer] = key, own
    found = _known(store, {cell: key for cell, (key, _) in wanted.items()}, processes_of(model))
    missing = {cell: parts for cell, parts in wanted.items() if cell not in found}
    if not missing:
        return found
    before = observe(model, tokenizer, facts, neighbors=neighbors)
    statistics: Mapping[int, KeyStatistics] = {}
    edited = sorted({layer for _, layer in missing})
    if any(method not in TRAINED for method, _ in missing):
        statistics = LazyStatistics(model, architecture, tokenizer, edited, config, base_facts.fingerprint)

    def edit_layer(layer: int) -> tuple[dict[tuple[str, int], Cell], ValueError | None]:
        made: dict[tuple[str, int], Cell] = {}
        shared: dict[bool, tuple[PreparedFacts, Cost]] = {}  # values are those of one layer
        failed: ValueError | None = None
        for method in methods:
            if (method, layer) not in missing:
                continue
            key, own = missing[method, layer]
            try:
                cell = _cell(
                    model,
                    architecture,
                    tokenizer,
                    facts,
                    own,
                    base_facts,
                    statistics,
                    shared,
                    together,
                    before,
                    neighbors,
                )
            except ValueError as error:  # some editors cannot work everywhere: AlphaEdit, where there is no null space
                logger.warning("Layer %d is left out for %s: %s", layer, method, error)
                failed = error
                continue
            store.add(key, cell, about or {})
            made[method, layer] = cell
            progress.update()
        return made, failed

    with tqdm(total=len(missing), desc="Edits at every layer", unit="cell", leave=False) as progress:
        results = processes_of(model).map(edit_layer, edited)
    for made, _ in results:
        found |= made
    failures = [failed for _, failed in results if failed is not None]
    if failures and set(methods) > {method for method, _ in found}:
        raise failures[-1]
    return found


def _known(store: CellStore, keys: Mapping[tuple[str, int], str], processes: Processes) -> dict[tuple[str, int], Cell]:
    """Return the cells that any of the processes has."""
    own = {cell: store.cells[key] for cell, key in keys.items() if key in store.cells}
    return {cell: one for part in processes.gather(own) for cell, one in part.items()}


def edit_constants(config: EditConfig) -> dict[str, Any]:
    """Return the options that decide what an edit at a given layer does, beside the editor."""
    constants = {name: value for name, value in config.to_dict().items() if name not in _IRRELEVANT}
    return {**constants, "covariance": source_name(config.covariance)}


def _key(
    facts: Sequence[EditRequest],
    config: EditConfig,
    architecture: Architecture,
    fingerprint: str,
    neighbors: int | None,
    together: bool,
) -> str:
    (layer,) = config.target_layers
    precision = matmul_precision()
    return cache_key(
        facts=[fact.to_dict() for fact in facts],
        method=config.method,
        module=architecture.down_projections[layer],
        constants=edit_constants(config),
        fingerprint=fingerprint,
        neighbors=neighbors,
        together=together,
        # Only where products are rounded, so that a key holds for all machines that do not.
        **({} if precision == "highest" else {"matmul": precision}),
    )


def _cell(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditRequest],
    config: EditConfig,
    base_facts: BaseFacts,
    statistics: Mapping[int, KeyStatistics],
    shared: dict[bool, tuple[PreparedFacts, Cost]],
    together: Collection[str],
    before: Observed,
    neighbors: int | None,
) -> Cell:
    """Make the edits of one cell; `shared` has the values that editors of the same layer found before."""
    (layer,) = config.target_layers
    find, spent = _finder(model, architecture, tokenizer, facts, config, base_facts, statistics, shared)
    everything = list(range(len(facts)))
    outcomes = []
    with measuring() as cost:
        for chosen in [everything] if config.method in together else [[index] for index in everything]:
            edited = [facts[index] for index in chosen]
            (delta,) = find(chosen).values()
            with architecture.adding_delta(model, layer, delta.A, delta.B):
                now = observe(model, tokenizer, edited, neighbors=neighbors)
            outcomes += [_outcome(fact, now, before, neighbors) for fact in edited]
    return Cell(config.method, layer, outcomes, spent + cost())


def _finder(
    model: nn.Module,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditRequest],
    config: EditConfig,
    base_facts: BaseFacts,
    statistics: Mapping[int, KeyStatistics],
    shared: dict[bool, tuple[PreparedFacts, Cost]],
) -> tuple[Callable[[list[int]], dict[str, LowRankDelta]], Cost]:
    """Return a function of fact indices to the delta of their edit, and what was spent before it is called."""
    check_method(model, architecture, config, config.target_layers)
    if config.method in TRAINED:
        return (
            lambda chosen: (
                train_facts(model, architecture, tokenizer, [facts[index] for index in chosen], config, {}).deltas
            ),
            Cost(),
        )
    contexts = base_facts.contexts(model, config)
    attention = config.method == "pmet"
    if attention not in shared:
        with measuring() as cost:
            prepared = prepare_facts(model, architecture, tokenizer, facts, config, contexts)
        shared[attention] = prepared, cost()
    prepared, spent = shared[attention]
    (layer,) = config.target_layers
    own = {layer: statistics[layer]}
    return lambda chosen: prepared.changes(config, own, chosen=chosen).deltas, spent


def is_comparable(fact: EditRequest) -> bool:
    """Tell whether new and old answer can be compared on paraphrases and neighbours of a fact."""
    return fact.target_true is not None and bool(fact.paraphrases) and bool(fact.neighborhood)


def tells_locality(fact: EditRequest) -> bool:
    """Tell whether S of a fact's edit says something of what must stay."""
    return is_comparable(fact) or bool(fact.locality)


def _outcome(fact: EditRequest, now: Observed, before: Observed, neighbors: int | None) -> Outcome:
    likelihoods = likelihoods_of_fact(fact, now.found, neighbors) if is_comparable(fact) else None
    return Outcome(matches_of(fact, now.found, before.found), likelihoods)
