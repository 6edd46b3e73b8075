"""The estimate of how many facts fit: never none, never more for less memory or larger facts."""

from __future__ import annotations

import pytest
import torch

from goldenedit.editing.budget import facts_at_once, free_memory
from models import tiny_model

FACT = {"layers": 30, "mlp_width": 1536, "rows": 11, "tokens": 40, "answer_tokens": 3}


def test_a_fact_always_runs():
    assert facts_at_once(tiny_model("llama"), **FACT, free=0) == 1


def test_less_memory_and_larger_facts_mean_fewer_side_by_side():
    model = tiny_model("llama")
    counts = [facts_at_once(model, **FACT, free=free) for free in (1 << 26, 1 << 30, 1 << 36)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    for name in FACT:
        assert facts_at_once(model, **FACT | {name: 4 * FACT[name]}, free=1 << 30) <= counts[1]


@pytest.mark.parametrize("free", [1 << 28, 1 << 30])
def test_what_is_kept_for_the_facts_fits(free):
    """Held against what autograd really keeps, counted by a hook on every saved tensor."""
    model = tiny_model("llama").requires_grad_(False)
    rows, tokens = 4, 20
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embedded = torch.randn(rows, tokens, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embedded).logits.log_softmax(-1).sum()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    fact = {"layers": 3, "mlp_width": 64, "rows": rows, "tokens": tokens, "answer_tokens": tokens}
    count = facts_at_once(model, **fact, free=free)
    assert count == 16 or count * kept <= free


def test_free_memory_is_told():
    assert free_memory(torch.device("cpu")) > 1 << 20
