"""Run the command line as a user does."""

from __future__ import annotations

import pytest

from goldenedit.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line and return its exit code, what it printed, and what it complained about."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err
