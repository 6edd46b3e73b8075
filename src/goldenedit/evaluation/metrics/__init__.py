"""The scores as metrics of the `evaluate` library. They are thin wrappers of `evaluation.scores`.

Each metric takes one row per prompt, with its fact, its kind and the model's output.

Example:
    ```python
    >>> import evaluate
    >>> from goldenedit.evaluation.metrics import path_of
    >>> metric = evaluate.load(path_of("generation"))
    >>> rows = {"fact": [0, 0], "kind": ["rewrite", "rephrase"], "predictions": ["Rome.", "Paris"]}
    >>> metric.compute(**rows, references=["Rome", "Rome"])["rephrase"]
    0.0
    ```
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("probability", "token_match", "generation")


def path_of(name: str) -> str:
    """Return the path that `evaluate.load` takes for a metric: `probability`, `token_match` or `generation`.

    Raises:
        ValueError: No metric has this name.
    """
    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}. Use one of {list(NAMES)}.")
    return str(Path(__file__).parent / name)
