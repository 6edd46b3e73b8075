"""What other systems do, emulated: no locks, folders that cannot be opened, files in use, names and encodings."""

from __future__ import annotations

import ast
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch

from goldenedit import platforms
from goldenedit.benchmark.run import run_golden_layers
from goldenedit.cache import write_atomically
from goldenedit.config import EditConfig
from goldenedit.editing.budget import free_memory
from goldenedit.platforms import Platform, file_name, print_anything, same_file
from goldenedit.requests import EditRequest
from goldenedit.storage import hub
from goldenedit.storage.atomic import READY, finish_replacing, replace_files
from goldenedit.storage.folder import EDIT_FILES

SOURCE = Path(__file__).resolve().parents[1] / "src" / "goldenedit"
ORDER = ("weights", "config", "index")
WINDOWS = Platform(has_locks=False, opens_folders=False, waits=(0.0,) * 3)
OTHER_OPENS = ("os.open", "opener.open")  # a descriptor, and a request
LACKING_MODULES = {"fcntl", "msvcrt", "multiprocessing", "platform", "posix", "pwd", "resource", "winreg"}
LACKING_NAMES = {"os.name", "sys.platform", "os.fork", "os.uname", "os.sysconf", "os.chmod", "os.geteuid", "os.symlink"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="open files are found in /proc")


def save(folder: Path, content: str) -> None:
    replace_files(folder, dict.fromkeys(ORDER, content.encode()), ORDER)


def contents(folder: Path) -> set[str]:
    assert {path.name for path in folder.iterdir()} == set(ORDER)
    return {path.read_text() for path in folder.iterdir()}


def is_open(path: os.PathLike[str] | str) -> bool:
    """Return whether this process has a file open, or one in a folder."""
    name = os.path.realpath(path)
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # of the listing itself
            continue
    return any(link == name or link.startswith(f"{name}/") for link in links)


@pytest.fixture
def windows(monkeypatch) -> Iterator[list[str]]:
    """Refuse what Windows refuses: to open folders, and to move, replace or delete files in use. Lists refusals."""
    refused: list[str] = []

    def refusing(name: str) -> None:
        original = getattr(os, name)

        def call(*paths, **options):
            if in_use := [path for path in paths if is_open(path)]:
                refused.append(f"{name} {os.path.basename(in_use[0])}")
                raise PermissionError(13, "The process cannot access the file", os.fspath(in_use[0]))
            return original(*paths, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "rename", "unlink"):
        refusing(name)
    open_file = os.open

    def open_no_folder(path, *arguments, **options):
        if os.path.isdir(path):
            refused.append(f"open {os.path.basename(path)}")
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as there, where folders have no descriptors
    monkeypatch.setattr(platforms, "HERE", WINDOWS)
    yield refused
    monkeypatch.undo()


# ---------------------------------------------------------------------- locks, folders, files in use


@linux
def test_saves_need_no_locks_and_open_no_folder(tmp_path, windows):
    save(tmp_path / "edit", "old")
    save(tmp_path / "edit", "new")
    assert contents(tmp_path / "edit") == {"new"}
    assert windows == []


@pytest.mark.parametrize("refusals", [1, 3])
@pytest.mark.parametrize("operation", ["replace", "rename", "unlink"])
def test_a_file_that_is_in_use_for_a_moment_is_tried_again(tmp_path, monkeypatch, operation, refusals):
    save(tmp_path / "edit", "old")
    original, left = getattr(Path, operation), [refusals]

    def refuse_at_first(path, *arguments, **options):
        if left[0]:
            left[0] -= 1
            raise PermissionError(13, "in use", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(platforms, "HERE", WINDOWS)
    monkeypatch.setattr(Path, operation, refuse_at_first)
    save(tmp_path / "edit", "new")
    assert left == [0]
    assert contents(tmp_path / "edit") == {"new"}


@linux
def test_a_file_that_stays_in_use_is_replaced_by_the_next_load(tmp_path, windows):
    folder = tmp_path / "edit"
    save(folder, "old")
    with (folder / "weights").open("rb") as reader:
        with pytest.raises(PermissionError, match=r"weights.*Close the programs.*The next load or save"):
            save(folder, "new")
        assert len(windows) == len(WINDOWS.waits) + 1  # tries
        assert reader.read() == b"old"
    assert (folder / READY).is_dir()
    finish_replacing(folder, ORDER)
    assert contents(folder) == {"new"}


@linux
def test_saves_get_through_while_others_read(tmp_path, windows, monkeypatch):
    monkeypatch.setattr(platforms, "HERE", Platform(has_locks=False, opens_folders=False, waits=(0.002,) * 500))
    folder, is_done = tmp_path / "edit", threading.Event()
    save(folder, "0")
    read: set[bytes] = set()

    def keep_reading() -> None:
        while not is_done.wait(0.001):
            try:
                read.add((folder / "weights").read_bytes())
            except FileNotFoundError:
                continue

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for count in range(1, 20):
        save(folder, str(count))
    is_done.set()
    reader.join()
    assert contents(folder) == {"19"}
    assert read <= {str(count).encode() for count in range(20)}


def test_a_refusal_is_final_where_files_in_use_can_be_replaced(monkeypatch):
    tries = []

    def refuse() -> None:
        tries.append(1)
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        Platform(waits=()).patiently(refuse)
    assert len(tries) == 1


def test_only_a_refusal_is_tried_again():
    tries = []

    def fail() -> None:
        tries.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        WINDOWS.patiently(fail)
    assert len(tries) == 1


@linux
def test_the_cache_is_written_while_its_file_is_read(tmp_path, windows, monkeypatch):
    path = tmp_path / "scores.json"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        monkeypatch.setattr("time.sleep", lambda seconds: reader.close())  # the reader ends while the writer waits
        write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert windows == ["replace scores.json"]
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_file_system_without_locks_or_flushes_is_no_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: refuse() if os.path.isdir(f"/proc/self/fd/{file}") else fsync(file))
    if platforms.fcntl is not None:
        monkeypatch.setattr(platforms.fcntl, "flock", refuse)
    save(tmp_path, "new")
    assert contents(tmp_path) == {"new"}


