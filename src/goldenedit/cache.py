"""Where results that cost time are kept: layer scores, key statistics, converted models."""

from __future__ import annotations

import hashlib
import json
import os
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
