"""Run the golden-layers benchmark in one process or several, and write its summaries and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.benchmark.golden_layers import Setting, measure_model
from goldenedit.benchmark.report import render, summarize
from goldenedit.config import EditConfig
from goldenedit.files import write_atomically
from goldenedit.model import EditModel
from goldenedit.parallel import join_processes
from goldenedit.platforms import file_name, same_file

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
            config = EditConfig(
                layer="random", target_modules=setting.config(next(iter(setting.methods))).target_modules
            )
            wrapped = EditModel(base, config, tokenizer)
            measurement = measure_model(wrapped, short_name, setting, output, console.print)
            del base  # frees its memory before the next model is loaded
            if state.is_main_process:
                text = json.dumps(summarize(measurement), indent=1) + "\n"
                write_atomically(output / f"{short_name}.summary.json", text.encode())
                write_report(output)
                console.print(f"Wrote the report to {output / 'report.md'}")


def write_report(output: Path) -> None:
    """Write a report of all summaries in a folder, with figures if matplotlib is installed."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.summary.json"))]
    figures: dict[str, list[str]] = {}
    if find_spec("matplotlib") is not None:
        from goldenedit.plots import plot_golden_layers

        for summary in summaries:
            for dataset in dict.fromkeys(curve["dataset"] for curve in summary["curves"]):
                name = f"{summary['model']}-{dataset}.png"
                plot_golden_layers(summary, dataset, output / name)
                figures.setdefault(summary["model"], []).append(name)
    write_atomically(output / "report.md", render(summaries, figures).encode())
