"""The cache: where it is, and files that are there whole or not at all."""

import io
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

from command import run
from goldenedit.cache import (
    cache_dir,
    cache_entries,
    cache_key,
    cache_limit,
    clean_cache,
    is_kept,
    keep,
)
from goldenedit.files import write_atomically


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


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path):
    path, contents = tmp_path / "file.bin", [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(contents)) as threads:
        for _ in range(20):
            list(threads.map(partial(write_atomically, path), contents))
            assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


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


# ---------------------------------------------------------------------- its limit


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache with results of 1,000 bytes that were last used one, two, three and nine days ago."""
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    days = {"scores/one": 1, "scores/two": 2, "moments/three": 3, "models/nine/weights": 9}
    for name, ago in days.items():
        write_atomically(tmp_path / name, bytes(1000))
        used = time.time() - ago * 86_400
        os.utime(tmp_path / name, (used, used))
    return tmp_path


def names(entries) -> list[str]:
    return [entry.path.name for entry in entries]


def test_entries_are_told_with_kind_and_size_the_oldest_first(cache):
    entries = cache_entries()
    assert names(entries) == ["nine", "three", "two", "one"]
    assert [entry.kind for entry in entries] == ["models", "moments", "scores", "scores"]
    assert {entry.size for entry in entries} == {1000}


def test_above_the_limit_what_was_not_used_for_longest_is_deleted_but_no_model(cache, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE_LIMIT", "4kB")
    keep(cache / "scores" / "new", bytes(1000))
    assert names(cache_entries()) == ["nine", "two", "one", "new"]


def test_what_is_read_counts_as_used(cache, monkeypatch):
    assert is_kept(cache / "moments" / "three")
    monkeypatch.setenv("GOLDENEDIT_CACHE_LIMIT", "4kB")
    keep(cache / "scores" / "new", bytes(1000))
    assert names(cache_entries()) == ["nine", "one", "three", "new"]


def test_the_newest_result_stays_even_if_it_is_larger_than_the_limit(cache, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE_LIMIT", "500")
    keep(cache / "scores" / "new", bytes(5000))
    assert names(cache_entries()) == ["nine", "new"]


def test_without_a_limit_everything_stays(cache, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE_LIMIT", "none")
    keep(cache / "scores" / "new", bytes(1000))
    assert len(cache_entries()) == 5


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("2kB", 2000), ("1.5 MB", 1_500_000), ("20G", 20 * 10**9), ("", 50 * 10**9)]
)
def test_the_limit_is_a_size(text, size, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE_LIMIT", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["much", "-5GB", "5 apples", "5PB"])
def test_a_limit_that_is_no_size_is_told_before_anything_is_deleted(text, cache, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE_LIMIT", text)
    with pytest.raises(ValueError, match="GOLDENEDIT_CACHE_LIMIT"):
        keep(cache / "scores" / "new", bytes(1000))
    assert len(cache_entries()) >= 4


def test_kinds_and_old_results_are_deleted_on_request(cache):
    assert names(clean_cache(unused_days=8)) == ["nine"]
    assert names(clean_cache(["scores"], unused_days=1.5)) == ["two"]
    assert names(cache_entries()) == ["three", "one"]
    with pytest.raises(ValueError, match="nothing of the kind 'models'"):
        clean_cache(["models"])
    assert names(clean_cache()) == ["three", "one"]
    assert not cache_entries()
    assert cache.is_dir()


def test_the_command_line_lists_and_deletes(cache, capsys):
    code, out, _ = run(capsys, "cache", "ls")
    assert code == 0
    for text in ("models", "scores", "2.0 kB", "9 days ago", "yesterday", "4.0 kB", "50.0 GB"):
        assert text in out
    code, out, _ = run(capsys, "cache", "clean", "scores")
    assert (code, out.split()[:3]) == (0, ["Deleted", "2", "results,"])
    code, _, err = run(capsys, "cache", "clean", "scores")
    assert code == 1
    assert "It has: models, moments" in err.replace("\n", " ")
    assert run(capsys, "cache", "clean", "--yes")[0] == 0
    assert not cache_entries()


def test_everything_is_deleted_only_after_a_yes(cache, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run(capsys, "cache", "clean")[0] == 1
    assert len(cache_entries()) == 4


# ---------------------------------------------------------------------- a cache that cannot be used


@pytest.fixture
def shown():
    """The warnings that a user would see."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield caught


def test_what_cannot_be_kept_is_told_once_a_folder(tmp_path, shown):
    (tmp_path / "one").touch()
    (tmp_path / "two").touch()
    for name in ("one/a", "one/b", "two/a", "one/c", "two/b"):
        keep(tmp_path / name, b"result")
    assert [str(tmp_path / name) in str(warning.message) for warning, name in zip(shown, ("one", "two"), strict=True)]
    assert "GOLDENEDIT_CACHE" in str(shown[0].message)
    assert "written" in str(shown[0].message)


def test_what_is_kept_is_there_and_nothing_is_told(tmp_path, shown):
    keep(tmp_path / "new" / "a", b"result")
    assert (tmp_path / "new" / "a").read_bytes() == b"result"
    assert is_kept(tmp_path / "new" / "a")
    assert not is_kept(tmp_path / "new" / "b")
    assert not is_kept(tmp_path / "new" / "a" / "b")
    assert not shown


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path, shown):
    (tmp_path / "a" / "inside").mkdir(parents=True)
    keep(tmp_path / "a", b"result")
    assert len(shown) == 1
    assert not is_kept(tmp_path / "a")


def test_a_cache_that_cannot_be_looked_into_is_told_once(tmp_path, shown, monkeypatch):
    def refused(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    assert not is_kept(tmp_path / "a")
    assert not is_kept(tmp_path / "b")
    (warning,) = shown
    assert "cannot be read (Permission denied)" in str(warning.message)


FULL_DISK = """
import resource, sys
from pathlib import Path
from goldenedit.cache import keep
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes behind 1000 bytes fail, as on a full disk
for name in "ab":
    keep(Path(sys.argv[1], name), bytes(5000))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_on_a_full_disk_the_work_goes_on_and_nothing_is_left(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert output.returncode == 0, output.stderr
    assert output.stderr.count("cannot be written") == 1
    assert list(tmp_path.iterdir()) == []
