"""Peak memory of each phase of an edit, compared with a plain forward of the same batch.

Each phase runs in a separate process, after the model is loaded and all weights have been read. Two peaks above that
level are measured: the memory of the process (`VmHWM`, reset before the phase), and the bytes of all live tensors
except the weights. The plain forward is `model(input_ids, attention_mask)` without gradients, with logits at all
positions. The goal is that the peak of an edit, weights included, is at most 1.35 times the peak of the plain forward.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import load, parser, record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from goldenedit import EditConfig, EditModel, EditRequest, proxy_facts
from goldenedit.architecture import read_architecture
from goldenedit.editing.prepared import prepare_facts
from goldenedit.editing.values import fact_rows
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.layer_selection import lga_scores
from goldenedit.lm.covariance import sampled_texts
from goldenedit.lm.statistics import second_moments
from goldenedit.lm.tokens import encode, pad, padding_id

GOAL = 1.35
TOKENS = 2048  # of the key statistics: one batch
PHASES = ("read", "lga", "statistics", "values", "solve", "edit", "save", "load")


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return, until their storage is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def status(name: str) -> int:
    """Return a size from the kernel's status file of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def measure(model: nn.Module, run: Callable[[], Any], by: str) -> int:
    """Return the peak of `run` above the level before it, in bytes, for the process or for tensors.

    Both cannot be measured at once, because tracking tensors needs memory itself.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if by == "tensors":
        with LiveTensors(model) as live:
            kept = run()
        del kept
        return live.peak
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = run()
    del kept
    return status("VmHWM") - before


def jobs(model: EditModel, facts: Sequence[EditRequest], scratch: Path) -> dict[str, tuple[Callable, Callable]]:
    """Return what to measure and its preparation for each phase; `plain <phase>` is the forward of its batch."""
    base, tokenizer, config, lm = model.get_base_model(), model.tokenizer, model.edit_config, model.lm
    device, ready = torch.device("cpu"), {}

    def plain(batch: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable, Callable]:
        def forward() -> Any:
            with torch.no_grad():
                return base(input_ids=ready["batch"][0], attention_mask=ready["batch"][1])

        return forward, lambda: ready.update(batch=batch())

    def values_batch() -> tuple[Tensor, Tensor]:
        rows = fact_rows(tokenizer, facts, lm.contexts(config), None)
        batch = pad([row for own in rows for row in own], padding_id(tokenizer), device)
        return batch.input_ids, batch.attention_mask

    def lga_batch() -> tuple[Tensor, Tensor]:
        rows = [encode(tokenizer, fact.text, answer) for fact in proxy_facts()[:4] for answer in _answers(fact)]
        batch = pad(rows, padding_id(tokenizer), device)
        return batch.input_ids, batch.attention_mask

    def probe_batch() -> tuple[Tensor, Tensor]:
        return torch.arange(1000, 1008)[None], torch.ones(1, 8, dtype=torch.long)

    def text_batch() -> tuple[Tensor, Tensor]:
        return torch.randint(100, 1000, (TOKENS // 32, 32)), torch.ones(TOKENS // 32, 32, dtype=torch.long)

    def prepare() -> Any:
        return prepare_facts(lm, facts, config, lm.contexts(config))

    def saved() -> None:
        model.edit(facts)
        model.save_pretrained(scratch)

    return {
        "plain read": plain(probe_batch),
        "read": (lambda: read_architecture(base), lambda: None),
        "plain lga": plain(lga_batch),
        "lga": (lambda: lga_scores(lm, proxy_facts()[:16]), lambda: None),
        "plain statistics": plain(text_batch),
        "statistics": (
            lambda: second_moments(lm, ready["texts"], config.target_layers, TOKENS),
            lambda: ready.update(texts=sampled_texts(lm, TOKENS, 0)),
        ),
        "plain values": plain(values_batch),
        "values": (prepare, lambda: lm.contexts(config)),
        "solve": (
            lambda: ready["facts"].changes(config, {layer: KeyStatistics(None) for layer in config.target_layers}),
            lambda: ready.update(facts=prepare()),
        ),
        "edit": (lambda: model.edit(facts), lambda: lm.contexts(config)),
        "save": (lambda: model.save_pretrained(scratch), lambda: model.edit(facts)),
        "load": (
            lambda: EditModel.from_pretrained(ready["base"], scratch, tokenizer=tokenizer),
            lambda: (saved(), ready.update(base=model.unload())),
        ),
    }


def _answers(fact: EditRequest) -> tuple[str, str]:
    assert fact.target_true is not None
    return fact.target_true, fact.target_new


def run_phase(arguments: argparse.Namespace) -> None:
    """Measure one phase in this process, and print its peak."""
    config = EditConfig(layer=arguments.layer, covariance="identity", batch_size=arguments.facts)
    model = load(arguments.model, config)
    base = model.get_base_model()
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.float().sum()  # weights that are mapped from a file count from now on
    facts = proxy_facts()[: arguments.facts]
    with tempfile.TemporaryDirectory() as scratch:
        run, prepare = jobs(model, facts, Path(scratch) / "edit")[arguments.phase]
        with torch.no_grad():
            base(input_ids=torch.arange(8)[None])  # what libraries set up once
        prepare()
        peak = measure(base, run, arguments.by)
    weights = sum(parameter.untyped_storage().nbytes() for parameter in base.parameters())
    print(json.dumps({"peak": peak, "weights": weights}))


def main() -> None:
    """Measure every phase, and print a table."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=1, help="facts of the batch that is edited")
    options.add_argument("--layer", type=int, default=3)
    options.add_argument("--phases", nargs="+", default=PHASES)
    options.add_argument("--phase", help="measure this one in this process (what the others do is a process each)")
    options.add_argument("--by", choices=("process", "tensors"), default="process")
    arguments = options.parse_args()
    if arguments.phase:
        run_phase(arguments)
        return

    @functools.cache
    def peak(phase: str, by: str) -> tuple[int, int]:
        shared = ["--model", arguments.model, "--facts", str(arguments.facts), "--layer", str(arguments.layer)]
        command = [sys.executable, __file__, *shared, "--phase", phase, "--by", by]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        return found["peak"], found["weights"]

    rows: list[dict[str, Any]] = []
    print(f"| phase | {' | '.join(('tensors', 'of the forward', 'process', 'of the forward', 'with weights'))} |")
    print("|---|---|---|---|---|---|")
    for phase in arguments.phases:
        beside = f"plain {phase}" if phase in ("read", "lga", "statistics") else "plain values"
        row: dict[str, Any] = {"model": arguments.model, "facts": arguments.facts, "phase": phase}
        for by in ("tensors", "process"):
            own, weights = peak(phase, by)
            plain, _ = peak(beside, by)
            row |= {"weights MB": round(weights / 1e6, 1), f"{by} MB": round(own / 1e6, 1)}
            row |= {f"{by} of the plain forward MB": round(plain / 1e6, 1)}
            row[f"{by} ratio with weights"] = round((weights + own) / (weights + plain), 3)
        cells = [row[name] for by in ("tensors", "process") for name in (f"{by} MB", f"{by} of the plain forward MB")]
        ratio = f"{row['tensors ratio with weights']} / {row['process ratio with weights']}"
        print(f"| {phase} | {' | '.join(map(str, cells))} | {ratio} |", flush=True)
        rows.append(row)
    missed = [row["phase"] for row in rows if row["tensors ratio with weights"] > GOAL]
    print(f"Above {GOAL}: {missed or 'none'}")
    record(f"memory-{arguments.model}-{arguments.facts}", rows)


if __name__ == "__main__":
    main()
