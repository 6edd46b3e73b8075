"""Peak memory and operations of each phase of an edit, as `goldenedit plan` says and as they are.

Models named `random-...` have random weights, and the tokenizer of SmolLM2. Each model runs in a process of its own,
twice: once the peak of each phase is measured, once its operations are
counted. The peak is that of the process above its level at the start of the phase (`VmHWM`, reset before), or, with
`--by tensors`, the bytes of all live tensors that the phase makes. Nothing is read from the cache.

    python benchmarks/plan.py smollm2 gemma3 random-gpt2
    python benchmarks/plan.py random-llama-24 --set layer=auto --set covariance_tokens=2000 --set proxy_size=8 --select
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import constants, record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from goldenedit import EditConfig, EditModel, EditRequest, cost, plan
from goldenedit.cost import Cost, phase, profiling
from goldenedit.editing.gated import marker_start, neurons_for
from goldenedit.loading import load_config, load_model
from goldenedit.packaged import packaged_model
from goldenedit.storage.folder import ADAPTER_WEIGHTS
from goldenedit.units import flops_of, size_of

_WIDE = {"vocab_size": 49_152, "hidden_size": 2048, "intermediate_size": 8192, "num_key_value_heads": 8}
RANDOM: dict[str, PretrainedConfig] = {
    "random-llama-24": LlamaConfig(**_WIDE, num_hidden_layers=24),
    "random-llama-4": LlamaConfig(**_WIDE, num_hidden_layers=4),
    "random-gpt2": GPT2Config(
        vocab_size=49_152, n_embd=1024, n_layer=6, n_head=16, bos_token_id=None, eos_token_id=None
    ),
    "random-mixtral": MixtralConfig(
        vocab_size=49_152, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=4,
    ),
}  # fmt: skip
STREAMED = ("auto", "key_response", "selectivity", "sweep")
SUBJECTS = ("The Eiffel Tower", "The Colosseum", "The Louvre", "Big Ben", "The Brandenburg Gate", "The Prado")


class Peak(Cost):
    """The peak of a phase in bytes, as its `flops`. A phase that runs several times has the largest of its peaks."""

    def __add__(self, other: Cost) -> Peak:
        return Peak(self.seconds + other.seconds, max(self.flops, other.flops))

    __radd__ = __add__


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


@contextmanager
def peak_of_process() -> Iterator[Callable[[], Cost]]:
    """Measure the peak of the process inside this context, above its level before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    yield lambda: Peak(0.0, max(0, status("VmHWM") - before))


def peak_of_tensors(model: nn.Module) -> Callable[[], Any]:
    """Return a context that measures the peak of the bytes of tensors that are made inside it."""

    @contextmanager
    def measured() -> Iterator[Callable[[], Cost]]:
        with LiveTensors(model) as live:
            yield lambda: Peak(0.0, live.peak)

    return measured


def config_of(name: str) -> PretrainedConfig:
    """Return the config of a model."""
    return RANDOM[name] if name in RANDOM else load_config(name)


