"""Edit folders: written and read back whole, and refused with the file's name when damaged."""

import json
import struct
from pathlib import Path

import pytest
import torch
from contents import FIRST, SECOND, assert_same, delta, edit_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from goldenedit.config import EditConfig
from goldenedit.requests import EditRequest
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    EDIT_CONFIG,
    EDITS,
    Edit,
    EditedFact,
    EditFolder,
    EditFolderError,
    folder_size,
    fuse,
    read_edit_folder,
    write_edit_folder,
)

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDITS)


@pytest.fixture
def folder(tmp_path):
    write_edit_folder(tmp_path / "edit", edit_folder(), "the card")
    return tmp_path / "edit"


def rewrite(path, change):
    """Change what a JSON file holds in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def rewrite_tensors(folder, change):
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


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
    write_edit_folder(tmp_path, EditFolder(content.edits, config, content.base_model, {}, "abc"), "")
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


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(EditFolderError, match=name):
        read_edit_folder(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(EditFolderError, match=name):
        read_edit_folder(folder)


def test_a_missing_card_does_not_matter(folder):
    (folder / CARD).unlink()
    assert_same(read_edit_folder(folder), edit_folder())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_truncated_file_is_named(folder, name, share):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(EditFolderError, match=name):
        read_edit_folder(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"not JSON", b"\xff\xfe", b"NaN", b"null", b"3", b"[]", b'"text"', b"{}", b"[{}]"])
def test_a_file_of_something_else_is_an_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(EditFolderError):
        read_edit_folder(folder)


def test_no_folder_and_a_file_are_no_edit_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        with pytest.raises(EditFolderError, match=name):
            read_edit_folder(tmp_path / name)


def test_a_plain_adapter_is_sent_to_peft(folder):
    (folder / EDIT_CONFIG).unlink()
    with pytest.raises(EditFolderError, match="PeftModel"):
        read_edit_folder(folder)


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_version_is_named(folder, version):
    rewrite(folder / EDIT_CONFIG, lambda content: content.update(format_version=version))
    with pytest.raises(EditFolderError, match=rf"{EDIT_CONFIG}.*version {version!r}"):
        read_edit_folder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", "AB")
def test_a_factor_that_is_not_finite_is_named(folder, value, factor):
    name = f"base_model.model.{SECOND}.lora_{factor}.weight"
    rewrite_tensors(folder, lambda tensors: tensors[name].__setitem__((0, 0), value))
    with pytest.raises(EditFolderError, match=rf"{ADAPTER_WEIGHTS}.*{SECOND}"):
        read_edit_folder(folder)


def other_rank(tensors):
    for factor, shape in (("A", (2, 6)), ("B", (4, 2))):
        tensors[f"base_model.model.{FIRST}.lora_{factor}.weight"] = torch.zeros(shape)


@pytest.mark.parametrize(
    "change",
    [
        other_rank,
        lambda tensors: tensors.update({f"base_model.model.{FIRST}.lora_A.weight": torch.zeros(2, 6)}),
        lambda tensors: tensors.update({f"base_model.model.{FIRST}.lora_A.weight": torch.zeros(3)}),
        lambda tensors: tensors.update({"stray": torch.zeros(1)}),
        lambda tensors: tensors.pop(f"base_model.model.{FIRST}.lora_B.weight"),
        lambda tensors: tensors.clear(),
    ],
    ids=["other rank", "factors that do not multiply", "a vector", "extra tensor", "missing tensor", "no tensors"],
)
def test_factors_that_are_not_those_of_the_config_are_named(folder, change):
    rewrite_tensors(folder, change)
    with pytest.raises(EditFolderError, match=ADAPTER_WEIGHTS):
        read_edit_folder(folder)


@pytest.mark.parametrize(
    "change",
    [{"r": 2}, {"lora_alpha": 6}, {"r": None}, {"target_modules": [FIRST]}, {"target_modules": [FIRST, SECOND, "x"]}]
    + [{"target_modules": [[]]}, {"target_modules": "text"}]
    + [{"target_modules": value} for value in (None, 3)],
    ids=str,
)
def test_an_adapter_config_of_other_factors_is_an_error(folder, change):
    rewrite(folder / ADAPTER_CONFIG, lambda content: content.update(change))
    with pytest.raises(EditFolderError):
        read_edit_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop(),
        lambda facts: facts[0].update(name="other"),
        lambda facts: facts[0].pop("facts"),
        lambda facts: facts[0]["facts"][0].pop("steps"),
        lambda facts: facts[0]["facts"][1].update(subject="The Louvre"),
        lambda facts: facts[0]["facts"][0].update(probability_after="high"),
        lambda facts: facts.append({"name": "stray", "facts": []}),
    ],
    ids=["too few", "other name", "no facts", "no outcome", "subject not in the prompt", "probability", "too many"],
)
def test_edits_that_do_not_match_are_an_error(folder, change):
    rewrite(folder / EDITS, change)
    with pytest.raises(EditFolderError, match=str(folder)):
        read_edit_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda sidecar: sidecar["edits"][0].update(ranks=[0, 9]),
        lambda sidecar: sidecar["edits"][0].update(ranks=[2, 0]),
        lambda sidecar: sidecar["edits"][0].update(ranks=[0, 1.5]),
        lambda sidecar: sidecar["edits"][0].update(modules=["x"]),
        lambda sidecar: sidecar["edits"][0].update(modules=[]),
        lambda sidecar: sidecar["config"].update(layr=3),
        lambda sidecar: sidecar["config"].update(layer=1.5),
        lambda sidecar: sidecar["base_model"].update(size=3),
        lambda sidecar: sidecar["base_model"].pop("fingerprint"),
        lambda sidecar: sidecar.pop("proxy_hash"),
        lambda sidecar: sidecar.update(edits=[]),
        lambda sidecar: sidecar["edits"].pop(),
        lambda sidecar: sidecar["edits"][1].update(ranks=[0, 3]),
    ],
    ids=[
        "ranks beyond the factors",
        "no ranks",
        "half a rank",
        "unknown module",
        "no module",
        "unknown option",
        "bad option",
        "unknown field of the base model",
        "no fingerprint",
        "no proxy hash",
        "no edits",
        "an edit less than the factors hold",
        "shared ranks",
    ],
)
def test_an_edit_config_that_does_not_match_is_an_error(folder, change):
    rewrite(folder / EDIT_CONFIG, change)
    with pytest.raises(EditFolderError, match=str(folder)):
        read_edit_folder(folder)


ORIGINAL = edit_folder()
relaxed = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(name=st.sampled_from(FILES), share=st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path_factory, name, share):
    folder = written(tmp_path_factory)
    data = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(data[: int(share * len(data))])
        try:
            found = read_edit_folder(folder)
        except EditFolderError:
            return
        assert_same(found, ORIGINAL)
    finally:
        (folder / name).write_bytes(data)


@relaxed
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_file_with_another_byte_is_refused_or_reads(tmp_path_factory, name, share, byte):
    folder = written(tmp_path_factory)
    data = (folder / name).read_bytes()
    place = int(share * len(data))
    try:
        (folder / name).write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
        try:
            found = read_edit_folder(folder)
        except EditFolderError:
            return
        # A byte inside a number or a text cannot be told from the number or text that was meant.
        assert [len(edit.facts) for edit in found.edits] == [2, 1]
        if byte == data[place]:
            assert_same(found, ORIGINAL)
        if name == ADAPTER_WEIGHTS and place < 8 + struct.unpack("<Q", data[:8])[0] and byte != data[place]:
            for one, other in zip(found.edits, ORIGINAL.edits, strict=True):
                assert {path: factors.A.shape for path, factors in one.deltas.items()} == {
                    path: factors.padded(other.rank).A.shape for path, factors in other.deltas.items()
                }
    finally:
        (folder / name).write_bytes(data)


_written: list[Path] = []


def written(tmp_path_factory) -> Path:
    """Return one folder for all examples."""
    if not _written:
        _written.append(tmp_path_factory.mktemp("folder"))
        write_edit_folder(_written[0], ORIGINAL, "the card")
    return _written[0]
