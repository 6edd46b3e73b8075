"""What is written is there whole or not at all, wherever the process dies or the disk is full.

`benchmarks/faults.py` tries each call; here are some of each kind.
"""

from __future__ import annotations

import pytest
from interrupted import Writing, trials, writings
from syscalls import IS_SUPPORTED, Fault, run_with_fault

from hub import Hub

NAMES = (
    *("save over an edit", "save a new edit", "finish a stopped save", "batch of a sequence", "cached result"),
    *("GGUF adapter", "adapter for mlx-lm", "Modelfile", "edited checkpoint", "edited checkpoint in an empty folder"),
    "push",
)
pytestmark = [
    pytest.mark.skipif(not IS_SUPPORTED, reason="needs Linux on x86-64"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # forks of a process with threads
]


@pytest.fixture(scope="module", autouse=True)
def tracing():
    """Skip where a process may not follow its child, as in some containers."""
    try:
        run_with_fault(lambda: None, Fault.KILL, 0)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def writing(request, hub: Hub, tmp_path) -> Writing:
    """The writing of a name."""
    every = writings(hub, tmp_path)
    assert tuple(every) == NAMES
    return every[request.param]


@pytest.mark.parametrize("writing", NAMES, indirect=True)
@pytest.mark.parametrize("fault", [Fault.KILL, Fault.FULL_DISK])
def test_the_old_state_or_the_new_one_is_left_and_an_error_names_a_file(writing, fault, tmp_path):
    found = list(trials(writing, fault, tmp_path, every=5))
    assert not [(outcome, state) for outcome, state in found if state not in writing.states]
    assert found[-1][1] == writing.states[-1]


def test_a_kill_in_the_middle_of_a_write_leaves_half_of_it(tmp_path):
    file = tmp_path / "file"
    outcomes = [run_with_fault(lambda: file.write_bytes(b"whole"), Fault.KILL, at) for at in (1, 2)]
    assert [outcome.call for outcome in outcomes] == ["write", None]
    run_with_fault(lambda: file.write_bytes(b"whole"), Fault.KILL, 1)
    assert file.read_bytes() == b"wh"


def test_a_full_disk_stays_full_and_refuses_nothing_that_takes_no_space(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    other.touch()

    def act():
        for _ in range(2):
            try:
                file.write_bytes(b"x")
            except OSError:
                other.rename(file)
        raise ValueError("the rename worked once")

    assert run_with_fault(act, Fault.FULL_DISK, 0).error.startswith("FileNotFoundError")
    assert file.exists()
    assert not other.exists()
