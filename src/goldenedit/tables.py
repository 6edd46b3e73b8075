"""The tables that the command line prints: layers, facts, costs and scores."""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from goldenedit.audit import EditAudit
    from goldenedit.audit_suspects import Suspect
    from goldenedit.cost import Cost
    from goldenedit.editors import Editor
    from goldenedit.evaluation.evaluate import Evaluation
    from goldenedit.evaluation.report import Text
    from goldenedit.layer_scores import LayerSelection, Selector
    from goldenedit.storage.folder import Edit


_LEGEND = (
    "Shares from 0.00 (none) to 1.00 (all), of n facts or of n prompts. 95%: their interval. base: the unedited model; "
    "told: the same with the fact in its prompt; random: a random change of the same size. KL: how far the "
    "probabilities of the next word are from the unedited model's, in nats; 0 is no difference."
)
_LEGEND_OF_NEGATION = 'With "not", saying the new answer is an error; base: the share that says the old one.'
_LEGEND_OF_COMPARISON = (
    "Shares from 0.00 (none) to 1.00 (all), in brackets their 95% intervals. random: under a random change of the same "
    "size. KL: how far the probabilities of the next word are from the unedited model's, in nats; 0 is no difference."
)
LEGEND_OF_CHANGES = (
    "fingerprint: a hash of the base model's weights; edits do not load onto others. key covariance: the text that "
    "tells the editor which other words to leave alone. rank: the directions in which a "
    "matrix changes, which the file has one row and one column for: few for a few facts, at most the width of the "
    "matrix (vLLM loads up to 512). norm: the size of the change."
)
_LEGEND_OF_FACTS = "before, after: the probability of the new answer, in the base model and with the edit."
_LEGEND_OF_AUDIT = (
    "size: the norm of the change, relative to that of the matrix. It may exceed 100% and harm nothing, because the "
    "default editor writes into neurons that are silent on other text: `goldenedit evaluate` measures harm. "
    "unexplained: the share of the change that the listed facts do not account for."
)
_LEGEND_OF_SCORES = {  # what is asked, in the words of the papers
    "efficacy": "the edited prompts",
    "rewrite": "the edited prompts",
    "paraphrase": "the same in other words",
    "rephrase": "the same in other words",
    "neighborhood": "prompts about other subjects",
    "locality": "other prompts, which should not change",
    "portability": "prompts whose answer follows from the fact",
    "score": "S, the harmonic mean of efficacy, paraphrase and neighborhood",
    "paraphrase accuracy": "tokens of the new answer that are the first choice, in other words",
}
_PATH = 36  # characters of the path of a module
_MISSED = 5  # facts that are named
_ASKED = ("rephrase", "question", "chat", "second_turn", "prefix")  # forms in which a fact should hold
_VERDICTS = {"exact": "and nothing else", "judge": "by the judge"}
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
        cached = " (cached)" if selection.is_cached else ""
        seconds, forwards = f"{selection.cost.seconds:.1f}{cached}", f"{selection.forward_equivalents:.1f}"
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


def facts_table(edits: Sequence[Edit], most: int | None = None) -> Table:
    """Return the facts of edits with the probability of each new answer; each fact that does not take says why.

    Args:
        most: Largest number of facts; None for all. Of more, those that do not take come first.
    """
    facts = [(edit.name, fact) for edit in edits for fact in edit.facts]
    left_out = 0 if most is None else max(len(facts) - most, 0)
    if left_out:
        facts = sorted(facts, key=lambda named: named[1].takes)[:most]
    has_failures = any(fact.failure is not None for _, fact in facts)
    table = Table("edit", "prompt", "new answer", "before", "after", *(["takes"] if has_failures else []))
    legend = [_LEGEND_OF_FACTS]
    if any(fact.weakest_note for _, fact in facts):
        legend.append("weakest: that of its least likely token.")
    for name, fact in facts:
        row = (name, fact.request.shown, fact.request.target_new)
        probabilities = (f"{fact.probability_before:.3f}", f"{fact.probability_after:.3f}{fact.weakest_note}")
        style, mark = (None, "yes") if fact.failure is None else ("yellow", f"does not take: {fact.failure}")
        table.add_row(*map(printable, row), *probabilities, *([mark] if has_failures else []), style=style)
    if left_out:
        legend.insert(0, f"and {left_out} more.")
    table.caption, table.caption_justify = " ".join(legend), "left"
    return table


