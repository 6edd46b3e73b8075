"""The maths of ROME and R-ROME against their formulas, on random matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.editors import FactKeys, KeyStatistics, Problem
from goldenedit.editors.rome import insert, r_rome, rome

D_IN, D_OUT = 12, 7
# Factors are returned in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

seeds = st.integers(0, 1000)


def statistics_of(generator: torch.Generator, kind: str) -> KeyStatistics:
    if kind == "identity":
        return KeyStatistics(None)
    keys = torch.randn(50, D_IN, generator=generator, dtype=torch.float64)
    return KeyStatistics(keys.T @ keys / 50, ridge=0.01)


def dense_second_moment(statistics: KeyStatistics) -> torch.Tensor:
    identity = torch.eye(D_IN, dtype=torch.float64)
    C = statistics.second_moment
    return identity if C is None else C + statistics.ridge * C.trace() / D_IN * identity


def random_facts(generator: torch.Generator, count: int, anchor: bool = False) -> list[FactKeys]:
    """Return facts whose mean key is like the bare one, as contexts make it."""
    bare = torch.randn(count, D_IN, generator=generator, dtype=torch.float64)
    mean = bare + 0.3 * torch.randn(count, D_IN, generator=generator, dtype=torch.float64)
    return [FactKeys(k, k_star, None, anchor) for k, k_star in zip(bare, mean, strict=True)]


def setting(seed: int, kind: str, count: int, anchor: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    statistics = statistics_of(generator, kind)
    facts = random_facts(generator, count, anchor)
    residuals = torch.randn(D_OUT, count, generator=generator, dtype=torch.float64)
    return Problem(facts, residuals, statistics)


kinds = pytest.mark.parametrize("kind", ["random", "identity"])


@kinds
@given(seed=seeds)
def test_rome_adds_the_residual_at_the_bare_key(kind, seed):
    problem = setting(seed, kind, 1)
    (fact,) = problem.facts
    torch.testing.assert_close(rome(problem).dense().double() @ fact.bare, problem.fact_residuals[:, 0], **CLOSE)


@kinds
@given(seed=seeds)
def test_rome_is_equation_2(kind, seed):
    problem = setting(seed, kind, 1)
    (fact,) = problem.facts
    u = torch.linalg.solve(dense_second_moment(problem.statistics), fact.mean)
    expected = torch.outer(problem.fact_residuals[:, 0], u) / (u @ fact.bare)
    delta = rome(problem).dense().double()
    assert (delta - expected).norm() <= 1e-5 * expected.norm()


@kinds
@given(seed=seeds)
def test_r_rome_without_anchor_is_the_textbook_formula(kind, seed):
    problem = setting(seed, kind, 1)
    (fact,) = problem.facts
    u = torch.linalg.solve(dense_second_moment(problem.statistics), fact.mean)
    expected = torch.outer(problem.fact_residuals[:, 0], u) / (u @ fact.mean)
    delta = r_rome(problem).dense().double()
    assert (delta - expected).norm() <= 1e-5 * expected.norm()


@kinds
@given(seed=seeds)
def test_r_rome_with_anchor_answers_the_mean_key_exactly_and_the_bare_key_nearly(kind, seed):
    problem = setting(seed, kind, 1, anchor=True)
    (fact,) = problem.facts
    delta = r_rome(problem).dense().double()
    wanted = problem.fact_residuals[:, 0]
    assert (delta @ fact.mean - wanted).norm() <= 1e-5 * wanted.norm()
    assert (delta @ fact.bare - wanted).norm() <= 1e-2 * wanted.norm()


def test_r_rome_with_anchor_takes_a_bare_key_that_is_the_mean():
    problem = setting(0, "random", 1)
    mean = problem.facts[0].mean
    same, plain = (replace(problem, facts=[FactKeys(mean, mean, None, anchor)]) for anchor in (True, False))
    torch.testing.assert_close(r_rome(same).dense(), r_rome(plain).dense())


@pytest.mark.parametrize("anchor", [False, True])
@given(seed=seeds)
def test_r_rome_s_detector_answers_least_to_other_text(anchor, seed):
    problem = setting(seed, "random", 1, anchor)
    (fact,) = problem.facts
    C = dense_second_moment(problem.statistics)
    w = r_rome(problem).A[0].double()
    w = w / (w @ fact.mean)
    anchors = torch.stack([fact.mean, fact.bare] if anchor else [fact.mean])
    others = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    feasible = others - others @ torch.linalg.pinv(anchors) @ anchors  # they change no answer to the anchors
    for step in (1e-2, 1.0):
        moved = w + step * feasible
        costs = torch.einsum("ni,ij,nj->n", moved, C, moved)
        assert (costs >= (w @ C @ w) * (1 - 1e-6)).all()


@pytest.mark.parametrize("editor", [rome, r_rome])
@kinds
@given(seed=seeds, count=st.integers(2, 4))
def test_facts_together_equal_facts_one_after_the_other(editor, kind, seed, count):
    problem = setting(seed, kind, count)
    residuals = problem.fact_residuals
    weight = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for index, fact in enumerate(problem.facts):
        key = fact.bare if editor is rome else fact.mean
        missing = residuals[:, index] - weight @ key  # the wanted value, less what the facts before put there
        alone = replace(problem, facts=[fact], fact_residuals=missing[:, None])
        weight = weight + editor(alone).dense().double()
        torch.testing.assert_close(weight @ key, residuals[:, index], rtol=1e-3, atol=1e-3)
    delta = editor(problem)
    assert delta.rank == count
    assert (delta.dense().double() - weight).norm() <= 1e-4 * weight.norm()


def test_contrast_makes_the_detector_silent_on_it():
    problem = setting(0, "random", 1)
    (fact,) = problem.facts
    contrast = torch.randn(D_IN, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = r_rome(problem).dense().double()
    silent = r_rome(replace(problem, facts=[replace(fact, contrast=10 * contrast)])).dense().double()
    torch.testing.assert_close(silent @ fact.mean, problem.fact_residuals[:, 0], **CLOSE)
    assert (silent @ contrast).norm() < 0.01 * (plain @ contrast).norm()


def test_inserted_values_are_those_of_the_triangular_system():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(D_IN, 3, generator=generator, dtype=torch.float64)
    residuals = torch.randn(D_OUT, 3, generator=generator, dtype=torch.float64)
    detectors = [key / (key @ key) for key in keys.T]
    delta = insert(detectors, keys, residuals)
    A, B = torch.stack(detectors), torch.zeros(D_OUT, 3, dtype=torch.float64)
    for i in range(3):
        B[:, i] = residuals[:, i] - sum(B[:, j] * (A[j] @ keys[:, i]) for j in range(i))
    torch.testing.assert_close(delta.dense().double(), B @ A, **CLOSE)


@pytest.mark.parametrize("editor", [rome, r_rome])
def test_factors_are_balanced_and_in_float32(editor):
    delta = editor(setting(0, "random", 3))
    assert delta.A.dtype == delta.B.dtype == torch.float32
    torch.testing.assert_close(delta.A.norm(dim=1), delta.B.norm(dim=0))
    assert delta.A.shape == (3, D_IN)
    assert delta.B.shape == (D_OUT, 3)
