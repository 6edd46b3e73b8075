"""Replacing the files of a folder: the old ones or the new ones, whatever happens, and the folder stays."""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from crashes import crash_at_every_step

from goldenedit import platforms
from goldenedit.storage import atomic
from goldenedit.storage.atomic import READY, finish_replacing, replace_files

ORDER = ("card", "state", "weights", "config", "index")
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such thing there")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(folder, **files):
    replace_files(folder, {name: text.encode() for name, text in files.items()}, ORDER)


def run(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "edit"
    save(folder, weights="old", state="old", index="old")
    return folder


def stopped(folder, moved=()):
    """Leave what a save leaves that was stopped when all was written, and some of it moved."""
    (folder / READY).mkdir()
    for name in ("weights", "config", "index"):
        (folder / (READY if name not in moved else "") / name).write_text("new")
    (folder / READY / "stale").write_text("card\nstate\nnotes.txt\n../outside")


# ---------------------------------------------------------------------- what is saved


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    save(tmp_path / "a" / "b", index="1")
    assert contents(tmp_path) == {"a/b/index": b"1"}


def test_files_of_the_set_are_replaced_or_go_and_others_are_kept(old):
    (old / "notes.txt").write_text("mine")
    (old / "sub").mkdir()
    (old / "sub" / "state").write_text("mine too")
    (old / "link").symlink_to("notes.txt")
    (old / "dangling").symlink_to("nothing")
    save(old, weights="new", card="new", index="new")
    assert contents(old) == {
        "weights": b"new",
        "card": b"new",
        "index": b"new",
        "notes.txt": b"mine",
        "sub/state": b"mine too",
        "link": b"mine",
    }
    assert (old / "link").is_symlink()
    assert os.readlink(old / "dangling") == "nothing"
    assert [path.name for path in old.parent.iterdir()] == ["edit"]


def test_links_in_the_place_of_files_go_and_what_they_point_at_stays(old, tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for name in ("weights", "state"):
        (old / name).unlink()
        (old / name).symlink_to(tmp_path / "theirs")
    save(old, weights="new", index="new")
    assert contents(old) == {"weights": b"new", "index": b"new"}
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_folder_in_the_way_of_a_file_is_an_error_that_names_it_and_leaves_all(old):
    (old / "config").mkdir()
    (old / "config" / "mine").write_text("mine")
    before = contents(old)
    with pytest.raises(IsADirectoryError, match="config"):
        save(old, weights="new", config="new", index="new")
    assert contents(old) == before
    save(old, weights="new", index="new")  # a folder of a name that is not needed is in nobody's way
    assert contents(old) == {"weights": b"new", "index": b"new", "config/mine": b"mine"}


def test_a_file_in_the_way_is_an_error_that_names_it_and_leaves_it(tmp_path):
    (tmp_path / "edit").write_text("mine")
    with pytest.raises(NotADirectoryError, match="edit"):
        save(tmp_path / "edit", index="1")
    assert contents(tmp_path) == {"edit": b"mine"}


def test_a_relative_path_with_a_trailing_slash_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("edit/", index="1")
    save("edit/", index="2")
    assert contents(tmp_path) == {"edit/index": b"2"}


@posix
def test_who_may_read_is_up_to_the_umask_and_an_old_folder_keeps_its_mode(tmp_path, old):
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    save(tmp_path / "new", index="1")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "new" / "index").stat().st_mode == (tmp_path / "file").stat().st_mode
    old.chmod(0o700)
    save(old, index="new")
    assert stat.S_IMODE(old.stat().st_mode) == 0o700


def test_a_link_to_a_folder_stays_a_link(old):
    link = old.parent / "link"
    link.symlink_to(old)
    save(link, index="new")
    assert link.is_symlink()
    assert contents(old) == {"index": b"new"}


@posix
def test_a_link_to_a_folder_that_is_still_to_be_made_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "edit")
    save(tmp_path / "link", index="1")
    assert contents(tmp_path / "edit") == {"index": b"1"}
    assert (tmp_path / "link").is_symlink()


# ---------------------------------------------------------------------- the folder stays

INSIDE = """
import os, sys
from pathlib import Path
from goldenedit.storage.atomic import replace_files
replace_files(Path("."), {"index": b"new"}, ("config", "index"))
print(os.listdir(os.getcwd()))
"""


