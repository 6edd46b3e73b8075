"""A cache on disk for results that take long to compute: layer scores, key statistics, converted models."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return the cache folder: `GOLDENEDIT_CACHE`, or the folder `goldenedit` in `HF_HOME`."""
    if explicit := os.environ.get("GOLDENEDIT_CACHE"):
        return Path(explicit).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "goldenedit"


def cache_key(**inputs: Any) -> str:
    """Return a short name for a result that depends on `inputs` alone; these can be anything that JSON can store."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old file or the new one, and never a partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
    """Write a result to the cache; if that fails, warn and go on."""
    with going_on_without(path, "written"):
        write_atomically(path, data)


def is_kept(path: Path) -> bool:
    """Return whether the cache has a file; if that cannot be determined, warn and return False."""
    with going_on_without(path, "read"):
        return path.is_file()
    return False
