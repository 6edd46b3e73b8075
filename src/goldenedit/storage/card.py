"""The model card of an edit folder, from a Jinja template."""

from __future__ import annotations

import json
from importlib import resources

import jinja2

from goldenedit.config import TRAINED
from goldenedit.storage.folder import EditFolder

_SHOWN = 20


def render_card(content: EditFolder) -> str:
    """Return the README.md of an edit folder: the first 20 facts, how to load it, how it was made."""
    template = resources.files("goldenedit.storage").joinpath("templates", "model_card.md.jinja")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    facts = [fact for edit in content.edits for fact in edit.facts]
    config = content.config
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        base_model=content.base_model,
        base_name=content.base_model.name_or_path.rstrip("/").split("/")[-1],
        config=config,
        by_keys=config.method not in TRAINED,
        relative_error=max(edit.relative_error for edit in content.edits),
        count=len(facts),
        facts=facts[:_SHOWN],
        layers=", ".join(map(str, config.target_layers)),
        rank=sum(edit.rank for edit in content.edits),
        selector=config.layer if isinstance(config.layer, str) else "hand",
        versions=", ".join(f"{name} {version}" for name, version in content.versions.items()),
        conv1d=any(edit.fan_in_fan_out for edit in content.edits),
    )
