"""Figures with matplotlib, which need no screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from goldenedit.files import write_atomically
from goldenedit.layer_scores import LayerSelection

_COLORS = {"other layers": "tab:blue", "golden layer": "goldenrod", "outliers": "lightgrey"}


def plot_selections(
    selections: Sequence[LayerSelection], path: str | Path, title: str = "", kappa: float = 1.0
) -> None:
    """Save bar charts of the scores of layer selectors, one below the other.

    The golden layer is gold, and the layers that are edited have a mark.

    Args:
        selections: Layer selections. Those without scores are skipped.
        path: The file to save.
        title: Title of the figure.
        kappa: Width of LGA's outlier fence. Layers outside it are gray, and their bars are cut off.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    scored = [selection for selection in selections if selection.scores is not None]
    figure = _figure(8, 1 + 2.2 * max(len(scored), 1))
    figure.suptitle(title)
    rows = figure.subplots(max(len(scored), 1), squeeze=False)[:, 0]
    for axes, selection in zip(rows, scored, strict=False):
        scores, is_inside = selection.score_tensor(), selection.within_fence(kappa)
        kinds = ["other layers" if inside else "outliers" for inside in is_inside.tolist()]
        if (golden := selection.golden(kappa)) is not None:
            kinds[golden] = "golden layer"
        values = scores.nan_to_num(0.0).tolist()
        for kind, color in _COLORS.items():
            if layers := [layer for layer, of_layer in enumerate(kinds) if of_layer == kind]:
                axes.bar(layers, [values[layer] for layer in layers], color=color, label=kind)
        edited = [0.0] * len(selection.layers)
        axes.plot(selection.layers, edited, "^", color="black", clip_on=False, label="edited")
        axes.legend(fontsize="small")
        inside_scores = scores[is_inside]
        low, high = min(0.0, 1.1 * inside_scores.min().item()), max(0.0, 1.1 * inside_scores.max().item())
        axes.set_ylim(low, high if high > low else 1.0)
        axes.set(xlabel="layer, counted from 0", ylabel=f"score by {selection.selector}")
    _save(figure, path)


def plot_golden_layers(summary: Mapping[str, Any], dataset: str, path: str | Path) -> None:
    """Save the curves of all editors on one dataset: success and harm by layer, the plateau, and selectors' choices.

    Args:
        summary: A summary of `goldenedit.benchmark.report.summarize`.
        dataset: One of its datasets.
        path: File of the chart, in the format that its name ends with.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: What a user sees was not measured on the dataset.
    """
    seen = [one for one in summary["seen"] if one["dataset"] == dataset and "kl" in one]
    if not seen:
        raise ValueError(f"The summary has nothing of what a user sees on {dataset!r}. Measure it first.")
    figure = _figure(9, 3.2 * len(seen))
    for row, (of_editor, pair) in enumerate(zip(seen, figure.subplots(len(seen), 2, squeeze=False), strict=True)):
        method, layers = of_editor["method"], of_editor["layers"]
        curve = next(
            one
            for one in summary["curves"]
            if (one["dataset"], one["method"], one["criterion"]) == (dataset, method, "seen")
        )
        success, harm = pair
        for name, label, color in (
            ("says", "says the fact", "C0"),
            ("unchanged", "other prompts unchanged", "C2"),
        ):
            _band(success, layers, of_editor[name], of_editor[f"{name}_intervals"], label, color)
        _band(success, layers, curve["scores"], curve["intervals"], "harmonic mean of both", "C3")
        _band(harm, layers, of_editor["kl"], of_editor["kl_intervals"], "KL on plain text, nats a token", "C1")
        success.set(ylim=(0, 1.02), ylabel=f"{method} (n = {of_editor['n']})")
        harm.set(yscale="log")
        for axes in pair:
            _shade(axes, curve["plateau"], layers)
            axes.set(xlim=(layers[0] - 0.5, layers[-1] + 0.5))
        _mark_choices(success, summary, dataset, method)
        if row == 0:
            success.set_title(
                f"{summary['model']}, {dataset}; shaded: layers that cannot be told from the best", fontsize=8
            )
        if row == len(seen) - 1:
            success.set(xlabel="layer")
            harm.set(xlabel="layer")
            lines = [line for axes in pair for line in axes.get_legend_handles_labels()[0]]
            figure.legend(handles=lines, fontsize=7, loc="outside lower center", ncols=len(lines))
    _save(figure, path)


def _band(
    axes: Any,
    layers: Sequence[int],
    values: Sequence[float],
    intervals: Sequence[Sequence[float]],
    label: str,
    color: str,
) -> None:
    axes.plot(layers, values, ".-", color=color, label=label)
    low, high = zip(*intervals, strict=True)
    axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)


def _shade(axes: Any, plateau: Sequence[int], layers: Sequence[int]) -> None:
    """Shade the layers of a plateau, each up to the middle between it and its neighbors."""
    for layer in plateau:
        place = layers.index(layer)
        left = (layers[place - 1] + layer) / 2 if place else layer - 0.5
        right = (layers[place + 1] + layer) / 2 if place + 1 < len(layers) else layer + 0.5
        axes.axvspan(left, right, color="gold", alpha=0.25, linewidth=0)


def _mark_choices(axes: Any, summary: Mapping[str, Any], dataset: str, method: str) -> None:
    """Mark what selectors chose that read the packaged facts; names of one layer stand above each other."""
    names: dict[int, list[str]] = {}
    for selection in summary["selections"]:
        is_own = not selection["methods"] or method in selection["methods"]
        if selection["proxy"] == "packaged" and is_own and ", " not in selection["selector"]:
            names.setdefault(selection["layer"], []).append(selection["selector"])
    for layer, of_layer in names.items():
        axes.axvline(layer, color="gray", linewidth=0.6, linestyle=":")
        axes.text(layer, 1.0, " " + ", ".join(of_layer), rotation=90, fontsize=5, va="top", ha="right")


def _save(figure: Any, path: str | Path) -> None:
    """Write a figure in the format that the file's name ends with, PNG by default."""
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=150)
    write_atomically(path, buffer.getvalue())


def check_matplotlib() -> None:
    """Raise ModuleNotFoundError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('Figures need matplotlib, which is not installed: pip install "goldenedit[plot]"')


def _figure(width: float, height: float) -> Any:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
