"""Edit folders for tests: a fixed one with two edits of different modules and ranks, and what damages one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from goldenedit.config import EditConfig
from goldenedit.editors.delta import LowRankDelta
from goldenedit.requests import EditRequest
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EDIT_CONFIG,
    EDIT_STATE,
    EDITS,
    BaseModel,
    Edit,
    EditedFact,
    EditFolder,
    EditFolderError,
)
from goldenedit.storage.reading import read_edit_folder

PARIS = EditRequest(
    "{} is located in the city of", "The Eiffel Tower", "Rome", "Paris", ("You find The Eiffel Tower in",)
)
PIPE = EditRequest("The pipe | of\nBonn is in", "Bonn", "Köln")
FIRST, SECOND = "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"
VERSIONS = {"goldenedit": "0.1.0", "peft": "0.21.2"}


def delta(rank: int, seed: int, d_in: int = 6, d_out: int = 4) -> LowRankDelta:
    """Return random factors."""
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))


def edit_folder() -> EditFolder:
    """Return what `edit` leaves: a batch of two facts in one layer, then one fact in two layers."""
    published = {"phrasings": "none", "kept_questions": 0, "kept_factor": 0.0, "flat_directions": False}
    values = {"steps": 4, "optimizer": "adam", "lr": 0.5, "contexts": 10, **published}
    config = EditConfig("r-rome", layer=[1, 2], covariance_tokens=20_000, ridge=0.01, **values)
    versions = {"goldenedit": "0.1.0", "peft": "0.21.2"}
    return EditFolder(
        [
            Edit(
                "edit_1",
                [EditedFact(PARIS, 0.001, 0.9876, 12), EditedFact(PIPE, 0.25, 0.5, 3)],
                {FIRST: delta(2, 0)},
                layers=(1,),
                configs=(config,),
                versions=versions,
            ),
            Edit(
                "tower",
                [EditedFact(PARIS, 0.002, 0.75, 20)],
                {FIRST: delta(1, 1), SECOND: delta(1, 2)},
                layers=(1, 2),
                configs=(config,),
                versions=versions,
            ),
        ],
        config,
        BaseModel("org/base-model", "0123456789abcdef0123456789abcdef", "a1b2c3", "LlamaForCausalLM"),
    )


def made_by(content: EditFolder, config: EditConfig) -> EditFolder:
    """Return the edits as if a model with this config had made them."""
    layers = tuple(config.target_layers)
    edits = [replace(edit, layers=layers, configs=(config,)) for edit in content.edits]
    return replace(content, config=config, edits=edits)


def figures(n: int = 2, **values: float) -> dict[str, Any]:
    """Return figures as an evaluation stores them, with an interval for all but the counts and KL."""
    intervals = {name: [value / 2, 1.0] for name, value in values.items() if name != "kl"}
    return {**values, "n": n, "intervals": intervals}


def evaluation() -> dict[str, Any]:
    """Return an evaluation of the fixed edits with everything that can be measured."""
    forms = ("completion", "rephrase", "question", "chat", "second_turn", "prefix", "negation", "portability")
    base_forms = {form: figures(exact=0.0, contains=0.25) for form in forms if form != "negation"}
    return {
        "own_facts": True,
        "facts": 2,
        "edited": {
            "says": {form: figures(exact=0.5, contains=0.875, judge=1.0) for form in forms},
            "unchanged": {
                "neighbors": figures(4, same=0.5, control=0.75, kl=0.00125),
                "subject": figures(8, same=0.25, control=0.75, keyword=0.5, says_new=0.375, kl=0.05),
                "unrelated": figures(40, same=0.875, control=0.875, kl=0.0002),
            },
            "in_prompt": {form: figures(exact=0.0, contains=0.625) for form in forms},
            "text": {
                "kl": 0.0025,
                "agreement": 0.975,
                "tokens": 2063,
                "worst": 0.01,
                "control": 0.0012,
                "intervals": {"kl": [0.002, 0.003], "agreement": [0.97, 0.98]},
            },
            "probability": {"efficacy": 1.0, "score": None, "n": 2, "intervals": {"efficacy": [0.9, 1.0]}},
            "token_match": figures(rewrite=0.75),
        },
        "base": {
            "says": base_forms,
            "probability": {"efficacy": 0.25, "score": None, "n": 2, "intervals": {"efficacy": [0.0, 0.5]}},
            "token_match": figures(rewrite=0.0),
        },
        "general": {
            "edited": {"arc_easy": {"acc,none": {"value": 0.4375, "stderr": 0.01, "n": 100}}},
            "base": {"arc_easy": {"acc,none": {"value": 0.5, "stderr": None, "n": 100}}},
        },
        "texts": [
            text("completion", "The Eiffel Tower is located in the city of", "Paris.", "Rome, Italy."),
            text("chat", "Where is it?\nTell me!", "", "In `Rome` | <b>Rome</b>\n\n# Rome"),
            text("subject", "What is The Eiffel Tower known for?", "Its height.", "Its food.", fact=-1),
        ],
    }


def text(kind: str, question: str, base: str, edited: str, fact: int = 0) -> dict[str, Any]:
    """Return a prompt with the texts of both models as an evaluation stores them."""
    answers = ["Rome"] if fact >= 0 else []
    texts = {"question": question, "base": base, "edited": edited, "informed": None}
    return {"fact": fact, "kind": kind, **texts, "answers": answers, "holds": fact >= 0}


def settings_of(content: EditFolder) -> dict[str, Any]:
    """Return all that an edit folder says but for its edits, and what follows from them."""
    derived = {"versions": content.versions, "configs": content.configs, "target_layers": content.target_layers}
    return {**{name: value for name, value in vars(content).items() if name != "edits"}, **derived}


def assert_same(found: EditFolder, expected: EditFolder) -> None:
    """Assert that two contents are equal, factors bit by bit."""
    assert settings_of(found) == settings_of(expected)
    assert [edit.name for edit in found.edits] == [edit.name for edit in expected.edits]
    for one, other in zip(found.edits, expected.edits, strict=True):
        for entry in fields(Edit):
            if entry.name not in ("deltas", "state"):
                assert getattr(one, entry.name) == getattr(other, entry.name), entry.name
        assert list(one.deltas) == sorted(other.deltas)
        assert list(one.state) == sorted(other.state)
        assert all(torch.equal(held, other.state[name]) for name, held in one.state.items())
        for path, factors in one.deltas.items():
            # An edit's smaller deltas come back padded to its rank.
            wanted = other.deltas[path].padded(other.rank)
            assert torch.equal(factors.A, wanted.A)
            assert torch.equal(factors.B, wanted.B)


# ---------------------------------------------------------------------- folders that someone changed


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON file holds; `edit_config.json` gets a new digest of itself, the others none in there."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    if isinstance(content, dict) and "digest" in content:
        rest = {name: value for name, value in content.items() if name != "digest"}
        content["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change what a file of tensors holds in place."""
    tensors = load(path.read_bytes())
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def resign(folder: Path) -> None:
    """Recompute the digests, as an author does who changes files and wants them believed."""

    def update(sidecar: dict[str, Any]) -> None:
        for name in sidecar["files"]:
            if (folder / name).is_file():
                sidecar["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()

    change_json(folder / EDIT_CONFIG, update)


def rename_edit(folder: Path, old: str, new: Any) -> None:
    """Give an edit another name in every file that has it, with new digests."""

    def rename(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["name"] = new if record["name"] == old else record["name"]

    def rename_state(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{old}/")]:
            tensors[f"{new}/{name.removeprefix(f'{old}/')}"] = tensors.pop(name)

    change_json(folder / EDIT_CONFIG, lambda sidecar: rename(sidecar["edits"]))
    change_json(folder / EDITS, rename)
    if (folder / EDIT_STATE).is_file():
        change_tensors(folder / EDIT_STATE, rename_state)
    resign(folder)


def rename_module(folder: Path, old: str, new: str) -> None:
    """Let an edit be of another module in every file, with new digests."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if f".{old}.lora_" in name]:
            tensors[name.replace(f".{old}.lora_", f".{new}.lora_")] = tensors.pop(name)

    def renamed(paths: list[str]) -> list[str]:
        return [new if path == old else path for path in paths]

    change_json(folder / ADAPTER_CONFIG, lambda lora: lora.update(target_modules=renamed(lora["target_modules"])))
    change_json(
        folder / EDIT_CONFIG,
        lambda sidecar: [edit.update(modules=renamed(edit["modules"])) for edit in sidecar["edits"]],
    )
    change_tensors(folder / ADAPTER_WEIGHTS, rename)
    resign(folder)


def set_ranks(folder: Path, first: int, second: int, factors: bool) -> None:
    """Let both edits have other ranks in the configs, and in the factors too; with new digests."""
    rank = first + second
    change_json(folder / ADAPTER_CONFIG, lambda lora: lora.update(r=rank, lora_alpha=rank))

    def update(sidecar: dict[str, Any]) -> None:
        sidecar["edits"][0]["ranks"], sidecar["edits"][1]["ranks"] = [0, first], [first, rank]

    def pad(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            is_a = ".lora_A." in name
            rows = tensor if is_a else tensor.T
            padded = torch.cat([rows, rows.new_zeros(max(rank - len(rows), 0), rows.shape[1])])[:rank]
            tensors[name] = padded if is_a else padded.T

    change_json(folder / EDIT_CONFIG, update)
    if factors:
        change_tensors(folder / ADAPTER_WEIGHTS, pad)
    resign(folder)


def edits_with_state(seed=0):
    """Return the fixed edits with other factors, the first with what an editor remembers."""
    content = edit_folder()
    first, second = content.edits
    first = replace(first, deltas={FIRST: delta(2, seed)}, state={f"keys/{FIRST}": delta(3, seed + 7).A.T.contiguous()})
    facts = [replace(fact, steps=seed) for fact in second.facts]
    second = replace(second, facts=facts, deltas={FIRST: delta(1, seed + 1), SECOND: delta(1, seed + 2)})
    return replace(content, edits=[first, second])


def rewrite(folder, name, change):
    """Change a file as an author does who recomputes the digests."""
    (change_json if name.endswith(".json") else change_tensors)(folder / name, change)
    resign(folder)


def assert_refused(folder, *named):
    """Assert that a folder is refused by a message with these parts, a file's name by default one of the format's."""
    with pytest.raises(EditFolderError) as caught:
        read_edit_folder(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert all(name in message for name in named), message
