"""The rows of neurons that respond to a subject or where an answer is due, against least squares over all tokens."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment

from goldenedit.editors import EDITORS, KeyStatistics, Problem
from goldenedit.editors.alphaedit import AlphaEditOptions
from goldenedit.editors.gated import (
    _MARKED,
    _NEITHER,
    _ONE_ALONE,
    _RIDGE,
    ANSWER_WEIGHTS,
    SUBJECT_WEIGHTS,
    InputMoments,
    answer_rows,
    gate_rows,
)
from goldenedit.editors.null_space import null_space_insertion

WIDTH = 24


def moments_of(text: torch.Tensor) -> InputMoments:
    return InputMoments(text.mean(0), text.T @ text / len(text), torch.ones(4))


def random_text(count=2_000, width=WIDTH):
    """Return inputs of tokens as in language models: they share a mean, and vary more in some directions."""
    spread = torch.logspace(0, -1, width)
    return torch.linspace(1, -1, width) + torch.randn(count, width) @ torch.diag(spread) @ torch.randn(width, width) / 3


def least_squares(here, elsewhere, text, weights, on_text):
    """Return the row that is nearest to its targets over all tokens, each as often as it weighs, and its response."""
    ridge = _RIDGE * text.square().mean() * torch.eye(text.shape[1])
    blocks = [(text, 1.0, on_text)]
    blocks += [(group, weights[0] / len(here), 1.0) for group in here]
    for groups, response in elsewhere:
        some = [group for group in groups if len(group)]
        blocks += [(group, weights[1] / len(some), response) for group in some]
    rows = [block * (weight / len(block)) ** 0.5 for block, weight, _ in blocks]
    targets = [torch.full([len(block)], (weight / len(block)) ** 0.5 * aim) for block, weight, aim in blocks]
    A, b = torch.cat([*rows, ridge.sqrt()]), torch.cat([*targets, torch.zeros(len(ridge))])
    row = torch.linalg.lstsq(A.double(), b.double()[:, None]).solution[:, 0]
    response = torch.stack([(group.double() @ row).mean() for group in here]).mean()
    return (row / response).float(), response.item()


def expected_rows(here, elsewhere, text, weights, on_text=-1.0):
    """Return both rows, with the weight of the tokens to respond to raised until both clearly respond."""
    everywhere = [(groups, 1.0) for groups, _ in elsewhere]
    for raised in range(10):
        of_raised = weights[0] * 4.0**raised, weights[1]
        w, response = least_squares(here, elsewhere, text, of_raised, on_text)
        e, of_all = least_squares(here, everywhere, text, of_raised, 1.0)
        if min(response, of_all) >= 0.5:
            return (w, e), raised
    raise AssertionError("these tokens cannot be told from text")


@pytest.mark.parametrize(
    ("weights", "on_text"), [(SUBJECT_WEIGHTS, -1.0), (ANSWER_WEIGHTS, 0.0), (ANSWER_WEIGHTS, _NEITHER)]
)
@pytest.mark.parametrize("elsewhere", [[[]], [[0]], [[1]], [[40, 3]], [[40], [3]], [[], [0, 7], [20, 1, 5]]], ids=str)
@pytest.mark.parametrize("here", [[1], [5], [2, 9, 30]], ids=str)
def test_rows_are_the_least_squares_over_all_tokens(here, elsewhere, weights, on_text):
    text = random_text()
    here = [random_text(count) + 1 for count in here]
    elsewhere = [
        ([random_text(count) - index for count in counts], -1.0 - index) for index, counts in enumerate(elsewhere)
    ]
    rows = gate_rows(here, elsewhere, moments_of(text), weights, on_text)
    expected, _ = expected_rows(here, elsewhere, text, weights, on_text)
    for row, of_row in zip(rows, expected, strict=True):
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, of_row, rtol=1e-3, atol=1e-4)


def test_tokens_that_are_hard_to_tell_from_others_weigh_more():
    text = random_text()
    here = silent = text[:4] + 1
    rows = gate_rows([here], [([silent], -1.0)], moments_of(text), SUBJECT_WEIGHTS)
    expected, raised = expected_rows([here], [([silent], -1.0)], text, SUBJECT_WEIGHTS)
    assert raised > 0
    for row, of_row in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, of_row, rtol=1e-2, atol=1e-3)


def test_groups_weigh_alike_whatever_their_sizes():
    text, one, other = random_text(), random_text(3) + 1, random_text(5) + 1
    silent, rest = random_text(4), random_text(6) - 1

    def rows(here, elsewhere):
        return gate_rows(here, [(elsewhere, -0.85)], moments_of(text), ANSWER_WEIGHTS, -2.0)

    plain = rows([one, other], [silent, rest])
    repeated = rows([one.repeat(7, 1), other], [silent.repeat(9, 1), rest])  # as if one kind had many more
    joined = rows([torch.cat([one, other])], [torch.cat([silent, rest])])
    for row, same, different in zip(plain, repeated, joined, strict=True):
        torch.testing.assert_close(same, row, rtol=1e-3, atol=1e-4)
        assert (different - row).norm() > 1e-2 * row.norm()


def test_a_group_without_tokens_counts_for_nothing():
    text, here, silent = random_text(), random_text(3) + 1, random_text(5)
    plain = gate_rows([here], [([silent], -0.85)], moments_of(text), ANSWER_WEIGHTS)
    elsewhere = [([silent, text[:0]], -0.85), ([text[:0]], -2.0), ([], -2.0)]
    padded = gate_rows([text[:0], here], elsewhere, moments_of(text), ANSWER_WEIGHTS)
    for row, same in zip(plain, padded, strict=True):
        torch.testing.assert_close(same, row)


@pytest.mark.parametrize("others", [[], [random_text(5) + 0.7, random_text(8) + 0.6]], ids=["alone", "beside others"])
def test_the_gate_of_an_answer_knows_both_and_its_up_projection_knows_the_marker(others):
    text = random_text()
    here, not_marked = [random_text(3) + 1, random_text(7) + 1], [random_text(4) + 0.5, random_text(6) + 0.5]
    not_asked, outside = random_text(9) + 0.5, random_text(30)
    both = [([outside], _NEITHER), ([not_asked], _ONE_ALONE), (not_marked, _ONE_ALONE), (others, _ONE_ALONE)]
    marked = [([outside], 0.0), ([not_asked], _MARKED), (not_marked, 0.0), (others, _MARKED)]
    w, e = gate_rows(here, both, moments_of(text), ANSWER_WEIGHTS, _NEITHER)
    u, _ = gate_rows(here, marked, moments_of(text), ANSWER_WEIGHTS, 0.0)
    found = answer_rows(here, not_asked, not_marked, outside, moments_of(text), others)
    for row, expected in zip(found, (w, u, e), strict=True):
        torch.testing.assert_close(row, expected)


def test_rows_are_one_at_the_subject_on_average():
    subject = random_text(5) + 1
    for row in gate_rows([subject], [([random_text(9)], -1.0)], moments_of(random_text()), SUBJECT_WEIGHTS):
        assert (subject @ row).mean().item() == pytest.approx(1, abs=1e-4)


def test_a_subject_that_cannot_be_told_from_text_does_not_make_the_rows_long():
    text = torch.cat([torch.randn(2_000, 8), torch.ones(2_000, 1)], 1)
    for apart in torch.linspace(0, 4, 50):  # somewhere between, the response to the subject is 0
        subject = torch.cat([torch.randn(20, 8) + apart, torch.ones(20, 1)], 1)
        w, _ = gate_rows([subject], [], moments_of(text), SUBJECT_WEIGHTS)
        assert (subject @ w).mean().item() == pytest.approx(1, abs=1e-4)
        assert (text @ w).std() < 2


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scale_of_the_inputs_does_not_change_what_the_rows_say(scale):
    text, subject, others = random_text(), random_text(3) + 1, random_text(9)
    plain = gate_rows([subject], [([others], -1.0)], moments_of(text), SUBJECT_WEIGHTS)
    scaled = gate_rows([scale * subject], [([scale * others], -1.0)], moments_of(scale * text), SUBJECT_WEIGHTS)
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
    silent = [([others[0]], -1.0)] if named_alike else []
    w, e = gate_rows([subject[0]], silent, moments_of(text), SUBJECT_WEIGHTS)
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