def same_values(fact: EditRequest, config: EditConfig) -> tuple[EditRequest, EditConfig]:
    return fact, config


def test_facts_and_settings_reach_processes_that_are_spawned():
    values = EditRequest("The Louvre is in", "The Louvre", "Rome"), EditConfig(layer=3, method="memit")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(same_values, values) == values


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("gemma-3-270m", "gemma-3-270m"),
        ("Modèle 1", "Modèle 1"),
        ("CON", "_CON"),
        ("nul.json", "_nul.json"),
        ("com1 .txt", "_com1 .txt"),
        ("COM¹", "_COM¹"),
        ("console", "console"),
        ("com10", "com10"),
        ("a:b*c", "a-b-c"),
        ("../up", "..-up"),
        ("edit. .", "edit"),
        ("a\nb", "a-b"),
        ("..", ""),
    ],
)
def test_file_names_are_allowed_on_windows(text, name):
    assert file_name(text) == name
    assert file_name(name) == name
    assert PureWindowsPath(name or "x").name == (name or "x")


def test_names_that_differ_in_case_or_in_how_accents_are_written_are_one_file_somewhere():
    assert same_file("Édit") == same_file("e\u0301dit") != same_file("edit")


def test_no_two_files_of_an_edit_are_one_where_case_does_not_count():
    assert len({same_file(name) for name in EDIT_FILES}) == len(EDIT_FILES)


@pytest.mark.parametrize("other", ["them/llama", "them/LLAMA.", "them/Llama"])
def test_models_whose_results_would_be_one_file_are_refused(tmp_path, other):
    with pytest.raises(ValueError, match="have the same name"):
        run_golden_layers(["us/Llama", other], None, None, tmp_path, None)


@pytest.mark.parametrize("subfolder", ["/etc", r"\etc", r"C:etc", r"C:\etc", r"a\..\..\b"])
def test_no_subfolder_of_windows_leads_out_of_an_edit(tmp_path, monkeypatch, subfolder):
    monkeypatch.setattr(hub, "Path", PureWindowsPath)
    with pytest.raises(ValueError, match="leads out"):
        hub.find_folder(str(tmp_path), subfolder=subfolder)


# ---------------------------------------------------------------------- texts


def unclear_texts(tree: ast.AST) -> list[int]:
    """Return the lines that leave it to the system which bytes a text is; line ends are a matter of writing alone."""
    lines = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) in OTHER_OPENS:
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        mode = name[0]
        if name == "open":
            place = 1 if isinstance(call.func, ast.Name) else 0  # the method has no argument for the file
            modes = [*call.args[place : place + 1], *(word.value for word in call.keywords if word.arg == "mode")]
            mode = ast.literal_eval(modes[-1]) if modes else "r"
        if name not in ("open", "read_text", "write_text") or "b" in mode:
            continue
        if not ({"encoding"} if mode == "r" else {"encoding", "newline"}) <= {word.arg for word in call.keywords}:
            lines.append(call.lineno)
    return lines


def test_no_text_depends_on_the_encoding_and_line_ends_of_the_system():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    assert {str(path): lines for path, tree in trees.items() if (lines := unclear_texts(tree))} == {}


def test_the_check_of_texts_finds_what_is_left_to_the_system():
    source = """
open("a"); open("a", "rb"); open("a", encoding="utf-8"); path.open("w", encoding="utf-8"); os.open("a", 0)
path.read_text()
path.write_text(text, encoding="utf-8")
path.write_text(text, encoding="utf-8", newline="")
"""
    assert sorted(unclear_texts(ast.parse(source))) == [2, 2, 3, 4]


def asks_the_system(tree: ast.AST) -> bool:
    """Return whether code asks which system it runs on, or uses what some systems lack."""
    for node in ast.walk(tree):
        imported = [alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)]
        if isinstance(node, ast.ImportFrom):
            imported.append(node.module or "")
        if {name.partition(".")[0] for name in imported} & LACKING_MODULES:
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LACKING_NAMES:
            return True
        if isinstance(node, ast.Constant) and str(node.value).startswith(("/proc/", "/dev/", "/tmp")):
            return True
    return False


def test_one_module_alone_asks_which_system_it_is():
    asking = {path.name for path in SOURCE.rglob("*.py") if asks_the_system(ast.parse(path.read_text("utf-8")))}
    assert asking == {"platforms.py"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_a_terminal_that_lacks_characters_shows_them_escaped(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_anything(stream, None, io.StringIO())
    stream.write("Zürich → 北京 █")
    stream.flush()
    assert b"\\u" in stream.buffer.getvalue()


def test_commands_print_to_pipes_of_every_encoding():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-m", "goldenedit", "editors"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"\\u2026" in done.stdout


def test_batches_fit_the_memory_that_any_system_tells(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5 << 30))
    assert free_memory(torch.device("cpu")) == 5 << 30
