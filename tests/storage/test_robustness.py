"""Edit folders that were damaged, or made to do harm: refused by name, or loaded right; no crash, and no other edit.

`benchmarks/robustness.py` counts the same over many more of them. An author who changes factors to other finite values
and recomputes the digests has made another edit, which is fine: that is not among the damages.
"""

from __future__ import annotations

import json
import random
import shutil
import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import (
    FIRST,
    SECOND,
    change_json,
    change_tensors,
    delta,
    evaluation,
    rename_edit,
    rename_module,
    resign,
    set_ranks,
    settings_of,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.storage.atomic import READY
from goldenedit.storage.card import render_card
from goldenedit.storage.fingerprint import fingerprint
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    EDIT_CONFIG,
    EDIT_FILES,
    EDIT_STATE,
    EDITS,
    BaseModel,
    Edit,
    EditedFact,
    EditFolder,
    write_edit_folder,
)
from goldenedit.storage.reading import read_edit_folder
from models import MLP_WIDTH, WIDTH, tiny_model

SIGNED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS, EDIT_STATE)  # those that edit_config.json has digests of
NEEDED = (*SIGNED, EDIT_CONFIG)

REFUSED, REFUSED_FOLDER, UNNAMED = "refused, names file", "refused, names folder", "refused, names neither"
RIGHT, OTHER_SETTINGS = "loaded right", "right edit, other settings"
WRONG, CRASH = "silent wrong edit", "crash"
OUTCOMES = (REFUSED, REFUSED_FOLDER, UNNAMED, RIGHT, OTHER_SETTINGS, WRONG, CRASH)
BAD = (UNNAMED, WRONG, CRASH)

# Damages a folder, given another of the same shape, and tells whether what was touched does not matter.
Damage = Callable[[random.Random, Path, Path], bool]
DAMAGES: dict[str, Damage] = {}


def damage(kind: str) -> Callable[[Damage], Damage]:
    def enlist(function: Damage) -> Damage:
        DAMAGES[kind] = function
        return function

    return enlist


# ---------------------------------------------------------------------- by accident, or by an author who signs nothing


@damage("truncated")
def _(rng, folder, other):
    path = folder / rng.choice(EDIT_FILES)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])
    return path.name == CARD


@damage("deleted")
def _(rng, folder, other):
    name = rng.choice(EDIT_FILES)
    (folder / name).unlink()
    return name == CARD


@damage("renamed")
def _(rng, folder, other):
    name = rng.choice(NEEDED)
    (folder / name).rename(folder / rng.choice([f"{name}.part", name.upper(), f" {name}", f"{name}~"]))
    return False


