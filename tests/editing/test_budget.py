"""The estimate of how many facts fit: never none, never more for less memory or larger facts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.editing.budget import facts_at_once, free_memory, groups_by_length
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


@given(lengths=st.lists(st.integers(1, 12), max_size=7).map(sorted), rows=st.integers(1, 12), most=st.integers(1, 4))
def test_groups_by_length_cost_no_more_than_any_other_split(lengths, rows, most):
    def cost(groups):
        return sum(64 + len(lengths[some]) * rows * lengths[some][-1] for some in groups)

    def splits(start=0):
        if start == len(lengths):
            yield []
        for end in range(start + 1, min(len(lengths), start + most) + 1):
            yield from ([slice(start, end), *others] for others in splits(end))

    found = groups_by_length(lengths, rows, most, torch.device("cpu"))
    assert [index for some in found for index in range(some.start, some.stop)] == list(range(len(lengths)))
    assert all(some.stop - some.start <= most for some in found)
    assert cost(found) == min(map(cost, splits()))


def test_where_a_step_costs_more_than_its_tokens_facts_stay_together():
    assert len(groups_by_length([2, 2, 9, 9], 11, 16, torch.device("cpu"))) == 2
    assert len(groups_by_length([2, 2, 9, 9], 11, 16, torch.device("cuda"))) == 1


@given(count=st.integers(0, 40), most=st.integers(1, 16))
def test_without_padding_there_are_as_few_groups_as_fit(count, most):
    found = groups_by_length([1] * count, 11, most, torch.device("cpu"), padded=False)
    assert [index for some in found for index in range(some.start, some.stop)] == list(range(count))
    assert len(found) == -(-count // most)
    assert all(some.stop - some.start <= most for some in found)
