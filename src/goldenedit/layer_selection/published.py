"""Layers that papers and their code edit, by model, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from goldenedit.config import EditConfig
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest

_LLAMA: dict[str, list[int]] = {"rome": [5], "memit": [4, 5, 6, 7, 8], "ft": [21]}
_LLAMA_3: dict[str, list[int]] = {**_LLAMA, "locft": [22]}
_QWEN: dict[str, list[int]] = {**_LLAMA, "ft": [27]}
_QWEN_2_5: dict[str, list[int]] = {**_QWEN, "locft": [6]}

# Layers, counted from 0, by the last part of the model's name in lower case and by `Editor.published`. They are from
# the hyperparameter files of ROME, MEMIT and EasyEdit; those of LocFT-BF are from its paper.
PUBLISHED_LAYERS: dict[str, dict[str, list[int]]] = {
    "gpt2-medium": {"rome": [8]},
    "gpt2-large": {"rome": [12]},
    "gpt2-xl": {"rome": [17], "memit": [13, 14, 15, 16, 17], "ft": [0]},
    "gpt-j-6b": {"rome": [5], "memit": [3, 4, 5, 6, 7, 8], "ft": [21]},
    "gpt-neox-20b": {"rome": [15]},
    "llama-2-7b": _LLAMA,
    "llama-2-7b-hf": _LLAMA,
    "llama-2-7b-chat-hf": _LLAMA,
    "meta-llama-3-8b": _LLAMA_3,
    "meta-llama-3-8b-instruct": _LLAMA_3,
    "llama-3.2-3b": _LLAMA,
    "llama-3.2-3b-instruct": _LLAMA,
    "mistral-7b-v0.1": _LLAMA,
    "mistral-7b-instruct-v0.2": _LLAMA,
    "qwen2-7b": _QWEN,
    "qwen2-7b-instruct": _QWEN,
    "qwen2.5-7b": _QWEN_2_5,
    "qwen2.5-7b-instruct": _QWEN_2_5,
}


def published_depth(kind: str | None) -> float | None:
    """Return the depth of the layer that a kind of editor (`Editor.published`) edits in Llama-3-8B, as a share of 1.

    Of several layers it is that of the last one. None if none is published.
    """
    layers = PUBLISHED_LAYERS["meta-llama-3-8b"].get(kind or "")
    return None if layers is None else layers[-1] / 32


@selector("published", depends_on=("method",), is_scored=False, needs_facts=False)
def published_layers(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> list[int]:
    """Return the layers that published work edits in this model with this kind of editor.

    Raises:
        ValueError: No layer is published for the model and the editor.
    """
    name = str(getattr(lm.model, "name_or_path", "") or "").rstrip("/").split("/")[-1].lower()
    remedy = "Use EditConfig(layer='lga'), or set the layer's number."
    if name not in PUBLISHED_LAYERS:
        raise ValueError(
            f"No layer is published for {name or 'a model without a name'!r}, only for "
            f"{sorted(PUBLISHED_LAYERS)}. {remedy}"
        )
    layers = PUBLISHED_LAYERS[name].get(config.editor.published or "")
    if layers is None:
        raise ValueError(f"No layer is published for the editor {config.method!r} on {name!r}. {remedy}")
    return list(layers)
