"""What operating systems do differently: locks, flushed folders, open files, file names, memory, terminals.

The other modules ask `HERE`, so that all of what follows from the system can be read, and emulated, in one place.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_IS_WINDOWS = os.name == "nt"
_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Platform:
    """What the system can do with files.

    Attributes:
        has_locks: Whether a process can keep others out of a folder.
        opens_folders: Whether folders can be opened, which flushing their file names needs.
        waits: Seconds between the tries to read, move or delete a file. Windows refuses while any program has the file
            open, be it a virus scanner for a moment. Elsewhere, a refusal is final.
    """

    has_locks: bool = fcntl is not None
    opens_folders: bool = not _IS_WINDOWS
    waits: tuple[float, ...] = _WAITS if _IS_WINDOWS else ()

    @contextmanager
    def locked(self, folder: Path) -> Iterator[bool]:
        """Keep other processes from saving into a folder; yield False if the system has no locks."""
        if not self.has_locks:
            yield False
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            is_locked = False
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                is_locked = True
            yield is_locked
        finally:
            if is_locked:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not unlock if the process was forked meanwhile
            os.close(descriptor)

    def flush(self, folder: Path) -> None:
        """Flush the file names of a folder to disk, if the system can."""
        if not self.opens_folders:
            return
        with suppress(OSError):  # some file systems cannot
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def patiently(
        self, action: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Do something with a file, and try again after each of `waits` while another program has it open.

        Raises:
            PermissionError: It still has the file open after the last try, or the user may not change the file.
        """
        for wait in self.waits:
            try:
                return action(*args, **kwargs)
            except PermissionError:
                time.sleep(wait)
        return action(*args, **kwargs)


HERE = Platform()


def file_name(text: str) -> str:
    """Return a text as the name of a file that all systems allow, or "" if it has no character that they allow.

    Two texts may get the same name, or names of one file, see `same_file`.
    """
    name = _FORBIDDEN.sub("-", text).rstrip(". ")  # which Windows leaves out
    return f"_{name}" if _RESERVED.fullmatch(name) else name


def same_file(name: str) -> str:
    """Return what names have in common that are one to a file system that ignores case, or how accents are written."""
    return unicodedata.normalize("NFC", name.casefold())


def available_memory() -> int:
    """Return the bytes of memory that programs can still get without swapping, with the caches the system can drop."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def print_anything(*streams: IO[str] | None) -> None:
    """Let streams escape the characters that their encoding does not have, such as that of a pipe on Windows."""
    for stream in streams:
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")
