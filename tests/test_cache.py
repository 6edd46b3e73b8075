"""The cache: where it is, and files that are there whole or not at all."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from goldenedit.cache import cache_dir, cache_key, write_atomically


def test_the_environment_says_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE", "~/edits")
    assert cache_dir() == Path.home() / "edits"


@pytest.mark.parametrize("value", [None, ""])
def test_by_default_the_cache_is_beside_that_of_the_hub(monkeypatch, value):
    monkeypatch.delenv("GOLDENEDIT_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("GOLDENEDIT_CACHE", value)
    assert cache_dir() == Path(constants.HF_HOME) / "goldenedit"


def test_a_key_depends_on_values_and_not_on_order():
    assert cache_key(a=1, b=[2]) == cache_key(b=[2], a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(b=1), cache_key(a="1")}) == 4


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file.bin"
    write_atomically(path, b"one")
    with pytest.raises(TypeError):
        write_atomically(path, "a text, not bytes")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_an_error_that_leaves_it(tmp_path):
    (tmp_path / "file.bin" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"file\.bin"):
        write_atomically(tmp_path / "file.bin", b"one")
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
