"""`goldenedit locate`: the golden layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from goldenedit import tables
from goldenedit.commands.options import FactsFormat, Model, SkipBad
from goldenedit.commands.terminal import Report, console, load_together, reporting, telling
from goldenedit.tables import printable

if TYPE_CHECKING:
    from goldenedit import EditModel
    from goldenedit.layer_scores import LayerSelection
    from goldenedit.storage.atlas import GoldenLayers


@reporting
def locate(
    model: Model,
    proxy: Annotated[
        Path | None, typer.Option(help="The file of facts to score layers on; packaged facts by default.")
    ] = None,
    format: FactsFormat = "auto",
    skip_bad: SkipBad = False,
    size: Annotated[int, typer.Option(help="The number of these facts to use.")] = 100,
    selector: Annotated[
        str,
        typer.Option(
            "--method",
            help="A layer selector (listed by `goldenedit editors`), or `all` for every selector except `sweep`.",
        ),
    ] = "lga",
    sweep: Annotated[int, typer.Option(help="With `all`: run `sweep` too, on this many facts.")] = 0,
    editor: Annotated[str, typer.Option(help="The editor for `sweep`, `key_response` and `published`.")] = "gated",
    loss: Annotated[str, typer.Option(help="The loss of `lga`: `sequence` or `answer`.")] = "sequence",
    kappa: Annotated[float, typer.Option(help="The width of the outlier fence, in interquartile ranges.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Save the chart as an image in this file.")] = None,
    push: Annotated[
        str | None, typer.Option(help="Share the result in this repository on the Hub, for `--layer hub:REPO`.")
    ] = None,
) -> Report:
    """Find the golden layer of MODEL by Layer Gradient Analysis, by another selector, or by all of them."""
    from dataclasses import replace

    from goldenedit import EditConfig, EditModel, load_requests
    from goldenedit.layer_selection import SELECTORS

    if plot is not None:
        from goldenedit.plots import check_matplotlib

        check_matplotlib()
    facts = None if proxy is None else load_requests(proxy, format, skip_bad=skip_bad)
    first = "lga" if selector == "all" else selector
    config = EditConfig(method=editor, layer=first, proxy=facts, proxy_size=size, lga_loss=loss, tukey_kappa=kappa)
    base, tokenizer, is_first = load_together(model)
    selections: list[LayerSelection] = []
    records: list[GoldenLayers] = []
    names = [record.name for record in SELECTORS.available()] if selector == "all" else [selector]
    for name in names:
        if selector == "all" and name == "sweep" and not sweep:
            continue
        count = sweep if selector == "all" and name == "sweep" else size
        wrapped = EditModel(base, replace(config, layer=name, proxy_size=count), tokenizer)
        _tell_start(wrapped, count)
        try:
            with telling():
                wrapped.select_layer()
        except ValueError as error:
            if selector != "all":
                raise
            console.print(f"{name}: {printable(str(error))}")
            continue
        assert wrapped.layer_selection is not None
        selections.append(wrapped.layer_selection)
        console.print(printable(f"{wrapped.layer_selection}."))  # now, because the next one may take long
        if push is not None:
            records.append(wrapped.golden_layers())
    _tell(selections, kappa)
    found = [
        {**selection.to_dict(), "within_noise": selection.within_noise(), "is_cached": selection.is_cached}
        for selection in selections
    ]
    result: dict[str, object] = {"selections": found}
    if plot is not None and is_first:
        from goldenedit.plots import plot_selections

        plot_selections(selections, plot, model, kappa)
        console.print(f"Saved the chart in {printable(str(plot))}")
        result["plot"] = str(plot)
    if push is not None and is_first:
        from goldenedit.storage.hub import push_golden_layers

        result["url"] = str(push_golden_layers(records, push))
        console.print(f"Shared in {printable(str(result['url']))}")
    layers = {selection.selector: ",".join(map(str, selection.layers)) for selection in selections}
    return Report(result, [f"{name}\t{chosen}" if selector == "all" else chosen for name, chosen in layers.items()])


def _tell_start(model: EditModel, facts: int) -> None:
    """Say which selector starts and, of a sweep, what it will take."""
    name = model.edit_config.layer
    text = f"{name} ..."
    if name == "sweep":
        layers = len(model.architecture.down_projections)
        text = (
            f"sweep: {facts} facts, each edited at each of {layers} layers, which takes as long as {facts * layers} "
            "edits. What is done is kept: if you stop it, the same command goes on ..."
        )
    console.print(text, style="dim")


def _tell(selections: Sequence[LayerSelection], kappa: float) -> None:
    """Print what selectors found: the layers and costs, and the scores of a single one as bars."""
    if len(selections) == 1 and selections[0].scores is not None:
        console.print(tables.layer_chart(selections[0], kappa))
    console.print(tables.selections_table(selections))
