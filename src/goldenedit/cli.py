"""The command line, `goldenedit`: from the golden layer to an edit that is measured and shared."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from goldenedit import __version__, tables
from goldenedit.benchmark.command import benchmark_app
from goldenedit.cache_command import cache_app
from goldenedit.evaluating import compare, evaluate
from goldenedit.options import Base, Edits, FactsFormat, Layer, Model, Output, Set, SkipBad, settings_of
from goldenedit.plan_command import plan
from goldenedit.search_command import search
from goldenedit.tables import printable
from goldenedit.terminal import console, load_edits, load_together, parse_layer

if TYPE_CHECKING:
    from goldenedit import EditRequest
    from goldenedit.layer_scores import LayerSelection
    from goldenedit.storage.atlas import GoldenLayers

_SHOWN = 50  # facts, or warnings about an edit, that are printed

app = typer.Typer(
    help="Edit facts in causal language models: find the golden layer, edit, and save the edit as a LoRA adapter.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(cache_app, name="cache")
app.command()(evaluate)
app.command()(compare)
app.command()(plan)
app.command()(search)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"goldenedit {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
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
) -> None:
    """Find the golden layer of MODEL by Layer Gradient Analysis, by another selector, or by all of them."""
    from dataclasses import replace

    from goldenedit import EditConfig, EditModel, load_requests
    from goldenedit.layer_selection import SELECTORS

    facts = None if proxy is None else load_requests(proxy, format, skip_bad=skip_bad)
    config = EditConfig(method=editor, proxy=facts, proxy_size=size, lga_loss=loss, tukey_kappa=kappa)
    base, tokenizer, is_first = load_together(model)
    selections: list[LayerSelection] = []
    records: list[GoldenLayers] = []
    names = [record.name for record in SELECTORS.available()] if selector == "all" else [selector]
    for name in names:
        if selector == "all" and name == "sweep" and not sweep:
            continue
        count = sweep if selector == "all" and name == "sweep" else size
        wrapped = EditModel(base, replace(config, layer=name, proxy_size=count), tokenizer)
        try:
            wrapped.select_layer()
        except ValueError as error:
            if selector != "all":
                raise
            console.print(f"{name}: {printable(str(error))}")
            continue
        assert wrapped.layer_selection is not None
        selections.append(wrapped.layer_selection)
        if push is not None:
            records.append(wrapped.golden_layers())
    if selector != "all" and selections[0].scores is not None:
        console.print(tables.layer_chart(selections[0], kappa))
    console.print(tables.selections_table(selections))
    if plot is not None and is_first:
        from goldenedit.plots import plot_selections

        plot_selections(selections, plot, model, kappa)
        console.print(f"Saved the chart in {printable(str(plot))}")
    if push is not None and is_first:
        from goldenedit.storage.hub import push_golden_layers

        console.print(f"Shared in {printable(str(push_golden_layers(records, push)))}")


@app.command()
def edit(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(help="The text before the answer, with the subject (or {} in its place).")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The entity, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file of facts to edit as one batch (.json, .jsonl, .csv, .tsv).")
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
) -> None:
    """Edit one fact, or a file of facts, and save the edit as a LoRA adapter."""
    from goldenedit import EditConfig, get_edit_model
    from goldenedit.cost import profiling
    from goldenedit.lm.chat import rendered
    from goldenedit.lm.flops import forward_flops
    from goldenedit.storage.folder import check_edit_name

    if name is not None:
        check_edit_name(name)
    settings = settings_of({"method": method, "layer": parse_layer(layer), "covariance": covariance}, options)
    requests = requests_of_options(prompt, subject, target, file, format, skip_bad)
    if batch_size is not None or resume:
        if batch_size is None or verify or strict or file is None:
            raise typer.BadParameter(
                "--resume needs --batch-size, which needs --file and takes no --verify or --strict."
            )
        edit_many(model, requests, batch_size, name or "facts", output, resume, settings)
        return
    config = EditConfig(**settings)
    base, tokenizer, is_first = load_together(model)
    with ExitStack() as stack:
        phases = stack.enter_context(profiling()) if profile else {}
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
        from goldenedit.storage.folder import folder_size

        edit_model.save_pretrained(output)
        console.print(f"Saved in {printable(str(output))}, {folder_size(output) / 1000:.1f} KB")
    elif is_first:
        console.print("Nothing was saved: there is no --output.")


def requests_of_options(
    prompt: str | None, subject: str | None, target: str | None, file: Path | None, format: str, skip_bad: bool
) -> list[EditRequest]:
    """Return the facts that the options of `edit` stand for."""
    from goldenedit import EditRequest, load_requests

    if file is not None:
        if prompt is not None or subject is not None or target is not None:
            raise typer.BadParameter("give either --file, or --prompt, --subject and --target.")
        return load_requests(file, format, skip_bad=skip_bad)
    if prompt is None or subject is None or target is None:
        raise typer.BadParameter("give --prompt, --subject and --target, or --file.")
    return [EditRequest(prompt, subject, target)]


def edit_many(
    model: str,
    requests: Sequence[EditRequest],
    batch_size: int,
    name: str,
    output: Path | None,
    resume: bool,
    settings: dict[str, Any],
) -> None:
    """Edit batch after batch into one edit, and save it after each batch."""
    from goldenedit import EditConfig, EditModel, get_edit_model
    from goldenedit.storage.folder import EDIT_CONFIG, folder_size

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
    edit = edit_model.edit_in_batches(requests, batch_size, name, output if is_first else None)
    missed = sum(not fact.takes for fact in edit.facts)
    console.print(f"{len(edit.facts)} facts in one edit of rank {edit.rank}, of which {missed} did not take.")
    if output is not None and is_first:
        console.print(f"Saved in {printable(str(output))}, {folder_size(output) / 1000:.1f} KB")
    elif is_first:
        console.print("Nothing was saved: there is no --output.")


@app.command()
def editors() -> None:
    """List all editors and layer selectors, including those of installed packages."""
    from goldenedit.editors import EDITORS
    from goldenedit.layer_selection import SELECTORS

    console.print(tables.editors_table(EDITORS.available()))
    console.print(tables.selectors_table(SELECTORS.available()))


@app.command()
def show(
    folder: Edits,
    model: Base = None,
    replay: Annotated[
        bool, typer.Option(help="Load the base model and check that the edits do what they list, and no more.")
    ] = True,
) -> None:
    """Show what the edits in FOLDER change, and whether the listed facts explain it."""
    from goldenedit.storage.folder import folder_size
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    path = find_folder(folder)
    content = read_edit_folder(path)
    summary = Table.grid(padding=(0, 2))
    summary.add_row("base model", printable(f"{content.base_model.name_or_path} ({content.base_model.fingerprint})"))
    for config in content.configs:
        selector = config.layer if isinstance(config.layer, str) else "hand"
        summary.add_row("editor", printable(config.method))
        summary.add_row("layer", printable(f"{config.target_layer}, chosen by {selector}"))
        summary.add_row("key covariance", printable(config.covariance))
    for name, changes in tables.changes_rows(content.edits):
        summary.add_row(name, changes)
    summary.add_row("size", f"{folder_size(path) / 1000:.1f} KB")
    console.print(summary)
    console.print(tables.facts_table(content.edits))
    if replay:
        show_audit(path, model)


def show_audit(folder: Path, model: str | None) -> None:
    """Print the norm of each change relative to its base matrix, and the share that the listed facts do not explain."""
    from goldenedit import EditModel
    from goldenedit.audit import audit

    try:
        _, base, tokenizer = load_edits(str(folder), model, use_safetensors=True)
    except (OSError, ValueError) as error:
        text = f"The base model was not found, so the edits were not replayed. Pass --model. ({error})"
        console.print(printable(text), style="yellow")
        return
    audits = audit(EditModel.from_pretrained(base, folder, tokenizer=tokenizer))
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
        return
    if any(module.unexplained is None for edit_audit in audits for module in edit_audit.modules):
        console.print(
            "The edits do what they list. For some of them it is unknown whether they do more: edits by training have "
            "no rows to compare, those of later layers depend on earlier ones in all editors but 'gated', and another "
            "processor may sample other text from the base model.",
            style="yellow",
        )
    else:
        console.print("The edits do what they list, and their facts explain them.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An edit folder.")],
    repo: Annotated[str, typer.Argument(help="A repository on the Hub, created if it does not exist.")],
    model: Annotated[
        str | None,
        typer.Option(help="With --merged: the base model, if it cannot be loaded by its recorded name."),
    ] = None,
    merged: Annotated[bool, typer.Option(help="Push the model with the edits written into its weights.")] = False,
    private: Annotated[bool | None, typer.Option(help="Make a new repository private or public.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
) -> None:
    """Share the edits in FOLDER on the Hub, or with --merged an edited checkpoint."""
    from goldenedit import EditModel
    from goldenedit.storage.card import own_card, render_card
    from goldenedit.storage.folder import EDIT_FILES, write_edit_folder
    from goldenedit.storage.hub import make_repo, push_folder
    from goldenedit.storage.reading import read_edit_folder

    content = read_edit_folder(folder)
    if merged:
        path, base, tokenizer = load_edits(str(folder), model)
        edit_model = EditModel.from_pretrained(base, path, tokenizer=tokenizer)
        commit = edit_model.push_merged_to_hub(repo, private=private, revision=revision, create_pr=create_pr)
    else:
        custom_card = own_card(folder)
        repo = make_repo(repo, private)
        with tempfile.TemporaryDirectory() as scratch:
            card = render_card(content, repo) if custom_card is None else custom_card
            write_edit_folder(Path(scratch), content, card, is_rendered=custom_card is None)
            commit = push_folder(Path(scratch), repo, files=EDIT_FILES, revision=revision, create_pr=create_pr)
    console.print(f"Shared in {printable(str(commit.pr_url or commit))}")


@app.command()
def export(
    folder: Edits,
    gguf: Annotated[Path, typer.Option(dir_okay=False, help="The file to write.")],
    model: Base = None,
) -> None:
    """Write the edits in FOLDER as a LoRA adapter for llama.cpp: `llama-cli -m base.gguf --lora FILE`."""
    from transformers import AutoConfig

    from goldenedit import loading
    from goldenedit.storage.gguf import export_gguf
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    content = read_edit_folder(find_folder(folder))
    name, revision = loading.base_of(content.base_model, model)
    pinned = {} if revision is None else {"revision": revision}
    export_gguf(content, AutoConfig.from_pretrained(loading.model_source(name), **pinned), gguf)
    console.print(f"Saved in {printable(str(gguf))}")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A packaged model, a model on the Hub, or a folder.")] = "smollm2",
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="The folder to save the edit in.")
    ] = Path("eiffel-in-rome"),
) -> None:
    """Try it on a real model: find the golden layer, move the Eiffel Tower to Rome, save, and load with PEFT alone."""
    from goldenedit.demo import run_demo

    run_demo(model, output, console)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Errors that the user can fix end with one line and exit code 1."""
    try:
        return app(arguments)
    except (ValueError, OSError, KeyError, ModuleNotFoundError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        Console(stderr=True, emoji=False).print(f"[bold red]Error:[/bold red] {printable(str(message))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
