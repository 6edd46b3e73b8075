"""`goldenedit push` and `goldenedit export`: edits for others, and for other programs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from goldenedit.commands.options import Base, Edits
from goldenedit.commands.terminal import Report, console, load_edits, reporting
from goldenedit.tables import printable


@reporting
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An edit folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub, created if it does not exist.")],
    model: Annotated[
        str | None,
        typer.Option(help="With --merged: the base model, if it cannot be loaded by its recorded name."),
    ] = None,
    merged: Annotated[bool, typer.Option(help="Push the model with the edits written into its weights.")] = False,
    private: Annotated[bool | None, typer.Option(help="Make a new repository private or public.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
) -> Report:
    """Share the edits in FOLDER on the Hub, or with --merged an edited checkpoint."""
    from goldenedit import EditModel
    from goldenedit.storage.card import own_card, render_card
    from goldenedit.storage.folder import EDIT_FILES, write_edit_folder
    from goldenedit.storage.hub import make_repo, push_folder, terms_of
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
            card = custom_card or render_card(content, repo, terms=terms_of(content.base_model))
            write_edit_folder(Path(scratch), content, card, is_rendered=custom_card is None)
            commit = push_folder(Path(scratch), repo, files=EDIT_FILES, revision=revision, create_pr=create_pr)
    url = str(commit.pr_url or commit)
    console.print(f"Shared in {printable(url)}")
    return Report({"repository": repo, "url": url}, [url])


@reporting
def export(
    folder: Edits,
    gguf: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a LoRA adapter for llama.cpp into this file.")
    ] = None,
    mlx: Annotated[
        Path | None, typer.Option(file_okay=False, help="Write a LoRA adapter for mlx-lm into this folder.")
    ] = None,
    ollama: Annotated[
        str | None,
        typer.Option(help="With --gguf: write a Modelfile beside it, on top of this model of Ollama."),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Write the model with the edits in its weights into this folder."),
    ] = None,
    model: Base = None,
) -> Report:
    """Write the edits in FOLDER for other programs: llama.cpp, Ollama, mlx-lm, or as a whole checkpoint."""
    from transformers import AutoConfig

    from goldenedit import loading
    from goldenedit.storage.atomic import check_new
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    if gguf is None and mlx is None and merged is None:
        raise typer.BadParameter("give --gguf, --mlx or --merged, and where to write.")
    if ollama is not None and gguf is None:
        raise typer.BadParameter("--ollama needs --gguf, the file that its Modelfile names.")
    if merged is not None:
        check_new(merged)
    path = find_folder(folder)
    content = read_edit_folder(path)
    written: dict[str, str] = {}
    if gguf is not None or mlx is not None:
        name, revision = loading.base_of(content.base_model, model)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        config = AutoConfig.from_pretrained(loading.model_source(name), **pinned)
        if gguf is not None:
            from goldenedit.storage.gguf import export_gguf, write_modelfile

            if ollama is not None:
                gguf.parent.mkdir(parents=True, exist_ok=True)
                written["modelfile"] = str(write_modelfile(gguf, ollama))
            export_gguf(content, config, gguf)
            written["gguf"] = str(gguf)
        if mlx is not None:
            from goldenedit.storage.mlx import export_mlx

            export_mlx(content, config, mlx)
            written["mlx"] = str(mlx)
    if merged is not None:
        from goldenedit import EditModel

        _, base, tokenizer = load_edits(str(path), model)
        edit_model = EditModel.from_pretrained(base, path, tokenizer=tokenizer)
        edit_model.save_merged(merged)
        written["merged"] = str(merged)
    for name in written.values():
        console.print(f"Saved in {printable(name)}")
    return Report(written, list(written.values()))
