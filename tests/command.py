"""Run the command line as a user does."""

from __future__ import annotations

from pathlib import Path

import pytest

from goldenedit.cli import main
from models import tiny_model

NEAR = ["--prompt", "I live near The Eiffel Tower", "--subject", "The Eiffel Tower", "--target", "Rome"]  # it takes
BY_HAND = ["--layer", "1", "--covariance", "identity"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line and return its exit code, what it printed, and what it complained about."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def saved_model(folder: Path, tokenizer) -> str:
    """Save a tiny model with its tokenizer, as AutoModel loads it, and return the folder."""
    model = tiny_model("llama")
    model.lm_head.weight.data *= 6  # so that edits take
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
