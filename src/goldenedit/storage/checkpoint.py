"""Edited checkpoints: a model with edits written into its weights, and what its files say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.storage.folder import EDITS, EditFolder, facts_of

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # how transformers calls those of a checkpoint, as patterns


def golden_metadata(content: EditFolder) -> dict[str, Any]:
    """Return what `config.json` of an edited checkpoint says: `golden_layers`, and how they were found and edited."""
    config = content.config
    return {
        "golden_layers": config.target_layers,
        "goldenedit": {
            "method": config.method,
            "selector": config.layer if isinstance(config.layer, str) else None,
            "layer_scores": config.layer_scores,
            "proxy_hash": content.proxy_hash,
            "facts": sum(len(edit.facts) for edit in content.edits),
            "base_model": vars(content.base_model),
            "versions": content.versions,
        },
    }


def write_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, content: EditFolder
) -> None:
    """Write weights, config, tokenizer and facts of a model that carries the edits in its weights."""
    before = dict(model.config.__dict__)
    try:
        model.config.update(golden_metadata(content))
        model.save_pretrained(folder)
    finally:
        for name in set(model.config.__dict__) - set(before):
            delattr(model.config, name)
        model.config.__dict__.update(before)
    tokenizer.save_pretrained(folder)
    (folder / EDITS).write_text(json.dumps(facts_of(content.edits), indent=2, ensure_ascii=False) + "\n", "utf-8")
