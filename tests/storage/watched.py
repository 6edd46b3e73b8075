"""What a piece of code does beyond the files that it was given: what it opens, runs and asks the network for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NEVER = (
    *(
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "pty.spawn",
        "ctypes.dlopen",
    ),
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class", "webbrowser.open"),
)
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_LIBRARIES = tuple(os.path.realpath(path) for path in {sys.prefix, sys.base_prefix, *sys.path} if path)
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/etc/localtime", "/usr/share/zoneinfo")

_watches: list[tuple[Path, list[str]]] = []
_hooked: list[bool] = []  # an audit hook cannot be taken away, so one serves all


@contextmanager
def watching(folder: Path) -> Iterator[list[str]]:
    """Yield a list that names everything that is done beyond reading the folder and libraries, when it is done."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    events: list[str] = []
    _watches.append((Path(os.path.realpath(folder)), events))
    try:
        yield events
    finally:
        _watches.pop()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches:
        return
    folder, events = _watches[-1]
    if event in _NEVER:
        events.append(f"{event} {arguments!r}"[:300])
    elif event in ("exec", "compile"):
        code = arguments[0] if event == "exec" else arguments[1]
        name = getattr(code, "co_filename", code)
        if isinstance(name, str) and os.path.abspath(name).startswith(f"{folder}{os.sep}"):
            events.append(f"{event} {name}")
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[1], arguments[2]
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if flags is not None else "r" not in (mode or "r")
        if not _is_below(path, folder) and (writes or not _is_library(path)) and path != os.devnull:
            events.append(f"open {path} {mode}")
    elif event in _CHANGES and not _is_below(_changed(arguments), folder):
        events.append(f"{event} {arguments!r}"[:300])


def _changed(arguments: tuple[Any, ...]) -> str:
    """Return the path that is changed; it may be relative to an open folder, whose number comes last."""
    path, last = os.fsdecode(arguments[0]), arguments[-1]
    if isinstance(last, int) and last >= 0 and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{last}"), path)
    return os.path.abspath(path)


def _is_below(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}{os.sep}")


def _is_library(path: str) -> bool:
    real = os.path.realpath(path)
    return real.startswith((*_LIBRARIES, *_SYSTEM))
