"""Each numeric option at its ends: an edit is made, or an error names what to change, and nothing is silent."""

from __future__ import annotations

import re
from dataclasses import Field, fields

import pytest
import torch

from goldenedit import EditConfig, EditModel
from goldenedit.editors import EDITORS
from models import tiny_model
from tiny_edits import MERKEL, logits

FAST = {
    "layer": 1, "steps": 2, "contexts": 2, "context_length": 3, "contrast": 1, "finetune_steps": 2, "phrasings": "none",
    "kept_questions": 1, "covariance_tokens": 100, "seed": 0,
}  # fmt: skip
_SMALL, _LARGE, _MANY = 1e-30, 1e30, 40
_OF_NEURONS = ("steps", "lr", "clamp", "kl_factor", "kept_factor", "kept_questions", "contexts")
_OF_MATHS = ("covariance_tokens", "ridge", "contrast", "contrast_weight")


def numbers(entry: Field) -> list[float]:
    """Return the least and the most of a numeric option; whole numbers are counts of work, and end sooner."""
    least, above, whole = (entry.metadata[name] for name in ("least", "above", "whole"))
    first = least if least is not None else above + (1 if whole else _SMALL)
    return [int(first), _MANY] if whole else [float(first), _LARGE]


def numeric_options(method: str) -> dict[str, Field]:
    """Return the numeric options that an editor reads; of those for values, only the ones that its maths reads.

    How values are optimized is the same for all editors but `gated`, and is tried with one of them and with `gated`.
    """
    editor = EDITORS.get(method)
    of_editors = {name for other in EDITORS.available() for name in other.fields}
    shared = {entry.name: entry for entry in fields(EditConfig) if entry.name not in of_editors}
    if method != "memit":
        names = _OF_NEURONS if method == "gated" else _OF_MATHS if editor.learns == "values" else ()
        shared = {name: shared[name] for name in names}
    return {name: entry for name, entry in {**shared, **editor.fields}.items() if "whole" in entry.metadata}


ENDS = [
    (method, name, value)
    for method in EDITORS.names()
    for name, entry in numeric_options(method).items()
    for value in numbers(entry)
]


@pytest.fixture(scope="module")
def models(tokenizer) -> dict[str, EditModel]:
    """Return a model for each editor, which keeps what it has computed about itself."""
    return {name: EditModel(tiny_model("llama"), EditConfig(name, **FAST), tokenizer) for name in EDITORS.names()}


@pytest.mark.parametrize(("method", "name", "value"), ENDS)
def test_an_option_at_its_end_makes_an_edit_or_an_error_that_names_a_remedy(models, method, name, value, caplog):
    model = models[method]
    before, told = logits(model), None
    try:
        model.edit_config = EditConfig(method, **FAST | {name: value})
        model.edit(MERKEL)
    except ValueError as error:
        told = str(error)
    assert (told is None) == bool(model.edits)
    assert told is None or re.search(r"EditConfig\.[a-z_]+|learning rate", told), told
    for edit in list(model.edits.values()):
        (fact,) = edit.facts
        assert 0 <= fact.probability_after <= 1
        assert fact.takes or f"The edit of 'Angela Merkel' does not take ({fact.failure})" in caplog.text
        model.delete_adapter(edit.name)
    assert torch.equal(logits(model), before)
