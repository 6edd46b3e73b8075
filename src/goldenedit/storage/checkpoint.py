"""Write edited checkpoints: models with edits merged into their weights, and metadata about the edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.storage.folder import EDITS, EditFolder, facts_of

WEIGHTS = (".safetensors", ".safetensors.index.json")  # endings of the names of weight files


def golden_metadata(content: EditFolder) -> dict[str, Any]:
    """Return the entries for `config.json`: `golden_layers`, and how they were selected and edited."""
    config = content.configs[-1]
    selectors = {options.layer if isinstance(options.layer, str) else None for options in content.configs}
    # Without the layer of the neurons that give the answers, which none was compared with.
    golden = sorted({layer for options in content.configs for layer in options.target_layers})
    return {
        "golden_layers": golden or content.target_layers,
        "goldenedit": {
            "methods": sorted({options.method for options in content.configs}),
            "selector": selectors.pop() if len(selectors) == 1 else None,
            "layer_scores": config.layer_scores if len(content.configs) == 1 else None,
            "proxy_hash": content.proxy_hash,
            "facts": sum(len(edit.facts) for edit in content.edits),
            "base_model": vars(content.base_model),
            "versions": content.versions,
        },
    }


def write_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, content: EditFolder
) -> None:
    """Write weights, config, tokenizer and facts of a model with merged edits."""
    original = dict(model.config.__dict__)
    try:
        model.config.update(golden_metadata(content))
        model.save_pretrained(folder)
    finally:
        for name in set(model.config.__dict__) - set(original):
            delattr(model.config, name)
        model.config.__dict__.update(original)
    tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # safetensors lets nobody but the owner read them
    facts = json.dumps(facts_of(content.edits), indent=2, ensure_ascii=False) + "\n"
    (folder / EDITS).write_text(facts, encoding="utf-8", newline="\n")