def seen_table(evaluation: Evaluation) -> Table:
    """Return what a user sees: how often the model says the answers, and what else changed."""
    legend = f"{_LEGEND} {_LEGEND_OF_NEGATION}" if "negation" in evaluation.says else _LEGEND
    table = Table(box=None, padding=(0, 2, 0, 0), caption=legend, caption_justify="left")
    table.add_column()
    for column in ("edited", "95%", "base", "told", "random", "n"):
        table.add_column(column, no_wrap=True)
    for row in (*_rows_of_forms(evaluation), *_rows_of_others(evaluation)):
        table.add_row(*row)
    return table


def _rows_of_forms(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    if evaluation.says:
        yield ("[bold]says the new answer, asked by[/bold]",)
    for form, scores in evaluation.says.items():
        base, informed = evaluation.base_seen.says.get(form), evaluation.in_prompt.get(form)
        for name in ("contains", "exact", "judge"):
            if (share := getattr(scores, name)) is None:
                continue
            label = f" {_label(form)}" if name == "contains" else f"   {_VERDICTS[name]}"
            others = ["" if other is None else f"{getattr(other, name).value:.2f}" for other in (base, informed)]
            yield label, f"{share.value:.2f}", _range(share.interval), *others, "", str(scores.n)


def _rows_of_others(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    if evaluation.unchanged:
        yield ("[bold]writes as the base model, after[/bold]",)
    for kind, same in evaluation.unchanged.items():
        control = "" if same.control is None else f"{same.control.value:.2f}"
        yield f" {_label(kind)}", f"{same.same.value:.2f}", _range(same.same.interval), "1.00", "", control, str(same.n)
        for label, share in (("keeps the key word", same.keyword), ("says the new answer", same.says_new)):
            if share is not None:
                yield f"   {label}", f"{share.value:.2f}", _range(share.interval), "", "", "", str(share.facts)
        yield "   KL", f"{same.kl:.2g}", "", "0", "", "", str(same.n)
    if (text := evaluation.text) is not None:
        intervals = {name: _range(bounds, ".2g") for name, bounds in text.intervals.items()}
        control = "" if text.control is None else f"{text.control:.2g}"
        yield ("[bold]on plain text[/bold]",)
        yield " KL", f"{text.kl:.2g}", intervals.get("kl", ""), "0", "", control, str(text.tokens)
        yield " KL of the text that changed most", f"{text.worst:.2g}", "", "0", "", "", ""
        agreement = f"{text.agreement:.3f}", intervals.get("agreement", "")
        yield " same most likely next word", *agreement, "1", "", "", str(text.tokens)


def _label(name: str) -> str:
    from goldenedit.storage.card_results import label_of

    return printable(label_of(name))


def _range(interval: tuple[float, float], style: str = ".2f") -> str:
    return f"{interval[0]:{style}}-{interval[1]:{style}}"


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return the scores of papers for the edited and the base model by family, with 95% intervals."""
    from goldenedit.storage.card_results import FAMILIES

    names = {name.replace("_", " ") for scores in evaluation.edited.values() for name in scores.intervals}
    legend = [f"{family.replace('_', ' ')}: {FAMILIES[family]}." for family in evaluation.edited if family in FAMILIES]
    legend += [f"{name}: {text}." for name, text in _LEGEND_OF_SCORES.items() if name in names]
    table = Table("family", "score", "edited", "95%", "base", caption="\n".join(legend), caption_justify="left")
    table.title, table.title_justify = "Scores of papers", "left"
    for family, scores in evaluation.edited.items():
        edited, base = scores.to_dict(), evaluation.base[family].to_dict()
        for name, interval in scores.intervals.items():
            row = (f"{edited[name]:.3f}", _bounds(interval, 3), f"{base[name]:.3f}")
            table.add_row(f"{family.replace('_', ' ')}, n = {edited['n']}", name.replace("_", " "), *row)
        table.add_section()
    return table


def failures(evaluation: Evaluation) -> Iterator[str]:
    """Yield lines on the facts that the edited model does not say; nothing if it says all.

    Each fact counts once: asked by its prompt or, if it has messages or this form was left out, in a chat. Then those
    follow that it says so, but not where they are asked in another form.
    """
    asked = [text for text in evaluation.texts if text.answers]
    # The edited prompt comes before the chat.
    asked_first = _first_of_facts(text for text in asked if text.kind in ("completion", "chat"))
    missed = [text for text in asked_first if not text.holds]
    if missed:
        yield f"The edited model does not say {len(missed)} of {len(asked_first)} facts:"
        yield from _named(missed, with_form=False)
    known = {text.fact for text in missed}
    others = (text for text in asked if text.kind in _ASKED and text.fact not in known)
    elsewhere = _first_of_facts(text for text in others if not text.holds)
    if elsewhere:
        yield f"It does not say {len(elsewhere)} of the others where they are asked in another form:"
        yield from _named(elsewhere, with_form=True)
    prompts = {text.question for text in asked if text.kind == "completion"}
    if any(text.kind == "chat" and text.question in prompts for text in asked if not text.holds):
        yield (
            "Facts without a question are asked in a chat by their prompt, as it stands. Add a column `question` to "
            "the facts to ask as people do."
        )


def _first_of_facts(texts: Iterable[Text]) -> list[Text]:
    """Return the first text of each fact, in the order of their last ones."""
    return list({text.fact: text for text in reversed(list(texts))}.values())[::-1]


def _named(texts: Sequence[Text], with_form: bool) -> Iterator[str]:
    """Yield a line on each of the first texts, and how many more there are."""
    for text in texts[:_MISSED]:
        form = f"{text.kind.replace('_', ' ')}: " if with_form else ""
        yield f"  {form}{text.question!r}: expected {text.answers[0]!r}, got {text.edited!r}"
    if len(texts) > _MISSED:
        yield f"  and {len(texts) - _MISSED} more"


def comparison_table(names: Sequence[str], evaluations: Sequence[Evaluation]) -> Table:
    """Return the figures of several edits side by side."""
    columns = [_figures(evaluation) for evaluation in evaluations]
    table = Table("", *map(printable, names), caption=_LEGEND_OF_COMPARISON, caption_justify="left")
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "") for column in columns))
    return table


def _figures(evaluation: Evaluation) -> dict[str, str]:
    """Return the figures of an edit by their labels."""
    figures = {}
    for form, said in evaluation.says.items():
        label = f"{_label(form)}{' (an error)' if form == 'negation' else ''}"
        figures[f"says it: {label}"] = f"{said.contains.value:.2f} ({_bounds(said.contains.interval)})"
    for kind, same in evaluation.unchanged.items():
        control = "" if same.control is None else f", random {same.control.value:.2f}"
        figures[f"unchanged: {_label(kind)}"] = f"{same.same.value:.2f} ({_bounds(same.same.interval)}){control}"
    if evaluation.text is not None:
        control = "" if evaluation.text.control is None else f", random {evaluation.text.control:.2g}"
        figures["plain text: KL"] = f"{evaluation.text.kl:.2g}{control}"
        figures["plain text: same most likely next word"] = f"{evaluation.text.agreement:.3f}"
    for family, scores in evaluation.edited.items():
        values = scores.to_dict()
        figures |= {
            f"{family.replace('_', ' ')}: {name.replace('_', ' ')}": f"{values[name]:.3f}" for name in scores.intervals
        }
    return figures


def general_table(general: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | None]]]]) -> Table:
    """Return the scores of lm-evaluation-harness for both models, with the number of items that they are over."""
    table = Table("task", "metric", "n", "edited", "base")
    for task, metrics in general["edited"].items():
        for metric, score in metrics.items():
            count = "" if score.get("n") is None else str(score["n"])
            row = [general[state][task][metric] for state in ("edited", "base")]
            table.add_row(printable(task), printable(metric), count, *map(_with_error, row))
    return table


def _with_error(score: Mapping[str, float | None]) -> str:
    value, error = score["value"], score.get("stderr")
    return ("" if value is None else f"{value:.3f}") + ("" if error is None else f" ± {error:.3f}")


def _bounds(interval: tuple[float, float], digits: int = 2) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def described_table(kind: str, members: Sequence[Editor] | Sequence[Selector], default: str) -> Table:
    """Return editors or layer selectors with their papers, and what they are. `default` names the default one."""
    table = Table(kind, "paper", "what it is")
    for member in members:
        name = f"{member.name} (default)" if member.name == default else member.name
        table.add_row(name, member.paper, printable(_summary(member.function)))
    return table


def options_table(editors: Sequence[Editor]) -> Table:
    """Return the options of editors. Editors with the same option and default share a row."""
    from goldenedit.editors.options import default_of

    named: dict[tuple[str, str, str], list[str]] = {}
    for editor in editors:
        for name, entry in editor.fields.items():
            row = name, str(default_of(entry, True)), str(entry.metadata.get("help", ""))
            named.setdefault(row, []).append(editor.name)
    table = Table(caption="Options: `--set option=value`, or `EditConfig(option=value)`.", caption_justify="left")
    table.add_column("option", no_wrap=True)
    for column in ("default", "of", "what it is"):
        table.add_column(column)
    for (name, default, text), names in sorted(named.items()):
        table.add_row(*map(printable, (name, default, ", ".join(names), text)))
    return table


def _summary(function: Callable[..., Any]) -> str:
    """Return the first paragraph of the documentation of a function's module or, without one, of the function."""
    text = getattr(sys.modules.get(function.__module__), "__doc__", None) or function.__doc__ or ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def changes_rows(edits: Sequence[Edit]) -> Iterator[tuple[str, str]]:
    """Yield the name of each edit, and for each layer the maps that it changes, with the ranks and norms."""
    for edit in edits:
        groups: dict[str, list[str]] = {}
        for path in sorted(edit.deltas, key=_by_layer):
            groups.setdefault(path.rpartition(".")[0], []).append(path)
        for index, (parent, paths) in enumerate(groups.items()):
            deltas = [edit.deltas[path] for path in paths]
            names = ", ".join(path.rpartition(".")[2] for path in paths)
            each = [str(delta.rank) for delta in deltas]
            ranks = each[0] if len(set(each)) == 1 else ", ".join(each)
            norms = ", ".join(f"{delta.norm:.2f}" for delta in deltas)
            name = edit.name if index == 0 else ""
            yield printable(name), printable(f"{parent}: {names}; rank {ranks}; norm {norms}")


def _by_layer(path: str) -> list[tuple[bool, int, str]]:
    """Return the sort key of a path that puts layer 10 after layer 9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in path.split(".")]


def audit_table(audits: Sequence[EditAudit]) -> Table:
    """Return the size of each change, and the share of it that the listed facts do not explain."""
    table = Table("edit", caption=_LEGEND_OF_AUDIT, caption_justify="left")
    table.add_column("module", overflow="fold", min_width=_PATH)
    for column in ("size", "unexplained"):
        table.add_column(column)
    for audit in audits:
        for index, module in enumerate(sorted(audit.modules, key=lambda module: _by_layer(module.path))):
            share = "unknown" if module.unexplained is None else f"{module.unexplained:.1%}"
            norm = "unknown" if module.norm is None else f"{module.norm:.2%}"
            table.add_row(printable(audit.name) if index == 0 else "", printable(module.path), norm, share)
        table.add_section()
    return table


def suspects_table(suspects: Sequence[Suspect]) -> Table:
    """Return names with their scores, the highest first."""
    table = Table("suspected name", "score")
    for suspect in sorted(suspects, key=lambda suspect: -suspect.score):
        table.add_row(printable(suspect.name), f"{suspect.score:.1f}")
    return table
