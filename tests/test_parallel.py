"""Two processes find what one finds, in half the work, and none is left waiting for the other."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from typer.testing import CliRunner

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.architecture import read_architecture
from goldenedit.cli import app
from goldenedit.editing import values
from goldenedit.layer_selection import CellStore, SweepOptions, edit_score, lga_scores, select, sweep
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import sample_continuations
from goldenedit.lm.statistics import second_moments
from goldenedit.parallel import Processes, processes_of
from models import NUM_LAYERS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

FACTS = [
    EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("Angela Merkel was born in", "Angela Merkel", "Berlin", locality=(("Paris is a", "city"),)),
    EditRequest("The Kingdom of Cambodia is a", "Cambodia", "city", "fox", locality=(("Rome is a", "city"),)),
]
FAST = {"steps": 4, "contexts": 2, "context_length": 3, "covariance_tokens": 300, "contrast": 0, "proxy": FACTS}


def _join(function, rank, folder, pipe):
    # File and gloo: no port that another test may hold.
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        outcome = (True, function())
    except Exception as error:
        outcome = (False, error)
    pipe.send_bytes(pickle.dumps(outcome))  # send() would share tensors by files that end with this process
    distributed.destroy_process_group()


@pytest.fixture
def in_two(tmp_path_factory):
    """A function that calls another one in two processes of one group, and returns what each of them returned."""

    def run(function: Callable) -> list:
        folder = tmp_path_factory.mktemp("group")
        context = multiprocessing.get_context("fork")  # what is imported need not be imported again
        pipes, processes = [], []
        for rank in range(2):
            here, there = context.Pipe(duplex=False)
            processes.append(context.Process(target=_join, args=(function, rank, folder, there)))
            pipes.append(here)
            processes[-1].start()
            there.close()
        results = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
        for process in processes:
            process.join()
        for succeeded, result in results:
            if not succeeded:
                raise result
        return [result for _, result in results]

    return run


def counted(module: nn.Module) -> list[int]:
    """Return a list that grows by the number of rows of each forward."""
    rows: list[int] = []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_lga_has_the_same_scores_in_half_the_rows(in_two, tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    rows = counted(model)

    def run():
        rows.clear()
        return lga_scores(lm, FACTS * 2, batch_size=1), sum(rows)

    alone, all_rows = run()
    for scores, own in in_two(run):
        torch.testing.assert_close(scores, alone, rtol=1e-12, atol=0)
        assert own <= all_rows / 2 + 4  # what the model itself answers is shared too


@pytest.mark.parametrize("tokens", [1000, 20], ids=["moments", "keys"])
@pytest.mark.parametrize("batch_tokens", [20, 10_000], ids=["many batches", "one batch"])
def test_key_statistics_are_the_same(in_two, tokenizer, batch_tokens, tokens):
    model = tiny_model("llama")
    texts = [fact.text for fact in FACTS]
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    run = partial(second_moments, lm, texts, [0, 2], tokens, batch_tokens, hold_keys=True)
    alone = run()
    one, other = in_two(run)
    for layer, moment in alone.items():
        torch.testing.assert_close(one[layer], moment, rtol=1e-5, atol=1e-6)
        assert torch.equal(one[layer], other[layer])


def measured(tokenizer, folder, layers: Iterable[int] | None = None) -> tuple[dict, int]:
    """Sweep, and return the cells and the number of those that this process measured itself."""
    model = EditModel(tiny_model("llama"), EditConfig(layer=0, **FAST), tokenizer)
    store = CellStore(folder / f"{model.lm.processes.index}.jsonl", folder.glob("*.jsonl"))
    known = len(store.cells)
    cells = sweep(model.lm, FACTS, model.edit_config, store, SweepOptions(layers=layers))
    return {cell: found.outcomes for cell, found in cells.items()}, len(store.cells) - known


def test_a_sweep_has_the_same_cells_each_measured_once(in_two, tokenizer, tmp_path):
    (tmp_path / "two").mkdir()
    alone, _ = measured(tokenizer, tmp_path)
    (one, first), (other, second) = in_two(partial(measured, tokenizer, tmp_path / "two"))
    assert one == other
    assert one.keys() == alone.keys()
    for cell, outcomes in alone.items():
        for mine, theirs in zip(outcomes, one[cell], strict=True):
            assert edit_score([mine]) == pytest.approx(edit_score([theirs]), rel=1e-4)
    assert sorted([first, second]) == [1, NUM_LAYERS - 1]


def test_a_cell_that_one_process_knows_is_not_measured_by_the_other(in_two, tokenizer, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    measured(tokenizer, tmp_path / "1", layers=[0])  # on the other machine's disk

    def run():
        return measured(tokenizer, tmp_path / str(distributed.get_rank()))

    (one, first), (other, second) = in_two(run)
    assert one.keys() == other.keys() == {("gated", layer) for layer in range(NUM_LAYERS)}
    assert first + second == NUM_LAYERS - 1


def test_an_edit_is_the_same_in_every_process_and_the_one_that_one_process_makes(
    in_two, tokenizer, monkeypatch, tmp_path
):
    def run():
        options = EditConfig(layer="lga", layer_pattern="golden", **FAST)
        model = get_edit_model(tiny_model("llama"), options, tokenizer)
        made = model.edit(FACTS[0])
        return {path: delta.dense() for path, delta in made.deltas.items()}, model.layer_selection

    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / "one"))
    alone, selection = run()
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / "two"))
    (one, first), (other, second) = in_two(run)
    assert one.keys() == other.keys() == alone.keys()
    for path, change in alone.items():
        assert torch.equal(one[path], other[path])
        torch.testing.assert_close(one[path], change, rtol=1e-3, atol=1e-3 * float(change.abs().max()))
    assert first.layers == second.layers == selection.layers
    assert first.cost.flops == selection.cost.flops  # those of both processes


@pytest.mark.parametrize("method", ["gated", "memit", "alphaedit"])
def test_a_batch_has_the_bytes_of_one_process_at_half_the_values(in_two, tokenizer, monkeypatch, tmp_path, method):
    facts = [replace(fact, prompt=f"{fact.text} {number}") for number in range(2) for fact in FACTS]
    optimized = []
    plain = values._optimize
    monkeypatch.setattr(values, "_optimize", lambda *args: optimized.append(args) or plain(*args))

    def run():
        optimized.clear()
        options = {"layer": 1, "method": method, "batch_size": 1, **FAST}
        made = EditModel(tiny_model("llama"), EditConfig(**options), tokenizer).edit(facts)
        return made.deltas, len(optimized)

    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / "one"))
    alone, all_values = run()
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / "two"))
    for deltas, own in in_two(run):
        assert deltas.keys() == alone.keys()
        for path, delta in alone.items():
            assert torch.equal(deltas[path].A, delta.A)
            assert torch.equal(deltas[path].B, delta.B)
        assert own <= all_values // 2 + 1  # each tries the first batch


def test_sampled_text_is_that_of_one_process_at_half_the_forwards(in_two, tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    rows = counted(model)

    def run():
        rows.clear()
        return sample_continuations(
            lm, ["The", "I", "You"] * 2, 5, 0, batch_size=1, processes=processes_of(model)
        ), len(rows)

    texts, forwards = run()
    for found, own in in_two(run):
        assert found == texts
        assert own == forwards / 2


def test_what_a_process_does_of_its_share_it_does_alone(in_two):
    model = nn.Linear(2, 2)

    def run():
        inside = processes_of(model).map(lambda _: processes_of(model).map(str, "ab"), range(3))
        return inside, processes_of(model).count

    assert in_two(run) == [([["a", "b"]] * 3, 2)] * 2


def test_what_fails_in_one_process_is_raised_in_both(in_two):
    def refuse(item: int) -> int:
        if item == 1:
            raise ValueError("item 1 cannot be")
        return item

    def run():
        with pytest.raises(ValueError, match="item 1 cannot be"):
            Processes(distributed.get_rank(), 2).map(refuse, range(5))
        return Processes(distributed.get_rank(), 2).map(lambda item: item * item, range(5))

    assert in_two(run) == [[0, 1, 4, 9, 16]] * 2


def test_processes_that_share_one_model_do_the_same_work(in_two):
    def run():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        model = tiny_model("llama")
        whole = processes_of(model)
        mesh = init_device_mesh("cpu", (2,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        return whole.count, processes_of(model).count

    assert in_two(run) == [(2, 1), (2, 1)]


def test_a_model_that_is_divided_among_processes_is_refused(in_two, tokenizer):
    def run():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        model = tiny_model("llama")
        mesh = init_device_mesh("cpu", (2,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"divided among processes \(tp_plan.*without tp_plan"):
            EditModel(model, EditConfig(layer=1), tokenizer)
        return True

    assert in_two(run) == [True, True]


def test_the_library_makes_no_process_group(tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it
    get_edit_model(tiny_model("llama"), EditConfig(layer="lga", **FAST), tokenizer).edit(FACTS[0])
    assert not distributed.is_initialized()


def test_the_command_line_edits_once_in_two_processes(tokenizer, tmp_path):
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fact = ["--prompt", FACTS[0].text, "--subject", FACTS[0].subject, "--target", "Rome"]
    command = ["edit", str(folder), *fact, "--layer", "lga", "--covariance", "identity", "-o"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "one")]).exit_code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "goldenedit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOLDENEDIT_CACHE": str(tmp_path / "cache")}
    arguments = [*launcher, *command, str(tmp_path / "two")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == 1
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key, factor in one.items():
        torch.testing.assert_close(two[key], factor, rtol=1e-3, atol=1e-3 * float(factor.abs().max()))


@pytest.mark.parametrize(
    ("error", "own", "other"),
    [
        (torch.OutOfMemoryError("no 2 GiB left"), "OutOfMemoryError: no 2 GiB left", r"RuntimeError: .*no 2 GiB left"),
        (MemoryError(), "MemoryError: ", r"RuntimeError: .*rank 1.*out of memory.*bfloat16"),
        (RuntimeError("a kernel"), "RuntimeError: a kernel", r"RuntimeError: .*rank 1.*failed with RuntimeError: a ke"),
        (PermissionError("a file"), "PermissionError: a file", r"OSError: .*rank 1.*PermissionError: a file"),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", r"RuntimeError: .*rank 1.*failed with KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3", r"RuntimeError: .*rank 1.*failed with SystemExit: 3"),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "no text"), "UnicodeDecodeError: ", r"ValueError: .*rank 1.*no text"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("work", ["a map", "between", "before a sum", "inside another", "at the end"])
def test_however_one_process_fails_all_end_with_its_message(in_two, error, own, other, work):
    def fail() -> None:
        if distributed.get_rank() == 1:
            raise error

    def do() -> None:
        processes = Processes(distributed.get_rank(), 2)
        with processes.together():
            if work == "a map":
                processes.map(lambda item: item if item != 1 else fail(), range(4))
            elif work == "inside another":
                with processes.together():
                    processes.gather(0)
                    fail()
            elif work != "at the end":
                processes.gather(0)
                fail()
                processes.gather(1) if work == "between" else processes.total(torch.ones(2))
            else:
                fail()

    def run() -> tuple[str, list[int]]:
        with pytest.raises(BaseException) as raised:  # noqa: PT011
            do()
        ended = f"{type(raised.value).__name__}: {raised.value}"
        return ended, Processes(distributed.get_rank(), 2).gather(distributed.get_rank())  # nothing is out of step

    (theirs, ranks), (mine, same_ranks) = in_two(run)
    assert ranks == same_ranks == [0, 1]
    assert mine.startswith(own)
    assert re.match(other, theirs)


def exhausting(model: nn.Module, rank: int, forwards: int) -> nn.Module:
    """Let the model run out of memory in the process of this rank once it has run so often."""
    counter = itertools.count()

    def run_out(*_: object) -> None:
        if distributed.is_initialized() and distributed.get_rank() == rank and next(counter) >= forwards:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(run_out)
    return model


def failing(model, tokenizer) -> LanguageModel:
    """Return a model whose architecture is known: reading it would run the model."""
    return LanguageModel(model, tokenizer, read_architecture(tiny_model("llama")))


SHARED_WORK: dict[str, Callable] = {
    "lga": lambda model, tokenizer: lga_scores(failing(model, tokenizer), FACTS),
    "key statistics": lambda model, tokenizer: second_moments(
        failing(model, tokenizer), [fact.text for fact in FACTS] * 2, [0, 2], 1000, 20
    ),
    "sweep": lambda model, tokenizer: get_edit_model(model, EditConfig(layer="sweep", **FAST), tokenizer),
    "a selector": lambda model, tokenizer: get_edit_model(model, EditConfig(layer="key_response", **FAST), tokenizer),
    "an edit": lambda model, tokenizer: EditModel(model, EditConfig(layer=1, **FAST), tokenizer).edit(FACTS[0]),
}


@pytest.mark.parametrize("work", SHARED_WORK)
def test_a_process_that_runs_out_of_memory_ends_the_other(in_two, tokenizer, work):
    rank = 0 if work == "an edit" else 1  # all text fits into one batch, that of the first process
    model = exhausting(tiny_model("llama"), rank, 6 if work in ("sweep", "a selector", "an edit") else 1)

    def run() -> str:
        with pytest.raises(RuntimeError, match=r"tried to allocate 2\.00 GiB") as raised:
            SHARED_WORK[work](model, tokenizer)
        return str(raised.value)

    message = in_two(run)[1 - rank]
    assert f"rank {rank}" in message
    assert "bfloat16" in message


def test_a_cache_that_one_process_cannot_read_ends_both(in_two, tokenizer, monkeypatch):
    def refuse(path):
        if distributed.is_initialized() and distributed.get_rank() == 1:
            raise PermissionError(f"may not read {path}")

    monkeypatch.setattr(select, "_read", refuse)

    def run() -> str:
        with pytest.raises(OSError, match="may not read") as raised:
            get_edit_model(tiny_model("llama"), EditConfig(layer="lga", **FAST), tokenizer)
        return str(raised.value)

    assert "rank 1" in in_two(run)[0]


def test_a_process_that_is_killed_ends_the_other(in_two, tmp_path):
    def run() -> None:
        def work(item: int) -> None:
            if item == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(RuntimeError):
            Processes(distributed.get_rank(), 2).map(work, range(4))
        (tmp_path / str(distributed.get_rank())).touch()

    with pytest.raises(EOFError):  # from the one that was killed
        in_two(run)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
