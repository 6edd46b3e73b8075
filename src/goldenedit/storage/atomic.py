"""Replace several files of a folder in one step: an interrupted save leaves either all old files or all new ones.

The folder itself and all other files in it stay. It may be a mount point or the working directory of a shell, and only
the folder needs to be writable, not its parent. A save has three steps:

1. All files are written to a hidden folder inside the folder and flushed to disk. If the save is interrupted before
   this is done, the old files are unchanged, and the next save deletes the hidden folder.
2. The hidden folder is renamed to `.goldenedit-saved`. From now on, the new files count as the contents of the folder.
3. The new files are moved to their places. Programs find the other files through two entry files. The old entry files
   are deleted first and the new ones are moved last, so that no program reads a mixture of two saves. If the save is
   interrupted here, `.goldenedit-saved` holds the remaining files, and the next load or save moves them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from goldenedit import platforms
from goldenedit.files import naming

READY = ".goldenedit-saved"
_STAGING = ".goldenedit-{}.saving"
_STALE = "stale"  # file in the hidden folder: names of old files to delete, because no new file replaces them
_ABANDONED = 3600  # seconds without a change after which a hidden folder counts as abandoned, on systems without locks


def replace_files(folder: Path, files: Mapping[str, bytes], order: Sequence[str]) -> None:
    """Replace the files of a folder by new ones in one step.

    Args:
        folder: The folder, which is created if it does not exist.
        files: Contents of the new files, by name.
        order: Names of all files that a save may write, in the order in which they are put in place. The last two are
            the entry files, through which programs find the others. Old files of these names that are not in `files`
            are deleted; files of other names are left alone.

    Raises:
        NotADirectoryError: `folder` is a file.
        IsADirectoryError: `folder` has a subfolder with the name of one of the files.
        OSError: The disk is full or not writable, and `folder` is unchanged. Or an old file could not be replaced yet,
            although all new files are saved; the message then says so.
    """
    folder = Path(os.path.realpath(folder))  # follows a link to a folder that does not exist yet
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with platforms.HERE.locked(folder) as is_locked:
        _put_in_place(folder, order)  # finish an interrupted save
        for leftover in folder.glob(_STAGING.format("*")):
            if is_locked or time.time() - os.path.getmtime(leftover) > _ABANDONED:
                shutil.rmtree(leftover, ignore_errors=True)
        for name in files:
            if (folder / name).is_dir():
                raise IsADirectoryError(
                    f"{folder / name} is a folder, but a file must be saved there. Move the folder."
                )
        staging = folder / _STAGING.format(secrets.token_hex(4))
        stale = [name for name in order if name not in files]
        try:
            staging.mkdir()
            for name, data in {**files, _STALE: "\n".join(stale).encode()}.items():
                with naming(folder):
                    _write(staging / name, data)
            platforms.HERE.flush(staging)
            platforms.HERE.patiently(staging.rename, folder / READY)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # another process has written into it
                    folder.rmdir()
            raise
        platforms.HERE.flush(folder)
        _put_in_place(folder, order)


def check_writable(folder: Path) -> None:
    """Raise OSError if a folder cannot be created or written to. It is not created.

    Raises:
        NotADirectoryError: The folder, or what should be one of its parents, is a file.
        OSError: The system refuses it, for example because its name is too long.
    """
    folder = Path(os.path.realpath(folder))
    parent = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file; name a folder to save into.")
    scratch = parent / _STAGING.format(secrets.token_hex(4))
    try:
        (scratch / folder.relative_to(parent)).mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"Nothing can be saved in {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raise OSError unless a folder can be made or is empty, and can be written to.

    Raises:
        FileExistsError: There are files in the folder.
        OSError: See `check_writable`.
    """
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Give a new folder.")


def finish_replacing(folder: Path, order: Sequence[str]) -> None:
    """Finish a save into the folder that was interrupted while it moved its files into place.

    Raises:
        OSError: A file cannot be replaced.
    """
    if (folder / READY).is_dir():
        with platforms.HERE.locked(folder):
            _put_in_place(folder, order)


def _put_in_place(folder: Path, order: Sequence[str]) -> None:
    """Move the files that are ready. If interrupted at any point, it can be run again with the same result."""
    ready = folder / READY
    if ready.is_symlink() or not ready.is_dir():  # a link could lead anywhere
        return
    if os.path.lexists(ready / order[-1]):  # this file is moved last
        try:
            entry_files = [name for name in reversed(order[-2:]) if _will_change(ready / name, folder / name)]
            for name in (*entry_files, *_stale(ready, order)):
                if not (folder / name).is_dir() or (folder / name).is_symlink():
                    platforms.HERE.patiently((folder / name).unlink, missing_ok=True)
            for name in order:
                with suppress(FileNotFoundError):  # moved already
                    platforms.HERE.patiently((ready / name).replace, folder / name)
            platforms.HERE.flush(folder)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The new files are saved in {ready}, but not all of them could be moved to {folder}: {error}. Close "
                "the programs that have the old files open. The next load or save in this folder moves the rest",
            ) from error
    shutil.rmtree(ready, ignore_errors=True)


def _will_change(new: Path, target: Path) -> bool:
    """Return whether a new file still has to be moved, and differs from the file that it replaces."""
    if not os.path.lexists(new):
        return False
    return not (new.is_file() and target.is_file() and new.read_bytes() == target.read_bytes())


def _stale(ready: Path, order: Sequence[str]) -> list[str]:
    """Return the names of old files to delete; only names in `order` are ever returned."""
    with suppress(FileNotFoundError):
        listed = (ready / _STALE).read_text(encoding="utf-8", errors="replace").split("\n")
        return [name for name in order if name in listed]
    return []


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
