"""What the benchmarks share: models, facts, single edits in batches, and results with machine and versions."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenedit import EditConfig, EditModel, EditRequest, load_requests, proxy_facts
from goldenedit.commands.options import read_option
from goldenedit.editing.prepared import PreparedFacts, prepare_facts
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.evaluation.counterfact import fact_likelihoods, known_facts
from goldenedit.evaluation.scores import FactLikelihoods, ProbabilityScores, probability_scores
from goldenedit.packaged import PACKAGED_MODELS, packaged_model

RESULTS = Path(__file__).parent / "results"
NEIGHBORS = 5
DATASETS = ("counterfact", "zsre", "wiki_recent", "wiki_counterfact")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", default="smollm2", help="a packaged model, a name on the Hub, or a folder")
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    found.add_argument("--data", type=Path, default=shared, help="folder with counterfact.json")
    return found


def load(name: str, config: EditConfig, dtype: str = "auto") -> EditModel:
    """Load a model for editing, without choosing a layer. By default it has the precision of its file."""
    source = str(packaged_model(name)) if name in PACKAGED_MODELS else name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return EditModel(model, config, AutoTokenizer.from_pretrained(source))


@contextmanager
def rounded_products() -> Iterator[None]:
    """Allow float32 products to be rounded, and disable the fused attention kernel, which is then slow on few tokens.

    On the processor of the tables, last hidden states, which are as large as 57, change by at most 0.002.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def known_counterfacts(model: EditModel, data: Path) -> list[EditRequest]:
    """Return the CounterFact records whose old answer the model prefers, in the order of the file."""
    requests = load_requests(data / "counterfact.json")
    return [requests[index] for index in known_facts(model.lm, requests)]


def preferring_proxy(model: EditModel) -> list[EditRequest]:
    """Return the packaged proxy facts whose old answer the model prefers: facts to choose constants on."""
    requests = proxy_facts()
    return [requests[index] for index in known_facts(model.lm, requests)]


def constants(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse options of the form `name=value` from the command line; values are JSON or plain text."""
    return dict(map(read_option, assignments))


def preferring(
    model: EditModel, data: Path, count: int, skip: int = 0, without: Collection[EditRequest] = ()
) -> tuple[list[EditRequest], list[FactLikelihoods]]:
    """Return CounterFact records whose old answer the model prefers by any margin, and the model's answers to them."""
    requests, before = [], []
    for request in load_requests(data / "counterfact.json"):
        if request in without or len(requests) == skip + count:
            continue
        found = fact_likelihoods(model.lm, request, NEIGHBORS)
        new, old = found.rewrite
        if old < new:
            requests.append(request)
            before.append(found)
    return requests[skip:], before[skip:]


def prepare(
    model: EditModel, requests: Sequence[EditRequest], statistics: Mapping[int, KeyStatistics] | None = None
) -> PreparedFacts:
    """Optimize the values of several facts in one batch, for edits that are made one by one later.

    Args:
        statistics: For values that are optimized under the change that inserts them.
    """
    contexts = model.lm.contexts(model.edit_config)
    return prepare_facts(model.lm, requests, model.edit_config, contexts, statistics=statistics)


def score_single_edits(
    model: EditModel,
    facts: PreparedFacts,
    statistics: dict[int, KeyStatistics],
    method: str = "r-rome",
    neighbors: int | None = NEIGHBORS,
    counts: Sequence[int] = (),
) -> dict[int, ProbabilityScores]:
    """Make, measure and undo each edit separately; score the first `counts` facts, by default all."""
    config, measured = replace(model.edit_config, method=method), []
    for index, request in enumerate(facts.requests):
        with applied(model, lambda index=index: facts.changes(config, statistics, chosen=[index]).deltas):
            measured.append(fact_likelihoods(model.lm, request, neighbors))
    return {count: probability_scores(measured[:count]) for count in counts or [len(measured)]}


@contextmanager
def applied(model: EditModel, deltas: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Apply deltas to linear maps of some layers inside this context."""
    with model.architecture.adding_deltas(model.lm.model, deltas()):
        yield


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the start of the context, up to now or to its end."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: (ended[0] if ended else time.perf_counter()) - started
    ended.append(time.perf_counter())


def machine() -> dict[str, Any]:
    """Return a description of the machine and the versions that the figures depend on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "goldenedit")}
    return {"processor": processor, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def record(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a benchmark to results/, with machine and versions."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def as_row(scores: ProbabilityScores) -> dict[str, Any]:
    """Return scores rounded for a table."""
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(scores).items()}