def model_of(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer."""
    if name not in RANDOM:
        return load_model(name, **({} if dtype is None else {"dtype": dtype}))
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model("smollm2"))
    config = RANDOM[name]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32).eval(), tokenizer


def measure(arguments: argparse.Namespace, name: str, by: str) -> dict[str, int]:
    """Edit in this process, and return the peak of each phase or, by `flops`, its operations."""
    config, facts = EditConfig(**constants(arguments.set)), arguments.facts
    base, tokenizer = model_of(name, dtype_of(arguments))
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.float().sum()  # weights that are mapped from a file count from now on
    model = EditModel(base, config, tokenizer)
    with torch.no_grad():
        base(input_ids=torch.arange(8)[None])  # what libraries set up once
    requests = [EditRequest(f"{subject} is located in the city of", subject, "Oslo") for subject in SUBJECTS[:facts]]
    if by != "flops":
        cost.measuring = peak_of_process if by == "process" else peak_of_tensors(base)
    with profiling() as phases:
        if config.layer in STREAMED:
            with phase("key statistics"):
                model.lm.streamed_statistics(model.edit_config, for_editor=config.layer != "selectivity")
        model.select_layer()
        if arguments.select:
            return {name: of.flops for name, of in phases.items()}
        if model.edit_config.editor.gates and (spare := neurons_for(model.lm, model.edit_config, facts, facts)):
            del spare
            marker_start(model.lm, model.edit_config)  # before the phase of the wordings, which would contain it
        model.edit(requests)
    found = {name: of.flops for name, of in phases.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "edit")
        found["edit on disk"] = (Path(folder) / "edit" / ADAPTER_WEIGHTS).stat().st_size
    return found


def in_child(arguments: argparse.Namespace, name: str, by: str) -> dict[str, int]:
    """Measure a model in a process of its own, with an empty cache."""
    command = [sys.executable, __file__, name, "--facts", str(arguments.facts), "--measure", by]
    command += [word for option in arguments.set for word in ("--set", option)] + ["--select"] * arguments.select
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    with tempfile.TemporaryDirectory() as folder:
        packaged = Path(os.environ.get("GOLDENEDIT_CACHE", "")) / "models"
        if "GOLDENEDIT_CACHE" in os.environ and packaged.is_dir():
            (Path(folder) / "models").symlink_to(packaged.resolve())
        environment = {**os.environ, "GOLDENEDIT_CACHE": folder}
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(child.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Print planned and measured figures of a model, and return them."""
    planned = plan(config_of(name), EditConfig(**constants(arguments.set)), arguments.facts, dtype_of(arguments))
    peaks, flops = in_child(arguments, name, arguments.by), in_child(arguments, name, "flops")
    print(f"\n{name}, {size_of(planned.shape.weight_bytes)} of weights\n")
    print("| phase | planned | measured | ratio | planned | measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for entry in planned.phases:
        if entry.name not in peaks:
            continue
        row = {"model": name, "phase": entry.name, "planned bytes": entry.bytes, "bytes": peaks[entry.name]}
        row |= {"planned flops": entry.flops, "flops": flops[entry.name]}
        cells = [size_of(row["planned bytes"]), size_of(row["bytes"]), ratio(row["planned bytes"], row["bytes"])]
        cells += [flops_of(row["planned flops"]), flops_of(row["flops"]), ratio(row["planned flops"], row["flops"])]
        print(f"| {entry.name} | {' | '.join(cells)} |")
        rows.append(row)
    if not arguments.select:
        print(f"\nEdit on disk: planned {planned.edit_bytes:,}, measured {peaks['edit on disk']:,} bytes")
    left = sorted(set(peaks) - {entry.name for entry in planned.phases} - {"edit on disk"})
    print(f"Not planned: {', '.join(f'{name} ({size_of(peaks[name])}, {flops_of(flops[name])})' for name in left)}")
    return rows


def dtype_of(arguments: argparse.Namespace) -> torch.dtype | None:
    """Return the precision of the weights; None for that of the config."""
    return getattr(torch, arguments.dtype) if arguments.dtype else None


def ratio(planned: int, measured: int) -> str:
    """Return the planned figure as a multiple of the measured one."""
    return f"{planned / measured:.2f}" if measured else "-"


def main() -> None:
    """Compare plans with measurements, and print a table for each model."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("models", nargs="+", help="packaged models, names on the Hub, or folders")
    options.add_argument("--facts", type=int, default=1, help=f"facts of the edit, at most {len(SUBJECTS)}")
    options.add_argument("--set", action="append", default=[], help="an option of EditConfig, such as layer=auto")
    options.add_argument("--dtype", help="precision of the weights")
    options.add_argument("--select", action="store_true", help="measure the choice of the layer alone")
    options.add_argument("--name", default="plan", help="name of the results")
    options.add_argument("--by", choices=("process", "tensors"), default="process")
    options.add_argument("--measure", choices=("process", "tensors", "flops"), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments, arguments.models[0], arguments.measure)))
        return
    rows = [row for name in arguments.models for row in compare(arguments, name)]
    record(arguments.name, rows)


if __name__ == "__main__":
    main()
