"""Everything that the library writes, with what a fault in the middle of it may leave: the old state or the new one.

`test_faults.py` tries a sample of the faults, and `benchmarks/faults.py` all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from contents import assert_same, edit_folder, edits_with_state
from safetensors.torch import load_file
from syscalls import Fault, Outcome, run_with_fault
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenedit import EditModel, EditRequest, get_edit_model
from goldenedit.cache import keep
from goldenedit.storage.atomic import READY
from goldenedit.storage.card import render_card
from goldenedit.storage.folder import ADAPTER_CONFIG, EDIT_FILES, EDIT_STATE, EDITS, EditFolder, write_edit_folder
from goldenedit.storage.gguf import export_gguf, write_modelfile
from goldenedit.storage.hub import make_repo, push_folder
from goldenedit.storage.mlx import ADAPTERS, export_mlx
from goldenedit.storage.reading import read_edit_folder
from hub import Hub
from models import tiny_model, tiny_tokenizer
from tiny_edits import fast_config, logits

OLD, NEW, NOTHING, UNFINISHED = "old", "new", "nothing", "unfinished"
REPO = "tester/edit"
_FACTS = [EditRequest("{} lies in", f"Place {number}", "Rome") for number in range(2)]


@dataclass(frozen=True)
class Writing:
    """Something that is written.

    Attributes:
        prepare: Makes the old state at a path that does not exist yet, in a folder that does.
        act: Writes the new state over it.
        state: Returns what is there: one of `states`, or else what is wrong with it.
        states: What a fault may leave.
        may_go_on: Whether the fault may be no error, because the result does not depend on what is written.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    state: Callable[[Path], str]
    states: tuple[str, ...] = (OLD, NEW)
    may_go_on: bool = False


def trials(writing: Writing, fault: Fault, scratch: Path, every: int = 1) -> Iterator[tuple[Outcome, str]]:
    """Write with a fault at each call, or at each so many; yield how it ended, and what is wrong then, or the state."""
    at = 0
    while True:
        place = scratch / f"{fault.name}_{at}"
        place.mkdir()
        path = place / "written"
        writing.prepare(path)
        outcome = run_with_fault(lambda path=path: writing.act(path), fault, at)  # type: ignore[misc]
        yield outcome, _judged(writing, fault, outcome, path)
        shutil.rmtree(place)
        if outcome.call is None:
            return
        at += every


def _judged(writing: Writing, fault: Fault, outcome: Outcome, path: Path) -> str:
    """Return the state after a fault, or what is wrong, which is not a state's name."""
    try:
        state = writing.state(path)
    except Exception as error:
        return f"unreadable: {type(error).__name__}: {error}"
    if state not in writing.states:
        return state
    if outcome.call is None:
        return state if state == writing.states[-1] and outcome.error is None else f"{state} without a fault: {outcome}"
    if fault is Fault.KILL:
        return state
    if outcome.error is None and state != writing.states[-1] and not writing.may_go_on:
        return f"{state} without an error"
    if outcome.error is not None and not any(sign in outcome.error for sign in ("/", "\\")):
        return f"an error that names no file: {outcome.error}"
    removes = outcome.call is not None and outcome.call.startswith(("unlink", "rmdir"))
    if not removes and (rest := [file.name for file in path.parent.iterdir() if file != path]):
        return f"left behind: {rest}"
    return state


def writings(hub: Hub, scratch: Path) -> dict[str, Writing]:
    """Return everything that is written, by name.

    Args:
        hub: The Hub that the environment names.
        scratch: A folder for what is prepared once.
    """
    model = get_edit_model(tiny_model("llama"), fast_config(), tiny_tokenizer())
    one, two = (EditFolder([model.edit(fact)], model.edit_config, model.base_info) for fact in _FACTS)
    model.delete_adapter("edit_2")
    config = model.get_base_model().config
    return {
        **_edit_folders(edits_with_state(), edit_folder()),
        "batch of a sequence": _batch(scratch / "batches"),
        "cached result": Writing(
            lambda path: keep(path, b"old" * 1000),
            lambda path: keep(path, b"new" * 1000),
            lambda path: _same(path, {OLD: b"old" * 1000, NEW: b"new" * 1000}),
            may_go_on=True,
        ),
        "GGUF adapter": _exported(lambda path, content: export_gguf(content, config, path), one, two),
        "adapter for mlx-lm": Writing(
            lambda folder: export_mlx(one, config, folder),
            lambda folder: export_mlx(two, config, folder),
            lambda folder: _mlx(folder, one, two),
            (OLD, UNFINISHED, NEW),
        ),
        "Modelfile": Writing(
            lambda folder: folder.mkdir(),
            lambda folder: write_modelfile(folder / "edit.gguf", "smollm2:135m"),
            lambda folder: _same(folder / "Modelfile", {NEW: b"FROM smollm2:135m\nADAPTER ./edit.gguf\n"}),
            (NOTHING, NEW),
        ),
        **_checkpoints(model),
        "push": _push(hub, edits_with_state(), edit_folder()),
    }


