"""The command line: `goldenedit locate`, `edit`, `evaluate`, `show`, `push`, `export`, `benchmark` and `demo`."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldenedit import tables
from goldenedit.benchmark.command import benchmark_app

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from goldenedit.layer_scores import LayerSelection
    from goldenedit.storage.atlas import GoldenLayers

app = typer.Typer(
    help="Knowledge editing for causal language models: find the golden layer, edit, save as a LoRA adapter.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.add_typer(benchmark_app, name="benchmark")
console = Console()

Model = Annotated[
    str, typer.Argument(help="A model's name on the Hub, a folder, or a packaged model: `smollm2` or `gemma3`.")
]
Layer = Annotated[
    str,
    typer.Option(
        help="A layer selector such as `lga` or `auto`, `hub:REPO`, a number, or several numbers with commas.",
    ),
]
Edits = Annotated[str, typer.Argument(help="An edit folder, or its repository on the Hub.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to save the edit in.")]


@app.command()
def locate(
    model: Model,
    proxy: Annotated[Path | None, typer.Option(help="Facts to compare layers on (.json, .jsonl).")] = None,
    size: Annotated[int, typer.Option(help="Number of proxy facts.")] = 100,
    selector: Annotated[
        str,
        typer.Option(
            "--method",
            help="A layer selector (`goldenedit editors` lists them), or `all` but the slow `sweep`.",
        ),
    ] = "lga",
    sweep: Annotated[int, typer.Option(help="With `all`: edit so many facts at every layer as well.")] = 0,
    editor: Annotated[str, typer.Option(help="Editor of `sweep`, `key_response` and `published`.")] = "r-rome",
    loss: Annotated[str, typer.Option(help="`sequence` or `answer`.")] = "sequence",
    kappa: Annotated[float, typer.Option(help="Width of the outlier fence in interquartile ranges.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Save the chart as a picture.")] = None,
    push: Annotated[
        str | None, typer.Option(help="Share what was found in this repository on the Hub, for `--layer hub:REPO`.")
    ] = None,
) -> None:
    """Find the golden layer of MODEL, by Layer Gradient Analysis, another selector, or all of them."""
    from dataclasses import replace

    from goldenedit import EditConfig, EditModel
    from goldenedit.layer_selection import SELECTORS, proxy_set

    source = str(proxy) if proxy else None
    config = EditConfig(method=editor, proxy=source, proxy_size=size, lga_loss=loss, tukey_kappa=kappa)
    proxy_set(config)  # what is wrong with it is told once
    base, tokenizer, is_first = load_together(model)
    found: list[LayerSelection] = []
    records: list[GoldenLayers] = []
    names = [record.name for record in SELECTORS.available()] if selector == "all" else [selector]
    for name in names:
        if selector == "all" and name == "sweep" and not sweep:
            continue
        own = replace(config, layer=name, proxy_size=sweep if selector == "all" and name == "sweep" else size)
        wrapped = EditModel(base, own, tokenizer)
        try:
            wrapped.select_layer()
        except ValueError as error:
            if selector != "all":
                raise
            console.print(f"{name}: {escape(str(error))}")
            continue
        assert wrapped.layer_selection is not None
        found.append(wrapped.layer_selection)
        if push is not None:
            records.append(wrapped.golden_layers())
    if selector != "all" and found[0].scores is not None:
        console.print(tables.layer_chart(found[0], kappa))
    console.print(tables.selections_table(found))
    if plot is not None and is_first:
        from goldenedit.plots import plot_selections

        plot_selections(found, plot, model, kappa)
        console.print(f"Chart saved in {escape(str(plot))}")
    if push is not None and is_first:
        from goldenedit.storage.hub import push_golden_layers

        console.print(f"Shared: {escape(str(push_golden_layers(records, push)))}")


@app.command()
def edit(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(help="The text before the answer, with the subject or {} in it.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The entity, as spelled in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    file: Annotated[Path | None, typer.Option(help="Facts to edit as one batch (.json, .jsonl).")] = None,
    method: Annotated[str, typer.Option(help="An editor; `goldenedit editors` lists them.")] = "r-rome",
    layer: Layer = "lga",
    covariance: Annotated[str, typer.Option(help="`sampled`, `identity`, a text file or a dataset.")] = "sampled",
    name: Annotated[str | None, typer.Option(help="Name of the edit.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show what each phase of the edit cost.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail, and save nothing, where a fact does not take.")
    ] = False,
    output: Output = None,
) -> None:
    """Edit one fact, or a file of facts, and save the edit as a LoRA adapter."""
    from goldenedit import EditConfig, EditRequest, get_edit_model, load_requests
    from goldenedit.cost import profiling
    from goldenedit.lm.chat import rendered
    from goldenedit.lm.flops import forward_flops

    if file is not None:
        if prompt is not None or subject is not None or target is not None:
            raise typer.BadParameter("give either --file, or --prompt, --subject and --target.")
        requests = load_requests(file)
    elif prompt is None or subject is None or target is None:
        raise typer.BadParameter("give --prompt, --subject and --target, or --file.")
    else:
        requests = [EditRequest(prompt, subject, target)]
    config = EditConfig(method=method, layer=parse_layer(layer), covariance=covariance)
    base, tokenizer, is_first = load_together(model)
    with ExitStack() as stack:
        phases = stack.enter_context(profiling()) if profile else {}
        edit_model = get_edit_model(base, config, tokenizer)
        made = edit_model.edit(requests, name=name)
    console.print(tables.facts_table([made]))
    if profile:
        facts = [rendered(tokenizer, request) for request in requests]
        console.print(tables.profile_table(phases, forward_flops(edit_model.lm, facts)))
    if strict and (missed := sum(not fact.takes for fact in made.facts)):
        raise ValueError(
            f"{missed} of {len(made.facts)} facts do not take, and nothing is saved. Try another --layer or --method, "
            "or leave --strict out."
        )
    if output is not None and is_first:
        from goldenedit.storage.folder import folder_size

        edit_model.save_pretrained(output)
        console.print(f"Saved in {escape(str(output))}, {folder_size(output) / 1000:.1f} KB")


@app.command()
def evaluate(
    folder: Edits,
    file: Annotated[
        Path | None, typer.Option(help="Facts to measure on (.json, .jsonl); by default those that the folder edits.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model, where it is not found by its name.")] = None,
    generation: Annotated[bool, typer.Option(help="Let the models write freely as well.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save all figures as JSON.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the figures into the folder and its model card.")] = False,
) -> None:
    """Measure the edits of FOLDER beside the base model."""
    import json

    from goldenedit import EditModel, load_requests

    if card and not Path(folder).is_dir():
        raise typer.BadParameter(f"--card writes into an edit folder, and {folder} is none: download it first.")
    requests = None if file is None else load_requests(file)
    path, base, tokenizer = load_edits(folder, model)
    edit_model = EditModel.from_pretrained(base, path, tokenizer=tokenizer)
    found = edit_model.evaluate(requests, generation)
    console.print(tables.evaluation_table(found))
    if card:
        from goldenedit.storage.card import own_card
        from goldenedit.storage.folder import CARD

        by_hand = own_card(path)
        edit_model.save_pretrained(path)
        if by_hand is not None:
            (path / CARD).write_text(by_hand, encoding="utf-8")
            console.print(f"{CARD} was written by hand and is left as it is; the figures are in edit_config.json.")
        else:
            console.print(f"Written into {escape(str(path / CARD))}")
    if output is not None:
        output.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        console.print(f"Saved in {escape(str(output))}")


@app.command()
def editors() -> None:
    """List the editors and the layer selectors that are there, those of installed packages too."""
    from goldenedit.editors import EDITORS
    from goldenedit.layer_selection import SELECTORS

    console.print(tables.editors_table(EDITORS.available()))
    console.print(tables.selectors_table(SELECTORS.available()))


@app.command()
def show(
    folder: Edits,
    model: Annotated[str | None, typer.Option(help="The base model, where it is not found by its name.")] = None,
    replay: Annotated[
        bool, typer.Option(help="Load the base model, and see whether the edits do what they list and no more.")
    ] = True,
) -> None:
    """Show what an edit changes, and whether its facts explain it."""
    from goldenedit.storage.folder import folder_size
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    path = find_folder(folder)
    content = read_edit_folder(path)
    summary = Table.grid(padding=(0, 2))
    summary.add_row("base model", escape(f"{content.base_model.name_or_path} ({content.base_model.fingerprint})"))
    for config in content.configs:
        selector = config.layer if isinstance(config.layer, str) else "hand"
        summary.add_row("editor", config.method)
        summary.add_row("layer", escape(f"{config.target_layer}, chosen by {selector}"))
        summary.add_row("key covariance", escape(config.covariance))
    for made in content.edits:
        for module, delta in made.deltas.items():
            summary.add_row(escape(made.name), escape(f"{module}, rank {delta.rank}, norm {delta.norm:.2f}"))
    summary.add_row("size", f"{folder_size(path) / 1000:.1f} KB")
    console.print(summary)
    console.print(tables.facts_table(content.edits))
    if replay:
        show_audit(path, model)


def show_audit(folder: Path, model: str | None) -> None:
    """Print norms relative to the base model's matrices, and what the listed facts do not explain."""
    from goldenedit import EditModel
    from goldenedit.audit import audit

    try:
        _, base, tokenizer = load_edits(str(folder), model, use_safetensors=True)
    except (OSError, ValueError) as error:
        text = f"The base model was not found, so nothing is compared with it: pass --model. ({error})"
        console.print(escape(text), style="yellow")
        return
    found = audit(EditModel.from_pretrained(base, folder, tokenizer=tokenizer))
    console.print(tables.audit_table(found))
    for made in found:
        for warning in made.warnings:
            console.print(f"Warning: edit {made.name!r}: {warning}.", style="bold red", markup=False)
    if any(made.warnings for made in found):
        return
    if any(module.unexplained is None for made in found for module in made.modules):
        console.print(
            "The edits do what they list. Whether they do more cannot be told for all of them here: editors that are "
            "trained leave no rows to compare, later layers depend on earlier ones, and another processor may sample "
            "other text from the base model.",
            style="yellow",
        )
    else:
        console.print("The edits do what they list, and their facts explain them.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An edit folder.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, created where there is none.")],
    model: Annotated[
        str | None, typer.Option(help="With --merged: the base model, where it is not found by its name.")
    ] = None,
    merged: Annotated[bool, typer.Option(help="Push the base model with the edits in its weights.")] = False,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
) -> None:
    """Share the edits of FOLDER on the Hub, or the checkpoint that they make."""
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
        by_hand = own_card(folder)
        repo = make_repo(repo, private)
        with tempfile.TemporaryDirectory() as scratch:
            write_edit_folder(Path(scratch), content, by_hand or render_card(content, repo))
            commit = push_folder(Path(scratch), repo, files=EDIT_FILES, revision=revision, create_pr=create_pr)
    console.print(f"Shared: {escape(str(commit.pr_url or commit))}")


