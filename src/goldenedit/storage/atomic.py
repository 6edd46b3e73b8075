"""Replace the files of a folder together: whatever stops a save, the old files are whole there, or the new ones.

The folder itself stays, with all else that is in it: a shell may be in it, it may be a mount point, and only the
folder has to be writable, not what it lies in. A save goes like this:

1. All files are written to a hidden folder inside and flushed to the disk. What stops the save until here leaves the
   old files, and the next save clears away what was written.
2. The hidden folder is renamed to `.goldenedit-saved`. From here on the new files are what the folder holds.
3. They are moved to their places. The two files that programs open the others by go first and come last, so that no
   program reads half of each save. What stops the save here leaves the rest in `.goldenedit-saved`, and the next load
   or save finishes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

READY = ".goldenedit-saved"
_STAGING = ".goldenedit-{}.saving"
_STALE = "stale"  # in the hidden folder: the names of old files that no new file takes the place of
_ABANDONED = 3600  # seconds without a change after which nobody is writing, where locks cannot tell


def replace_files(folder: Path, files: Mapping[str, bytes], order: Sequence[str]) -> None:
    """Put files into a folder, which is made where there is none, in place of those that `order` names.

    Args:
        folder: The folder.
        files: What is to be in the files, by their names.
        order: All names that the folder's files may have, in the order they are put in place. The last two are what
            programs open the others by. Files of other names are left alone.

    Raises:
        NotADirectoryError: `folder` is a file.
        IsADirectoryError: There is a folder where a file goes.
        OSError: The disk is full or not writable, and `folder` is as it was; or, as the message then says, the new
            files are all there but one of the old ones could not be replaced yet.
    """
    folder = Path(os.path.realpath(folder))  # a link to a folder that is still to be made
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder) as is_alone:
        _put_in_place(folder, order)  # what an earlier save left
        for left in folder.glob(_STAGING.format("*")):
            if is_alone or time.time() - os.path.getmtime(left) > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        for name in files:
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{folder / name} is a folder, and a file goes there: move it away.")
        staging = folder / _STAGING.format(secrets.token_hex(4))
        stale = [name for name in order if name not in files]
        try:
            staging.mkdir()
            for name, data in {**files, _STALE: "\n".join(stale).encode()}.items():
                _write(staging / name, data)
            _flush(staging)
            staging.rename(folder / READY)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # somebody else has put something there
                    folder.rmdir()
            if isinstance(error, OSError) and error.filename is None and error.errno is not None:
                error.filename = str(folder)
            raise
        _flush(folder)
        _put_in_place(folder, order)


def finish_replacing(folder: Path, order: Sequence[str]) -> None:
    """Put in place what a save into the folder had written, where it was stopped before it could.

    Raises:
        OSError: A file cannot be replaced.
    """
    if (folder / READY).is_dir():
        with _alone_in(folder):
            _put_in_place(folder, order)


def _put_in_place(folder: Path, order: Sequence[str]) -> None:
    """Move the files that are ready; done again from anywhere, it comes to the same."""
    ready = folder / READY
    if ready.is_symlink() or not ready.is_dir():  # a stranger's link may lead anywhere
        return
    if os.path.lexists(ready / order[-1]):  # which is moved last
        try:
            openers = [name for name in reversed(order[-2:]) if _changes(ready / name, folder / name)]
            for name in (*openers, *_stale(ready, order)):
                if not (folder / name).is_dir() or (folder / name).is_symlink():
                    (folder / name).unlink(missing_ok=True)
            for name in order:
                with suppress(FileNotFoundError):  # moved already
                    (ready / name).replace(folder / name)
            _flush(folder)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The new files are saved in {ready}, but not all of them could be moved to {folder}: {error}. Close "
                "the programs that have the old ones open; the next load or save there finishes it",
            ) from error
    shutil.rmtree(ready, ignore_errors=True)


def _changes(new: Path, target: Path) -> bool:
    """Tell whether a file is still to be moved, and says something else than the one in its place."""
    if not os.path.lexists(new):
        return False
    return not (new.is_file() and target.is_file() and new.read_bytes() == target.read_bytes())


def _stale(ready: Path, order: Sequence[str]) -> list[str]:
    """Return the names of the old files that go, and never one that is not of the format."""
    with suppress(FileNotFoundError):
        named = (ready / _STALE).read_text(encoding="utf-8", errors="replace").split("\n")
        return [name for name in order if name in named]
    return []


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Keep other processes from saving into a folder; yield whether the system can, which Windows cannot."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_alone = False
        with suppress(OSError):  # file systems of some networks have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_alone = True
        yield is_alone
    finally:
        if is_alone:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not, where the process was forked meanwhile
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can: Windows opens no folders."""
    if os.name == "nt":
        return
    with suppress(OSError):  # nor can all file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
