"""Where results that cost time are kept: layer scores, key statistics, converted models."""

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
    """Return the cache folder: `GOLDENEDIT_CACHE`, or `goldenedit` below `HF_HOME`."""
    if explicit := os.environ.get("GOLDENEDIT_CACHE"):
        return Path(explicit).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "goldenedit"


def cache_key(**parts: Any) -> str:
    """Return a short name for a result that depends on `parts` (anything JSON can say) and on nothing else."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def going_on_without(path: Path, access: str) -> Iterator[None]:
    """Warn, once for each folder, where a file of the cache cannot be `access`: a cache saves time and nothing else."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"The cache {path.parent} cannot be {access} ({error.strerror or error}), so that results are computed "
            "again each time. Set GOLDENEDIT_CACHE to a folder that can be read and written.",
            stacklevel=1,  # Python shows a text once a line: this one, whoever asks
        )


def keep(path: Path, data: bytes) -> None:
    """Write a result to the cache, or warn where that is not possible: who computed it has it."""
    with going_on_without(path, "written"):
        write_atomically(path, data)


def is_kept(path: Path) -> bool:
    """Tell whether the cache has a file; warn where that cannot be told."""
    with going_on_without(path, "read"):
        return path.is_file()
    return False
