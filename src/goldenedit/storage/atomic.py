"""Replace a whole folder at once: whoever looks, and whatever crashes, there is the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing_folder(folder: Path, but: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place when the context ends without an error.

    What is in `folder` under other names than the new files is kept, but for what `but` names.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: The disk is full or not writable; `folder` is as it was.
    """
    folder = Path(os.path.realpath(folder))  # through a link, the folder it points at is replaced
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            for path in new.iterdir():
                _flush(path)
            _flush(new)
            if folder.is_dir():
                _carry_over(folder, new, but)
                shutil.copymode(folder, new)
                here = folder.samefile(".") if _has_cwd() else False
                _exchange(new, folder)
                if here:
                    os.chdir(folder)  # not in the old folder, which is about to go
            else:
                new.rename(folder)
            _flush(folder.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(folder)
        raise


def _has_cwd() -> bool:
    """Tell whether this process's own folder is still there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _carry_over(old: Path, new: Path, but: Collection[str]) -> None:
    """Bring what only the old folder has into the new one, by hard links where the file system has them."""
    for path in old.iterdir():
        if path.name in but or (target := new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(str(path), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can (Linux), else in two, with the old one kept until the end."""
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_name("old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise


def _flush(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
