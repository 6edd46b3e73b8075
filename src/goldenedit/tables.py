"""What the command line prints: tables of layers, facts, costs and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from goldenedit.cost import Cost
    from goldenedit.editors import Editor
    from goldenedit.evaluation.evaluate import Evaluation
    from goldenedit.layer_scores import LayerSelection, Selector
    from goldenedit.storage.folder import Edit


def layer_chart(selection: LayerSelection, kappa: float, width: int = 40) -> Table:
    """Return the layer scores as bars; layers outside LGA's fence are dimmed, the golden one stands out."""
    scores, passed = selection.score_tensor(), selection.within_fence(kappa)
    kept = scores[passed]
    low, high = min(0.0, kept.min().item()), kept.max().item()
    table = Table("layer", "score", "", box=None, padding=(0, 1))
    for layer, score in enumerate(scores.tolist()):
        if score != score:
            table.add_row(str(layer), "-", "")
            continue
        share = min(max((score - low) / max(high - low, 1e-30), 0.0), 1.0)
        style = "bold yellow" if layer in selection.layers else "" if passed[layer] else "dim"
        note = "" if passed[layer] else " outside the fence"
        table.add_row(str(layer), f"{score:.4g}", "█" * max(round(share * width), 1) + note, style=style)
    return table


def selections_table(selections: Sequence[LayerSelection]) -> Table:
    """Return the layers that selectors chose, and what each cost when its scores were computed."""
    table = Table("selector", "layer", "facts", "seconds", "forwards a fact")
    for one in selections:
        layers = ", ".join(map(str, one.layers))
        cost = (f"{one.cost.seconds:.1f}", f"{one.forward_equivalents:.1f}") if one.facts else ("", "")
        table.add_row(one.selector, f"[bold]{layers}[/bold]", str(one.facts or ""), *cost)
    return table


def profile_table(phases: Mapping[str, Cost], forward: float) -> Table:
    """Return what phases cost, also in plain forwards of the facts with their new answers, of `forward` operations."""
    table = Table("phase", "seconds", "GFLOP", "plain forwards", show_footer=True)
    seconds, flops = (sum(getattr(cost, name) for cost in phases.values()) for name in ("seconds", "flops"))
    footer = ("all", f"{seconds:.2f}", f"{flops / 1e9:.1f}", f"{flops / forward:.1f}")
    for column, total in zip(table.columns, footer, strict=True):
        column.footer = total
    for name, cost in phases.items():
        table.add_row(name, f"{cost.seconds:.2f}", f"{cost.flops / 1e9:.1f}", f"{cost.flops / forward:.1f}")
    return table


def facts_table(edits: list[Edit]) -> Table:
    """Return the facts of edits with the probability of each answer before and after; those not taken are marked."""
    table = Table("edit", "prompt", "new answer", "before", "after", "")
    for made in edits:
        for fact in made.facts:
            row = (made.name, fact.request.shown, fact.request.target_new)
            figures = (f"{fact.probability_before:.3f}", f"{fact.probability_after:.3f}")
            style, mark = (None, "") if fact.takes else ("yellow", "does not take")
            table.add_row(*map(escape, row), *figures, mark, style=style)
    return table


def evaluation_table(found: Evaluation) -> Table:
    """Return the scores of edited and base model by family, with 95% intervals."""
    table = Table("family", "score", "edited", "95%", "base")
    for family, measured in found.edited.items():
        figures, base = measured.to_dict(), found.base[family].to_dict()
        for name, (low, high) in measured.intervals.items():
            row = (f"{figures[name]:.3f}", f"{low:.3f} to {high:.3f}", f"{base[name]:.3f}")
            table.add_row(f"{family}, n = {figures['n']}", name.replace("_", " "), *row)
        table.add_section()
    return table


def editors_table(editors: Sequence[Editor]) -> Table:
    """Return editors with their papers, and what their options do."""
    from goldenedit.editors.options import default_of

    table = Table("editor", "paper", "option", "default", "what it does")
    for editor in editors:
        rows = [
            (name, str(default_of(entry, True)), str(entry.metadata.get("help", "")))
            for name, entry in editor.fields.items()
        ]
        for index, row in enumerate(rows or [("", "", "")]):
            table.add_row(*((editor.name, editor.paper) if index == 0 else ("", "")), *map(escape, row))
    return table


def selectors_table(selectors: Sequence[Selector]) -> Table:
    """Return layer selectors with their papers, and what they do."""
    table = Table("layer selector", "paper", "what it does")
    for selector in selectors:
        table.add_row(selector.name, selector.paper, escape((selector.function.__doc__ or "").strip().split("\n")[0]))
    return table
