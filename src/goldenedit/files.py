"""Files that appear whole or not at all, and errors that name them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

from goldenedit import platforms

_NUMBER = re.compile(r"\(os error (\d+)\)")  # how Rust libraries, such as safetensors and tokenizers, report one


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old file or the new one, and never a partial one.

    Raises:
        OSError: The file cannot be written. The old one is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}.partial")  # threads write the cache, too
    try:
        with naming(path):
            partial.write_bytes(data)
        platforms.HERE.patiently(partial.replace, path)
    finally:
        partial.unlink(missing_ok=True)


def folder_at(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder to write to.

    Raises:
        ValueError: It is empty, which would be the folder that the program runs in, or no path can be so.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not the path of a folder. Name one; '.' is the one that this program runs in.")
    return Path(text)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a path in system errors that name none, such as that of a full disk.

    Raises:
        OSError: One was raised inside, or an exception of another type with the number of a system error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (found := _NUMBER.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
