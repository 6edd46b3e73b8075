"""A fixed edit folder with two edits of different modules and ranks."""

from __future__ import annotations

import torch

from goldenedit.config import EditConfig
from goldenedit.editing.delta import LowRankDelta
from goldenedit.requests import EditRequest
from goldenedit.storage.folder import BaseModel, Edit, EditedFact, EditFolder

PARIS = EditRequest(
    "{} is located in the city of", "The Eiffel Tower", "Rome", "Paris", ("You find The Eiffel Tower in",)
)
PIPE = EditRequest("The pipe | of\nBonn is in", "Bonn", "Köln")
FIRST, SECOND = "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"


def delta(rank: int, seed: int, d_in: int = 6, d_out: int = 4) -> LowRankDelta:
    """Return random factors."""
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))


def edit_folder() -> EditFolder:
    """Return what `edit` leaves: a batch of two facts in one layer, then one fact in two layers."""
    return EditFolder(
        [
            Edit(
                "edit_1", [EditedFact(PARIS, 0.001, 0.9876, 12), EditedFact(PIPE, 0.25, 0.5, 3)], {FIRST: delta(2, 0)}
            ),
            Edit("tower", [EditedFact(PARIS, 0.002, 0.75, 20)], {FIRST: delta(1, 1), SECOND: delta(1, 2)}),
        ],
        EditConfig(layer=[1, 2], steps=4, covariance_tokens=20_000, ridge=0.01),
        BaseModel("org/base-model", "0123456789abcdef0123456789abcdef", "a1b2c3", "LlamaForCausalLM"),
        {"goldenedit": "0.1.0", "peft": "0.21.2"},
        None,
    )


def assert_same(found: EditFolder, expected: EditFolder) -> None:
    """Assert that two contents are equal, factors bit by bit."""
    assert (found.config, found.base_model, found.versions, found.proxy_hash) == (
        expected.config,
        expected.base_model,
        expected.versions,
        expected.proxy_hash,
    )
    assert [edit.name for edit in found.edits] == [edit.name for edit in expected.edits]
    for one, other in zip(found.edits, expected.edits, strict=True):
        assert (one.facts, one.fan_in_fan_out) == (other.facts, other.fan_in_fan_out)
        assert list(one.deltas) == sorted(other.deltas)
        for path, factors in one.deltas.items():
            # An edit's smaller deltas come back padded to its rank.
            wanted = other.deltas[path].padded(other.rank)
            assert torch.equal(factors.A, wanted.A)
            assert torch.equal(factors.B, wanted.B)