@damage("swapped with each other")
def _(rng, folder, other):
    one, two = (folder / name for name in rng.sample(NEEDED, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    return False


@damage("swapped with another edit's")
def _(rng, folder, other):
    name = rng.choice(NEEDED)
    same = (folder / name).read_bytes() == (other / name).read_bytes()
    shutil.copy(other / name, folder / name)
    return same


@damage("a changed byte")
def _(rng, folder, other):
    path = folder / rng.choice((*SIGNED, CARD))
    change_byte(rng, path)
    return path.name == CARD


@damage("a changed byte of edit_config.json")
def _(rng, folder, other):
    change_byte(rng, folder / EDIT_CONFIG)
    return False


def change_byte(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    text = path.suffix in (".json", ".md")  # a letter for a letter is harder to notice
    choices = [byte for byte in (string.printable.encode() if text else range(256)) if byte != data[place]]
    data[place] = rng.choice(choices)
    path.write_bytes(data)


@damage("link to another edit's file")
def _(rng, folder, other):
    name = rng.choice(NEEDED)
    same = (folder / name).read_bytes() == (other / name).read_bytes()
    return link(folder / name, other / name) or same


@damage("link to itself")
def _(rng, folder, other):
    path = folder / rng.choice(EDIT_FILES)
    return link(path, path)


@damage("link to nothing")
def _(rng, folder, other):
    return link(folder / rng.choice(EDIT_FILES), folder / "nothing")


@damage("link to /dev/null")
def _(rng, folder, other):
    return link(folder / rng.choice(EDIT_FILES), Path("/dev/null"))


@damage("link to a folder")
def _(rng, folder, other):
    return link(folder / rng.choice(EDIT_FILES), rng.choice([folder, other, Path("/")]))


@damage("link to an identical copy")
def _(rng, folder, other):
    path = folder / rng.choice(EDIT_FILES)
    copy = shutil.copy(path, folder / "copy")
    link(path, Path(copy))
    return True


def link(path: Path, target: Path) -> bool:
    path.unlink()
    path.symlink_to(target)
    return path.name == CARD


@damage("a folder in a file's place")
def _(rng, folder, other):
    path = folder / rng.choice(EDIT_FILES)
    path.unlink()
    path.mkdir()
    return path.name == CARD


@damage("files of somebody's own")
def _(rng, folder, other):
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(other, folder / "other")
    (folder / "adapter_model.bin").write_bytes(rng.randbytes(100))
    return True


@damage("a save that was stopped on its way")
def _(rng, folder, other):
    (folder / READY).mkdir()
    for name in EDIT_FILES[rng.randrange(len(EDIT_FILES)) :]:
        (folder / name).rename(folder / READY / name)
        if rng.random() < 0.5 and name not in EDIT_FILES[-2:]:  # those two go before the others are moved
            shutil.copy(other / name, folder / name)
    return True


@damage("another edit's file where a stopped save leaves its own")
def _(rng, folder, other):
    (folder / READY).mkdir()
    name = rng.choice(EDIT_FILES)
    shutil.copy(other / name, folder / READY / name)
    return name != EDIT_CONFIG  # without one nothing is moved


# ---------------------------------------------------------------------- by an author who recomputes the digests


@damage("signed: truncated")
def _(rng, folder, other):
    path = folder / rng.choice(SIGNED)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) - 2)])  # JSON without its last line end is whole
    resign(folder)
    return False


@damage("signed: a huge rank in the configs")
def _(rng, folder, other):
    set_ranks(folder, 2, rng.choice([10**6, 2**31, 2**63, 10**400]), factors=False)
    return False


@damage("signed: a huge rank in configs and factors")
def _(rng, folder, other):
    set_ranks(folder, 2, rng.choice([64 * WIDTH - 1, 100 * WIDTH]), factors=True)
    return False


@damage("signed: a rank that is none")
def _(rng, folder, other):
    rank = rng.choice([0, -3, "3", None, 2.5, [3], True])
    change_json(folder / ADAPTER_CONFIG, lambda lora: lora.update(r=rank, lora_alpha=rank))
    resign(folder)
    return False


@damage("signed: no edits at all")
def _(rng, folder, other):
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar.update(edits=[]))
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar["files"].pop(EDIT_STATE))
    change_json(folder / ADAPTER_CONFIG, lambda lora: lora.update(r=0, lora_alpha=0, target_modules=[]))
    (folder / EDIT_STATE).unlink()
    (folder / EDITS).write_text("[]")
    save_file({}, folder / ADAPTER_WEIGHTS)
    resign(folder)
    return False


@damage("signed: factors that are not finite")
def _(rng, folder, other):
    value = rng.choice([float("nan"), float("inf"), -float("inf")])

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[rng.choice(sorted(tensors))].view(-1)
        tensor[rng.randrange(len(tensor))] = value

    change_tensors(folder / rng.choice([ADAPTER_WEIGHTS, EDIT_STATE]), change)
    resign(folder)
    return False


_DTYPES = (
    *(torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float64),
)


@damage("signed: factors of another dtype")
def _(rng, folder, other):
    dtype, which = rng.choice(_DTYPES), rng.choice(["", "lora_A", "lora_B", SECOND])

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if which in name})

    change_tensors(folder / ADAPTER_WEIGHTS, change)
    resign(folder)
    return dtype == torch.float64  # holds the same values


@damage("signed: factors of another shape")
def _(rng, folder, other):
    def change(tensors: dict[str, Tensor]) -> None:
        name = rng.choice(sorted(tensors))
        shapes = [tensors[name].T, tensors[name][0], tensors[name][None], tensors[name][:-1], tensors[name][:0]]
        tensors[name] = rng.choice(shapes)

    change_tensors(folder / ADAPTER_WEIGHTS, change)
    resign(folder)
    return False


