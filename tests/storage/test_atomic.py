"""Saving a folder: the old one or the new one, whatever happens."""

import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

from goldenedit.storage.atomic import replacing_folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(folder, but=(), **files):
    with replacing_folder(folder, but) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def fail_after_writing(path, error):
    path.write_text("new")
    raise error


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "edit"
    save(folder, one="old", two="old")
    return folder


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    save(tmp_path / "a" / "b", one="1")
    assert contents(tmp_path) == {"a/b/one": b"1"}


def test_files_are_replaced_and_others_are_kept(old):
    (old / "notes.txt").write_text("mine")
    (old / "sub").mkdir()
    (old / "sub" / "deep").write_text("mine too")
    (old / "link").symlink_to("notes.txt")
    save(old, one="new", three="new")
    assert contents(old) == {
        "one": b"new",
        "two": b"old",
        "three": b"new",
        "notes.txt": b"mine",
        "sub/deep": b"mine too",
        "link": b"mine",
    }
    assert (old / "link").is_symlink()
    assert [path.name for path in old.parent.iterdir()] == ["edit"]


def test_what_but_names_goes_and_nothing_that_is_called_alike(old):
    (old / "three").mkdir()
    (old / "three" / "deep").write_text("old")
    (old / "four").symlink_to("one")
    (old / "five").symlink_to("nothing")
    (old / "sub").mkdir()
    (old / "sub" / "two").write_text("mine")
    (old / "two.txt").write_text("mine")
    save(old, but=("one", "two", "three", "four", "five", "six"), one="new")
    assert contents(old) == {"one": b"new", "sub/two": b"mine", "two.txt": b"mine"}
    assert {path.name for path in old.iterdir()} == {"one", "sub", "two.txt"}


def test_a_dangling_link_is_carried_over(old):
    (old / "link").symlink_to("nothing")
    save(old, one="new")
    assert os.readlink(old / "link") == "nothing"


def test_an_error_inside_leaves_what_but_names_too(old):
    before = contents(old)
    with pytest.raises(RuntimeError), replacing_folder(old, but=("one", "two")):
        raise RuntimeError
    assert contents(old) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_inside_leaves_the_old_folder_and_nothing_beside_it(old, error):
    before = contents(old)
    with pytest.raises(error), replacing_folder(old) as new:
        fail_after_writing(new / "one", error)
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["edit"]


def test_an_error_inside_leaves_no_folder_where_there_was_none(tmp_path):
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "edit"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_an_error_that_names_it_and_leaves_it(tmp_path):
    (tmp_path / "edit").write_text("mine")
    with pytest.raises(NotADirectoryError, match="edit"):
        save(tmp_path / "edit", one="1")
    assert contents(tmp_path) == {"edit": b"mine"}


def test_a_relative_path_with_a_trailing_slash_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("edit/", one="1")
    save("edit/", one="2")
    assert contents(tmp_path) == {"edit/one": b"2"}


def test_who_may_read_a_new_folder_is_up_to_the_umask(tmp_path):
    (tmp_path / "plain").mkdir()
    save(tmp_path / "edit", one="1")
    assert (tmp_path / "edit").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_who_may_read_an_old_folder_is_kept(old):
    old.chmod(0o700)
    save(old, one="new")
    assert stat.S_IMODE(old.stat().st_mode) == 0o700


FULL_DISK = """
import resource, sys
from pathlib import Path
from goldenedit.storage.atomic import replacing_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes behind 1000 bytes fail, as on a full disk
try:
    with replacing_folder(Path(sys.argv[1])) as new:
        (new / "one").write_bytes(b"new")
        (new / "two").write_bytes(b"x" * 5000)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk_leaves_the_old_folder(old):
    before = contents(old)
    output = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(old)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "two" in output.stdout or "edit" in output.stdout
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["edit"]


WRITER = """
import sys
from pathlib import Path
from goldenedit.storage.atomic import replacing_folder
folder = Path(sys.argv[1])
print("ready", flush=True)
for count in range(10**9):
    with replacing_folder(folder) as new:
        (new / "one").write_text(f"{count}." * 2000)
        (new / "two").write_text(f"{count}." * 2000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one step on Linux only")
@pytest.mark.parametrize("seed", range(10))
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_version(old, seed):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(old)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(random.Random(seed).uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
    assert (old / "one").read_bytes() == (old / "two").read_bytes()
    assert set(contents(old)) == {"one", "two"}
    save(old, one="next", two="next")  # what a killed writer leaves beside the folder is in nobody's way
    assert contents(old) == {"one": b"next", "two": b"next"}


INSIDE = """
import os
from pathlib import Path
from goldenedit.storage.atomic import replacing_folder
with replacing_folder(Path(".")) as new:
    (new / "one").write_text("new")
print(os.listdir(os.getcwd()))
"""


def test_a_folder_may_be_replaced_from_inside(old):
    output = subprocess.run([sys.executable, "-c", INSIDE], cwd=old, capture_output=True, text=True, timeout=60)
    assert contents(old) == {"one": b"new", "two": b"old"}
    assert output.returncode == 0, output.stderr
    assert "one" in output.stdout


GONE = """
import os, sys
from pathlib import Path
from goldenedit.storage.atomic import replacing_folder
os.rmdir(os.getcwd())  # as when another process saves to the folder that this one is in
with replacing_folder(Path(sys.argv[1])) as new:
    (new / "one").write_text("new")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="keeps the folder that a process is in")
def test_a_folder_is_replaced_by_a_process_whose_own_folder_is_gone(old):
    (old.parent / "gone").mkdir()
    command = [sys.executable, "-c", GONE, str(old)]
    output = subprocess.run(command, cwd=old.parent / "gone", capture_output=True, text=True, timeout=60)
    assert output.returncode == 0, output.stderr
    assert contents(old) == {"one": b"new", "two": b"old"}


def test_a_link_to_a_folder_stays_a_link(old):
    link = old.parent / "link"
    link.symlink_to(old)
    save(link, one="new")
    assert link.is_symlink()
    assert contents(old) == {"one": b"new", "two": b"old"}
