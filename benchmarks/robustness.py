"""Test edit folders whose writer is killed, and folders that are damaged by accident or on purpose.

Kills: a process saves two edits over each other in a loop and is killed (SIGKILL) at random moments. When the folder is
then loaded, which finishes an interrupted save, it must hold exactly one of the two edits. The model has SmolLM2's
widths, few layers and random weights. The larger edit has rank 64, so that a save writes as many megabytes as a large
batch. The process is forked, because starting a new one takes longer than a hundred saves.

Damages: those of `tests/storage/test_robustness.py`, by accident or by an author who recomputes the digests, one or
two to a folder; and mutants, which a model of the format makes (`tests/storage/mutants.py`). Each folder is loaded on a
tiny base model in this process, which may take 2 GiB more than at the start and 10 seconds of the processor a folder,
and is watched for what it opens, runs and connects to. An author who changes factors to other finite values and
recomputes the digests has made a different valid edit; of such mutants it is asked that they load as stock PEFT loads
them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import record, timed
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.editors.delta import LowRankDelta
from goldenedit.storage.atomic import READY
from goldenedit.storage.folder import EDIT_FILES, Edit, EditedFact, EditFolder, write_edit_folder

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "storage")]

from mutants import mutate  # noqa: E402
from test_mutants import (  # noqa: E402
    LIKE_PEFT,
    ONLY_HERE,
    REFUSED,
    WRONG_MUTANT,
    gated_folder,
    mutant_verdict,
    pair_verdict,
    twice_damaged,
)
from test_robustness import BAD, OUTCOMES, RIGHT, damaged_copy, right_folders  # noqa: E402
from watched import watching  # noqa: E402

from models import tiny_model  # noqa: E402

WIDTH, MLP_WIDTH, RANK, FACTS = 576, 1536, 64, 200  # SmolLM2's widths


def main() -> None:
    """Run kills and damages, print the results, and write them to results/."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--folders", type=int, default=200, help="number of damaged folders, half of them twice")
    options.add_argument("--mutants", type=int, default=200, help="number of mutants")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.kills:
            rows.append(kill(Path(scratch), arguments.kills, arguments.seed))
            print(rows[-1])
        damages = damage(Path(scratch), arguments.folders, arguments.seed)
        show(damages, (*OUTCOMES, LIKE_PEFT, "refused needlessly"))
        mutants = mutate_folders(Path(scratch), arguments.mutants, arguments.seed)
        show(mutants, (REFUSED, RIGHT, LIKE_PEFT, ONLY_HERE, *WRONG_MUTANT))
        damages += mutants
    record("robustness", rows + damages)


# ---------------------------------------------------------------------- kills


