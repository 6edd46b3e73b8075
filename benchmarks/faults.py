"""Kill the process, fill the disk, or fail the call, at every system call of everything that the library writes.

Each trial runs in a child process that is followed by ptrace (`tests/storage/syscalls.py`): the call number k that
changes a file, or sends something, is the child's last, or is refused. A call that writes and is the last one writes
half of its bytes. Then what is there must be the old state or the new one as a whole, and an error must name a file. No
call is left out, so there is no seed. Linux on x86-64 only.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "storage")]

import conftest  # noqa: E402, I001  # first: it starts the Hub, and the others read where it is
from common import record  # noqa: E402
from interrupted import trials, writings  # noqa: E402
from syscalls import Fault  # noqa: E402


def main() -> None:
    """Try every fault, print what was found, and write it to results/."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", help="a part of the name of what is written")
    options.add_argument("--every", type=int, default=1, help="leave out all but each so many calls")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("goldenedit").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, writing in writings(conftest._SERVER, Path(scratch)).items():
            if arguments.only and arguments.only not in name:
                continue
            for fault in Fault:
                found, wrong = Counter[str](), []
                for outcome, state in trials(writing, fault, Path(scratch), arguments.every):
                    if state not in writing.states:
                        wrong.append(f"{outcome.call}: {state}")
                    elif outcome.call is not None:
                        found[state] += 1
                trials_made = sum(found.values()) + len(wrong)
                rows.append({"written": name, "fault": fault.value, "trials": trials_made, **found, "wrong": wrong})
                print(rows[-1], flush=True)
    show(rows)
    record("faults", rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the trials as a table of what is written and what was there afterwards."""
    states = ("trials", "old", "nothing", "unfinished", "new")
    table = Table("written", "fault", *states, "wrong")
    for row in rows:
        table.add_row(
            row["written"], row["fault"], *(str(row.get(state, 0)) for state in states), str(len(row["wrong"]))
        )
    total: Counter[str] = Counter()
    for row in rows:
        total.update({state: row.get(state, 0) for state in states} | {"wrong": len(row["wrong"])})
    table.add_row("all", "", *(str(total[state]) for state in (*states, "wrong")))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
