"""Run the golden-layers benchmark in one process or several, and write its summaries and report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.benchmark.criteria import CRITERIA, LayerCurve
from goldenedit.benchmark.golden_layers import Measurement, Setting, measure_model
from goldenedit.benchmark.report import SUMMARY_VERSION, Summary, render, summarize
from goldenedit.config import EditConfig
from goldenedit.cost import Cost
from goldenedit.files import write_atomically
from goldenedit.model import EditModel
from goldenedit.parallel import join_processes
from goldenedit.platforms import file_name, same_file
from goldenedit.storage.atlas import (
    GOLDEN_LAYERS,
    GoldenLayers,
    dump_golden_layers,
    read_golden_layers,
    with_record,
)
from goldenedit.storage.hub import public_name
from goldenedit.versions import library_versions

logger = logging.getLogger(__name__)

Loader = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def run_golden_layers(models: Sequence[str], load: Loader, setting: Setting, output: Path, console: Console) -> None:
    """Measure models one after the other. The report covers all summaries in the folder, including those of other runs.

    Raises:
        ValueError: A dataset or a model cannot be read.
    """
    from accelerate import PartialState

    short_names = {name: file_name(Path(name).name) or "model" for name in models}
    if len(set(map(same_file, short_names.values()))) < len(models):
        raise ValueError(f"Two of the models {list(models)} have the same name. Use a separate folder for each.")
    processes, _ = join_processes()
    state = PartialState()
    for name, short_name in short_names.items():
        with processes.together():  # each process waits for the others at its end
            base, tokenizer = load(name)
            base.to(state.device)
            say = console.print if state.is_main_process else logger.debug
            config = EditConfig(
                layer="random", target_modules=setting.config(next(iter(setting.methods))).target_modules
            )
            wrapped = EditModel(base, config, tokenizer)
            measurement = measure_model(wrapped, short_name, setting, output, say)
            del base  # frees its memory before the next model is loaded
            if state.is_main_process:
                text = json.dumps(summarize(measurement), indent=1) + "\n"
                write_atomically(output / f"{short_name}.summary.json", text.encode())
                records = golden_records(wrapped, measurement)
                with_new = reduce(with_record, records, _stored_records(output / GOLDEN_LAYERS))
                write_atomically(output / GOLDEN_LAYERS, dump_golden_layers(with_new).encode())
                write_report(output)
                console.print(f"Wrote the report to {output / 'report.md'}")


def golden_records(model: EditModel, measurement: Measurement) -> list[GoldenLayers]:
    """Return the best layer of each editor by what a user sees, with the layers that cannot be told from it, to share.

    The facts of all datasets count. Of editors at several datasets, only layers that were edited on all of them do.
    """
    base, records = model.base_info, []
    for method in dict.fromkeys(method for _, method in measurement.curves):
        curves = [curve for (_, of), curve in measurement.curves.items() if of == method]
        if not (layers := sorted(set.intersection(*(set(curve.outcomes) for curve in curves)))):
            continue
        outcomes = {layer: [one for curve in curves for one in curve.outcomes[layer]] for layer in layers}
        joined = LayerCurve.of(CRITERIA["seen"], outcomes)
        if joined is None:
            continue
        by_layer = dict(zip(layers, zip(joined.scores.tolist(), joined.intervals(), strict=True), strict=True))
        found = [by_layer.get(layer) for layer in range(measurement.num_layers)]
        cost = sum((curve.cost for curve in curves), Cost())
        records.append(
            GoldenLayers(
                model=public_name(base),
                fingerprint=base.fingerprint,
                selector="sweep",
                layers=[joined.best],
                scores=[None if known is None else known[0] for known in found],
                method=method,
                revision=base.revision,
                architecture=base.architecture,
                facts=joined.facts,
                seconds=cost.seconds,
                forward_equivalents=sum(curve.forward_equivalents for curve in curves),
                versions=library_versions(),
                signs=base.signs,
                dtype=base.dtype,
                plateau=joined.plateau(),
                intervals=[None if known is None else list(known[1]) for known in found],
            )
        )
    return records


def _stored_records(path: Path) -> list[GoldenLayers]:
    return read_golden_layers(path) if path.is_file() else []


def write_report(output: Path) -> None:
    """Write a report of all summaries in a folder, with figures if matplotlib is installed."""
    summaries = list(filter(None, map(_read_summary, sorted(output.glob("*.summary.json")))))
    figures: dict[str, list[str]] = {}
    if find_spec("matplotlib") is not None:
        from goldenedit.plots import plot_golden_layers

        for summary in summaries:
            for dataset in dict.fromkeys(seen["dataset"] for seen in summary["seen"] if "kl" in seen):
                name = f"{summary['model']}-{dataset}.png"
                plot_golden_layers(summary, dataset, output / name)
                figures.setdefault(summary["model"], []).append(name)
    write_atomically(output / "report.md", render(summaries, figures).encode())


def _read_summary(path: Path) -> Summary | None:
    """Return a summary; None, with a warning, for one of another version of the library."""
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("version") != SUMMARY_VERSION:
        logger.warning("%s is of another version of goldenedit, and is left out of the report. Measure it again.", path)
        return None
    return dict(summary)
