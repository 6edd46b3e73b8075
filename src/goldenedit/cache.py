"""A cache on disk for results that take long to compute: layer scores, key statistics, converted models.

It has a limit, `GOLDENEDIT_CACHE_LIMIT` (such as `20GB`; 50 GB by default, `none` for no limit). Above it, what was not
used for longest is deleted. Converted models stay: they are deleted on request only (`goldenedit cache clean`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goldenedit import platforms
from goldenedit.files import write_atomically

MODELS = "models"  # the kind whose entries are folders
DEFAULT_LIMIT = "50GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class CacheEntry:
    """A result in the cache.

    Attributes:
        path: Its file; of a converted model, its folder.
        kind: The folder of the cache that it is in, such as `covariance`.
        size: Bytes.
        used: When it was last written or read, in seconds since 1970.
    """

    path: Path
    kind: str
    size: int
    used: float


def cache_dir() -> Path:
    """Return the cache folder: `GOLDENEDIT_CACHE`, or the folder `goldenedit` in `HF_HOME`."""
    if explicit := os.environ.get("GOLDENEDIT_CACHE"):
        return Path(explicit).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "goldenedit"


def cache_key(**inputs: Any) -> str:
    """Return a short name for a result that depends on `inputs` alone; these can be anything that JSON can store."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def going_on_without(path: Path, access: str) -> Iterator[None]:
    """Turn a file error into a warning, once per folder, as results do not depend on the cache.

    Args:
        path: The file in the cache.
        access: What fails if an error occurs: `"read"` or `"written"`.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"The cache folder {path.parent} cannot be {access} ({error.strerror or error}), so results are computed "
            "again each time. Set GOLDENEDIT_CACHE to a folder that can be read and written.",
            stacklevel=1,  # Python shows a message once per line of code: this line, for all callers
        )


def keep(path: Path, data: bytes) -> None:
    """Write a result to the cache; if that fails, warn and go on. Above the limit, older results are deleted."""
    with going_on_without(path, "written"):
        write_atomically(path, data)
        if (most := cache_limit()) is not None:
            _shrink(most, path)


def is_kept(path: Path) -> bool:
    """Return whether the cache has a file; if that cannot be determined, warn and return False.

    The file counts as used now.
    """
    with going_on_without(path, "read"):
        found = path.is_file()
        if found:
            with suppress(OSError):  # a cache may be shared and read-only
                os.utime(path)
        return found
    return False


def cache_limit() -> int | None:
    """Return the largest size of the cache in bytes, or None for no limit: `GOLDENEDIT_CACHE_LIMIT`.

    Raises:
        ValueError: It is no size.
    """
    text = os.environ.get("GOLDENEDIT_CACHE_LIMIT") or DEFAULT_LIMIT
    if text.strip().casefold() == "none":
        return None
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if size is None:
        raise ValueError(f"GOLDENEDIT_CACHE_LIMIT={text!r} is no size. Set it to one such as '20GB', or to 'none'.")
    return int(float(size[1]) * _UNITS[size[2].upper()])


def cache_entries() -> list[CacheEntry]:
    """Return what is in the cache, that which was not used for longest first."""
    folder = cache_dir()
    entries: list[CacheEntry] = []
    for of_kind in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not of_kind.is_dir():
            continue
        paths = of_kind.iterdir() if of_kind.name == MODELS else of_kind.rglob("*")
        for path in paths:
            with suppress(FileNotFoundError):  # another process deletes too
                if of_kind.name == MODELS and path.is_dir():
                    files = [file.stat() for file in path.rglob("*") if file.is_file()]
                elif path.is_file():
                    files = [path.stat()]
                else:
                    continue
                used = max((file.st_mtime for file in files), default=0.0)
                entries.append(CacheEntry(path, of_kind.name, sum(file.st_size for file in files), used))
    return sorted(entries, key=lambda entry: entry.used)


def clean_cache(kinds: Collection[str] = (), unused_days: float = 0.0) -> list[CacheEntry]:
    """Delete results from the cache, and return them. They are computed again when they are needed.

    Args:
        kinds: The kinds to delete; empty for all.
        unused_days: Delete only what was not used for so many days.

    Raises:
        ValueError: The cache has nothing of a kind.
        OSError: Something cannot be deleted.
    """
    entries = cache_entries()
    if missing := set(kinds) - {entry.kind for entry in entries}:
        known = ", ".join(sorted({entry.kind for entry in entries})) or "nothing"
        raise ValueError(f"The cache has nothing of the kind {sorted(missing)[0]!r}. It has: {known}.")
    before = time.time() - 24 * 3600 * unused_days
    chosen = [entry for entry in entries if (not kinds or entry.kind in kinds) and entry.used <= before]
    for entry in chosen:
        _delete(entry.path)
    return chosen


def _shrink(most: int, newest: Path) -> None:
    """Delete what was not used for longest until the cache is within a limit, but never the newest file."""
    entries = cache_entries()
    size = sum(entry.size for entry in entries)
    for entry in entries:
        if size <= most:
            break
        if entry.kind != MODELS and entry.path != newest:
            _delete(entry.path)
            size -= entry.size


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        platforms.HERE.patiently(path.unlink, missing_ok=True)