def kill(scratch: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a saving process repeatedly, and count what the folder holds afterwards."""
    config = LlamaConfig(vocab_size=200, hidden_size=WIDTH, intermediate_size=MLP_WIDTH, num_hidden_layers=3)
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = with_two_edits(base, scratch / "made")
    folder, wanted, logits, seconds = scratch / "killed" / "edit", {}, {}, 0.0
    for name in model.edits:
        with timed() as elapsed:
            model.save_pretrained(scratch / name, selected_adapters=[name])
        seconds = max(seconds, elapsed())
        wanted[name] = files_of(scratch / name)
        model.set_adapter(name)
        logits[name] = logits_of(model)
    model.save_pretrained(folder, selected_adapters=["large"])
    (folder / "notes.txt").write_text("mine")
    model.unload()  # so that the folder can be loaded on the same base model
    moments, found = random.Random(seed), Counter[str]()
    for _ in range(kills):
        with saving(base, scratch, folder, tuple(wanted)):
            time.sleep(moments.uniform(0, 6 * seconds))
        writing, moving = any(folder.glob(".goldenedit-*.saving")), (folder / READY).exists()
        loaded = EditModel.from_pretrained(base, folder, tokenizer=tokenizer())
        held = next((name for name in wanted if files_of(folder) == wanted[name]), "neither")
        held = held if held != "neither" and torch.equal(logits_of(loaded), logits[held]) else "neither"
        loaded.unload()
        kept = (folder / "notes.txt").read_text() == "mine"
        stages = ["inside a save"] * (writing or moving) + ["finished by the load"] * moving
        found.update([f"held {held}", *stages, *["own file kept"] * kept])
    size, names = sum(map(len, wanted["large"].values())), ("held large", "held small", "held neither")
    counts = {name: found[name] for name in (*names, "inside a save", "finished by the load", "own file kept")}
    return {"check": "kill", "kills": kills, "bytes of a save": size, "seconds a save": round(seconds, 3), **counts}


def with_two_edits(base: PreTrainedModel, folder: Path) -> EditModel:
    """Return the model with two edits, "large" and "small"; only the large one has a state."""
    generator = torch.Generator().manual_seed(0)
    model = EditModel(base, EditConfig(layer=[0, 1, 2]), tokenizer())
    for name, rank in (("large", RANK), ("small", 1)):
        facts = [
            EditedFact(EditRequest("{} lies in", f"Place {number}", "Rome", "Paris"), 0.01, 0.9, 25)
            for number in range(FACTS if name == "large" else 1)
        ]
        deltas = {
            path: LowRankDelta(
                torch.randn(rank, MLP_WIDTH, generator=generator), torch.randn(WIDTH, rank, generator=generator)
            )
            for path in model.architecture.down_projections.values()
        }
        state = {f"keys/{path}": delta.A.T.contiguous() for path, delta in deltas.items()} if name == "large" else {}
        content = EditFolder([Edit(name, facts, deltas, state=state)], model.edit_config, model.base_info)
        write_edit_folder(folder / name, content, "")
        model.load_adapter(folder / name)
    return model


@contextmanager
def saving(base: PreTrainedModel, scratch: Path, folder: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Save the edits over each other in another process, which is killed when the context ends."""
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model = EditModel(base, EditConfig(layer=[0, 1, 2]), tokenizer())
            for name in names:
                model.load_adapter(scratch / name)
            os.write(started, b"x")
            while True:
                for name in names:
                    model.save_pretrained(folder, selected_adapters=[name])
        finally:
            os._exit(1)
    os.close(started)
    assert os.read(ready, 1) == b"x"
    yield
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL  # it was still saving
    os.close(ready)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of the format that a folder has."""
    return {name: (folder / name).read_bytes() for name in EDIT_FILES if (folder / name).exists()}


def logits_of(model: EditModel) -> Tensor:
    """Return the logits of a fixed text."""
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token, which is enough because edits are only loaded and saved."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))


# ---------------------------------------------------------------------- damages


def damage(scratch: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Load damaged folders of all kinds; return one row per kind with the number of each outcome."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    failures: dict[str, set[str]] = defaultdict(set)
    right, other = right_folders(tiny_model("llama"), scratch)
    for number in range(count):
        folder = scratch / f"damaged_{number}"
        make = damaged_copy if number < count / 2 else twice_damaged
        kinds, harmless = make(right, other, folder, number, str(seed))
        kind = kinds if number < count / 2 else "two of these"
        with limits() as spent, watching(folder) as events:
            outcome, message = pair_verdict(kinds, folder, right, lambda: tiny_model("llama"), tokenizer())
        beyond = [event for event in events if not event.startswith(f"open {scratch}")]  # what it is compared with
        needless = harmless and outcome != RIGHT
        outcomes[kind].update([outcome, *(["refused needlessly"] if needless else [])])
        if outcome in (*BAD, *WRONG_MUTANT, ONLY_HERE) or needless or beyond:
            failures[kind].add(f"{number} {kinds}: {outcome}: {message} {beyond}".replace(str(folder), "FOLDER")[:300])
        outcomes[kind]["longest"] = max(outcomes[kind]["longest"], math.ceil(spent[0]))
        shutil.rmtree(folder)
    return [{"check": kind, **found, "failures": sorted(failures[kind])} for kind, found in outcomes.items()]


def mutate_folders(scratch: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Load mutants of two right folders; return one row for each with the number of each outcome."""
    plain, _ = right_folders(tiny_model("llama"), scratch / "plain")
    rows = []
    rights = {"mutant": (plain, lambda: tiny_model("llama")), "mutant of gated edits": gated_folder(scratch / "gated")}
    for kind, (right, base) in rights.items():
        found, failures = Counter[str](), []
        for number in range(count // 2):
            folder = scratch / f"mutant_{number}"
            shutil.copytree(right, folder)
            is_signed = mutate(random.Random(f"{seed}/{number}"), folder)
            with limits() as spent:
                outcome, message = mutant_verdict(folder, is_signed, right, base)
            found.update([outcome])
            found["longest"] = max(found["longest"], math.ceil(spent[0]))
            if outcome in (*WRONG_MUTANT, ONLY_HERE):
                failures.append(f"{number}: {outcome}: {message}".replace(str(folder), "FOLDER")[:300])
            shutil.rmtree(folder)
        rows.append({"check": kind, **found, "failures": failures})
    return rows


@contextmanager
def limits() -> Iterator[list[float]]:
    """Let the code inside take 2 GiB, 10 seconds of the processor and a minute in all; yield a list for the seconds."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    seconds: list[float] = []

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError("It took more than 10 seconds.")

    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, before[1]))
    signal.setitimer(signal.ITIMER_PROF, 10)
    signal.alarm(60)
    started = time.process_time()
    try:
        yield seconds
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        seconds.append(time.process_time() - started)


def show(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print a table of kinds and outcomes, and what failed."""
    table = Table(Column("damage", no_wrap=True), *columns)
    total: Counter[str] = Counter()
    for row in rows:
        table.add_row(row["check"], *(str(row.get(name, "")) for name in columns))
        total.update({name: row.get(name, 0) for name in columns})
    table.add_row("all", *(str(total[name]) for name in columns))
    console = Console(width=170)
    console.print(table)
    for row in rows:
        for message in row["failures"][:20]:
            console.print(f"{row['check']}: {message}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
