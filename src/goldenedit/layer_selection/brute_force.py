"""Brute force: edit facts at every layer and measure the edits. It costs much more than the other selectors.

The other selectors are compared with it. A cell is one editor at one layer on some facts. Each cell is stored at once
as a line of JSON, so that an interrupted sweep continues where it stopped. Values are optimized in batches, under the
change that the editor of the cell makes of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from goldenedit.cache import cache_dir, going_on_without
from goldenedit.config import EditConfig
from goldenedit.cost import Cost, measuring
from goldenedit.editing.gates import known_neurons
from goldenedit.editing.learn import TextStatistics, learn_facts
from goldenedit.editing.prepared import check_editable, prepare_facts
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.statistics import KeyStatistics, UnreadStatistics
from goldenedit.evaluation.counterfact import likelihoods_of_fact
from goldenedit.evaluation.evaluate import Observed, matches_of, observe
from goldenedit.layer_scores import selector
from goldenedit.layer_selection.cells import Cell, CellStore, Outcome, edit_score
from goldenedit.lm import LanguageModel
from goldenedit.lm.covariance import source_name
from goldenedit.parallel import Processes, failing_together
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)

# Options that an edit at a given layer does not depend on.
_IRRELEVANT = (
    *("method", "layer", "layer_pattern", "pattern_layers", "target_layer", "layer_scores", "proxy", "proxy_size"),
    *("lga_loss", "tukey_kappa", "batch_size", "max_perplexity_ratio", "max_text_kl"),
)
_NEIGHBORS = 5
_VERSION = 3  # of the content of cells and the way they are measured
_Deltas = Callable[[list[int]], dict[str, LowRankDelta]]


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep.

    Attributes:
        methods: Editors. Defaults to the config's editor.
        layers: Layers. Defaults to all that can be edited.
        in_batches: Whether editors that are made for batches insert all facts in one batch. Other editors, and all by
            default, insert each fact alone.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
        about: Information for readers of the stored cells.
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
    """Edit facts at each layer with each editor, and return the cells by editor and layer.

    Under `accelerate launch` or torchrun the processes share the layers (see `goldenedit.parallel`).

    Args:
        lm: The model, without edits.
        config: Constants of the editors.
        store: Cells of earlier sweeps, to which new cells are added. Each process has a file of its own.
        options: Editors, layers and prompts.

    Returns:
        Cells by editor and layer. If an editor fails at a layer, there is no such cell, and a warning gives the reason.

    Raises:
        ValueError: A fact cannot be tokenized, or an editor fails at every layer.
    """
    options = options or SweepOptions()
    methods = list(options.methods) or [config.method]
    layers = sorted(lm.architecture.down_projections) if options.layers is None else options.layers
    keys: dict[tuple[str, int], str] = {}
    configs: dict[tuple[str, int], EditConfig] = {}
    for layer, method in product(layers, methods):
        method_options = config.options if method == config.method else {}
        at_layer = replace(config, layer=layer, target_layer=None, layer_pattern="golden")
        configs[method, layer] = replace(at_layer, method=method, options=method_options)
        keys[method, layer] = _key(lm, facts, configs[method, layer], options)
    cells = _stored_cells(store, keys, lm.processes)
    missing = [cell for cell in keys if cell not in cells]
    if not missing:
        return cells
    before = observe(lm, facts, neighbors=options.neighbors)
    edited = sorted({layer for _, layer in missing})
    statistics = _statistics(lm, [configs[cell] for cell in missing], edited)

    def edit_layer(layer: int) -> tuple[dict[tuple[str, int], Cell], str | None]:
        measured: dict[tuple[str, int], Cell] = {}
        edits = _Layer(lm, facts, statistics, before, options)
        failure: str | None = None  # a text, which can be sent to other processes
        for method in methods:
            if (method, layer) not in missing:
                continue
            try:
                cell = edits.cell(configs[method, layer])
            except ValueError as error:
                # Some editors cannot edit every layer, for example AlphaEdit without a null space.
                logger.warning("Layer %d is skipped for %s: %s", layer, method, error)
                failure = str(error)
                continue
            store.add(keys[method, layer], cell, options.about)
            measured[method, layer] = cell
            progress.update()
        return measured, failure

    with tqdm(total=len(missing), desc="Edits at every layer", unit="cell", leave=False) as progress:
        results = lm.processes.map(edit_layer, edited)
    for measured, _ in results:
        cells |= measured
    failures = [failure for _, failure in results if failure is not None]
    if failures and set(methods) > {method for method, _ in cells}:
        raise ValueError(failures[-1])
    return cells


def _statistics(lm: LanguageModel, configs: Sequence[EditConfig], layers: Sequence[int]) -> Mapping[int, KeyStatistics]:
    """Return the statistics of layers that editors read; none if no editor reads them."""
    readers = [config for config in configs if config.editor.reads_statistics]
    statistics = lm.streamed_statistics(readers[0], layers) if readers else {}
    for config in readers:  # of all layers in one pass, at the first call; `lm` keeps them
        lm.output_gradients(config, layers)
    if gating := [config for config in readers if config.editor.gates]:
        known_neurons(lm, gating[0], sorted({*layers, *_layers_of_answers(lm, gating)}))
    return statistics


def _layers_of_answers(lm: LanguageModel, configs: Sequence[EditConfig]) -> set[int]:
    """Return the layers that give the answers of edits; those that cannot be made have none."""
    found = set()
    for config in configs:
        with suppress(ValueError):
            found.add(config.layer_of_answers(lm.architecture.num_layers))
    return {layer for layer in found if layer is not None}


def _stored_cells(
    store: CellStore, keys: Mapping[tuple[str, int], str], processes: Processes
) -> dict[tuple[str, int], Cell]:
    """Return the cells that are stored by any of the processes."""
    stored_here = {cell: store.cells[key] for cell, key in keys.items() if key in store.cells}
    return {cell: content for stored in processes.gather(stored_here) for cell, content in stored.items()}


def edit_constants(config: EditConfig) -> dict[str, Any]:
    """Return the options that an edit at a given layer depends on, without the editor's name."""
    constants = {name: value for name, value in config.to_dict().items() if name not in _IRRELEVANT}
    if not config.options:
        del constants["options"]
    return {**constants, "covariance": source_name(config.covariance)}


