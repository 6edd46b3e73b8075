"""Run something in a child process that is killed, or is told that the disk is full, at one of its system calls.

The parent follows the child by ptrace, which takes no compiler and no other program. It counts the calls that change
files or send something. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tqdm.auto import tqdm

IS_SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

_WRITES = {1: "write", 18: "pwrite64", 20: "writev"}
_OPENS = {2: "open", 85: "creat", 257: "openat"}
_TAKES_SPACE = {**_WRITES, **_OPENS, 76: "truncate", 77: "ftruncate", 83: "mkdir", 258: "mkdirat", 285: "fallocate"}
_TAKES_SPACE |= {40: "sendfile", 86: "link", 88: "symlink", 265: "linkat", 266: "symlinkat", 326: "copy_file_range"}
_CHANGES = {**_TAKES_SPACE, 74: "fsync", 75: "fdatasync", 82: "rename", 264: "renameat", 316: "renameat2"}
_CHANGES |= {84: "rmdir", 87: "unlink", 263: "unlinkat"}
_SENDS = {44: "sendto", 46: "sendmsg"}

_TRACEME, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 12, 13, 24, 0x4200
_MARKED_STOPS, _FOLLOW_THREADS, _EXIT_WITH_PARENT = 0x1, 0x8, 0x100000  # options
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_REPORTS = signal.SIGUSR1  # sent by the child when the action has ended and it is followed no longer
_ALL_THREADS = 0x40000000  # an option of waitpid


class Fault(Enum):
    """What happens at the call: it is the process's last and writes half, or it and those after it find a full disk."""

    KILL = "kill"
    FULL_DISK = "full disk"
    IO_ERROR = "I/O error"


@dataclass(frozen=True)
class Outcome:
    """How the child ended.

    Attributes:
        call: Name of the system call with the fault; None if the child made fewer calls.
        error: Type and message of what the child raised; None if it raised nothing or was killed.
    """

    call: str | None
    error: str | None


_NAMES = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base"


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in (*_NAMES.split(), "ds", "es", "fs", "gs")]


def run_with_fault(action: Callable[[], object], fault: Fault, at: int) -> Outcome:
    """Run `action` in a child process with a fault at its call number `at`, counted from 0."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        _act(action, writable)
    os.close(writable)
    call = _Tracer(child, fault, at).follow()
    with os.fdopen(readable, encoding="utf-8", errors="replace") as pipe:
        error = pipe.read()
    return Outcome(call, error or None)


def _act(action: Callable[[], object], report: int) -> None:
    """Run the action and end the process, whatever happens: nothing of the tests may run in the child."""
    try:
        for kind in tqdm.mro():  # the parent's lock may be held by another thread, and is shared with the child
            if "_lock" in vars(kind):
                kind._lock = threading.RLock()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # those of pytest are files on a disk
        if ctypes.CDLL(None).ptrace(_TRACEME, 0, None, None) != 0:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            action()
        except BaseException as error:
            os.kill(os.getpid(), _REPORTS)
            os.write(report, f"{type(error).__name__}: {error}".encode())
        os.kill(os.getpid(), _REPORTS)
    finally:
        os._exit(0)


class _Tracer:
    """Lets a child run from call to call, and applies a fault to one of them.

    Args:
        child: The process, which has stopped to be followed.
        fault: What happens.
        at: Number of the call that it happens at, of those that count, from 0.
    """

    def __init__(self, child: int, fault: Fault, at: int) -> None:
        self.child = child
        self.fault = fault
        self.left = at
        self.counted = {Fault.KILL: _CHANGES | _SENDS, Fault.FULL_DISK: _TAKES_SPACE, Fault.IO_ERROR: _CHANGES}[fault]
        self.met: str | None = None  # name of the call with the fault
        self.inside: set[int] = set()  # threads between the entry and the exit of a call
        self.refused: dict[int, int] = {}  # threads whose call is to fail, with the error number
        self.dying = False  # whether the child is to end with the call that it is in
        self.ptrace = ctypes.CDLL(None).ptrace
        self.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

    def follow(self) -> str | None:
        """Follow the child to its end, and return the name of the call with the fault; None if there was none."""
        if not os.WIFSTOPPED(os.waitpid(self.child, 0)[1]):
            raise RuntimeError("This system does not let a process follow its child.")
        self.ptrace(_SETOPTIONS, self.child, None, _MARKED_STOPS | _FOLLOW_THREADS | _EXIT_WITH_PARENT)
        self.ptrace(_SYSCALL, self.child, None, None)
        reports = False
        while True:
            thread, status = os.waitpid(-1, _ALL_THREADS)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                if thread == self.child:
                    return self.met
                continue
            stop = os.WSTOPSIG(status)
            if stop == _SYSCALL_STOP and not reports:
                self.enters_or_leaves(thread)
            reports |= stop == _REPORTS
            is_own = stop in (_SYSCALL_STOP, signal.SIGTRAP, signal.SIGSTOP, _REPORTS)
            self.ptrace(_SYSCALL, thread, None, None if is_own else stop)

    def enters_or_leaves(self, thread: int) -> None:
        """Act on a thread that stands at the entry or the exit of a call."""
        registers = _Registers()
        self.ptrace(_GETREGS, thread, None, ctypes.addressof(registers))
        if thread not in self.inside:
            self.inside.add(thread)
            self.enters(thread, registers)
        else:
            self.inside.discard(thread)
            if self.dying:
                os.kill(self.child, signal.SIGKILL)
            elif thread in self.refused:
                registers.rax = ctypes.c_ulonglong(-self.refused.pop(thread)).value
                self.ptrace(_SETREGS, thread, None, ctypes.addressof(registers))

    def enters(self, thread: int, registers: _Registers) -> None:
        """Apply the fault if it is this call's turn; a full disk stays full."""
        name = _counted(registers, self.counted)
        if name is None:
            return
        is_met = self.left == 0 or (self.left < 0 and self.fault is Fault.FULL_DISK)
        self.left -= 1
        if not is_met:
            return
        self.met = self.met or name
        if self.fault is Fault.KILL and name in ("write", "pwrite64") and registers.rdx > 1:
            registers.rdx //= 2  # bytes to write
            self.dying = True
        elif self.fault is Fault.KILL:
            os.kill(self.child, signal.SIGKILL)
            return
        else:
            self.refused[thread] = errno.ENOSPC if self.fault is Fault.FULL_DISK else errno.EIO
            registers.orig_rax = ctypes.c_ulonglong(-1).value  # no call
        self.ptrace(_SETREGS, thread, None, ctypes.addressof(registers))


def _counted(registers: _Registers, counted: dict[int, str]) -> str | None:
    """Return the name of a call that counts: not of opening to read, nor of writing to the standard streams."""
    number = registers.orig_rax
    name = counted.get(number)
    if number in _WRITES and registers.rdi <= 2:
        return None
    if name in ("open", "openat"):
        flags = registers.rdx if name == "openat" else registers.rsi
        return name if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
    return name
