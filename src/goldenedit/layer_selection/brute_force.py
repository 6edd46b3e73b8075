"""Brute force: edit facts at every layer and measure the edits. It costs much more than the other selectors.

The other selectors are compared with it. A cell is one editor at one layer on some facts. Each cell is stored at once
as a line of JSON, so that an interrupted sweep continues where it stopped. Values are optimized in batches, under the
change that the editor of the cell makes of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
from goldenedit.editing.learn import TextStatistics, learn_each, learn_facts
from goldenedit.editing.prepared import Changes, check_editable, prepare_facts
from goldenedit.editors.statistics import KeyStatistics, UnreadStatistics
from goldenedit.layer_scores import selector
from goldenedit.layer_selection.cells import Cell, CellStore, edit_score
from goldenedit.layer_selection.trials import Trial, Trials, is_comparable
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
_VERSION = 4  # of the content of cells and the way they are measured


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep.

    Attributes:
        methods: Editors. Defaults to the config's editor.
        layers: Layers. Defaults to all that can be edited.
        in_batches: Whether editors that are made for batches insert all facts in one batch. Other editors, and all by
            default, insert each fact alone.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
        sees: Whether to measure what a user sees, beside the scores of papers.
        about: Information for readers of the stored cells.
    """

    methods: Sequence[str] = ()
    layers: Sequence[int] | None = None
    in_batches: bool = False
    neighbors: int | None = None
    sees: bool = False
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
    configs = {(method, layer): _at(config, method, layer) for layer, method in product(layers, methods)}
    keys = {cell: _key(lm, facts, of_cell, options) for cell, of_cell in configs.items()}
    cells = _stored_cells(store, keys, lm.processes)
    missing = [cell for cell in keys if cell not in cells]
    if not missing:
        return cells
    trials = Trials(lm, facts, options.neighbors, options.sees)
    edited = sorted({layer for _, layer in missing})
    statistics = read_statistics(lm, [configs[cell] for cell in missing], edited)

    def edit_layer(layer: int) -> tuple[dict[tuple[str, int], Cell], str | None]:
        made: dict[str, tuple[list[Trial], Cost]] = {}
        edits = _Layer(lm, facts, statistics, options)
        failure: str | None = None  # a text, which can be sent to other processes
        for method in methods:
            if (method, layer) not in missing:
                continue
            try:
                made[method] = edits.edits(configs[method, layer])
            except ValueError as error:
                # Some editors cannot edit every layer, for example AlphaEdit without a null space.
                logger.warning("Layer %d is skipped for %s: %s", layer, method, error)
                failure = str(error)
        every = [trial for several, _ in made.values() for trial in several]
        with measuring() as cost:
            outcomes = iter(trials.outcomes(every, layer) if every else ())
        measured: dict[tuple[str, int], Cell] = {}
        for method, (several, of_edits) in made.items():
            of_facts = {
                fact: outcome for trial in several for fact, outcome in zip(trial.facts, next(outcomes), strict=True)
            }
            share = Cost(cost().seconds / len(made), cost().flops // len(made))
            cell = Cell(method, layer, [of_facts[fact] for fact in range(len(facts))], of_edits + share)
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


def missing_layers(
    lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig, store: CellStore, options: SweepOptions
) -> list[int]:
    """Return the layers of `options` at which the config's editor was not measured on these facts, by any process."""
    layers = options.layers or ()
    keys = {(config.method, layer): _key(lm, facts, _at(config, config.method, layer), options) for layer in layers}
    stored = _stored_cells(store, keys, lm.processes)
    return [layer for layer in layers if (config.method, layer) not in stored]


def _at(config: EditConfig, method: str, layer: int) -> EditConfig:
    """Return the config of a cell. Options by name are those of the config's own editor."""
    at_layer = replace(config, layer=layer, target_layer=None, layer_pattern="golden")
    return replace(at_layer, method=method, options=config.options if method == config.method else {})


def read_statistics(
    lm: LanguageModel, configs: Sequence[EditConfig], layers: Sequence[int]
) -> Mapping[int, KeyStatistics]:
    """Return the statistics of layers that editors read, from the cache or now; none if no editor reads them."""
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
        sees=options.sees,
        together=options.in_batches and config.editor.inserts_batches,
    )


class _Layer:
    """The edits of one layer."""

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[EditRequest],
        statistics: Mapping[int, KeyStatistics],
        options: SweepOptions,
    ) -> None:
        self.lm = lm
        self.facts = facts
        self.statistics = statistics
        self.options = options

    def edits(self, config: EditConfig) -> tuple[list[Trial], Cost]:
        """Make the edits of a cell, and return them with their cost."""
        check_editable(self.lm, config, config.target_layers)
        every_fact = list(range(len(self.facts)))
        in_one_batch = self.options.in_batches and config.editor.inserts_batches
        calls = [every_fact] if in_one_batch else [[index] for index in every_fact]
        with measuring() as cost:
            make = self._inserted if config.editor.learns == "values" else self._learned
            changes = make(config, calls)
            trials = [Trial(facts, one.deltas) for facts, one in zip(calls, changes, strict=True)]
        return trials, cost()

    def _inserted(self, config: EditConfig, calls: Sequence[Sequence[int]]) -> list[Changes]:
        (layer,) = config.target_layers
        statistics = {layer: self.statistics[layer] if config.editor.reads_statistics else UnreadStatistics()}
        contexts, gradients = self.lm.contexts(config), self.lm.output_gradients(config, [layer])
        together = len(calls) < len(self.facts)
        prepared = prepare_facts(self.lm, self.facts, config, contexts, together, statistics, gradients)
        return [prepared.changes(config, statistics, chosen=facts) for facts in calls]

    def _learned(self, config: EditConfig, calls: Sequence[Sequence[int]]) -> list[Changes]:
        text = TextStatistics(self.statistics, self.lm.output_gradients(config, config.target_layers))
        if len(calls) == len(self.facts):
            return learn_each(self.lm, self.facts, config, text)
        return [learn_facts(self.lm, [self.facts[fact] for fact in facts], config, {}, text) for facts in calls]


def tells_locality(fact: EditRequest) -> bool:
    """Return whether a fact has prompts that measure what an edit must not change."""
    return is_comparable(fact) or bool(fact.locality)


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