@damage("signed: factors missing, or too many")
def _(rng, folder, other):
    def change(tensors: dict[str, Tensor]) -> None:
        name = rng.choice(sorted(tensors))
        more = rng.choice(
            [f"{name}.x", name.replace("lora_A", "lora_C"), "../x", "", name.replace("layers.", "layer.")]
        )
        if rng.random() < 0.5 or more == name:
            tensors.pop(name)
        else:
            tensors[more] = tensors[name].clone()

    change_tensors(folder / ADAPTER_WEIGHTS, change)
    resign(folder)
    return False


_PATH_TRICKS = ("../x", "a/b", "", "..", "/etc/passwd", "C:\\x", "a..b", ".a", "a\0b", "x\n", "a\u2028b")


@damage("signed: a path trick as a module")
def _(rng, folder, other):
    tricks = [*_PATH_TRICKS, f"../{SECOND}", f"{SECOND}/", f"{SECOND}.", f".{SECOND}", ".*down_proj", "mödel"]
    rename_module(folder, SECOND, rng.choice(tricks))
    return False


@damage("signed: a module that the base model has not so")
def _(rng, folder, other):
    no_linear = ["model", "model.layers", "model.layers.2", "model.layers.2.mlp", "model.norm", "model.embed_tokens"]
    other_shape = ["lm_head", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.o_proj"]
    nothing = ["down_proj", "mlp.down_proj", "model.layers.9.mlp.down_proj", f"{SECOND}.weight", "__class__", "forward"]
    rename_module(folder, SECOND, rng.choice(no_linear + other_shape + nothing))
    return False


@damage("signed: a path trick as an edit's name")
def _(rng, folder, other):
    rename_edit(folder, rng.choice(["edit_1", "tower"]), rng.choice([*_PATH_TRICKS, "a.b", "*", None, 3, ["a"]]))
    return False


@damage("signed: an edit named like something of PEFT's or PyTorch's")
def _(rng, folder, other):
    names = ["keys", "values", "update", "training", "forward", "type", "float", "_modules", "__class__", "__init__"]
    names += ["lora_", "lora_A", "weight", "default", "base_layer", "model"]
    rename_edit(folder, rng.choice(["edit_1", "tower"]), rng.choice(names))
    return False


@damage("signed: a path trick as a file")
def _(rng, folder, other):
    names = [*_PATH_TRICKS, CARD, EDIT_CONFIG, f"./{EDITS}", f"../{folder.name}/{EDITS}", str(folder / EDITS)]
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar["files"].update({rng.choice(names): "0" * 64}))
    return False


@damage("signed: modules that are not the edit's")
def _(rng, folder, other):
    modules = rng.choice([[FIRST], [SECOND], [FIRST, FIRST], [SECOND, SECOND], [], [FIRST, "x"], "", None])
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar["edits"][1].update(modules=modules))
    return False


@damage("signed: ranks that are not the edit's")
def _(rng, folder, other):
    wrong = [[0, 2], [0, 3]], [[0, 3], [3, 3]], [[0, 2], [2, 2**70]], [[0, -1], [-1, 3]], [[-1, 2], [2, 3]]
    ranks = rng.choice([*wrong, [[0, 2.0], [2.0, 3]], ["02", [2, 3]], [None, None], [[0, 2, 3], [3]]])

    def change(sidecar: dict[str, Any]) -> None:
        for edit, own in zip(sidecar["edits"], ranks, strict=True):
            edit["ranks"] = own

    change_json(folder / EDIT_CONFIG, change)
    return False


@damage("signed: an edit twice, or not at all")
def _(rng, folder, other):
    name = rng.choice([EDITS, EDIT_CONFIG])

    def change(content: Any) -> None:
        records = content if name == EDITS else content["edits"]
        one, two = records
        double = {**one, "facts": two["facts"]} if name == EDITS else {**two, "name": "edit_1"}
        records[:] = rng.choice([[one], [two], [two, one], [one, two, two], [double, one, two], [one, double, two]])

    change_json(folder / name, change)
    resign(folder)
    return False


