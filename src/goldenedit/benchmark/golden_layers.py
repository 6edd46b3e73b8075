"""Is there a golden layer, and who finds it? Edits of test facts at every layer, and what all selectors choose.

For each model, dataset and editor, test facts are edited alone at each layer of a grid and at each layer that a
selector chooses. What a selector's layer loses against the best one is its *regret*. Selectors never see the test
facts: they read the packaged facts, or, in the rows with a dataset as their proxy, other facts of this dataset.

Cells, of one editor at one layer on some facts, are stored at once as lines of JSON, so that an interrupted run goes on
where it stopped. Facts are measured in rounds, all layers and editors of some facts before the next ones, so that a
budget of minutes can end the run after any round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from goldenedit.config import LGA_LOSSES, EditConfig
from goldenedit.cost import Cost, measuring
from goldenedit.evaluation.counterfact import known_facts
from goldenedit.layer_scores import golden_layer
from goldenedit.layer_selection import CellStore, LayerSelection, Outcome, SweepOptions, find_layers, proxy_set, sweep
from goldenedit.layer_selection.brute_force import missing_layers, read_statistics
from goldenedit.layer_selection.cells import Cell
from goldenedit.layer_selection.lga import gradient_products
from goldenedit.layer_selection.published import published_depth
from goldenedit.layer_selection.trials import is_comparable
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.flops import forward_flops
from goldenedit.lm.tokens import context_length, encode
from goldenedit.model import EditModel
from goldenedit.parallel import processes_of
from goldenedit.requests import EditRequest, load_requests

logger = logging.getLogger(__name__)

PACKAGED = "packaged"
_CHOSEN_BY_BENCHMARK = {"method", "layer", "layer_pattern", "pattern_layers", "proxy", "lga_loss", "tukey_kappa"}
_BLOCK = 64  # facts that are measured together
_TIMED = 2  # facts that tell what a cell costs
_FEWEST_LAYERS = 4


@dataclass(frozen=True)
class Setting:
    """The setting of a benchmark.

    Attributes:
        datasets: Test facts by name: a file, a dataset of the Hub, or the facts themselves.
        methods: Editors, each with the number of facts to edit; None for `test`.
        test: Number of test facts of each dataset, from its start.
        dataset_proxy: Number of proxy facts of each dataset, from its end, for LGA and `auto`.
        traced: Number of packaged facts for causal tracing.
        chunk: Facts of a round.
        grid: Number of layers, evenly spaced, to edit beside those that selectors choose; None for all layers.
        neighbors: Number of neighborhood prompts of each fact.
        budget: Minutes that selectors and edits of each model may take; None for as many as they need.
        options: Further options of `EditConfig`.
        format: Format of the test facts, for `load_requests`.
        skip_bad: Whether to leave out test facts that cannot be read.

    Raises:
        ValueError: A number is too small, a dataset has the reserved name, or an option is unknown or set by the
            benchmark itself.
    """

    datasets: Mapping[str, str | Sequence[EditRequest]]
    methods: Mapping[str, int | None] = field(default_factory=lambda: {"r-rome": None})
    test: int = 64
    dataset_proxy: int = 50
    traced: int = 25
    chunk: int = 16
    grid: int | None = None
    neighbors: int = 5
    budget: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    format: str = "auto"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        counts = [count for count in self.methods.values() if count is not None]
        least = min(self.test, self.chunk, self.traced, *counts)
        if least < 1 or min(self.dataset_proxy, self.neighbors) < 0:
            raise ValueError(
                f"The benchmark needs at least one fact of each kind, got test={self.test}, chunk={self.chunk}, "
                f"traced={self.traced}, dataset_proxy={self.dataset_proxy}, neighbors={self.neighbors}, "
                f"methods={dict(self.methods)}. Raise them."
            )
        if not self.methods:
            raise ValueError("The benchmark needs an editor. Name one in methods.")
        if self.grid is not None and self.grid < 2:
            raise ValueError(f"grid must be at least 2 layers, got {self.grid}. Use None for all layers.")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget must be a positive number of minutes, got {self.budget}.")
        if PACKAGED in self.datasets:
            raise ValueError(f"{PACKAGED!r} is the name of the packaged proxy set. Give the dataset another name.")
        if reserved := sorted(_CHOSEN_BY_BENCHMARK & set(self.options)):
            raise ValueError(f"The benchmark sets the options {reserved} itself. Remove them.")
        for method in self.methods:
            self.config(method)

    def config(self, method: str) -> EditConfig:
        """Return the config of an editor."""
        return EditConfig.from_dict({**self.options, "method": method})

    def facts_of(self, method: str) -> int:
        """Return the number of test facts of each dataset that an editor edits."""
        return min(self.test, self.methods[method] or self.test)


@dataclass(frozen=True)
class Curve:
    """One editor on the facts of one dataset: the outcomes of all facts by layer, and the cost."""

    outcomes: dict[int, list[Outcome]]
    cost: Cost
    forward_equivalents: float

    @property
    def facts(self) -> int:
        """Number of facts."""
        return len(next(iter(self.outcomes.values())))


@dataclass(frozen=True)
class Choice:
    """What a selector chose.

    Attributes:
        name: Its name in the report.
        proxy: The dataset of its proxy facts.
        selection: The layer, with scores and cost.
        methods: Editors that it chose for; empty for all.
    """

    name: str
    proxy: str
    selection: LayerSelection
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """All results on one model.

    Attributes:
        model: Its name in the report.
        num_layers: Number of its decoder layers.
        curves: By dataset and editor.
        choices: What the selectors chose.
        grid: The layers that were edited whatever the selectors chose.
    """

    model: str
    num_layers: int
    curves: dict[tuple[str, str], Curve]
    choices: list[Choice]
    grid: Sequence[int]


def measure_model(
    model: EditModel,
    name: str,
    setting: Setting,
    output: Path,
    say: Callable[[str], Any] = logger.info,
) -> Measurement:
    """Run the benchmark on one model, in this process or in all that hold the model.

    Args:
        model: The model, without edits.
        name: Name of the model in the report.
        setting: Datasets, editors and numbers of facts.
        output: Folder of the cells.
        say: Called with the plan before the edits are made, and with what was left out to keep the budget.

    Raises:
        ValueError: No fact of a dataset can be used, a dataset mixes two kinds of facts, or the budget is too small.
    """
    started = monotonic()
    splits: dict[str, list[EditRequest]] = {}
    proxies: dict[str, list[EditRequest]] = {}
    for dataset, source in setting.datasets.items():
        is_file = isinstance(source, str)
        facts = load_requests(source, setting.format, skip_bad=setting.skip_bad) if is_file else source
        requests = [rendered(model.tokenizer, request) for request in facts]  # type: ignore[arg-type]
        splits[dataset] = usable_facts(model, requests, setting.test)
        tested = {fact.text for fact in splits[dataset]}
        others = [request for request in reversed(requests) if request.text not in tested]
        if seen := usable_facts(model, others, setting.dataset_proxy):
            proxies[dataset] = seen
    for dataset, tests in splits.items():
        if not tests:
            raise ValueError(
                f"No fact of {dataset!r} can be used: none fits into the model's context, or, where there are "
                "neighbors, the model prefers none of the old answers."
            )
        if len({is_comparable(fact) for fact in tests}) > 1:
            raise ValueError(
                f"Facts of {dataset!r} are of two kinds, with neighbors and with locality. Make two datasets of them."
            )
    choices = _choose_all(model, setting, proxies)
    rounds = _Rounds(model, name, setting, splits, output, {layer for one in choices for layer in one.selection.layers})
    rounds.plan(started, say)
    rounds.run(say)
    return Measurement(name, model.architecture.num_layers, rounds.curves(), choices, rounds.grid)


def usable_facts(model: EditModel, requests: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """Return the first `count` facts that can be scored, each prompt once.

    Such facts can be tokenized. If new and old answer are compared on neighbors, the model must prefer the old one
    (see `known_facts`).
    """
    usable: list[EditRequest] = []
    seen: set[tuple[str, str]] = set()
    for start in range(0, len(requests), _BLOCK):
        fitting = []
        for request in requests[start : start + _BLOCK]:
            prompt = (request.text, request.subject)
            if prompt not in seen and _fits(model, request):
                fitting.append(request)
            seen.add(prompt)
        compared = [request for request in fitting if is_comparable(request)]
        known = {id(compared[index]) for index in known_facts(model.lm, compared)}
        usable += [request for request in fitting if not is_comparable(request) or id(request) in known]
        if len(usable) >= count:
            break
    return usable[:count]


def _fits(model: EditModel, request: EditRequest) -> bool:
    """Return whether all prompts of a fact can be tokenized with their answers."""
    longest = context_length(model.get_base_model().config)
    answers = [answer for answer in (request.target_new, request.target_true) if answer is not None]
    pairs = [
        *((prompt, answer) for prompt in (*request.paraphrases, *request.neighborhood) for answer in answers),
        *request.portability,
        *request.locality,
    ]
    try:
        for answer in answers:
            encode(model.tokenizer, request.text, answer, request.subject_end, longest)
        for prompt, answer in pairs:
            encode(model.tokenizer, prompt, answer, max_length=longest)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class _Round:
    """Facts of a dataset that some editors edit at all layers."""

    dataset: str
    start: int
    end: int
    methods: tuple[str, ...]


class _Rounds:
    """The edits of all facts, in rounds of some facts at all layers.

    Args:
        chosen: Layers that selectors chose, which are edited whatever the grid is.
    """

    def __init__(
        self,
        model: EditModel,
        name: str,
        setting: Setting,
        splits: Mapping[str, Sequence[EditRequest]],
        output: Path,
        chosen: set[int],
    ) -> None:
        self.model = model
        self.name = name
        self.setting = setting
        self.splits = splits
        self.processes = processes_of(model.get_base_model())
        self.store = CellStore(output / f"cells-{self.processes.index}.jsonl", output.glob("cells-*.jsonl"))
        self.every = sorted(model.architecture.down_projections)
        self.chosen = chosen & set(self.every)
        self.grid = self._grid(setting.grid or len(self.every))
        self.rounds = list(self._rounds())
        self.seconds: dict[tuple[str, str], float] = {}  # of one fact at one layer, by dataset and editor
        self.deadline = math.inf
        self._cells: dict[tuple[str, str], list[Cell]] = {}
        self._measured: dict[tuple[str, str], list[EditRequest]] = {}

    @property
    def layers(self) -> list[int]:
        """The layers of the grid, and those that selectors chose."""
        return sorted({*self.grid, *self.chosen})

    def _grid(self, count: int) -> list[int]:
        """Return layers that are evenly spaced."""
        return self.every[:: max(1, math.ceil(len(self.every) / count))]

    def _rounds(self) -> Iterator[_Round]:
        """Yield all rounds. Their ends do not depend on the budget, so that cells of an earlier run are found again."""
        chunk = self.setting.chunk
        for start in range(0, self.setting.test, chunk):
            for dataset, facts in self.splits.items():
                ends: dict[int, list[str]] = {}  # editors by the end of their facts
                for method in self.setting.methods:
                    if (end := min(start + chunk, self.setting.facts_of(method), len(facts))) > start:
                        ends.setdefault(end, []).append(method)
                yield from (_Round(dataset, start, end, tuple(methods)) for end, methods in ends.items())

    def plan(self, started: float, say: Callable[[str], Any]) -> None:
        """Measure what a cell costs, tell what the run will take, and fit it into the budget.

        Args:
            started: When the run began.

        Raises:
            ValueError: The budget does not suffice for one round at a few layers.
        """
        methods, layers = list(self.setting.methods), self.layers
        middle = layers[len(layers) // 2]
        configs = [replace(self.setting.config(method), layer=layer) for method in methods for layer in layers]
        read_statistics(self.model.lm, configs, layers)  # once for all rounds, so they are no cost of a round
        for dataset, facts in self.splits.items():
            for method in methods:
                with suppress(ValueError):  # an editor that cannot edit this layer is not counted
                    cells = self._sweep(dataset, facts[:_TIMED], [method], [middle])
                    self.seconds[dataset, method] = cells[method, middle].cost.seconds / len(facts[:_TIMED])
        left_out = 0
        if self.setting.budget is not None:
            self.deadline = started + 60 * self.setting.budget
            left_out = self._fit(self.setting.budget, self._left())
        facts_by_method = {
            method: max((one.end for one in self.rounds if method in one.methods), default=0)
            for method in self.setting.methods
        }
        about = ", ".join(f"{count} facts by {method}" for method, count in facts_by_method.items())
        say(
            f"{self.name}: {about}, of {', '.join(self.splits)}, at {len(self.layers)} of {len(self.every)} layers "
            f"({', '.join(map(str, self.layers))}). This takes about {self._needed(self.rounds) / 60:.0f} minutes."
        )
        if left_out:
            say(f"To keep the budget, {left_out} of {left_out + len(self.rounds)} rounds of facts are left out.")

    def _left(self) -> float:
        """Return the seconds that are left, the same in all processes."""
        return min(self.processes.gather(self.deadline - monotonic()))

    def _needed(self, rounds: Sequence[_Round]) -> float:
        """Return the seconds that the cells take which are not stored."""
        total = 0.0
        for one in rounds:
            facts = self.splits[one.dataset][one.start : one.end]
            for method in one.methods:
                missing = missing_layers(
                    self.model.lm, facts, self.setting.config(method), self.store, self._options(method)
                )
                per_process = math.ceil(len(missing) / self.processes.count)
                total += self.seconds.get((one.dataset, method), 0.0) * len(facts) * per_process
        return total

    def _fit(self, budget: float, left: float) -> int:
        """Leave out the last rounds, and where one is too long, layers. Return the number of rounds left out."""
        every = len(self.rounds)
        while (needed := self._needed(self.rounds)) > left:
            if len(self.rounds) > 1:
                self.rounds.pop()
            elif len(self.grid) > _FEWEST_LAYERS:
                self.grid = self._grid(max(len(self.grid) // 2, _FEWEST_LAYERS))
            else:
                raise ValueError(
                    f"A budget of {budget:g} minutes is too small: {self.rounds[0].end} facts at {len(self.layers)} "
                    f"layers take about {math.ceil(budget + (needed - left) / 60)}. Raise it, or lower chunk, or name "
                    "fewer editors."
                )
        return every - len(self.rounds)

    def run(self, say: Callable[[str], Any]) -> None:
        """Make all edits, or those that the budget has time for."""
        for one in self.rounds:
            needed = self._needed([one])
            if needed > self._left():
                what = f"facts {one.start} to {one.end} of {one.dataset} by {', '.join(one.methods)}"
                say(f"The budget is spent: {what} are left out.")
                continue
            began = monotonic()
            facts = self.splits[one.dataset][one.start : one.end]
            cells = self._measure(one, say)
            for method in one.methods:
                self._measured.setdefault((one.dataset, method), []).extend(facts)
                of_method = [cell for cell in cells.values() if cell.method == method]
                self._cells.setdefault((one.dataset, method), []).extend(of_method)
            if needed:  # what rounds take tells more than two facts did
                slower = max(self.processes.gather(monotonic() - began)) / needed
                self.seconds = {key: seconds * slower for key, seconds in self.seconds.items()}

    def _measure(self, one: _Round, say: Callable[[str], Any]) -> dict[tuple[str, int], Cell]:
        """Make the edits of a round. An editor that fails at every layer is told, and the others are measured."""
        facts, about = self.splits[one.dataset][one.start : one.end], f"{one.start} to {one.end}"
        with suppress(ValueError):  # told below, of each editor
            return self._sweep(one.dataset, facts, one.methods, self.layers, about)
        cells: dict[tuple[str, int], Cell] = {}
        for method in one.methods:
            try:
                cells |= self._sweep(one.dataset, facts, [method], self.layers, about)
            except ValueError as error:
                say(f"{method} cannot edit facts {about} of {one.dataset}: {error}")
        return cells

    def _sweep(
        self, dataset: str, facts: Sequence[EditRequest], methods: Sequence[str], layers: Sequence[int], about: str = ""
    ) -> dict[tuple[str, int], Cell]:
        told = {"model": self.name, "dataset": dataset, "facts": about}
        options = replace(self._options(*methods), layers=layers, about=told)
        return sweep(self.model.lm, facts, self.setting.config(methods[0]), self.store, options)

    def _options(self, *methods: str) -> SweepOptions:
        return SweepOptions(methods, self.layers, neighbors=self.setting.neighbors, sees=True)

    def curves(self) -> dict[tuple[str, str], Curve]:
        """Return the outcomes by dataset and editor, at the layers where all facts were edited."""
        found = {}
        for (dataset, method), cells in self._cells.items():
            facts = self._measured[dataset, method]
            outcomes = {
                layer: [outcome for cell in cells if cell.layer == layer for outcome in cell.outcomes]
                for layer in self.layers
            }
            outcomes = {layer: of_facts for layer, of_facts in outcomes.items() if len(of_facts) == len(facts)}
            if outcomes:
                cost = sum((cell.cost for cell in cells if cell.layer in outcomes), Cost())
                found[dataset, method] = Curve(outcomes, cost, cost.flops / forward_flops(self.model.lm, facts))
        return found


def _choose_all(model: EditModel, setting: Setting, proxies: Mapping[str, list[EditRequest]]) -> list[Choice]:
    """Run all selectors on the packaged proxy facts, and LGA and `auto` also on the proxy facts of each dataset."""
    choices: list[Choice] = []
    methods = list(setting.methods)

    def run(name: str, dataset: str = PACKAGED, method: str = methods[0], is_own: bool = False, **options: Any) -> None:
        config = replace(setting.config(method), layer_pattern="golden", proxy=proxies.get(dataset), **options)
        choices.append(Choice(name, dataset, find_layers(model.lm, config), (method,) if is_own else ()))

    whole = model.architecture
    for loss in LGA_LOSSES:
        run(f"lga {loss}", layer="lga", lga_loss=loss)
        run(f"lga {loss}, no filter", layer="lga", lga_loss=loss, tukey_kappa=math.inf)
        for dataset in proxies:
            run(f"lga {loss}", dataset, layer="lga", lga_loss=loss)
        choices += _lga_variants(model, setting, loss)
    for method in methods:  # for an editor that learns, it is that of R-ROME
        run("auto", method=method, is_own=True, layer="auto")
        for dataset in proxies:
            run("auto", dataset, method, True, layer="auto")
    run("selectivity", layer="selectivity")
    run("causal_tracing", layer="causal_tracing", proxy_size=setting.traced)
    layers = sorted(whole.down_projections)
    choices.append(Choice("middle", PACKAGED, LayerSelection("middle", None, [layers[len(layers) // 2]])))
    for method in methods:
        with suppress(ValueError):  # no layer is published for most models
            run("published", method=method, is_own=True, layer="published")
        if (depth := published_depth(setting.config(method).editor.published)) is not None:
            at = min(layers, key=lambda layer: abs(layer - depth * whole.num_layers))
            choices.append(
                Choice("published depth", PACKAGED, LayerSelection("published depth", None, [at]), (method,))
            )
    return choices


def _lga_variants(model: EditModel, setting: Setting, loss: str) -> list[Choice]:
    """Return what LGA of the down projection alone chooses, as it is and corrected.

    `cosine` is the sum of the facts' cosines, `norms` the sum of dot products over that of the norms, and `without its
    trend over depth` the sum divided by a line through the logarithms of its size.
    """
    config = replace(setting.config(next(iter(setting.methods))), layer="lga")
    facts = [rendered(model.tokenizer, fact) for fact in proxy_set(config)]
    whole = model.architecture
    alone = replace(whole, mlp_linears={layer: (path,) for layer, path in whole.down_projections.items()})
    lm = LanguageModel(model.lm.model, model.tokenizer, alone, model.lm.weights, model.lm.beside)
    found = []
    with measuring() as spent:
        products = gradient_products(lm, facts, loss, with_norms=True)  # type: ignore[arg-type]
    dots, norms = products[..., 0], (products[..., 1] * products[..., 2]).sqrt()
    total = dots.sum(0)
    depth = torch.arange(len(total), dtype=total.dtype)
    known = ~total.isnan()
    line = torch.stack([depth, torch.ones_like(depth)], 1)
    trend = line @ torch.linalg.lstsq(line[known], total[known, None].abs().clamp(min=1e-30).log()).solution
    variants = {
        "down projection": total,
        "down projection, cosine": (dots / norms.clamp(min=1e-30)).sum(0),
        "down projection, norms": total / norms.sum(0),
        "down projection, without its trend over depth": total / trend[:, 0].exp(),
    }
    for name, scores in variants.items():
        listed = [None if score != score else score for score in scores.tolist()]
        layer = golden_layer(scores)
        chosen = LayerSelection("lga", listed, [layer], len(facts), spent())
        found.append(Choice(f"lga {loss}, {name}", PACKAGED, chosen))
    return found