def test_a_folder_may_be_saved_to_from_inside(old):
    output = run(INSIDE, cwd=old)
    assert output.returncode == 0, output.stderr
    assert "index" in output.stdout
    assert (old / "index").read_text() == "new"


def test_a_shell_that_is_in_the_folder_stays_there(old):
    waits = "import os; input(); print(os.getcwd(), open('index').read(), open(os.path.abspath('index')).read())"
    with subprocess.Popen(
        [sys.executable, "-c", waits], cwd=old, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        inode = old.stat().st_ino
        save(old, index="new")
        output, _ = other.communicate("\n", timeout=60)
    assert output.split() == [str(old), "new", "new"]
    assert old.stat().st_ino == inode


@posix
def test_a_process_whose_own_folder_is_gone_can_save(old):
    (old.parent / "gone").mkdir()
    code = "import os; os.rmdir(os.getcwd())\n" + INSIDE.replace('Path(".")', "Path(sys.argv[1])")
    output = run(code.replace("print(os.listdir(os.getcwd()))", ""), old, cwd=old.parent / "gone")
    assert output.returncode == 0, output.stderr
    assert (old / "index").read_text() == "new"


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from goldenedit.storage.atomic import replace_files
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
replace_files(Path(sys.argv[1]), {"index": b"new"}, ("state", "config", "index"))
"""


@posix
def test_only_the_folder_itself_has_to_be_writable():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own is for nobody else
        folder = Path(parent) / "edit"
        save(folder, weights="old", state="old", index="old")
        if os.geteuid() == 0:
            for path in (folder, *folder.iterdir()):
                os.chown(path, 65534, 65534)
        os.chmod(parent, 0o555)
        output = run(UNPRIVILEGED, folder)
        os.chmod(parent, 0o755)
        assert output.returncode == 0, output.stderr
        assert contents(folder) == {"index": b"new", "weights": b"old"}


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"), reason="needs mount namespaces")
def test_a_mount_point_can_be_saved_to(old):
    script = 'mount -t tmpfs tmpfs "$1" && cd / && "$0" -c "$2" "$1" && "$0" -c "$2" "$1" && cat "$1/index"'
    code = INSIDE.replace('Path(".")', "Path(sys.argv[1])")
    output = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script, sys.executable, str(old), code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in output.stderr or "mount:" in output.stderr:
        pytest.skip("may not mount here")
    assert output.returncode == 0, output.stderr
    assert output.stdout.endswith("new")


# ---------------------------------------------------------------------- errors, crashes, and what comes after them


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("is_new", [False, True])
def test_an_error_while_files_are_written_leaves_the_old_ones_and_no_trace(old, tmp_path, monkeypatch, error, is_new):
    def fail(path, data):
        path.write_bytes(data)
        if path.name == "weights":
            raise error

    monkeypatch.setattr(atomic, "_write", fail)
    folder = tmp_path / "new" if is_new else old
    before = contents(tmp_path)
    with pytest.raises(error):
        save(folder, index="new", weights="new")
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()
    assert {path.name for path in old.iterdir()} == {"weights", "state", "index"}


FULL_DISK = """
import resource, sys
from pathlib import Path
from goldenedit.storage.atomic import replace_files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes behind 1000 bytes fail, as on a full disk
try:
    replace_files(Path(sys.argv[1]), {"weights": b"new", "index": b"x" * 5000}, ("config", "weights", "index"))
except OSError as error:
    print(error)
"""


@posix
def test_a_full_disk_leaves_the_old_files(old):
    before = contents(old)
    output = run(FULL_DISK, old)
    assert output.returncode == 0, output.stderr
    assert str(old) in output.stdout
    assert contents(old) == before


def test_where_a_file_cannot_be_replaced_the_next_save_or_load_finishes(old, monkeypatch):
    replace = Path.replace

    def locked(path, target):
        if target.name == "weights":  # as Windows does with a file that is open
            raise PermissionError(13, "in use", str(target))
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", locked)
        with pytest.raises(PermissionError, match=r"saved in .*weights.*next load or save"):
            save(old, weights="new", card="new", index="new")
        with pytest.raises(PermissionError, match="next load or save"):
            finish_replacing(old, ORDER)
    assert not (old / "index").exists()  # what the others are opened by comes last
    finish_replacing(old, ORDER)
    assert contents(old) == {"weights": b"new", "card": b"new", "index": b"new"}
    assert set(os.listdir(old)) == {"weights", "card", "index"}


@pytest.mark.parametrize("moved", [(), ("weights",), ("weights", "config"), ("weights", "config", "index")])
@pytest.mark.parametrize("way", ["load", "save"])
def test_what_a_stopped_save_left_is_finished(old, moved, way):
    (old / "notes.txt").write_text("mine")
    (old.parent / "outside").write_text("mine")
    (old / "index").unlink()
    if "index" in moved:
        (old / "state").unlink()
    stopped(old, moved)
    if way == "load":
        finish_replacing(old, ORDER)
        expected = {"weights": b"new", "config": b"new", "index": b"new", "notes.txt": b"mine"}
    else:
        save(old, index="newer")
        expected = {"index": b"newer", "notes.txt": b"mine"}
    assert contents(old) == expected
    assert set(os.listdir(old)) == set(expected)
    assert (old.parent / "outside").read_text() == "mine"


@posix
def test_what_a_killed_save_was_writing_is_cleared_away(old):
    (old / ".goldenedit-0123abcd.saving").mkdir()
    (old / ".goldenedit-0123abcd.saving" / "weights").write_text("half")
    finish_replacing(old, ORDER)
    assert (old / "weights").read_text() == "old"
    save(old, index="new")
    assert os.listdir(old) == ["index"]


def test_where_nobody_can_be_kept_out_what_others_write_is_left_alone(old, monkeypatch):
    monkeypatch.setattr(platforms, "HERE", platforms.Platform(has_locks=False))
    for name in ("new", "abandoned"):
        (old / f".goldenedit-{name}.saving").mkdir()
    os.utime(old / ".goldenedit-abandoned.saving", (0, 0))
    save(old, index="new")
    assert set(os.listdir(old)) == {"index", ".goldenedit-new.saving"}


def test_a_strangers_link_is_not_followed(old, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "index").write_text("mine")
    (old / READY).symlink_to(tmp_path / "home")
    finish_replacing(old, ORDER)
    assert (tmp_path / "home" / "index").read_text() == "mine"
    assert (old / "index").read_text() == "old"


def state_of(folder):
    """What a program sees that opens the files by the index and the config."""
    return {name: (folder / name).read_text() for name in ORDER if (folder / name).exists()}


@posix
def test_after_a_crash_at_any_step_the_files_are_of_one_save(tmp_path):
    before = {"weights": "old", "state": "old", "config": "old", "index": "old"}
    after = {"weights": "new", "card": "new", "config": "new", "index": "new"}
    seen = []
    for folder in crash_at_every_step(tmp_path, lambda new: save(new, **before), lambda new: save(new, **after)):
        (folder / "notes.txt").write_text("mine")
        at_hand = state_of(folder)
        if "index" in at_hand:
            assert at_hand in (before, after)
        elif "config" in at_hand:
            assert at_hand["config"] == at_hand["weights"]
        finish_replacing(folder, ORDER)
        assert state_of(folder) in (before, after)
        seen.append(state_of(folder)["index"])
        save(folder, index="next")
        assert contents(folder) == {"index": b"next", "notes.txt": b"mine"}
        assert set(os.listdir(folder)) == {"index", "notes.txt"}
    assert seen == sorted(seen, reverse=True)  # old until all is written, then new
    assert set(seen) == {"old", "new"}


WRITER = """
import sys
from pathlib import Path
from goldenedit.storage.atomic import replace_files
print("ready", flush=True)
for count in range(10**9):
    files = {name: f"{count}.".encode() * 2000 for name in ("weights", "index")}
    replace_files(Path(sys.argv[1]), files, ("state", "weights", "config", "index"))
"""


@posix
@pytest.mark.parametrize("seed", range(5))
def test_a_writer_killed_at_any_moment_leaves_one_save(old, seed):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(old)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(random.Random(seed).uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
    finish_replacing(old, ORDER)
    assert (old / "weights").read_bytes() == (old / "index").read_bytes()
    save(old, weights="next", index="next")  # what a killed writer leaves is in nobody's way
    assert contents(old) == {"weights": b"next", "index": b"next"}


@posix
def test_processes_that_save_to_one_folder_wait_for_each_other(old):
    code = WRITER.replace("range(10**9)", "range(int(sys.argv[2]), int(sys.argv[2]) + 40)")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(old), str(start)], stdout=subprocess.DEVNULL)
        for start in (100, 500)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert (old / "weights").read_bytes() == (old / "index").read_bytes()
    assert set(os.listdir(old)) == {"weights", "index"}
