"""`goldenedit show`: what edits change, and do their facts explain it? `goldenedit editors`: what can be chosen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from goldenedit import tables
from goldenedit.commands.options import Base, Edits
from goldenedit.commands.terminal import Report, console, load_edits, load_model, reporting, telling
from goldenedit.tables import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from goldenedit import EditModel
    from goldenedit.audit import EditAudit
    from goldenedit.audit_suspects import Suspect
    from goldenedit.storage.folder import Edit

_SHOWN = 50  # warnings about an edit that are printed
_ADAPTER = "audited"


@reporting
def show(
    folder: Edits,
    model: Base = None,
    replay: Annotated[
        bool, typer.Option(help="Load the base model and check that the edits do what they list, and no more.")
    ] = True,
    suspects: Annotated[
        Path | None,
        typer.Option(
            metavar="NAMES.txt",
            help="A text file with a name on each line: tell which of them the edits answer to, though they do not "
            "list them. FOLDER may then hold a plain LoRA adapter too.",
        ),
    ] = None,
) -> Report:
    """Show what the edits in FOLDER change, and whether the listed facts explain it."""
    from goldenedit.loading import base_of
    from goldenedit.storage.folder import folder_size
    from goldenedit.storage.hub import find_adapter
    from goldenedit.storage.reading import is_plain_adapter, read_edit_folder

    if suspects is not None and not replay:
        raise typer.BadParameter("--suspects replays the edits, so it does not go with --no-replay.")
    names: list[str] = []
    if suspects is not None:
        from goldenedit.audit_suspects import read_names  # which imports PEFT, for seconds

        names = read_names(suspects)
    path = find_adapter(folder)
    size = folder_size(path)
    if names and is_plain_adapter(path):
        return _show_plain(path, model, names, size)
    content = read_edit_folder(path)
    summary = Table.grid(padding=(0, 2))
    name, _ = base_of(content.base_model, model)
    summary.add_row("base model", printable(name))
    summary.add_row("fingerprint", printable(content.base_model.fingerprint))
    for config in content.configs:
        summary.add_row("editor", printable(config.method))
        summary.add_row("layer", printable(config.layers_in_words))
        summary.add_row("key covariance", printable(config.covariance))
    for name, changes in tables.changes_rows(content.edits):
        summary.add_row(name, changes)
    summary.add_row("size", f"{size / 1000:.1f} KB")
    console.print(summary)
    console.print(tables.LEGEND_OF_CHANGES, style="dim italic")
    console.print(tables.facts_table(content.edits))
    replayed = _replayed(path, model, needed=bool(names)) if replay else None
    audits = None if replayed is None else show_audit(replayed)
    found = _show_suspects(replayed, names) if replayed is not None and names else []
    values = {
        "base_model": asdict(content.base_model),
        "edits": [_values(edit) for edit in content.edits],
        "evaluation": content.evaluation,
        "bytes": size,
        "audit": None if audits is None else [asdict(audit) for audit in audits],
        "suspects": [asdict(suspect) for suspect in found] if names else None,
    }
    return Report(values, [edit.name for edit in content.edits])


def _values(edit: Edit) -> dict[str, Any]:
    return {
        "name": edit.name,
        "layers": list(edit.layers),
        "methods": [config.method for config in edit.configs],
        "modules": {path: {"rank": delta.rank, "norm": delta.norm} for path, delta in edit.deltas.items()},
        "facts": [fact.to_dict() for fact in edit.facts],
        "versions": dict(edit.versions),
    }


def _show_plain(path: Path, model: str | None, names: Sequence[str], size: int) -> Report:
    """Tell which names a plain LoRA adapter answers to. It lists nothing, and has no facts to replay."""
    from peft import PeftConfig

    from goldenedit import EditConfig, EditModel

    base_name = model or PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base_name:
        raise ValueError(f"The adapter in {path} does not name its base model. Pass --model.")
    console.print(printable(f"{path} holds a plain adapter of {base_name}, and lists no facts."))
    base, tokenizer = load_model(base_name, use_safetensors=True)
    edit_model = EditModel(base, EditConfig(), tokenizer)
    edit_model.load_adapter(path, _ADAPTER)
    edit_model.set_adapter(_ADAPTER)
    found = _show_suspects(edit_model, names)
    values = {
        "base_model": {"name_or_path": base_name},
        "edits": [],
        "evaluation": None,
        "bytes": size,
        "audit": None,
        "suspects": [asdict(suspect) for suspect in found],
    }
    return Report(values, [suspect.name for suspect in found if suspect.is_suspected])


def _show_suspects(model: EditModel, names: Sequence[str]) -> list[Suspect]:
    """Print and return which names the change in a model answers to, though it does not list them."""
    from goldenedit.audit_suspects import suspects

    with console.status("Asking about the names"):
        found = suspects(model, names)
    hidden = [suspect for suspect in found if suspect.is_suspected]
    if hidden:
        console.print(tables.suspects_table(hidden))
    listed = sum(suspect.is_listed for suspect in found)
    text = f"{len(hidden)} of {len(found)} names are suspected: the change answers to them and does not list them."
    console.print(f"{text} It lists {listed} of the names.", style="bold red" if hidden else None)
    return found


def _replayed(folder: Path, model: str | None, needed: bool) -> EditModel | None:
    """Return the edits on their base model. Without it, the result is None, or an error if it is needed."""
    from goldenedit import EditModel

    try:
        _, base, tokenizer = load_edits(str(folder), model, use_safetensors=True)
    except (OSError, ValueError) as error:
        text = f"The base model was not found, so the edits were not replayed. Pass --model. ({error})"
        if needed:
            raise ValueError(text) from error
        console.print(printable(text), style="yellow")
        return None
    return EditModel.from_pretrained(base, folder, tokenizer=tokenizer)


def show_audit(model: EditModel) -> list[EditAudit]:
    """Print the norm of each change relative to its base matrix, and the share that the listed facts do not explain."""
    from goldenedit.audit import audit

    with telling():
        audits = audit(model)
    console.print(tables.audit_table(audits))
    for edit_audit in audits:
        for warning in edit_audit.warnings[:_SHOWN]:
            console.print(printable(f"Warning: edit {edit_audit.name!r}: {warning}."), style="bold red")
        if left_out := len(edit_audit.warnings[_SHOWN:]):
            console.print(printable(f"Edit {edit_audit.name!r} has {left_out} more warnings."), style="bold red")
    answered = [is_answered for edit_audit in audits for is_answered in edit_audit.answered]
    if not all(answered):
        count, verb = answered.count(False), "is" if answered.count(False) == 1 else "are"
        console.print(f"{count} of {len(answered)} listed facts {verb} not answered.", style="bold red")
    if any(edit_audit.warnings for edit_audit in audits):
        return audits
    if any(module.unexplained is None for edit_audit in audits for module in edit_audit.modules):
        console.print(
            "The edits do what they list. For some of them it is unknown whether they do more: edits by training have "
            "no rows to compare, those of later layers depend on earlier ones in all editors but 'gated', and another "
            "processor may sample other text from the base model.",
            style="yellow",
        )
    else:
        console.print("The edits do what they list, and their facts explain them.")
    return audits


@reporting
def editors() -> Report:
    """List all editors and layer selectors, including those of installed packages."""
    from goldenedit import EditConfig
    from goldenedit.editors import EDITORS
    from goldenedit.editors.options import default_of
    from goldenedit.layer_selection import SELECTORS

    known, selectors = EDITORS.available(), SELECTORS.available()
    config = EditConfig()
    console.print(tables.described_table("editor", known, config.method))
    console.print(tables.described_table("layer selector", selectors, str(config.layer)))
    console.print(tables.options_table(known))
    values = {
        "editors": [
            {
                "name": editor.name,
                "paper": editor.paper,
                "options": {
                    name: {"default": default_of(entry, True), "help": entry.metadata.get("help", "")}
                    for name, entry in editor.fields.items()
                },
            }
            for editor in known
        ],
        "layer_selectors": [{"name": selector.name, "paper": selector.paper} for selector in selectors],
    }
    return Report(values, [editor.name for editor in known])
