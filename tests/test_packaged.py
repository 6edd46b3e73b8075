"""Packaged models: what is said where they cannot be converted."""

import pytest
from safetensors import SafetensorError

from goldenedit import packaged
from goldenedit.loading import base_of, load_model
from goldenedit.packaged import PACKAGED_MODELS, is_installed, packaged_model, packaged_name
from goldenedit.storage.fingerprint import weight_hashes
from goldenedit.storage.folder import BaseModel


def test_an_unknown_name_is_an_error_that_lists_those_there_are():
    with pytest.raises(KeyError, match="smollm2"):
        packaged_model("bert")


@pytest.mark.skipif(not is_installed("smollm2"), reason="not installed")
def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file.*GOLDENEDIT_CACHE.*2 GB"):
        packaged_model("smollm2")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_an_error_that_says_what_to_set(tmp_path, error):
    with pytest.raises(OSError, match=r"No space left on device.*GOLDENEDIT_CACHE"), packaged._writing_to(tmp_path):
        raise error


def test_a_model_that_another_process_converted_meanwhile_is_used(tmp_path):
    for name in ("finished", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    packaged._put(tmp_path / "finished", tmp_path / "target")
    assert (tmp_path / "target" / "config.json").read_text() == "target"


@pytest.mark.real
@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_a_packaged_model_is_known_by_its_weights(name):
    if not is_installed(name):
        pytest.skip("not installed")
    model, _ = load_model(name)
    assert packaged_name(weight_hashes(model).fingerprint) == name


def test_edits_of_a_packaged_model_find_it_on_another_machine(tmp_path):
    fingerprint = PACKAGED_MODELS["smollm2"].fingerprint
    assert base_of(BaseModel("/cache/of/someone/models/smollm2", fingerprint)) == ("smollm2", None)
    assert base_of(BaseModel(str(tmp_path), fingerprint)) == (str(tmp_path), None)
    assert base_of(BaseModel("org/model", fingerprint, "a1")) == ("org/model", "a1")
    assert base_of(BaseModel("/nowhere", "0" * 32)) == ("/nowhere", None)
    assert base_of(BaseModel("/nowhere", fingerprint), "mine") == ("mine", None)
