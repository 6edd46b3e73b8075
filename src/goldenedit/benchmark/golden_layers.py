"""How close is the golden layer to the best layer? All selectors are compared with brute force on test facts.

For each model, dataset and editor, test facts are edited at every layer. The *regret* of a selector is the loss of its
layer against the best one, `1 - S(chosen) / S(best)`. Editors that are made for batches insert test facts as batches.
Selectors see only proxy facts: those of the packaged set, some of which are also edited at every layer, and, for LGA
and `auto`, other facts of the dataset.

The results are JSON files: cells, which are stored at once so that an interrupted run continues, and a summary for each
model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from goldenedit.architecture.layers import Architecture
from goldenedit.config import LGA_LOSSES, EditConfig
from goldenedit.cost import Cost
from goldenedit.evaluation.counterfact import known_facts
from goldenedit.layer_selection import CellStore, LayerSelection, Outcome, SweepOptions, find_layers, sweep
from goldenedit.layer_selection.brute_force import is_comparable, tells_locality
from goldenedit.layer_selection.cells import Cell
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.flops import forward_flops
from goldenedit.lm.tokens import context_length, encode
from goldenedit.model import EditModel
from goldenedit.parallel import processes_of
from goldenedit.requests import EditRequest, load_requests, proxy_facts

PACKAGED = "packaged"
_CHOSEN_BY_BENCHMARK = {"method", "layer", "layer_pattern", "pattern_layers", "proxy", "lga_loss", "tukey_kappa"}
_BLOCK = 64  # facts that are measured together


@dataclass(frozen=True)
class Setting:
    """The setting of a benchmark.

    Attributes:
        datasets: Sources of the test facts by name: files, or datasets of the Hub.
        methods: Editors.
        test: Number of test facts of each dataset, from its start.
        proxy: Number of packaged facts that brute force edits to find the golden layer.
        dataset_proxy: Number of proxy facts of each dataset, from its end, for LGA and `auto`.
        traced: Number of packaged facts for causal tracing.
        chunk: Facts per cell. Their values are optimized in one batch.
        neighbors: Number of neighborhood prompts of each fact.
        options: Further options of `EditConfig`.
        format: Format of the test facts, for `load_requests`.
        skip_bad: Whether to leave out test facts that cannot be read.

    Raises:
        ValueError: A number is too small, a dataset has the reserved name, or an option is unknown or set by the
            benchmark itself.
    """

    datasets: Mapping[str, str]
    methods: Sequence[str] = ("r-rome",)
    test: int = 20
    proxy: int = 10
    dataset_proxy: int = 50
    traced: int = 25
    chunk: int = 10
    neighbors: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    format: str = "auto"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if min(self.test, self.proxy, self.chunk, self.traced) < 1:
            raise ValueError("The benchmark needs at least one fact of each kind. Raise test, proxy, chunk and traced.")
        if PACKAGED in self.datasets:
            raise ValueError(f"{PACKAGED!r} is the name of the packaged proxy set. Give the dataset another name.")
        if reserved := sorted(_CHOSEN_BY_BENCHMARK & set(self.options)):
            raise ValueError(f"The benchmark sets the options {reserved} itself. Remove them.")
        for method in self.methods:
            self.config(method)

    def config(self, method: str) -> EditConfig:
        """Return the config of an editor."""
        return EditConfig.from_dict({**self.options, "method": method})


@dataclass(frozen=True)
class Curve:
    """Brute force of one editor on the facts of one dataset: the outcomes of all facts by layer, and the cost."""

    outcomes: dict[int, list[Outcome]]
    cost: Cost
    forward_equivalents: float

    @property
    def facts(self) -> int:
        """Number of facts."""
        return len(next(iter(self.outcomes.values())))


@dataclass(frozen=True)
class Measurement:
    """All results on one model.

    Attributes:
        model: Its name in the report.
        num_layers: Number of its decoder layers.
        curves: By dataset and editor. The packaged proxy facts are the dataset `PACKAGED`.
        selections: By the dataset of the proxy facts, and the selector's name.
    """

    model: str
    num_layers: int
    curves: dict[tuple[str, str], Curve]
    selections: dict[tuple[str, str], LayerSelection]


def measure_model(
    model: EditModel,
    name: str,
    setting: Setting,
    output: Path,
) -> Measurement:
    """Run the benchmark on one model, in this process or in all that hold the model.

    Args:
        model: The model, without edits.
        name: Name of the model in the report.
        setting: Datasets, editors and numbers of facts.
        output: Folder of the cells.

    Raises:
        ValueError: No fact of a dataset can be used, or a dataset mixes two kinds of facts.
    """
    splits = {PACKAGED: usable_facts(model, proxy_facts(), setting.proxy)}
    proxies: dict[str, list[EditRequest]] = {}
    for dataset, source in setting.datasets.items():
        facts = load_requests(source, setting.format, skip_bad=setting.skip_bad)
        requests = [rendered(model.tokenizer, request) for request in facts]
        splits[dataset] = usable_facts(model, requests, setting.test)
        tested = {fact.text for fact in splits[dataset]}
        others = [request for request in reversed(requests) if request.text not in tested]
        if seen := usable_facts(model, others, setting.dataset_proxy):
            proxies[dataset] = seen
    for dataset, facts in splits.items():
        if not facts:
            raise ValueError(
                f"No fact of {dataset!r} can be used. Facts need locality, or paraphrases, neighbors and an old answer "
                "that the model prefers."
            )
        if len({is_comparable(fact) for fact in facts}) > 1:
            raise ValueError(
                f"Facts of {dataset!r} are of two kinds, with neighbors and with locality. Make two datasets of them."
            )
    curves = _sweep_all(model, name, setting, splits, output)
    return Measurement(name, model.architecture.num_layers, curves, _select_all(model, setting, proxies))


def usable_facts(model: EditModel, requests: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """Return the first `count` facts that can be scored, each prompt once.

    Such facts can be tokenized and have prompts whose answers must stay. If new and old answer are compared on
    neighbors, the model must prefer the old one (see `known_facts`).
    """
    usable: list[EditRequest] = []
    seen: set[tuple[str, str]] = set()
    for start in range(0, len(requests), _BLOCK):
        fitting = []
        for request in requests[start : start + _BLOCK]:
            prompt = (request.text, request.subject)
            if prompt not in seen and tells_locality(request) and _fits(model, request):
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


def _sweep_all(
    model: EditModel,
    name: str,
    setting: Setting,
    splits: Mapping[str, Sequence[EditRequest]],
    output: Path,
) -> dict[tuple[str, str], Curve]:
    """Edit the facts of every split at every layer. Cells that are stored in the folder are reused."""
    base, config = model.get_base_model(), setting.config(setting.methods[0])
    store = CellStore(output / f"cells-{processes_of(base).index}.jsonl", output.glob("cells-*.jsonl"))
    layers = sorted(model.architecture.down_projections)
    curves = {}
    for dataset, facts in splits.items():
        plain = forward_flops(model.lm, facts)
        cells: list[Cell] = []
        for start in range(0, len(facts), setting.chunk):
            about = {"model": name, "dataset": dataset, "facts": f"{start} to {start + setting.chunk}"}
            options = SweepOptions(setting.methods, layers, in_batches=True, neighbors=setting.neighbors, about=about)
            cells += sweep(model.lm, facts[start : start + setting.chunk], config, store, options).values()
        for method in setting.methods:
            of_method = [cell for cell in cells if cell.method == method]
            outcomes = {
                layer: [outcome for cell in of_method if cell.layer == layer for outcome in cell.outcomes]
                for layer in layers
            }
            outcomes = {layer: of_facts for layer, of_facts in outcomes.items() if len(of_facts) == len(facts)}
            if not outcomes:
                continue
            cost = sum((cell.cost for cell in of_method), Cost())
            curves[dataset, method] = Curve(outcomes, cost, cost.flops / plain)
    return curves


def _select_all(
    model: EditModel, setting: Setting, proxies: Mapping[str, list[EditRequest]]
) -> dict[tuple[str, str], LayerSelection]:
    """Run all selectors on the packaged proxy facts, and LGA and `auto` also on the proxy facts of each dataset.

    Selectors that depend on the editor run for the first one.
    """
    selections: dict[tuple[str, str], LayerSelection] = {}

    def run(dataset: str, name: str, architecture: Architecture, **options: Any) -> None:
        config = replace(setting.config(setting.methods[0]), **options)
        lm = LanguageModel(model.lm.model, model.tokenizer, architecture, model.lm.weights, model.lm.beside)
        selections[dataset, name] = find_layers(lm, config)

    whole = model.architecture
    down = replace(whole, mlp_linears={layer: (path,) for layer, path in whole.down_projections.items()})
    for loss in LGA_LOSSES:
        for part, architecture in (("", whole), (", down projection", down)):
            for fence, kappa in (("", 1.0), (", no filter", math.inf)):
                run(PACKAGED, f"lga {loss}{part}{fence}", architecture, layer="lga", lga_loss=loss, tukey_kappa=kappa)
        for dataset, facts in proxies.items():
            run(dataset, f"lga {loss}", whole, layer="lga", lga_loss=loss, proxy=facts)
    run(PACKAGED, "auto", whole, layer="auto")
    for dataset, facts in proxies.items():
        run(dataset, "auto", whole, layer="auto", proxy=facts)
    run(PACKAGED, "selectivity", whole, layer="selectivity")
    run(PACKAGED, "causal_tracing", whole, layer="causal_tracing", proxy_size=setting.traced)
    layers = sorted(whole.down_projections)
    selections[PACKAGED, "middle"] = LayerSelection("middle", None, [layers[len(layers) // 2]])
    with suppress(ValueError):  # no layer is published for most models
        run(PACKAGED, "published", whole, layer="published")
    return selections
