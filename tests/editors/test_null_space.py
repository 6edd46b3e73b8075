"""Null-space insertion against its plain dense formula."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import FactKeys, KeyStatistics, Problem
from goldenedit.editors.alphaedit import AlphaEditOptions
from goldenedit.editors.null_space import null_space_insertion

WIDTH, OUT = 24, 5


def problem(counts=(3, 5), ridge=0.2, threshold=0.1, identity=False, seed=0) -> Problem:
    """Return a problem of subjects with so many wordings each."""
    generator = torch.Generator().manual_seed(seed)
    facts = []
    for count in counts:
        center = torch.randn(WIDTH, 1, generator=generator)
        every = center + 0.3 * torch.randn(WIDTH, count, generator=generator)
        facts.append(FactKeys(every[:, 0], every.mean(1), every=every))
    statistics = KeyStatistics(None) if identity else KeyStatistics(second_moment(WIDTH))
    values = torch.randn(OUT, len(counts), generator=generator)
    return Problem(facts, values, statistics, AlphaEditOptions(null_space_threshold=threshold, null_space_ridge=ridge))


def basis(threshold: float) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(second_moment(WIDTH))
    return vectors[:, eigenvalues < threshold]


def detectors(given: Problem) -> torch.Tensor:
    """Return the detector of each subject, `(N, d_in)`."""
    delta = null_space_insertion(given)
    assert torch.equal(delta.B, given.fact_residuals)
    return delta.A.double()


def responses(given: Problem) -> list[torch.Tensor]:
    """Return by subject what all detectors respond to its keys, `(N, wordings)`."""
    return [detectors(given) @ fact.every.double() for fact in given.facts]


@pytest.mark.parametrize("identity", [False, True])
def test_each_detector_is_the_ridge_regression_in_the_null_space(identity):
    given = problem(identity=identity)
    U = torch.eye(WIDTH, dtype=torch.float64) if identity else basis(0.1)
    assert U.shape[1] < WIDTH or identity
    P = U @ U.T
    gram = sum(fact.every.double() @ fact.every.double().T for fact in given.facts)
    for detector, fact in zip(detectors(given), given.facts, strict=True):
        expected = torch.linalg.solve(P @ gram @ P + 0.2 * torch.eye(WIDTH), P @ fact.every.double().sum(1))
        torch.testing.assert_close(detector, expected, rtol=1e-4, atol=1e-6)


def test_no_other_detector_of_the_null_space_has_a_smaller_loss():
    given = problem(counts=(4,))
    (fact,), (best,) = given.facts, detectors(given)

    def loss(detector: torch.Tensor) -> float:
        return ((detector @ fact.every.double() - 1).square().sum() + 0.2 * detector.square().sum()).item()

    for _ in range(20):
        step = basis(0.1) @ torch.randn(basis(0.1).shape[1], dtype=torch.float64)
        assert loss(best + 0.01 * step) > loss(best)


def test_keys_outside_of_the_null_space_get_no_response():
    outside = torch.linalg.eigh(second_moment(WIDTH)).eigenvectors[:, -5:]
    assert (detectors(problem()) @ outside).abs().max() < 1e-5


@pytest.mark.parametrize("identity", [False, True])
def test_without_a_ridge_each_detector_responds_to_the_wordings_of_its_own_subject_alone(identity):
    found = responses(problem(ridge=1e-9, identity=identity))
    for own, of_subject in enumerate(found):
        for index, response in enumerate(of_subject):
            expected = torch.full_like(response, float(index == own))
            torch.testing.assert_close(response, expected, rtol=0, atol=1e-3)


def test_a_ridge_shortens_detectors_and_responses():
    lengths, means = [], []
    for ridge in (1e-6, 1.0, 100.0):
        given = problem(ridge=ridge)
        lengths.append(detectors(given)[0].norm())
        means.append(responses(given)[0][0].mean())
    assert lengths == sorted(lengths, reverse=True)
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(1.0, abs=1e-3)


def test_a_wording_that_is_there_twice_with_all_others_is_half_the_ridge():
    given, halved = problem(), problem(ridge=0.1)
    twice = [FactKeys(fact.bare, fact.mean, every=torch.cat([fact.every] * 2, 1)) for fact in given.facts]
    again = Problem(twice, given.fact_residuals, given.text_statistics, given.options)
    torch.testing.assert_close(detectors(again), detectors(halved), rtol=1e-4, atol=1e-6)


def test_plain_keys_are_one_wording_each():
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(WIDTH, 3, generator=generator), torch.randn(OUT, 3, generator=generator)
    options = AlphaEditOptions(null_space_threshold=0.1, null_space_ridge=1e-9)
    given = Problem.of(keys, values, KeyStatistics(None), options)
    torch.testing.assert_close(null_space_insertion(given).dense() @ keys, values, rtol=1e-3, atol=1e-4)


def test_no_null_space_is_told():
    with pytest.raises(ValueError, match="no eigenvalue below"):
        null_space_insertion(problem(threshold=1e-12))