_VALUES = (10**400, -1, 3.5, "x", "nan", None, True, [], [[1]], ["../x"], {"a": 1})


@damage("signed: an option that means nothing")
def _(rng, folder, other):
    names = ["layer", "target_layer", "target_modules", "steps", "lr", "seed", "tukey_kappa", "proxy", "method", "x"]
    name, value = rng.choice([*names, "layer_scores", "target_layer", "target_layer"]), rng.choice(_VALUES)
    free = {"layer": "lga"} if name == "target_layer" else {}
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar["config"].update({**free, name: value}))
    return False


@damage("signed: values of the wrong kind")
def _(rng, folder, other):
    value = rng.choice(_VALUES)

    def change_sidecar(sidecar: dict[str, Any]) -> None:
        name = rng.choice(["base_model", "edits", "config", "files", "evaluation", "versions", "relative_error"])
        (sidecar["edits"][0] if name == "relative_error" else sidecar)[name] = value

    def change_lora(lora: dict[str, Any]) -> None:
        lora[rng.choice(["r", "lora_alpha", "target_modules"])] = value

    def change_facts(records: list[dict[str, Any]]) -> None:
        name = rng.choice(["prompt", "paraphrases", "locality", "steps", "facts"])
        (records[0] if name == "facts" else records[0]["facts"][0])[name] = [{"a": value}] if name != "steps" else []

    name, change = rng.choice(
        [
            (EDIT_CONFIG, change_sidecar),
            (EDIT_CONFIG, change_sidecar),
            (ADAPTER_CONFIG, change_lora),
            (EDITS, change_facts),
        ]
    )
    change_json(folder / name, change)
    if name != EDIT_CONFIG:
        resign(folder)
    return False


@damage("signed: an evaluation with a value of the wrong kind")
def _(rng, folder, other):
    def change(sidecar: dict[str, Any]) -> None:
        place = sidecar["evaluation"]
        key = rng.choice(list(place))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.9:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = rng.choice(_VALUES)

    change_json(folder / EDIT_CONFIG, change)
    return False


@damage("signed: JSON that is deep, huge, or none")
def _(rng, folder, other):
    texts = ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "9" * 5000, "NaN", "Infinity"]
    texts += ["null", "3", '"text"', "[]", "{}", "[null]", "\ufeff[]", "'a'", "\0", '["\\ud800"]']
    name = rng.choice([ADAPTER_CONFIG, EDITS, EDIT_CONFIG])
    (folder / name).write_text(rng.choice(texts), encoding="utf-8")
    if name != EDIT_CONFIG:
        resign(folder)
    return False


@damage("signed: another format version")
def _(rng, folder, other):
    version = rng.choice([True, 2, 0, -1, None, "1", [1], {}, 1.5, 10**400])
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar.update(format_version=version))
    return False


@damage("signed: a state that is none")
def _(rng, folder, other):
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(iter(tensors))
        tensor = tensors.pop(name)
        changes = [(name, tensor[0]), (name, tensor[None]), ("nobody/keys", tensor), ("keys", tensor), ("", tensor)]
        tensors.update([rng.choice(changes)])

    change_tensors(folder / EDIT_STATE, change)
    resign(folder)
    return False


@damage("signed: made on other weights")
def _(rng, folder, other):
    wrong = rng.choice(["0" * 32, "", None, 3, []])
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar["base_model"].update(fingerprint=wrong))
    return False


# ---------------------------------------------------------------------- what becomes of them


def right_folders(base: PreTrainedModel, root: Path) -> tuple[Path, Path]:
    """Write two edit folders of the same shape for a tiny Llama, random but right, and return their paths."""
    made_on = BaseModel("org/base-model", fingerprint(base), None, type(base).__name__)
    for number, name in enumerate(("right", "other")):
        facts = [
            EditedFact(EditRequest("{} lies in", f"{place} {number}", "Rome", "Paris"), 0.01, 0.9, 5)
            for place in ("Bonn", "Oslo", "Riga")
        ]
        made = [delta(rank, 10 * number + seed, MLP_WIDTH, WIDTH) for seed, rank in enumerate((2, 1, 1))]
        keys = {f"keys/{FIRST}": delta(2, 10 * number + 5, MLP_WIDTH).A.T}
        edits = [
            Edit("edit_1", facts[:2], {FIRST: made[0]}, state=keys),
            Edit("tower", facts[2:], {FIRST: made[1], SECOND: made[2]}),
        ]
        content = EditFolder(edits, EditConfig(layer=[1, 2]), made_on, {"peft": "1"}, evaluation())
        write_edit_folder(root / name, content, "the card")
    return root / "right", root / "other"


