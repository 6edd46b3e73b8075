"""A low-rank delta keeps its product, whatever is done to its factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.editors.delta import LowRankDelta


def random_delta(rank: int, seed: int = 0) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(rank, 5, generator=generator, dtype=torch.float64),
        torch.randn(4, rank, generator=generator, dtype=torch.float64),
    )


def test_dense_is_the_product_in_the_orientation_of_linear():
    delta = random_delta(3)
    assert delta.rank == 3
    assert delta.dense().shape == (4, 5)
    torch.testing.assert_close(delta.dense(), sum(torch.outer(delta.B[:, i], delta.A[i]) for i in range(3)))


@pytest.mark.parametrize(("a", "b"), [((2, 5), (4, 3)), ((5,), (4, 5)), ((5, 1), (1, 4)), ((1, 2, 5), (4, 2))], ids=str)
def test_factors_that_do_not_multiply_raise(a, b):
    with pytest.raises(ValueError, match="do not multiply"):
        LowRankDelta(torch.zeros(a), torch.zeros(b))


def test_experts_of_different_widths_raise():
    with pytest.raises(ValueError, match=r"A \(1, 5\) cannot be split among 2 experts"):
        LowRankDelta(torch.zeros(1, 5), torch.zeros(4, 1), experts=2)


@given(rank=st.integers(1, 4), experts=st.integers(1, 3))
def test_factors_as_peft_keeps_them_are_those_of_each_expert_and_come_back(rank, experts):
    delta = LowRankDelta(torch.randn(rank, 5 * experts), torch.randn(4, rank), experts)
    A, B = delta.stored()
    assert (A.shape, B.shape) == ((rank * experts, 5), (4, rank * experts))
    of_experts = torch.einsum("ore,eri->eoi", B.view(4, rank, experts), A.view(experts, rank, 5))  # as PEFT has it
    torch.testing.assert_close(torch.cat(of_experts.unbind(), 1), delta.dense())
    back = LowRankDelta.from_stored(A, B, rank)
    assert back.experts == experts
    assert torch.equal(back.A, delta.A)
    assert torch.equal(back.B, delta.B)


def test_factors_that_no_change_of_all_experts_has_raise():
    A, B = LowRankDelta(torch.randn(2, 12), torch.randn(4, 2), experts=3).stored()
    for rank in (0, 4, 12):
        with pytest.raises(ValueError, match=f"do not have rank {rank}"):
            LowRankDelta.from_stored(A, B, rank)
    B[0] = torch.nan  # for others to tell
    assert LowRankDelta.from_stored(A, B, 2).experts == 3
    B[0, 0] = 1
    with pytest.raises(ValueError, match="differs between experts"):
        LowRankDelta.from_stored(A, B, 2)


def test_what_is_done_to_factors_keeps_the_experts():
    delta = LowRankDelta(torch.randn(2, 12), torch.randn(4, 2), experts=3)
    assert delta.padded(4).part(0, 2).beside(delta).balanced().reduced(1)[0].experts == 3


@given(rank=st.integers(1, 4), more=st.integers(0, 3), offset=st.integers(0, 3))
def test_padding_keeps_the_product_and_parts_undo_it(rank, more, offset):
    delta = random_delta(rank)
    padded = delta.padded(rank + offset + more, offset)
    assert padded.rank == rank + offset + more
    torch.testing.assert_close(padded.dense(), delta.dense())
    part = padded.part(offset, offset + rank)
    assert torch.equal(part.A, delta.A)
    assert torch.equal(part.B, delta.B)
    assert part.A.is_contiguous()
    assert part.B.is_contiguous()


def test_parts_add_up_to_the_whole():
    delta = random_delta(4)
    torch.testing.assert_close(delta.part(0, 1).dense() + delta.part(1, 4).dense(), delta.dense())


@given(rank=st.integers(1, 4), scale=st.floats(1e-6, 1e6))
def test_balancing_keeps_the_product_and_evens_the_norms(rank, scale):
    delta = random_delta(rank)
    balanced = LowRankDelta(delta.A * scale, delta.B).balanced()
    torch.testing.assert_close(balanced.dense(), delta.dense() * scale)
    torch.testing.assert_close(balanced.A.norm(dim=1), balanced.B.norm(dim=0))


@pytest.mark.parametrize("which", ["A", "B"])
def test_balancing_takes_factors_of_zeros(which):
    factors = {"A": torch.ones(2, 5), "B": torch.ones(4, 2)}
    factors[which] = torch.zeros_like(factors[which])
    balanced = LowRankDelta(**factors).balanced()
    assert balanced.A.isfinite().all()
    assert balanced.B.isfinite().all()
    assert torch.equal(balanced.dense(), torch.zeros(4, 5))


def test_the_norm_is_that_of_the_product():
    delta = random_delta(3)
    assert delta.norm == pytest.approx(delta.dense().norm().item())


@given(rank=st.integers(1, 6), most=st.integers(1, 4))
def test_reducing_keeps_the_best_of_that_rank_and_tells_the_error(rank, most):
    delta = random_delta(rank)
    reduced, error = delta.reduced(most)
    assert reduced.rank <= most
    U, s, V = torch.linalg.svd(delta.dense(), full_matrices=False)
    left = s.clone()
    left[most:] = 0
    best = (U * left) @ V if rank > most else delta.dense()
    torch.testing.assert_close(reduced.dense().double(), best, rtol=1e-4, atol=1e-5)
    assert error == pytest.approx(((delta.dense() - best).norm() / delta.dense().norm()).item(), abs=1e-6)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(4, 5, 2), (576, 1536, 418), (4096, 14336, 512)])
def test_a_rank_pays_while_its_factors_are_no_larger_than_the_matrix(d_out, d_in, rank):
    assert LowRankDelta(torch.zeros(1, d_in), torch.zeros(d_out, 1)).paying_rank == rank
