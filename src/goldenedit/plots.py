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


def plot_heat_map(summary: Mapping[str, Any], path: str | Path) -> None:
    """Save S of a benchmark's edits as a heat map, with a row for each dataset and editor and a column for each layer.

    A star marks the best layer of each row, and a ring the golden layer of the proxy facts.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    curves = summary["curves"]
    figure = _figure(10, 1.5 + 0.4 * len(curves))
    axes = figure.subplots()
    layers = sorted({layer for curve in curves for layer in curve["layers"]})
    by_layer = [dict(zip(curve["layers"], curve["scores"], strict=True)) for curve in curves]
    rows = [[scores.get(layer, float("nan")) for layer in layers] for scores in by_layer]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(curves)), [f"{curve['dataset']}, {curve['method']}" for curve in curves])
    axes.set_xticks(range(len(layers)), layers)
    for row, curve in enumerate(curves):
        axes.plot(layers.index(curve["best"]), row, "*", color="white")
        if "golden" in curve and curve["golden"]["layer"] in layers:
            axes.plot(layers.index(curve["golden"]["layer"]), row, "o", color="gold", fillstyle="none", markersize=12)
    axes.set(xlabel="layer", title=f"S of {summary['model']} by edited layer")
    figure.colorbar(image)
    _save(figure, path)


def plot_scores_against_s(summary: Mapping[str, Any], path: str | Path) -> None:
    """Save scatter plots of selectors' scores against S by brute force: one point per layer, one color per dataset.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    method = summary["curves"][0]["method"]
    curves = [curve for curve in summary["curves"] if curve["method"] == method]
    scored = [
        selection
        for selection in summary["selections"]
        if selection["scores"] is not None and selection["proxy"] == curves[0]["dataset"]
    ]
    figure = _figure(12, 3 * ((len(scored) + 3) // 4))
    panels = figure.subplots((len(scored) + 3) // 4, 4, squeeze=False).flatten()
    for axes in panels[len(scored) :]:
        axes.set_visible(False)
    for axes, selection in zip(panels, scored, strict=False):
        for curve in curves:
            points = [
                (selection["scores"][layer], score)
                for layer, score in zip(curve["layers"], curve["scores"], strict=True)
                if selection["scores"][layer] is not None
            ]
            axes.scatter(*zip(*points, strict=True), s=8, label=curve["dataset"])
        axes.set_title(selection["selector"], fontsize=8)
        axes.set_ylabel("S")
    panels[0].legend(fontsize=6)
    _save(figure, path)


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
