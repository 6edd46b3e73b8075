"""Edit folders: written and read back whole."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contents import (
    FIRST,
    SECOND,
    assert_same,
    delta,
    edit_folder,
    edits_with_state,
)
from crashes import crash_at_every_step
from safetensors import safe_open
from safetensors.torch import load_file

from goldenedit.config import EditConfig
from goldenedit.requests import EditRequest
from goldenedit.storage import reading
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    EDIT_CONFIG,
    EDIT_FILES,
    EDIT_STATE,
    EDITS,
    Edit,
    EditedFact,
    EditFolder,
    EditFolderError,
    folder_size,
    fuse,
    write_edit_folder,
)
from goldenedit.storage.reading import listed_files, read_edit_folder

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDITS)
SIGNED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS, EDIT_STATE)  # those that edit_config.json has digests of


def test_a_folder_reads_back_what_was_written(folder):
    assert_same(read_edit_folder(folder), edit_folder())
    assert (folder / CARD).read_text() == "the card"
    assert {path.name for path in folder.iterdir()} == {*FILES, CARD}
    assert folder_size(folder) == sum(path.stat().st_size for path in folder.iterdir())


def test_the_adapter_config_has_the_documented_keys_and_not_one_more(folder):
    assert json.loads((folder / ADAPTER_CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base-model",
        "revision": "a1b2c3",
        "r": 3,
        "lora_alpha": 3,
        "target_modules": [FIRST, SECOND],
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def test_the_tensors_are_named_as_peft_names_them_with_one_rank_for_all(folder):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    assert shapes == {
        f"base_model.model.{path}.lora_{factor}.weight": shape
        for path in (FIRST, SECOND)
        for factor, shape in (("A", (3, 6)), ("B", (4, 3)))
    }
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_adapter_is_the_sum_of_the_edits(folder):
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for path in (FIRST, SECOND):
        A, B = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        total = sum(edit.deltas[path].dense() for edit in edit_folder().edits if path in edit.deltas)
        torch.testing.assert_close(B @ A, total)


def test_edits_of_one_module_add_up_in_ranks_of_their_own():
    rank, modules = fuse(edit_folder().edits)
    assert rank == 3
    assert torch.equal(modules[FIRST].part(0, 2).A, delta(2, 0).A)
    assert torch.equal(modules[FIRST].part(2, 3).B, delta(1, 1).B)
    assert modules[SECOND].part(0, 2).dense().abs().max() == 0


def test_saving_what_was_read_gives_the_same_bytes(folder, tmp_path):
    write_edit_folder(tmp_path / "again", read_edit_folder(folder), "the card")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_proxy_list_is_left_to_its_hash(tmp_path):
    content = edit_folder()
    config = EditConfig(proxy=[EditRequest("{} is in", "Bonn", "Rome")], tukey_kappa=float("inf"))
    write_edit_folder(tmp_path, EditFolder(content.edits, config, content.base_model, "abc"), "")
    found = read_edit_folder(tmp_path)
    assert (found.config.proxy, found.config.tukey_kappa, found.proxy_hash) == (None, float("inf"), "abc")


def test_conv1d_is_remembered(tmp_path):
    content = edit_folder()
    edits = [Edit(edit.name, edit.facts, edit.deltas, fan_in_fan_out=True) for edit in content.edits]
    write_edit_folder(tmp_path, EditFolder(edits, content.config, content.base_model), "")
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["fan_in_fan_out"] is True
    assert all(edit.fan_in_fan_out for edit in read_edit_folder(tmp_path).edits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_say_is_not_written(folder, value):
    content = edit_folder()
    facts = [EditedFact(content.edits[0].facts[0].request, value, 0.5, 1)]
    broken = EditFolder([Edit("a", facts, content.edits[0].deltas)], content.config, content.base_model)
    with pytest.raises(ValueError, match="JSON"):
        write_edit_folder(folder, broken, "another card")
    assert_same(read_edit_folder(folder), edit_folder())
    assert (folder / CARD).read_text() == "the card"


def test_the_weakest_token_comes_back_and_is_unknown_in_older_files(folder, tmp_path):
    assert "weakest_after" not in (folder / EDITS).read_text()
    assert [fact.weakest_after for edit in read_edit_folder(folder).edits for fact in edit.facts] == [None] * 3
    content = edit_folder()
    edits = [replace(edit, facts=[replace(fact, weakest_after=0.25) for fact in edit.facts]) for edit in content.edits]
    write_edit_folder(tmp_path / "new", replace(content, edits=edits), "")
    assert_same(read_edit_folder(tmp_path / "new"), replace(content, edits=edits))


def test_what_an_editor_remembers_comes_back(folder_with_state):
    assert_same(read_edit_folder(folder_with_state), edits_with_state())
    assert {path.name for path in folder_with_state.iterdir()} == set(EDIT_FILES)


EVALUATION = {
    "own_facts": True,
    "facts": 2,
    "edited": {"probability": {"n": 2, "efficacy": 1.0, "intervals": {"efficacy": [0.5, 1.0]}}},
    "base": {"probability": {"n": 2, "efficacy": 0.0, "intervals": {"efficacy": [0.0, 0.5]}}},
}


def test_what_was_measured_comes_back(tmp_path):
    content = replace(edit_folder(), evaluation=EVALUATION)
    write_edit_folder(tmp_path, content, "")
    assert_same(read_edit_folder(tmp_path), content)


def test_the_edit_config_has_the_digest_of_every_other_file_but_the_card(folder, folder_with_state):
    for where, names in ((folder, set(SIGNED) - {EDIT_STATE}), (folder_with_state, set(SIGNED))):
        found = json.loads((where / EDIT_CONFIG).read_text())["files"]
        assert found == {name: hashlib.sha256((where / name).read_bytes()).hexdigest() for name in names}
        assert listed_files(where) == sorted(names)


def test_saving_over_an_edit_with_state_leaves_none_of_its_files_and_all_of_the_users(folder_with_state, tmp_path):
    (folder_with_state / "notes.txt").write_text("mine")
    (folder_with_state / "runs").mkdir()
    (folder_with_state / "runs" / EDIT_STATE).write_text("mine too")
    write_edit_folder(folder_with_state, edit_folder(), "another card")
    assert_same(read_edit_folder(folder_with_state), edit_folder())
    assert {path.name for path in folder_with_state.iterdir()} == {*FILES, CARD, "notes.txt", "runs"}
    assert (folder_with_state / "notes.txt").read_text() == "mine"
    assert (folder_with_state / "runs" / EDIT_STATE).read_text() == "mine too"


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_after_a_crash_at_any_step_a_folder_has_the_old_edits_or_the_new_ones(tmp_path, monkeypatch):
    before, after = edits_with_state(), edit_folder()
    found, refused = [], set()
    for folder in crash_at_every_step(
        tmp_path,
        lambda new: write_edit_folder(new, before, "the card"),
        lambda new: write_edit_folder(new, after, "another card"),
    ):
        with monkeypatch.context() as patched:  # a reader on a disk that it may not write to
            patched.setattr(Path, "replace", not_permitted)
            patched.setattr(Path, "unlink", not_permitted)
            try:
                held = read_edit_folder(folder)
            except EditFolderError as error:
                refused.add(re.sub(r"\(.*\)", "", str(error).replace(str(folder), "FOLDER")))
            else:
                assert_same(held, after if len(held.edits[0].state) == 0 else before)
        held = read_edit_folder(folder)
        found.append("old" if held.edits[0].state else "new")
        assert_same(held, before if held.edits[0].state else after)
        assert (folder / CARD).read_text() == ("the card" if held.edits[0].state else "another card")
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}
    (message,) = refused
    assert "A save to FOLDER was interrupted" in message
    assert "or save the edit again" in message


def not_permitted(path, *arguments, **options):
    raise PermissionError(13, "Permission denied", str(path))


def test_a_reader_whose_folder_is_saved_to_meanwhile_reads_what_is_saved(folder, monkeypatch):
    plain, saved = reading._read, []

    def read(path):
        if path.name == EDITS and not saved:
            saved.append(path)
            write_edit_folder(folder, edits_with_state(), "")
        return plain(path)

    monkeypatch.setattr(reading, "_read", read)
    assert_same(read_edit_folder(folder), edits_with_state())
    assert saved


def test_what_was_read_stays_when_the_files_change(tmp_path):
    content = replace(edits_with_state(), edits=edits_with_state().edits[:1])
    write_edit_folder(tmp_path, content, "")
    found = read_edit_folder(tmp_path)
    for name in (ADAPTER_WEIGHTS, EDIT_STATE):
        with (tmp_path / name).open("r+b") as file:  # in place, as a copying program does
            file.write(bytes((tmp_path / name).stat().st_size))
    assert_same(found, content)
