"""What an editor may return and must declare; a record that means nothing is refused where it is made."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from goldenedit.editors import Editor, LowRankDelta, Problem, option, relative
from goldenedit.editors.record import NoOptions
from goldenedit.editors.statistics import UnreadStatistics


@dataclass
class Options:
    ridge: float | None = relative(0.1, unit="key energy", help="Weight of the size.")
    rank: int = option(2, least=1, whole=True, help="Rank.")


@dataclass
class Incomplete:
    ridge: float


def problem(**more):
    return Problem.of(torch.randn(6, 3), torch.randn(4, 3), **more)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_factors_of_any_precision_become_float32(precision):
    K = problem().keys
    change = Editor("any", lambda posed: LowRankDelta(K.T.to(precision), posed.residuals)).solve(problem())
    assert (change.A.dtype, change.B.dtype) == (torch.float32, torch.float32)


def test_a_change_may_be_dense():
    change = Editor("any", lambda posed: posed.residuals.double() @ posed.keys.double().T).solve(posed := problem())
    torch.testing.assert_close(change, posed.residuals @ posed.keys.T)
    assert posed.folded(change) is change


def test_what_is_no_change_is_refused_by_the_name_of_the_editor():
    with pytest.raises(TypeError, match=r"'silent' returned NoneType.*LowRankDelta"):
        Editor("silent", lambda posed: None).solve(problem())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"reads": "covariance"}, r"reads .* tuple .* got 'covariance'"),
        ({"reads": ("statistics",)}, r"reads .* got \('statistics',\)"),
        ({"vectors": ("mlp", "norm")}, r"vectors .* got \('mlp', 'norm'\)"),
        ({"learns": "value"}, r"learns .* must be one of .* got 'value'"),
        ({"learns": "training", "options": Options}, "must extend TrainingOptions"),
        ({"reads": ("output_gradients",)}, "only editors with learns='training'"),
        ({"loss": "lats"}, r"loss .* must be one of .* got 'lats'"),
        ({"options": NoOptions()}, "a dataclass whose fields all have defaults"),
        ({"options": dict}, "a dataclass whose fields all have defaults"),
        ({"options": Incomplete}, "a dataclass whose fields all have defaults"),
    ],
    ids=str,
)
def test_a_record_that_means_nothing_is_refused(declared, message):
    with pytest.raises(ValueError, match=message):
        Editor("any", lambda posed: None, **declared)


def test_options_of_a_bare_problem_are_plain_numbers():
    assert problem(options=Options(ridge=0.5)).options.ridge == 0.5
    assert problem(options=Options()).options.ridge == 0.1  # without a published number the default is it
    posed = problem()
    resolved = Editor("any", lambda posed: None, options=Options).resolve({}, True, posed)
    assert resolved.ridge == pytest.approx(0.1 * posed.keys.square().sum(0).mean().item())


@pytest.mark.parametrize(
    "use",
    [
        lambda posed: posed.statistics.solve(posed.keys),
        lambda posed: posed.statistics.spectrum,
        lambda posed: posed.unit("mean eigenvalue"),
        lambda posed: posed.unit("key energy per trace"),
    ],
    ids=["solve", "spectrum", "eigenvalue", "trace"],
)
def test_statistics_that_an_editor_does_not_declare_are_refused(use):
    with pytest.raises(ValueError, match="Add 'covariance' to reads="):
        use(problem(statistics=UnreadStatistics()))
