"""Brute force: edit facts at every layer and look. What the other selectors are measured by, and far dearer.

A cell is one editor at one layer on some facts. Cells are kept as they come, a JSON line each, so that a sweep that was
stopped goes on where it was. Values are optimized side by side, and once for all editors that share them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from goldenedit.cache import cache_dir, going_on_without
from goldenedit.config import EditConfig
from goldenedit.cost import Cost, measuring
from goldenedit.editing.edit import PreparedFacts, check_editable, prepare_facts
from goldenedit.editing.learn import learn_facts
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.evaluation.counterfact import likelihoods_of_fact
from goldenedit.evaluation.evaluate import Observed, matches_of, observe
from goldenedit.evaluation.scores import (
    FactLikelihoods,
    FactMatches,
    harmonic_mean,
    probability_scores,
    token_match_scores,
)
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.lm.covariance import source_name
from goldenedit.parallel import Processes, failing_together
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)

# What an edit at a given layer does not depend on.
_IRRELEVANT = (
    *("method", "layer", "layer_pattern", "pattern_layers", "target_layer", "layer_scores", "proxy", "proxy_size"),
    *("lga_loss", "tukey_kappa", "batch_size", "max_perplexity_ratio"),
)
_NEIGHBORS = 5
_VERSION = 1  # of what a cell holds and how it is measured
_Deltas = Callable[[list[int]], dict[str, LowRankDelta]]


@dataclass(frozen=True)
class Outcome:
    """What became of one fact, in the families of scores that it has prompts for.

    Attributes:
        matches: Token match, which every fact has.
        likelihoods: NLLs of new and old answer, where the fact has paraphrases and neighbors to compare them on.
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
        assert score is not None  # such facts have paraphrases and neighbors
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


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures.

    Attributes:
        methods: Editors; by default the config's.
        layers: Layers; by default all that can be edited.
        in_batches: Whether editors that are made for batches insert all facts at once; others do each fact alone.
        neighbors: Use the first so many neighborhood prompts of each fact; None for all.
        about: What a reader of the store should know of these cells.
    """

    methods: Sequence[str] = ()
    layers: Sequence[int] | None = None
    in_batches: bool = False
    neighbors: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@failing_together
def sweep(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    config: EditConfig,
    store: CellStore,
    options: SweepOptions | None = None,
) -> dict[tuple[str, int], Cell]:
    """Edit the facts at each layer with each editor, and return what became of them by editor and layer.

    Under `accelerate launch` or torchrun the layers are shared among the processes (see `goldenedit.parallel`).

    Args:
        lm: The model, without edits.
        config: Constants of the editors.
        store: Where cells are taken from and kept; each process adds to a file of its own.
        options: What is measured.

    Returns:
        Cells by editor and layer; those of layers that an editor failed at are not there, and a warning says why.

    Raises:
        ValueError: A fact cannot be tokenized, or an editor fails at every layer.
    """
    options = options or SweepOptions()
    methods = list(options.methods) or [config.method]
    layers = sorted(lm.architecture.down_projections) if options.layers is None else options.layers
    wanted: dict[tuple[str, int], tuple[str, EditConfig]] = {}
    for layer, method in product(layers, methods):
        own = config.options if method == config.method else {}
        of_cell = replace(config, method=method, options=own, layer=layer, target_layer=None, layer_pattern="golden")
        wanted[method, layer] = _key(lm, facts, of_cell, options), of_cell
    cells = _known(store, {cell: key for cell, (key, _) in wanted.items()}, lm.processes)
    missing = {cell: parts for cell, parts in wanted.items() if cell not in cells}
    if not missing:
        return cells
    before = observe(lm, facts, neighbors=options.neighbors)
    statistics: Mapping[int, KeyStatistics] = {}
    edited = sorted({layer for _, layer in missing})
    if any(of_cell.editor.learns == "values" for _, of_cell in missing.values()):
        statistics = lm.streamed_statistics(config, edited)

    def edit_layer(layer: int) -> tuple[dict[tuple[str, int], Cell], str | None]:
        measured: dict[tuple[str, int], Cell] = {}
        at_layer = _Layer(lm, facts, statistics, before, options)
        failed: str | None = None  # in words, which every process can read
        for method in methods:
            if (method, layer) not in missing:
                continue
            key, of_cell = missing[method, layer]
            try:
                cell = at_layer.cell(of_cell)
            except ValueError as error:  # some editors cannot work everywhere: AlphaEdit, where there is no null space
                logger.warning("Layer %d is left out for %s: %s", layer, method, error)
                failed = str(error)
                continue
            store.add(key, cell, options.about)
            measured[method, layer] = cell
            progress.update()
        return measured, failed

    with tqdm(total=len(missing), desc="Edits at every layer", unit="cell", leave=False) as progress:
        results = lm.processes.map(edit_layer, edited)
    for measured, _ in results:
        cells |= measured
    failures = [failed for _, failed in results if failed is not None]
    if failures and set(methods) > {method for method, _ in cells}:
        raise ValueError(failures[-1])
    return cells


def _known(store: CellStore, keys: Mapping[tuple[str, int], str], processes: Processes) -> dict[tuple[str, int], Cell]:
    """Return the cells that any of the processes has."""
    here = {cell: store.cells[key] for cell, key in keys.items() if key in store.cells}
    return {cell: content for part in processes.gather(here) for cell, content in part.items()}


def edit_constants(config: EditConfig) -> dict[str, Any]:
    """Return the options that decide what an edit at a given layer does, beside the editor."""
    constants = {name: value for name, value in config.to_dict().items() if name not in _IRRELEVANT}
    if not config.options:
        del constants["options"]
    return {**constants, "covariance": source_name(config.covariance)}


def _key(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig, options: SweepOptions) -> str:
    (layer,) = config.target_layers
    return lm.cache_key(
        _VERSION,
        facts=[fact.to_dict() for fact in facts],
        method=config.method,
        module=lm.architecture.down_projections[layer],
        constants=edit_constants(config),
        neighbors=options.neighbors,
        together=options.in_batches and config.editor.inserts_batches,
    )


class _Layer:
    """Makes the edits of one layer; editors that insert the same values share them."""

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[EditRequest],
        statistics: Mapping[int, KeyStatistics],
        before: Observed,
        options: SweepOptions,
    ) -> None:
        self.lm = lm
        self.facts = facts
        self.statistics = statistics
        self.before = before
        self.options = options
        self._prepared: dict[tuple[str, ...], tuple[PreparedFacts, Cost]] = {}

    def cell(self, config: EditConfig) -> Cell:
        """Make the edits of a cell, and measure each."""
        (layer,) = config.target_layers
        check_editable(self.lm, config, config.target_layers)
        deltas_of, spent = self._inserting(config) if config.editor.learns == "values" else self._learning(config)
        everything = list(range(len(self.facts)))
        at_once = self.options.in_batches and config.editor.inserts_batches
        outcomes = []
        with measuring() as cost:
            for chosen in [everything] if at_once else [[index] for index in everything]:
                edited = [self.facts[index] for index in chosen]
                (delta,) = deltas_of(chosen).values()
                with self.lm.architecture.adding_delta(self.lm.model, layer, delta.A, delta.B):
                    now = observe(self.lm, edited, neighbors=self.options.neighbors)
                outcomes += [_outcome(fact, now, self.before, self.options.neighbors) for fact in edited]
        return Cell(config.method, layer, outcomes, spent + cost())

    def _inserting(self, config: EditConfig) -> tuple[_Deltas, Cost]:
        """Return a function of fact indices to the delta of their edit, and what the values cost."""
        vectors = config.editor.vectors
        if vectors not in self._prepared:
            contexts = self.lm.contexts(config)
            with measuring() as cost:
                prepared = prepare_facts(self.lm, self.facts, config, contexts)
            self._prepared[vectors] = prepared, cost()
        prepared, spent = self._prepared[vectors]
        (layer,) = config.target_layers
        statistics = {layer: self.statistics[layer]}
        return lambda chosen: prepared.changes(config, statistics, chosen=chosen).deltas, spent

    def _learning(self, config: EditConfig) -> tuple[_Deltas, Cost]:
        return (lambda chosen: learn_facts(self.lm, [self.facts[index] for index in chosen], config, {}).deltas), Cost()


def is_comparable(fact: EditRequest) -> bool:
    """Tell whether new and old answer can be compared on paraphrases and neighbors of a fact."""
    return fact.target_true is not None and bool(fact.paraphrases) and bool(fact.neighborhood)


def tells_locality(fact: EditRequest) -> bool:
    """Tell whether S of a fact's edit says something of what must stay."""
    return is_comparable(fact) or bool(fact.locality)


