"""The cache of keys and values, which transformers calls `cache` since 5.24 and called `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword argument by which a model's forward takes its cache."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output; None if it has none, or one of recurrent states alone, as Mamba has.

    Recurrent states take padding for text, so what they give in a batch is not what they give alone.
    """
    cache = getattr(output, "cache", None)
    cache = getattr(output, "past_key_values", None) if cache is None else cache
    layers = getattr(cache, "layers", None)
    return None if layers and not any(hasattr(layer, "keys") for layer in layers) else cache
