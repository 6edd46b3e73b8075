"""Layers that papers and their code edit, by model: a baseline to compare with."""

from __future__ import annotations

from typing import Any

# 0-based layers of ROME's family, by the last part of the model's name in lower case. Sources: the hyperparameter
# files of ROME, MEMIT and EasyEdit.
PUBLISHED_LAYERS: dict[str, int] = {
    "gpt2-medium": 8,
    "gpt2-large": 12,
    "gpt2-xl": 17,
    "gpt-j-6b": 5,
    "gpt-neox-20b": 15,
    "llama-2-7b": 5,
    "llama-2-7b-hf": 5,
    "llama-2-7b-chat-hf": 5,
    "meta-llama-3-8b": 5,
    "meta-llama-3-8b-instruct": 5,
    "llama-3.2-3b": 5,
    "llama-3.2-3b-instruct": 5,
    "mistral-7b-v0.1": 5,
    "mistral-7b-instruct-v0.2": 5,
    "qwen2-7b": 5,
    "qwen2-7b-instruct": 5,
    "qwen2.5-7b": 5,
    "qwen2.5-7b-instruct": 5,
}


def published_layer(model: Any) -> int:
    """Return the layer that the field edits in this model.

    Raises:
        ValueError: Nothing is published for it; the message says what else to do.
    """
    name = str(getattr(model, "name_or_path", "") or "").rstrip("/").split("/")[-1].lower()
    if name not in PUBLISHED_LAYERS:
        raise ValueError(
            f"No layer is published for {name or 'a model without a name'!r}; there is one for "
            f"{sorted(PUBLISHED_LAYERS)}. Use EditConfig(layer='lga'), or give the layer's number."
        )
    return PUBLISHED_LAYERS[name]
