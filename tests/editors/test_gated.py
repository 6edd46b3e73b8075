"""The rows of a neuron that responds to one subject, against least squares over all tokens."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import EDITORS, KeyStatistics, Problem
from goldenedit.editors.alphaedit import AlphaEditOptions
from goldenedit.editors.gated import _OTHERS, _RIDGE, _SUBJECT, InputMoments, gate_rows
from goldenedit.editors.null_space import null_space_insertion

WIDTH = 24


def moments_of(text: torch.Tensor) -> InputMoments:
    return InputMoments(text.mean(0), text.T @ text / len(text), torch.ones(4))


def random_text(count=2_000, width=WIDTH):
    """Return inputs of tokens as in language models: they share a mean, and vary more in some directions."""
    spread = torch.logspace(0, -1, width)
    return torch.linspace(1, -1, width) + torch.randn(count, width) @ torch.diag(spread) @ torch.randn(width, width) / 3


def least_squares(subject, others, text, of_subject, of_rest):
    """Return the row that is nearest to its targets over all tokens, each as often as it weighs."""
    ridge = _RIDGE * text.square().mean() * torch.eye(text.shape[1])
    blocks = [(text, 1.0, of_rest), (subject, _SUBJECT, of_subject), (others, _OTHERS, of_rest)]
    rows = [block * (weight / len(block)) ** 0.5 for block, weight, _ in blocks if len(block)]
    targets = [
        torch.full([len(block)], (weight / len(block)) ** 0.5 * aim) for block, weight, aim in blocks if len(block)
    ]
    A, b = torch.cat([*rows, ridge.sqrt()]), torch.cat([*targets, torch.zeros(len(ridge))])
    row = torch.linalg.lstsq(A.double(), b.double()[:, None]).solution[:, 0]
    return (row / (subject.double() @ row).mean()).float()


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("wordings", [1, 5])
def test_rows_are_the_least_squares_over_all_tokens(count, wordings):
    text, subject, others = random_text(), random_text(wordings) + 1, random_text(count)
    w, e = gate_rows(subject, others, moments_of(text))
    assert w.dtype == e.dtype == torch.float32
    torch.testing.assert_close(w, least_squares(subject, others, text, 1.0, -1.0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(e, least_squares(subject, others, text, 1.0, 1.0), rtol=1e-3, atol=1e-4)


def test_rows_are_one_at_the_subject_on_average():
    subject = random_text(5) + 1
    for row in gate_rows(subject, random_text(9), moments_of(random_text())):
        assert (subject @ row).mean().item() == pytest.approx(1, abs=1e-4)


def test_a_subject_that_cannot_be_told_from_text_does_not_make_the_rows_long():
    text = torch.cat([torch.randn(2_000, 8), torch.ones(2_000, 1)], 1)
    for apart in torch.linspace(0, 4, 50):  # somewhere between, the response to the subject is 0
        subject = torch.cat([torch.randn(20, 8) + apart, torch.ones(20, 1)], 1)
        w, _ = gate_rows(subject, text[:0], moments_of(text))
        assert (subject @ w).mean().item() == pytest.approx(1, abs=1e-4)
        assert (text @ w).std() < 2


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scale_of_the_inputs_does_not_change_what_the_rows_say(scale):
    text, subject, others = random_text(), random_text(3) + 1, random_text(9)
    plain = gate_rows(subject, others, moments_of(text))
    scaled = gate_rows(scale * subject, scale * others, moments_of(scale * text))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(scale * other, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("named_alike", [True, False])
def test_rows_tell_a_subject_from_text_and_from_other_subjects(named_alike):
    width = 200
    spread = torch.logspace(0.5, -0.5, width)

    def draw(count, noise=1.0):
        return 3 * (torch.arange(width) == width - 1) + noise * torch.randn(count, width) * spread

    def name(seed):
        return torch.randn(width, generator=torch.Generator().manual_seed(seed))

    ending = 5.0 * (torch.arange(width) == 1)  # what subjects share whose names end alike
    subject = [draw(8, noise=0.4) + ending + name(0) for _ in range(2)]
    others = [
        torch.cat([draw(1, noise=0.4) + ending + name(seed) for seed in range(start, start + 64)]) for start in (1, 100)
    ]
    text = draw(5_000)
    w, e = gate_rows(subject[0], others[0] if named_alike else draw(0), moments_of(text))
    assert (subject[1] @ w).min() > 0.4  # in wordings that it was not fitted to
    assert (draw(5_000) @ w < 0).float().mean() > 0.999
    for tokens in (subject[1], draw(5_000)):
        assert (tokens @ e - 1).square().mean() < 0.1
    if named_alike:  # those that it was not fitted to
        assert (others[1] @ w < 0).float().mean() > 0.9


def test_where_no_neuron_can_be_rewritten_the_change_is_that_of_null_space_insertion():
    problem = Problem.of(torch.randn(12, 3), torch.randn(6, 3), KeyStatistics(second_moment(12)), AlphaEditOptions())
    record = EDITORS.get("gated")
    change, expected = record.function(problem), null_space_insertion(problem)
    torch.testing.assert_close(change.dense(), expected.dense())
    assert record.gates
