"""`goldenedit edit`: one fact, or a file of facts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from goldenedit import tables
from goldenedit.commands.options import FactsFormat, Layer, Model, Output, Set, SkipBad, settings_of
from goldenedit.commands.terminal import Report, console, load_together, parse_layer, reporting, telling
from goldenedit.tables import printable
from goldenedit.units import count_of

if TYPE_CHECKING:
    from goldenedit import EditModel, EditRequest
    from goldenedit.storage.folder import Edit, EditedFact

_SHOWN = 50  # facts that are printed
_ASKED = 16  # facts that are asked in a chat
_REMEDY = (
    "Teach them as they are asked, in more wordings: repeat --prompt, or use the field `prompts` of a file. "
    "Conversations go into the field `messages`."
)
_NAMED = 5  # of these, facts that are named because they do not hold there


@reporting
def edit(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The text before the answer, with the subject (or {} in its place). Repeat it to teach the fact in "
            "more wordings, such as a question."
        ),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The entity, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A file of facts to edit as one batch (.json, .jsonl, .csv, .tsv), with the columns `prompt`, "
            "`subject` and `target`."
        ),
    ] = None,
    format: FactsFormat = "auto",
    skip_bad: SkipBad = False,
    method: Annotated[str, typer.Option(help="The editor (listed by `goldenedit editors`).")] = "gated",
    layer: Layer = "lga",
    covariance: Annotated[
        str, typer.Option(help="Key statistics: `sampled`, `identity`, a text file or a dataset.")
    ] = "sampled",
    options: Set = None,
    name: Annotated[str | None, typer.Option(help="The name of the edit.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the cost of each phase of the edit.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Edit the file in batches of so many facts into one edit, saved after each."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the edits in the output folder: edit the facts it lacks.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail and save nothing if the edit of any fact does not take.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask the model before and after the edit, as a user would.")
    ] = False,
    output: Output = None,
) -> Report:
    """Edit one fact, or a file of facts, and save the edit as a LoRA adapter."""
    from goldenedit import EditConfig, get_edit_model
    from goldenedit.cost import profiling
    from goldenedit.lm.chat import rendered
    from goldenedit.lm.flops import forward_flops
    from goldenedit.storage.atomic import check_writable
    from goldenedit.storage.folder import check_edit_name

    if name is not None:
        check_edit_name(name)
    settings = settings_of({"method": method, "layer": parse_layer(layer), "covariance": covariance}, options)
    requests = requests_of_options(prompt, subject, target, file, format, skip_bad)
    if output is not None:
        check_writable(output)
    if batch_size is not None or resume:
        if batch_size is None or verify or strict or file is None:
            raise typer.BadParameter(
                "--resume needs --batch-size, which needs --file and takes no --verify or --strict."
            )
        return edit_many(model, requests, batch_size, name or "facts", output, resume, settings)
    config = EditConfig(**settings)
    base, tokenizer, is_first = load_together(model)
    if output is not None:
        _tell_replaced(output)
    with ExitStack() as stack:
        phases = stack.enter_context(profiling()) if profile else {}
        stack.enter_context(telling())
        edit_model = get_edit_model(base, config, tokenizer)
        new_edit = edit_model.edit(requests, name=name, verify=verify)
    console.print(tables.facts_table([new_edit], most=_SHOWN))
    if new_edit.verification is not None:
        console.print(printable(str(new_edit.verification)))
    if profile:
        facts = [rendered(tokenizer, request) for request in requests]
        console.print(tables.profile_table(phases, forward_flops(edit_model.lm, facts)))
    if strict and (missed := sum(not fact.takes for fact in new_edit.facts)):
        raise ValueError(
            f"The edits of {missed} of {len(new_edit.facts)} facts do not take, so nothing was saved. Try another "
            "--layer or --method, or leave out --strict."
        )
    if output is not None and is_first:
        edit_model.save_pretrained(output)
    seconds = {name: cost.seconds for name, cost in phases.items()}
    return _report(edit_model, new_edit, output, seconds, asks=is_first and not verify)


def _tell_replaced(output: Path) -> None:
    """Say that an edit in the output folder will be replaced."""
    from goldenedit.storage.reading import read_edit_folder

    with suppress(OSError, ValueError):  # whatever is there is no edit
        count = sum(len(edit.facts) for edit in read_edit_folder(output).edits)
        console.print(
            f"{printable(str(output))} holds edits of {count} facts, which this edit will replace. To keep them, stop "
            "this command and give another --output."
        )


def requests_of_options(
    prompts: list[str] | None, subject: str | None, target: str | None, file: Path | None, format: str, skip_bad: bool
) -> list[EditRequest]:
    """Return the facts that the options of `edit` stand for."""
    from goldenedit import EditRequest, load_requests
    from goldenedit.requests import distinct

    if file is not None:
        if prompts or subject is not None or target is not None:
            raise typer.BadParameter("give either --file, or --prompt, --subject and --target.")
        return distinct(load_requests(file, format, skip_bad=skip_bad))
    if not prompts or subject is None or target is None:
        raise typer.BadParameter("give --prompt, --subject and --target, or --file.")
    return [EditRequest(prompts[0], subject, target, prompts=prompts[1:])]


def edit_many(
    model: str,
    requests: Sequence[EditRequest],
    batch_size: int,
    name: str,
    output: Path | None,
    resume: bool,
    settings: dict[str, Any],
) -> Report:
    """Edit batch after batch into one edit, and save it after each batch."""
    from goldenedit import EditConfig, EditModel, get_edit_model
    from goldenedit.storage.folder import EDIT_CONFIG

    is_there = output is not None and (output / EDIT_CONFIG).exists()
    if resume and output is None:
        raise typer.BadParameter("--resume needs the --output of the run to go on with.")
    if is_there and not resume:
        raise ValueError(f"There are edits in {output}. Pass --resume to go on with them, or choose another --output.")
    base, tokenizer, is_first = load_together(model)
    if is_there:
        assert output is not None
        edit_model = EditModel.from_pretrained(base, output, tokenizer=tokenizer)
        if name not in edit_model.edits:
            names = ", ".join(edit_model.edits)
            raise ValueError(f"{output} has no edit {name!r}. Pass the --name of one that it has: {names}.")
        for option, value in settings.items():
            if getattr(edit_model.edit_config, option) != value:
                made = getattr(edit_model.edit_config, option)
                raise ValueError(f"The edits in {output} were made with {option}={made}. Pass the same.")
    else:
        edit_model = get_edit_model(base, EditConfig(**settings), tokenizer)
    with telling():
        edit = edit_model.edit_in_batches(requests, batch_size, name, output if is_first else None)
    missed = sum(not fact.takes for fact in edit.facts)
    console.print(f"{len(edit.facts)} facts in one edit of rank {edit.rank}, of which {missed} did not take.")
    return _report(edit_model, edit, output, {}, asks=is_first)


def ask_in_chat(edit_model: EditModel, facts: Sequence[EditedFact]) -> dict[str, Any] | None:
    """Tell which facts that take do not hold in a chat: of many, a sample. None if the model has no chat template."""
    taken = [fact.request for fact in facts if fact.takes]
    step = -(-len(taken) // _ASKED) or 1
    with console.status("Asking in a chat"):
        said = edit_model.said_in_chat(taken[::step])
    if not said:
        return None
    missed = [answer for answer in said if not answer.holds]
    of_all = f"{len(said)} of the {len(taken)} facts" if len(said) < len(taken) else count_of(len(said), "fact")
    if missed:
        console.print(f"Asked in a chat for {of_all}, the model does not say {len(missed)}:", style="yellow")
        for answer in missed[:_NAMED]:
            text = f"  {answer.question!r}: expected {answer.expected!r}, got {answer.written!r}"
            console.print(printable(text), style="yellow")
        if len(missed) > _NAMED:
            console.print(f"  and {len(missed) - _NAMED} more", style="yellow")
        console.print(_REMEDY)
    else:
        text = f"Asked in a chat for {of_all}, the model says all of them."
        if len(said) == 1:
            text = f"Asked in a chat {said[0].question!r}, the model says it."
        console.print(printable(text))
    return {"asked": len(said), "says": len(said) - len(missed), "missed": [asdict(answer) for answer in missed]}


def _report(edit_model: EditModel, edit: Edit, output: Path | None, seconds: dict[str, float], asks: bool) -> Report:
    """Ask for the facts in a chat if `asks`, say where the edit was saved, and return it."""
    from goldenedit.storage.folder import folder_size

    values: dict[str, Any] = {
        "name": edit.name,
        "layers": list(edit.layers),
        "facts": [{**fact.to_dict(), "takes": fact.takes} for fact in edit.facts],
        "lost": [fact.to_dict() for fact in edit.lost],
        "output": None if output is None else str(output),
    }
    if asks:
        values["chat"] = ask_in_chat(edit_model, edit.facts)
    if seconds:
        values["seconds"] = seconds
    if edit.verification is not None:
        values["verification"] = edit.verification.to_dict()
    if output is None or not output.exists():
        console.print("Nothing was saved: there is no --output.")
        return Report(values)
    values["bytes"] = folder_size(output)
    console.print(f"Saved in {printable(str(output))}, {values['bytes'] / 1000:.1f} KB")
    return Report(values, [output])