def _key(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig, options: SweepOptions) -> str:
    (layer,) = config.target_layers
    return lm.cache_key(
        _VERSION,
        facts=[fact.to_dict() for fact in facts],
        tokens=lm.tokens_of(facts),
        method=[config.method, config.editor.version],
        module=lm.architecture.down_projections[layer],
        constants=edit_constants(config),
        neighbors=options.neighbors,
        together=options.in_batches and config.editor.inserts_batches,
    )


class _Layer:
    """The edits of one layer. Editors that insert the same values share them."""

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

    def cell(self, config: EditConfig) -> Cell:
        """Make and measure the edits of a cell."""
        (layer,) = config.target_layers
        check_editable(self.lm, config, config.target_layers)
        deltas_of, values_cost = self._inserting(config) if config.editor.learns == "values" else self._learning(config)
        every_fact = list(range(len(self.facts)))
        in_one_batch = self.options.in_batches and config.editor.inserts_batches
        outcomes = []
        with measuring() as cost:
            for chosen in [every_fact] if in_one_batch else [[index] for index in every_fact]:
                batch = [self.facts[index] for index in chosen]
                with self.lm.architecture.adding_deltas(self.lm.model, deltas_of(chosen)):
                    after = observe(self.lm, batch, neighbors=self.options.neighbors)
                outcomes += [_outcome(fact, after, self.before, self.options.neighbors) for fact in batch]
        return Cell(config.method, layer, outcomes, values_cost + cost())

    def _inserting(self, config: EditConfig) -> tuple[_Deltas, Cost]:
        """Return a function from indices of facts to the deltas of their edit, and the cost of the values."""
        (layer,) = config.target_layers
        statistics = {layer: self.statistics[layer] if config.editor.reads_statistics else UnreadStatistics()}
        together = self.options.in_batches and config.editor.inserts_batches
        contexts = self.lm.contexts(config)
        with measuring() as cost:
            gradients = self.lm.output_gradients(config, [layer])
            prepared = prepare_facts(self.lm, self.facts, config, contexts, together, statistics, gradients)
        return lambda chosen: prepared.changes(config, statistics, chosen=chosen).deltas, cost()

    def _learning(self, config: EditConfig) -> tuple[_Deltas, Cost]:
        """Return the same for editors that learn; their cost is that of each edit."""
        text = TextStatistics(self.statistics, self.lm.output_gradients(config, config.target_layers))

        def deltas_of(chosen: list[int]) -> dict[str, LowRankDelta]:
            facts = [self.facts[index] for index in chosen]
            return learn_facts(self.lm, facts, config, {}, text).deltas

        return deltas_of, Cost()


def is_comparable(fact: EditRequest) -> bool:
    """Return whether a fact has an old answer, paraphrases and neighbors to compare its answers on."""
    return fact.target_true is not None and bool(fact.paraphrases) and bool(fact.neighborhood)


def tells_locality(fact: EditRequest) -> bool:
    """Return whether a fact has prompts that measure what an edit must not change."""
    return is_comparable(fact) or bool(fact.locality)


def _outcome(fact: EditRequest, after: Observed, before: Observed, neighbors: int | None) -> Outcome:
    likelihoods = likelihoods_of_fact(fact, after.likelihoods, neighbors) if is_comparable(fact) else None
    return Outcome(matches_of(fact, after.likelihoods, before.likelihoods), likelihoods)


@selector("sweep", depends_on=("edit",))
def sweep_scores(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> tuple[Tensor, Cost]:
    """Return S of trial edits at each layer, and their cost. Cells of an interrupted sweep are reused.

    Raises:
        ValueError: No fact has prompts whose answers must stay.
    """
    if not any(tells_locality(fact) for fact in facts):
        raise ValueError(
            "No proxy fact has prompts whose answers must stay, so a sweep cannot compare layers. Add locality, or "
            "paraphrases and neighborhood with target_true."
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
