"""`goldenedit plan`: what an edit of a model will cost, by its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from goldenedit.commands.options import Layer, Model, Set, settings_of
from goldenedit.commands.terminal import Report, console, parse_layer, reporting
from goldenedit.tables import printable
from goldenedit.units import flops_of, size_of, time_of

if TYPE_CHECKING:
    from goldenedit.plans import Plan

_DTYPES = ("float32", "bfloat16", "float16")


@reporting
def plan(
    model: Model,
    layer: Layer = "lga",
    method: Annotated[str, typer.Option(help="The editor (listed by `goldenedit editors`).")] = "gated",
    facts: Annotated[int, typer.Option(min=1, help="The number of facts.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="The precision of the weights: `float32`, `bfloat16` or `float16`.")
    ] = None,
    options: Set = None,
) -> Report:
    """Tell what an edit of MODEL will cost, before any work: memory, operations and an estimate of the time."""
    import torch

    from goldenedit import EditConfig
    from goldenedit.editing.budget import free_memory
    from goldenedit.loading import load_config
    from goldenedit.plans import plan as plan_edit

    if dtype is not None and dtype not in _DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    memory = free_memory(torch.device("cpu"))
    accelerator = free_memory(torch.device("cuda")) if torch.cuda.is_available() else None
    config = EditConfig(**settings_of({"method": method, "layer": parse_layer(layer)}, options))
    planned = plan_edit(
        load_config(model),
        config,
        facts,
        None if dtype is None else getattr(torch, dtype),
        memory if accelerator is None else accelerator,
    )
    shape = planned.shape
    console.print(f"{printable(model)}: {shape.layers} layers, of which {numbers(shape.editable)} can be edited")
    for name, size in shape.weights.items():
        console.print(f"Weights in {name}: {size_of(size)}")
    console.print(plan_table(planned))
    console.print(f"The edit on disk: {size_of(planned.edit_bytes)}")
    seconds = planned.seconds()
    console.print(
        f"An estimate for this CPU: {time_of(seconds)}, if nothing is cached and with the load that it has now."
    )
    for note in planned.notes:
        console.print(printable(note), style="yellow")
    show_fit(planned, memory)
    if accelerator is not None:
        show_fit(planned, memory, accelerator)
    values = {
        "editable_layers": list(shape.editable),
        "weight_bytes": shape.weight_bytes,
        "phases": [{"name": phase.name, "bytes": phase.bytes, "flops": phase.flops} for phase in planned.phases],
        "peak_bytes": planned.peak_bytes,
        "flops": planned.flops,
        "cpu_seconds": seconds,
        "edit_bytes": planned.edit_bytes,
        "notes": list(planned.notes),
        "free_bytes": memory,
        "fits": planned.fits(memory),
        "remedies": planned.remedies(memory),
    }
    if accelerator is not None:
        values |= {
            "accelerator_bytes": planned.accelerator_bytes,
            "host_bytes": planned.host_bytes,
            "free_accelerator_bytes": accelerator,
            "fits_accelerator": planned.fits(memory, accelerator),
        }
    return Report(values, [planned.peak_bytes])


def show_fit(planned: Plan, memory: int, accelerator: int | None = None) -> None:
    """Print whether an edit fits this machine, and with which settings it would."""
    if accelerator is None:
        needed, free = planned.peak_bytes, f"{size_of(memory)} of free memory"
    else:
        needed = planned.accelerator_bytes
        free = f"{size_of(accelerator)} of free GPU memory, with {size_of(planned.host_bytes)} of main memory"
    fits = planned.fits(memory, accelerator)
    words = "fits into" if fits else "does not fit into"
    console.print(f"The peak of {size_of(needed)} {words} {free}.", style=None if fits else "bold red")
    if fits:
        return
    remedies = planned.remedies(memory, accelerator)
    if remedies:
        console.print(printable(f"It would fit with {', or with '.join(remedies)}."))
    else:
        console.print("No setting makes it fit. Use a larger machine, or load the model quantized or offloaded.")


def plan_table(planned: Plan) -> Table:
    """Return memory and operations of each phase, which is called as `edit` tells it."""
    from goldenedit.cost import PHASES

    table = Table("phase", "memory beside the weights", "operations", show_footer=True)
    totals = ("peak with the weights, total", size_of(planned.peak_bytes), flops_of(planned.flops))
    for column, total in zip(table.columns, totals, strict=True):
        column.footer = total
    for phase in planned.phases:
        table.add_row(PHASES.get(phase.name, phase.name.capitalize()), size_of(phase.bytes), flops_of(phase.flops))
    return table


def numbers(layers: Sequence[int]) -> str:
    """Return the numbers of layers, those without gaps as a range.

    Example:
        ```python
        >>> from goldenedit.commands.plan import numbers
        >>> numbers([0, 1, 2, 5])
        '0 to 2 and 5'
        ```
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    *first, last = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{', '.join(first)} and {last}" if first else last
