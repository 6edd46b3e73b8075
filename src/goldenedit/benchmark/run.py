"""Run the golden-layers benchmark, in one process or several, and write what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.benchmark.golden_layers import Setting, measure_model
from goldenedit.benchmark.report import render, summarize
from goldenedit.cache import write_atomically
from goldenedit.config import EditConfig
from goldenedit.model import EditModel
from goldenedit.parallel import join_processes

Loader = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def run_golden_layers(models: Sequence[str], load: Loader, setting: Setting, output: Path, console: Console) -> None:
    """Measure models one after the other; the report covers all summaries in the folder, those of other runs too.

    Raises:
        ValueError: A dataset or a model cannot be read.
    """
    from accelerate import PartialState

    called = {name: Path(name).name or "model" for name in models}
    if len(set(called.values())) < len(models):
        raise ValueError(f"Two of the models {list(models)} have one name: measure them into folders of their own.")
    processes, _ = join_processes()
    state = PartialState()
    for name, short in called.items():
        with processes.together():  # at the end of which each waits for the others
            base, tokenizer = load(name)
            base.to(state.device)
            config = EditConfig(layer="random", target_modules=setting.config(setting.methods[0]).target_modules)
            found = measure_model(EditModel(base, config, tokenizer), short, setting, output)
            del base  # before the next one takes its place
            if state.is_main_process:
                text = json.dumps(summarize(found), indent=1) + "\n"
                write_atomically(output / f"{short}.summary.json", text.encode())
                write_report(output)
                console.print(f"Report in {output / 'report.md'}")


def write_report(output: Path) -> None:
    """Write the report, and its figures where matplotlib is installed, of all summaries in a folder."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.summary.json"))]
    figures: dict[str, list[str]] = {}
    if find_spec("matplotlib") is not None:
        from goldenedit.plots import plot_heat_map, plot_scores_against_s

        for summary in summaries:
            name = summary["model"]
            figures[name] = [f"{name}-layers.png", f"{name}-selectors.png"]
            plot_heat_map(summary, output / figures[name][0])
            plot_scores_against_s(summary, output / figures[name][1])
    write_atomically(output / "report.md", render(summaries, figures).encode())