def _outcome(fact: EditRequest, now: Observed, before: Observed, neighbors: int | None) -> Outcome:
    likelihoods = likelihoods_of_fact(fact, now.found, neighbors) if is_comparable(fact) else None
    return Outcome(matches_of(fact, now.found, before.found), likelihoods)


@selector("sweep", depends_on=("edit",))
def sweep_scores(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> tuple[Tensor, Cost]:
    """Return S of the facts' edits at each layer, and the cost of all of them; cells of a stopped run are at hand.

    Raises:
        ValueError: No fact has prompts whose answers must stay.
    """
    if not any(tells_locality(fact) for fact in facts):
        raise ValueError(
            "No proxy fact has prompts whose answers must stay (locality, or paraphrases and neighborhood with "
            "target_true): a sweep could not tell layers apart."
        )
    folder = cache_dir() / "cells"
    index = lm.processes.index
    path, others = folder / f"{lm.fingerprint}-{index}.jsonl", list[Path]()
    with going_on_without(path, "read"):
        others = list(folder.glob(f"{lm.fingerprint}-*.jsonl"))
    store = CellStore(path, others, is_cache=True)
    cells = sweep(lm, facts, config, store, SweepOptions(neighbors=_NEIGHBORS))
    scores = torch.full((lm.architecture.num_layers,), torch.nan, dtype=torch.float64)
    cost = Cost()
    for (_, layer), cell in cells.items():
        scores[layer] = edit_score(cell.outcomes)
        cost += cell.cost
    return scores, cost
