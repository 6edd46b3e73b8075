"""Kill a process before each step that it takes on the files of a folder, one step a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

_STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
_KILLED, _FAILED = 9, 1


def crash_at_every_step(
    scratch: Path, prepare: Callable[[Path], object], change: Callable[[Path], object]
) -> Iterator[Path]:
    """Yield a folder for each step of `change`, prepared and then left by a process that died just before that step."""
    for step in count():
        folder = scratch / f"step_{step}"
        prepare(folder)
        child = os.fork()
        if child == 0:
            try:
                _die_before(step, folder)
                change(folder)
                os._exit(0)
            finally:  # whatever it raised: nothing of the tests may run here
                os._exit(_FAILED)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, _KILLED)
        yield folder
        if status == 0:
            assert step > 10
            return


def _die_before(step: int, folder: Path) -> None:
    left = step

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _STEPS and any(str(folder) in str(argument) for argument in arguments):
            if left == 0:
                os._exit(_KILLED)
            left -= 1

    sys.addaudithook(hook)
