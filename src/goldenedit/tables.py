"""The tables that the command line prints: layers, facts, costs and scores."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from goldenedit.audit import EditAudit
    from goldenedit.cost import Cost
    from goldenedit.editors import Editor
    from goldenedit.evaluation.evaluate import Evaluation
    from goldenedit.layer_scores import LayerSelection, Selector
    from goldenedit.storage.folder import Edit


_KEPT = "\n\t\u200c\u200d"  # line ends, tabs, and the joiners of scripts and emoji


def printable(text: str) -> str:
    """Return a text as rich prints it verbatim: without markup, and with U+FFFD in place of control characters.

    The text of a stranger must not move the cursor, hide other text or change the direction of writing.
    """
    return escape("".join("\ufffd" if _is_control(character) else character for character in text))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _KEPT


def layer_chart(selection: LayerSelection, kappa: float, width: int = 40) -> Table:
    """Return the layer scores as bars. Chosen layers are highlighted, and layers outside the fence are dimmed."""
    scores, passed = selection.score_tensor(), selection.within_fence(kappa)
    within = scores[passed]
    low, high = min(0.0, within.min().item()), within.max().item()
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
    """Return the layers that each selector chose, and the cost of computing its scores."""
    table = Table("selector", "layer", "facts", "seconds", "forwards a fact")
    for selection in selections:
        layers = ", ".join(map(str, selection.layers))
        seconds, forwards = f"{selection.cost.seconds:.1f}", f"{selection.forward_equivalents:.1f}"
        cost = (str(selection.facts), seconds, forwards) if selection.facts else ("", "", "")
        table.add_row(selection.selector, f"[bold]{layers}[/bold]", *cost)
    return table


def profile_table(phases: Mapping[str, Cost], forward: float) -> Table:
    """Return the cost of each phase. `forward` is the FLOPs of one plain forward of the facts with new answers."""
    table = Table("phase", "seconds", "GFLOP", "plain forwards", show_footer=True)
    seconds, flops = (sum(getattr(cost, name) for cost in phases.values()) for name in ("seconds", "flops"))
    totals = ("total", f"{seconds:.2f}", f"{flops / 1e9:.1f}", f"{flops / forward:.1f}")
    for column, total in zip(table.columns, totals, strict=True):
        column.footer = total
    for name, cost in phases.items():
        table.add_row(name, f"{cost.seconds:.2f}", f"{cost.flops / 1e9:.1f}", f"{cost.flops / forward:.1f}")
    return table


def facts_table(edits: list[Edit]) -> Table:
    """Return the facts of edits with the probability of each new answer; each fact that does not take says why."""
    table = Table("edit", "prompt", "new answer", "before", "after", "")
    for edit in edits:
        for fact in edit.facts:
            row = (edit.name, fact.request.shown, fact.request.target_new)
            probabilities = (f"{fact.probability_before:.3f}", f"{fact.probability_after:.3f}{fact.weakest_note}")
            style, mark = (None, "") if fact.failure is None else ("yellow", f"does not take: {fact.failure}")
            table.add_row(*map(printable, row), *probabilities, mark, style=style)
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return the scores of the edited and the base model by family, with 95% intervals."""
    table = Table("family", "score", "edited", "95%", "base")
    for family, scores in evaluation.edited.items():
        edited, base = scores.to_dict(), evaluation.base[family].to_dict()
        for name, (low, high) in scores.intervals.items():
            row = (f"{edited[name]:.3f}", f"{low:.3f} to {high:.3f}", f"{base[name]:.3f}")
            table.add_row(f"{family}, n = {edited['n']}", name.replace("_", " "), *row)
        table.add_section()
    return table


def editors_table(editors: Sequence[Editor]) -> Table:
    """Return the editors with their papers and options."""
    from goldenedit.editors.options import default_of

    table = Table("editor", "paper", "option", "default", "what it does")
    for editor in editors:
        rows = [
            (name, str(default_of(entry, True)), str(entry.metadata.get("help", "")))
            for name, entry in editor.fields.items()
        ]
        for index, row in enumerate(rows or [("", "", "")]):
            table.add_row(*((editor.name, editor.paper) if index == 0 else ("", "")), *map(printable, row))
    return table


def selectors_table(selectors: Sequence[Selector]) -> Table:
    """Return the layer selectors with their papers."""
    table = Table("layer selector", "paper", "what it does")
    for selector in selectors:
        table.add_row(
            selector.name, selector.paper, printable((selector.function.__doc__ or "").strip().split("\n")[0])
        )
    return table


def audit_table(audits: Sequence[EditAudit]) -> Table:
    """Return the size of each change, and the share of it that the listed facts do not explain."""
    table = Table("edit", "module", "norm, relative to the base matrix", "not explained by its facts")
    for audit in audits:
        for module in audit.modules:
            share = "unknown" if module.unexplained is None else f"{module.unexplained:.1%}"
            norm = "unknown" if module.norm is None else f"{module.norm:.2%}"
            table.add_row(printable(audit.name), printable(module.path), norm, share)
    return table
