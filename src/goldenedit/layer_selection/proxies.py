"""The proxy set: the facts that layer selectors compare layers on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from goldenedit.config import EditConfig
from goldenedit.requests import EditRequest, load_requests, proxy_facts


def proxy_set(config: EditConfig) -> list[EditRequest]:
    """Return the facts that layer selectors compare layers on.

    Raises:
        ValueError: `config.proxy` is not an existing file, or has no facts.
    """
    if config.proxy is None:
        facts = proxy_facts()
    elif isinstance(config.proxy, str):
        if not Path(config.proxy).is_file():
            raise ValueError(f"EditConfig.proxy {config.proxy!r} is not a file. Use a file of facts.")
        facts = load_requests(config.proxy)
    else:
        facts = config.proxy
    if not facts:
        raise ValueError("EditConfig.proxy has no facts. Add at least one.")
    return facts[: config.proxy_size]


def proxy_hash(facts: list[EditRequest]) -> str:
    """Return a short hash of facts."""
    records = [fact.to_dict() for fact in facts]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]