def damaged_copy(right: Path, other: Path, folder: Path, number: int, seed: str) -> tuple[str, bool]:
    """Make damaged copy `number`, all kinds in turn; return the kind, and whether the edit must load all the same."""
    kind = list(DAMAGES)[number % len(DAMAGES)]
    shutil.copytree(right, folder)
    return kind, DAMAGES[kind](random.Random(f"{seed}/{number}"), folder, other)


def verdict(folder: Path, right: Path, base: Callable[[], PreTrainedModel], tokenizer: Any) -> tuple[str, str]:
    """Load a folder beside the right one, and return what came of it, with the message where it was an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = EditModel.from_pretrained(base(), folder, tokenizer=tokenizer)
            render_card(read_edit_folder(folder))
    except ValueError as error:
        message = str(error)
        if any(name in message for name in EDIT_FILES):
            return REFUSED, message
        return (REFUSED_FOLDER if str(folder) in message else UNNAMED), message
    except Exception as error:  # whatever it is, it is what we look for
        return CRASH, f"{type(error).__name__}: {error}"
    expected = EditModel.from_pretrained(base(), right, tokenizer=tokenizer)
    if not torch.equal(_logits(loaded), _logits(expected)) or not _same_edits(loaded, expected):
        return WRONG, f"{sorted(loaded.edits)}"
    found, wanted = read_edit_folder(folder), read_edit_folder(right)
    same = settings_of(found) == settings_of(wanted) and [(edit.name, edit.relative_error) for edit in found.edits] == [
        (edit.name, edit.relative_error) for edit in wanted.edits
    ]
    return (RIGHT if same else OTHER_SETTINGS), ""


def _logits(model: EditModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def _same_edits(one: EditModel, other: EditModel) -> bool:
    """Tell whether two models have the same edits, whatever they are called."""
    if len(one.edits) != len(other.edits):
        return False
    for a, b in zip(one.edits.values(), other.edits.values(), strict=True):
        if a.facts != b.facts or set(a.state) != set(b.state) or set(a.deltas) != set(b.deltas):
            return False
        pairs = [(a.state[name], b.state[name]) for name in a.state]
        pairs += [(a.deltas[path].A, b.deltas[path].A) for path in a.deltas]
        pairs += [(a.deltas[path].B, b.deltas[path].B) for path in a.deltas]
        if not all(torch.equal(x.double(), y.double()) for x, y in pairs):
            return False
    return True


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return right_folders(tiny_model("llama"), tmp_path_factory.mktemp("right"))


@pytest.mark.parametrize("number", range(2 * len(DAMAGES)))
def test_a_damaged_folder_is_refused_by_name_or_loads_right(right, tokenizer, tmp_path, number):
    kind, harmless = damaged_copy(*right, tmp_path / "edit", number, "test")
    outcome, message = verdict(tmp_path / "edit", right[0], lambda: tiny_model("llama"), tokenizer)
    assert outcome not in BAD, f"{kind}: {message}"
    if harmless:
        assert outcome == RIGHT, f"{kind}: {message}"


def test_the_folders_that_are_damaged_are_right_and_differ(right, tokenizer):
    assert verdict(right[0], right[0], lambda: tiny_model("llama"), tokenizer) == (RIGHT, "")
    assert verdict(right[1], right[0], lambda: tiny_model("llama"), tokenizer)[0] == WRONG
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in right]
    assert set(files[0]) == set(files[1]) == set(EDIT_FILES)
    assert {name for name in EDIT_FILES if files[0][name] == files[1][name]} == {ADAPTER_CONFIG, CARD}
    assert json.loads(files[0][EDIT_CONFIG])["files"].keys() == set(SIGNED)