def _save(content: EditFolder) -> Callable[[Path], None]:
    return lambda folder: write_edit_folder(folder, content, render_card(content, "edit"))


def _edit_folders(old: EditFolder, new: EditFolder) -> dict[str, Writing]:
    """Return the savings of an edit folder, and what a load does that finishes one."""

    def stopped(folder: Path) -> None:
        _save(old)(folder)
        _save(new)(folder / READY)
        (folder / READY / "stale").write_text(EDIT_STATE)

    def state(folder: Path) -> str:
        return _which(folder, old, new)

    return {
        "save over an edit": Writing(_save(old), _save(new), state),
        "save a new edit": Writing(lambda folder: None, _save(new), state, (NOTHING, NEW)),
        "finish a stopped save": Writing(stopped, read_edit_folder, state, (NEW,), may_go_on=True),
    }


def _batch(saved: Path) -> Writing:
    """Return the second batch of a sequence, which is saved over the first one."""
    model = get_edit_model(tiny_model("llama"), fast_config(), tiny_tokenizer())
    model.edit_in_batches(_FACTS[:1], save_directory=saved)

    def state(folder: Path) -> str:
        (edit,) = read_edit_folder(folder).edits
        return {1: OLD, 2: NEW}.get(len(edit.facts), f"{len(edit.facts)} facts")

    return Writing(
        lambda folder: shutil.copytree(saved, folder),
        lambda folder: model.edit_in_batches(_FACTS, 1, save_directory=folder),
        state,
    )


def _checkpoints(model: EditModel) -> dict[str, Writing]:
    """Return the savings of edited checkpoints; the model in memory must stay as it is."""

    def act(folder: Path) -> None:
        before = logits(model)
        try:
            model.save_merged(folder)
        finally:
            if not torch.equal(logits(model), before):
                raise AssertionError("The model in memory has changed.")

    return {
        "edited checkpoint": Writing(lambda folder: None, act, _checkpoint, (NOTHING, NEW)),
        "edited checkpoint in an empty folder": Writing(Path.mkdir, act, _checkpoint, (NOTHING, UNFINISHED, NEW)),
    }


def _push(hub: Hub, old: EditFolder, new: EditFolder) -> Writing:
    """Return the upload of an edit over another one; what is there is what the Hub has."""

    def push(folder: Path, content: EditFolder) -> None:
        _save(content)(folder)
        push_folder(folder, REPO, files=EDIT_FILES)

    def prepare(folder: Path) -> None:
        hub.reset()
        make_repo(REPO)
        push(folder, old)
        shutil.rmtree(folder)

    def state(folder: Path) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in hub.repositories[REPO].files().items():
            (folder / name).write_bytes(data)
        return _which(folder, old, new)

    return Writing(prepare, lambda folder: push(folder, new), state)


def _which(folder: Path, old: EditFolder, new: EditFolder) -> str:
    """Return which of two edits a folder holds."""
    if not folder.exists() or not [path for path in folder.iterdir() if path.suffix != ".saving"]:
        return NOTHING
    found = read_edit_folder(folder)
    for state, content in ((OLD, old), (NEW, new)):
        with suppress(AssertionError):
            assert_same(found, content)
            return state
    return "another edit"


def _same(path: Path, contents: dict[str, bytes]) -> str:
    """Return which of some contents a file has."""
    if not path.exists():
        return NOTHING
    data = path.read_bytes()
    return next((state for state, content in contents.items() if data == content), f"{len(data)} bytes of another file")


def _exported(export: Callable[[Path, EditFolder], None], old: EditFolder, new: EditFolder) -> Writing:
    """Return the writing of one file over another, which say different things."""

    def state(path: Path) -> str:
        expected = {}
        for name, content in ((OLD, old), (NEW, new)):
            with TemporaryDirectory() as scratch:
                export(Path(scratch, path.name), content)
                expected[name] = Path(scratch, path.name).read_bytes()
        return _same(path, expected)

    return Writing(lambda path: export(path, old), lambda path: export(path, new), state)


def _mlx(folder: Path, old: EditFolder, new: EditFolder) -> str:
    """Return which adapter a folder holds; mlx-lm refuses a folder that lacks a file."""
    if not all((folder / name).exists() for name in (ADAPTERS, ADAPTER_CONFIG)):
        return UNFINISHED
    factors = load_file(folder / ADAPTERS)
    for state, content in ((OLD, old), (NEW, new)):
        deltas = content.edits[0].deltas
        if all(torch.equal(factors[f"{path}.lora_a"], delta.A.T) for path, delta in deltas.items()):
            return state
    return "another adapter"


def _checkpoint(folder: Path) -> str:
    """Return whether a folder holds a checkpoint that loads; transformers refuses one without a config."""
    if not folder.exists() or not any(path for path in folder.iterdir() if not path.name.startswith(".")):
        return NOTHING
    if not (folder / "config.json").exists():
        return UNFINISHED
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    AutoTokenizer.from_pretrained(folder)
    json.loads((folder / EDITS).read_text(encoding="utf-8"))
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    return NEW if not wrong and torch.isfinite(logits(loaded)).all() else f"a checkpoint without {wrong}"