@app.command()
def export(
    folder: Edits,
    gguf: Annotated[Path, typer.Option(help="File to write, a LoRA adapter for llama.cpp.")],
    model: Annotated[str | None, typer.Option(help="The base model, where it is not found by its name.")] = None,
) -> None:
    """Write an edit as a GGUF adapter: `llama-cli -m base.gguf --lora FILE`."""
    from transformers import AutoConfig

    from goldenedit import loading
    from goldenedit.storage.gguf import export_gguf
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    content = read_edit_folder(find_folder(folder))
    name, revision = loading.base_of(content.base_model, model)
    pinned = {} if revision is None else {"revision": revision}
    export_gguf(content, AutoConfig.from_pretrained(loading.model_source(name), **pinned), gguf)
    console.print(f"Saved in {escape(str(gguf))}")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A packaged model, a name on the Hub, or a folder.")] = "smollm2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to save the edit in.")] = Path(
        "eiffel-in-rome"
    ),
) -> None:
    """Run the main job on a real model: find the golden layer, move the Eiffel Tower, save, load elsewhere."""
    from goldenedit.demo import run_demo

    run_demo(model, output, console)


def load_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and say so while it takes time."""
    from goldenedit import loading

    with console.status(f"Loading {escape(name)}"):
        return loading.load_model(name, **options)


def load_together(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model in each process of a launcher; tell whether this one may print and write, the others are silent."""
    from goldenedit import loading

    model, tokenizer, is_first = loading.load_together(name)
    console.quiet = console.quiet or not is_first
    return model, tokenizer, is_first


def load_edits(folder: str, model: str | None, **options: Any) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the folder of some edits, and load the model that they were made on, at its commit, or another one."""
    from goldenedit import loading
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    path = find_folder(folder)
    name, revision = loading.base_of(read_edit_folder(path).base_model, model)
    return path, *load_model(name, revision=revision, **options)


def parse_layer(text: str) -> int | list[int] | str:
    """Read a layer option: a word, a number, or numbers with commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        return text
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors that the user can mend end with one line and exit code 1."""
    try:
        return app(arguments)
    except (ValueError, OSError, KeyError, ModuleNotFoundError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {escape(str(message))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
