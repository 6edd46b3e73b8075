"""Does an accelerator make the CPU's edits, and what does an edit of 8 billion parameters cost there? Prints one JSON.

1. A random Llama with the shape of Llama-3-8B in bfloat16, made on the accelerator: LGA over 100 facts, statistics, one
   edit, and a batch of 100: seconds, the share of them in kernels, and the peak of memory beside a plain forward's. The
   slowest phase comes with its kernels.
2. SmolLM2, if its weights are there, and tiny random models of twelve architectures: each is edited on the CPU in
   float32, and on the accelerator in float32, bfloat16 and float16, with packed and with padded replay. The error is
   the largest relative error of a change; in half precision the probability of the new answer tells more.

Parts that do not fit into `--budget` seconds are left out and named. `--small` tries the script on any machine.

    make gpu-check
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import load
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model, proxy_facts
from goldenedit.cost import profiling
from goldenedit.packaged import is_installed, packaged_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models import TINY_CONFIGS, tiny_model, tiny_tokenizer

FACT = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
TINY = {"layer": 1, "contexts": 2, "context_length": 3, "covariance_tokens": 500, "steps": 10, "phrasings": "none"}
METHODS = ("memit", "gated")
EXACT = 2e-2  # of a change in float32: steps of the optimization amplify rounding
LLAMA_3_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0,
}  # fmt: skip
SMALL = {"vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}


def main() -> None:
    """Run all parts that fit into the budget, and print their figures as one JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--budget", type=float, default=450, help="seconds")
    options.add_argument("--small", action="store_true", help="a small model in the place of the one of 8 billion")
    arguments = options.parse_args()
    device, until = torch.device(arguments.device), time.monotonic() + arguments.budget
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(device), "left out": [], "failed": {}}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    parts: dict[str, tuple[float, Callable[[], Any]]] = {}
    if is_installed("smollm2"):
        parts["llama-3-8b"] = (120, lambda: large(device, arguments.small, until))
        parts["smollm2"] = (60, lambda: real(device, until))
    parts |= {name: (5, lambda name=name: tiny(name, device, until)) for name in TINY_CONFIGS}
    for name, (least, part) in parts.items():
        if time.monotonic() + (0 if arguments.small else least) > until:
            found["left out"].append(name)
            continue
        try:
            found[name] = part()
        except Exception as error:  # the other parts are worth their figures
            found["failed"][name] = f"{type(error).__name__}: {error} at {traceback.format_tb(error.__traceback__)[-1]}"
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["failed"]))


def tiny(name: str, device: torch.device, until: float) -> dict[str, Any]:
    """Edit a tiny model on the CPU and on a device."""
    return compared(lambda: tiny_model(name), tiny_tokenizer(), METHODS, TINY, device, until)


def real(device: torch.device, until: float) -> dict[str, Any]:
    """Edit SmolLM2 on the CPU and on a device."""
    model = load("smollm2", EditConfig())
    base, tokenizer = model.get_base_model(), model.tokenizer
    return compared(lambda: base.float().cpu(), tokenizer, METHODS, {"layer": 3}, device, until)


def compared(
    load_model: Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    methods: tuple[str, ...],
    options: dict[str, Any],
    device: torch.device,
    until: float,
) -> dict[str, Any]:
    """Return the largest relative errors of a device's changes by editor, precision and replay, and seconds."""
    rows: dict[str, Any] = {}
    for method in methods:
        config = EditConfig(method=method, **options)
        with seconds_of() as on_cpu:
            expected = get_edit_model(load_model(), config, tokenizer).edit(FACT)
        rows[f"{method}, cpu seconds"] = on_cpu()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for attention in ("sdpa", "eager"):  # packed and padded replay
                if time.monotonic() > until:
                    return rows
                base = load_model().to(device, dtype)
                base.set_attn_implementation(attention)
                with seconds_of() as elapsed:
                    edit = get_edit_model(base, config, tokenizer).edit(FACT)
                errors = [
                    ((delta.dense().cpu() - expected.deltas[path].dense()).norm() / delta.dense().norm()).item()
                    if path in expected.deltas and delta.dense().shape == expected.deltas[path].dense().shape
                    else float("inf")
                    for path, delta in edit.deltas.items()
                ]
                row = {"error": max(errors), "seconds": elapsed()}
                row |= {"probability": edit.facts[0].probability_after}
                row |= {"on the cpu": expected.facts[0].probability_after}
                if dtype == torch.float32:
                    row["same"] = row["error"] < EXACT
                rows[f"{method}, {str(dtype).removeprefix('torch.')}, {attention}"] = row
    return rows


def large(device: torch.device, small: bool, until: float) -> dict[str, Any]:
    """Measure the phases of edits of a large random model that is made on the device."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_model("smollm2"))
    config = LlamaConfig(**(SMALL if small else LLAMA_3_8B))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    facts = proxy_facts()[: 4 if small else 100]
    model = EditModel(base, EditConfig(layer="lga", method="memit", proxy_size=len(facts)), tokenizer)
    ids = torch.randint(100, 40_000, (16, 16), device=device)
    with torch.no_grad(), peak_of(device) as plain:
        base(input_ids=ids)
    jobs: dict[str, Callable[[], Any]] = {
        f"LGA, {len(facts)} facts": model.select_layer,
        "statistics": lambda: model.lm.statistics(model.edit_config, model.edit_config.target_layers),
        "one edit": lambda: model.edit(facts[0]),
        f"{len(facts)} edits": lambda: model.edit(facts, into="facts"),
    }
    weights = sum(parameter.nbytes for parameter in base.parameters())
    found: dict[str, Any] = {"weights GB": weights / 1e9, "plain forward GB": plain() / 1e9, "left out": []}
    slowest: tuple[float, str] = (0.0, "")
    for name, job in jobs.items():
        if time.monotonic() > until - 60 and not small:
            found["left out"].append(name)
            continue
        activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
        with peak_of(device) as peak, seconds_of() as elapsed, profile(activities=activities) as kernels:
            with profiling() as phases:
                job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        spent = elapsed()
        averages = kernels.key_averages()
        on_device = sum(entry.self_device_time_total for entry in averages) / 1e6
        found[name] = {
            "seconds": spent,
            "in kernels": on_device / spent,
            "peak GB": peak() / 1e9,
            "phases": {phase: round(cost.seconds, 2) for phase, cost in phases.items()},
        }
        if spent > slowest[0]:
            order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            slowest = spent, name
            found["slowest"] = {
                "job": name,
                "kernels": {
                    entry.key[:80]: round(getattr(entry, order) / 1e6, 3)
                    for entry in sorted(averages, key=lambda entry: -getattr(entry, order))[:12]
                },
            }
    return found


@contextmanager
def seconds_of() -> Iterator[Callable[[], float]]:
    """Measure the seconds of this context."""
    start = time.perf_counter()
    ended: list[float] = []
    yield lambda: round((ended[0] if ended else time.perf_counter()) - start, 3)
    ended.append(time.perf_counter())


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure the peak of a device's memory inside this context; 0 on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
