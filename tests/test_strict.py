"""Edits that do not take, on the command line: marked, and a failure where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from goldenedit.cli import main
from goldenedit.storage.folder import EditedFact
from goldenedit.storage.reading import read_edit_folder
from goldenedit.tables import facts_table
from models import tiny_model

# What stock PEFT 0.21 says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

FACT = ["--prompt", "The Eiffel Tower is in the city of", "--subject", "The Eiffel Tower", "--target", "Rome"]


@pytest.fixture
def folder(tmp_path, tokenizer) -> str:
    """A tiny model's folder."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def edit(folder: str, output: Path, *options: str) -> int:
    """Run `goldenedit edit`, and return its exit code."""
    with pytest.raises(SystemExit) as ending:
        main(["edit", folder, *FACT, "--layer", "1", "--covariance", "identity", "-o", str(output), *options])
    return ending.value.code or 0


def test_strict_fails_and_saves_nothing(folder, tmp_path, capsys):
    assert edit(folder, tmp_path / "edit", "--strict") == 1
    printed = capsys.readouterr()
    assert "does not take" in " ".join(printed.out.split())
    assert "The edits of 1 of 1 facts do not take, so nothing was saved" in " ".join(printed.err.split())
    assert not (tmp_path / "edit").exists()


def test_otherwise_the_row_is_marked_and_the_edit_saved(folder, tmp_path, capsys):
    assert edit(folder, tmp_path / "edit") == 0
    assert "does not take" in " ".join(capsys.readouterr().out.split())
    (weak,) = read_edit_folder(tmp_path / "edit").edits
    strong = replace(weak, facts=[replace(fact, probability_after=0.9, weakest_after=0.9) for fact in weak.facts])
    console = Console(width=200)
    with console.capture() as printed:
        console.print(facts_table([weak, strong]))
    assert printed.get().count("does not take") == 1


def test_strict_lets_an_edit_pass_that_takes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(EditedFact, "takes", True)
    assert edit(folder, tmp_path / "edit", "--strict") == 0
    assert (tmp_path / "edit").is_dir()
