"""goldenedit: knowledge editing as a plugin beside transformers and PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goldenedit.config import EditConfig
    from goldenedit.model import EditModel, get_edit_model
    from goldenedit.plans import Plan, plan
    from goldenedit.requests import EditRequest, load_requests, proxy_facts

_HOMES = {
    "EditConfig": "goldenedit.config",
    "EditModel": "goldenedit.model",
    "EditRequest": "goldenedit.requests",
    "Plan": "goldenedit.plans",
    "get_edit_model": "goldenedit.model",
    "load_requests": "goldenedit.requests",
    "plan": "goldenedit.plans",
    "proxy_facts": "goldenedit.requests",
}

__version__ = "0.2.0"
__all__ = ["EditConfig", "EditModel", "EditRequest", "Plan", "get_edit_model", "load_requests", "plan", "proxy_facts"]


def __getattr__(name: str) -> Any:
    """Import what is asked for and nothing else, as transformers does."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
