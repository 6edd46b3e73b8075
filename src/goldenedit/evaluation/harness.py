"""General ability, measured by EleutherAI's lm-evaluation-harness (`pip install "goldenedit[lm-eval]"`)."""

from __future__ import annotations

import copy
import difflib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from goldenedit.model import EditModel


class HarnessScore(TypedDict):
    """A figure of the harness, its standard error where it has one, and the number of items it is over."""

    value: float | None
    stderr: float | None
    n: int | None


HarnessScores = dict[str, dict[str, HarnessScore]]


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> HarnessScores:
    """Run tasks of lm-evaluation-harness on a model in memory.

    The figures are those of `lm_eval --model hf`. Most tasks load their data from the Hub. The model, the tokenizer and
    the state of the random generators are as before afterward.

    Args:
        model: A causal LM of transformers. Adapters that are active on it take effect.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups or tags of the harness, or paths to task files in YAML. A task file can run Python
            files that it names.
        include_path: A folder with further task files, found by their names.
        limit: Use the first so many items of each task; None for all.
        batch_size: How many items go through the model at once. Figures differ by rounding between batch sizes.

    Returns:
        By task, and in it by metric, the value, its standard error and the number of items. Value and error are None
        where the task has none or they are not finite, and the number is None for groups of tasks. A metric that
        filters answers is called `"exact_match,strict-match"`, others `"acc"`.

    Raises:
        ModuleNotFoundError: lm-evaluation-harness is not installed.
        ValueError: There is no such task, or a number is out of range.

    Example:
        ```python
        >>> harness_scores(model, tokenizer, ["arc_easy"], limit=100)["arc_easy"]["acc"]
        {'value': 0.61, 'stderr': 0.049, 'n': 100}
        ```
    """
    manager = _task_manager(tasks, include_path, limit, batch_size)
    return _scores(model, tokenizer, tasks, manager, limit, batch_size)


def harness_comparison(
    edit_model: EditModel,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, HarnessScores]:
    """Run tasks of lm-evaluation-harness on an edited model, and on the same model with its edits switched off.

    Args:
        edit_model: The model with its active edits.
        tasks: See `harness_scores`, as for the other arguments.
        include_path: A folder with further task files.
        limit: Use the first so many items of each task.
        batch_size: How many items go through the model at once.

    Returns:
        `{"edited": ..., "base": ...}`, each as `harness_scores` returns it.

    Raises:
        ModuleNotFoundError: lm-evaluation-harness is not installed.
        ValueError: There is no such task, or a number is out of range.

    Example:
        ```python
        >>> scores = harness_comparison(model, ["arc_easy"], limit=100)
        >>> scores["edited"]["arc_easy"]["acc"]["value"] - scores["base"]["arc_easy"]["acc"]["value"]
        -0.01
        ```
    """
    manager = _task_manager(tasks, include_path, limit, batch_size)
    base, tokenizer = edit_model.get_base_model(), edit_model.tokenizer
    edited = _scores(base, tokenizer, tasks, manager, limit, batch_size)
    with edit_model.disable_adapter():
        unedited = _scores(base, tokenizer, tasks, manager, limit, batch_size)
    return {"edited": edited, "base": unedited}


def _task_manager(
    tasks: Sequence[str], include_path: str | Path | None, limit: int | None, batch_size: int
) -> TaskManager:
    """Return what finds the tasks, after a check of all arguments."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks is a list of at least one task, got {tasks!r}.")
    if (limit is not None and limit < 1) or batch_size < 1:
        raise ValueError(f"limit and batch_size are at least 1, got {limit} and {batch_size}.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {str(include_path)!r} is not a folder. Pass the folder of your task files.")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "General ability is measured by lm-evaluation-harness, which is not installed: "
            'pip install "goldenedit[lm-eval]"'
        ) from error
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task in manager.task_index or Path(task).expanduser().is_file():
            continue
        near = difflib.get_close_matches(task, manager.all_tasks, n=5)
        remedy = f"Names near it are {', '.join(near)}." if near else "List all names with: lm_eval ls tasks"
        raise ValueError(f"{task!r} is neither a task of lm-evaluation-harness nor a task file. {remedy}")
    return manager


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None,
    batch_size: int,
) -> HarnessScores:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _as_before(model):
        with _without_warnings("lm_eval.models.huggingface"), _without_tying(model):
            # The harness gives a tokenizer without a padding token one: it gets a copy.
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        output = simple_evaluate(wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
    return {task: _by_metric(row, output["n-samples"].get(task)) for task, row in output["results"].items()}


def _by_metric(row: Mapping[str, Any], samples: Mapping[str, int] | None) -> dict[str, HarnessScore]:
    """Return the scores of a task. The harness has `"acc,none"` and `"acc_stderr,none"` among its other entries."""
    scores: dict[str, HarnessScore] = {}
    for entry, value in row.items():
        metric, comma, answers = entry.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = row.get(f"{metric}_stderr,{answers}")
        scores[metric if answers == "none" else entry] = {
            "value": _finite(value),
            "stderr": _finite(stderr),  # "N/A" where there is none
            "n": samples["effective"] if samples else None,
        }
    return scores


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


@contextmanager
def _as_before(model: PreTrainedModel) -> Iterator[None]:
    """Put back what the harness changes: the modules' modes, and the random generators, which it seeds."""
    import numpy as np  # comes with the harness

    modes = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # the one that it seeds
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, training in modes.items():
            module.training = training


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Silence a logger that warns of what is meant: that the model is in memory already."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_tying(model: PreTrainedModel) -> Iterator[None]:
    """Let the harness's call of `tie_weights()` pass: it would overwrite embeddings that an adapter has retrained."""
    vars(model)["tie_weights"] = lambda: None  # hides the method, of this object alone
    try:
        yield
    finally:
        del vars(model)["tie_weights"]
