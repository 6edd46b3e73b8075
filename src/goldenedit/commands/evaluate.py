"""The commands that measure edits: `goldenedit evaluate` and `goldenedit compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from goldenedit import tables
from goldenedit.commands.options import Base, Edits, FactsFormat, SkipBad
from goldenedit.commands.terminal import Report, console, load_edits, load_model, reporting, telling
from goldenedit.files import write_atomically
from goldenedit.tables import printable

if TYPE_CHECKING:
    from goldenedit.evaluation.evaluate import Evaluation
    from goldenedit.evaluation.judges import Judge
    from goldenedit.model import EditModel

Facts = Annotated[Path | None, typer.Option(help="A file of facts to evaluate on; by default the edited facts.")]
Forms = Annotated[
    str | None,
    typer.Option(
        help="The forms in which facts are asked, with commas between, such as `completion,chat`; all by default."
    ),
]
Unchanged = Annotated[bool, typer.Option(help="Compare other prompts and plain text with the base model.")]


@reporting
def evaluate(
    folder: Edits,
    file: Facts = None,
    format: FactsFormat = "auto",
    skip_bad: SkipBad = False,
    model: Base = None,
    forms: Forms = None,
    unchanged: Unchanged = True,
    texts: Annotated[int, typer.Option(min=0, help="Print so many questions with the answers of both models.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(help="The URL of an OpenAI-compatible server that judges each answer. It gets OPENAI_API_KEY."),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The name of the judge on this server.")] = "",
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness (names or YAML files), with commas between.")
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder with further tasks of the harness.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many items of each task.")] = None,
    generation: Annotated[bool, typer.Option(help="Also measure whether texts begin with the answer.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Save all scores in this JSON file.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the scores into FOLDER and its model card.")] = False,
) -> Report:
    """Ask the edited model as a user would, and compare everything else with its base model."""
    from goldenedit import EditModel

    if lm_eval is None and (lm_eval_path, lm_eval_limit) != (None, None):
        raise typer.BadParameter("--lm-eval-path and --lm-eval-limit need --lm-eval, the tasks.")
    _check_outputs(folder if card else None, output)
    options = _options(forms, unchanged, judge, judge_model)
    requests = _facts(file, format, skip_bad)
    path, base, tokenizer = load_edits(folder, model)
    edit_model = EditModel.from_pretrained(base, path, tokenizer=tokenizer)
    scores: dict[str, Any] = {}
    if lm_eval is not None:  # first: a task that does not exist is an error before anything takes long
        tasks = [task.strip() for task in lm_eval.split(",")]
        scores["general"] = edit_model.evaluate_general(tasks, lm_eval_path, lm_eval_limit)
    with telling():
        evaluation = edit_model.evaluate(requests, generation=generation, **options)
    scores = {**evaluation.to_dict(), **scores}
    _print(evaluation, texts)
    if "general" in scores:
        console.print(tables.general_table(scores["general"]))
    if card:
        _write_card(edit_model, path)
    if output is not None:
        write_atomically(output, (json.dumps(scores, indent=1) + "\n").encode())
        console.print(f"Saved in {printable(str(output))}")
    return Report(scores, [] if output is None else [output])


@reporting
def compare(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDERS...", help="Edit folders or repositories, all of one base model.")
    ],
    file: Facts = None,
    format: FactsFormat = "auto",
    skip_bad: SkipBad = False,
    model: Base = None,
    forms: Forms = None,
    unchanged: Unchanged = True,
) -> Report:
    """Set edits side by side, on the same facts: by default all that any of them edits."""
    from goldenedit import EditModel, loading
    from goldenedit.requests import distinct
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    options = _options(forms, unchanged, None, "")
    requests = _facts(file, format, skip_bad)
    paths = [find_folder(folder) for folder in folders]
    contents = [read_edit_folder(path) for path in paths]
    bases = {content.base_model.fingerprint: content.base_model for content in contents}
    if len(bases) > 1:
        names = ", ".join(base.name_or_path for base in bases.values())
        raise ValueError(f"The folders edit different base models ({names}). Compare edits of one base model.")
    if requests is None:
        edited = [fact.request for content in contents for edit in content.edits for fact in edit.facts]
        try:
            requests = distinct(edited)
        except ValueError as error:
            raise ValueError(
                f"The folders edit different facts. Pass --file with the facts to ask. ({error})"
            ) from error
    name, revision = loading.base_of(contents[0].base_model, model)
    base, tokenizer = load_model(name, revision=revision)
    evaluations = []
    lm = None
    for path in paths:
        edit_model = EditModel.from_pretrained(base, path, tokenizer=tokenizer)
        lm = edit_model.lm = lm or edit_model.lm  # it keeps what the base model answers, which is asked once
        console.print(f"{printable(str(path))}:", style="dim")
        with telling():
            evaluations.append(edit_model.evaluate(requests, in_prompt=False, **options))
        edit_model.unload()
    console.print(tables.comparison_table(folders, evaluations))
    return Report([evaluation.to_dict() for evaluation in evaluations])


def _check_outputs(folder: str | None, output: Path | None) -> None:
    """Raise BadParameter if the card of a folder, or an output file, cannot be written after a long evaluation."""
    if folder is not None and not Path(folder).is_dir():
        raise typer.BadParameter(f"--card writes into a local edit folder, and {folder} is not one. Download it first.")
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"--output is in {output.parent}, which is no folder. Make it first.")


def _facts(file: Path | None, format: str, skip_bad: bool) -> list[Any] | None:
    from goldenedit import load_requests

    return None if file is None else load_requests(file, format, skip_bad=skip_bad)


def _options(forms: str | None, unchanged: bool, judge: str | None, judge_model: str) -> dict[str, Any]:
    """Return arguments of `EditModel.evaluate`. A form that does not exist raises before a model is loaded."""
    from goldenedit.evaluation.forms import FORMS, check_forms

    names = list(FORMS) if forms is None else [form.strip() for form in forms.split(",") if form.strip()]
    return {"forms": check_forms(names), "unchanged": unchanged, "judge": _judge(judge, judge_model)}


def _judge(url: str | None, model: str) -> Judge | None:
    if url is None and not model:
        return None
    if url is None:
        raise typer.BadParameter("--judge-model needs --judge, the URL of its server.")
    if not model:
        raise typer.BadParameter("--judge needs --judge-model, the name of the model on the server.")
    from goldenedit.evaluation.judges import url_judge

    return url_judge(url, model)


def _print(evaluation: Evaluation, texts: int) -> None:
    """Print the figures, so many questions with the answers of both models, and the facts that are not said."""
    from goldenedit.evaluation.report import shown, spread

    console.print(tables.seen_table(evaluation))
    console.print(tables.evaluation_table(evaluation))
    for text in spread(evaluation.texts)[:texts]:
        console.print(printable(shown(text, ("base model", "edited model"))))
    for line in tables.failures(evaluation):
        console.print(printable(line), style="yellow")


def _write_card(edit_model: EditModel, path: Path) -> None:
    from goldenedit.storage.card import own_card
    from goldenedit.storage.folder import CARD

    edit_model.save_pretrained(path)
    if own_card(path) is not None:
        console.print(f"{CARD} was written or changed by hand, so it stays. The scores are in edit_config.json.")
    else:
        console.print(f"Wrote the scores into {printable(str(path / CARD))}")
