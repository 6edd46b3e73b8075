"""Which layers are edited together, given the scores."""

from __future__ import annotations

import pytest

from goldenedit.config import EditConfig
from goldenedit.layer_selection import choose

SCORES = [1.0, 90.0, 2.0, None, 5.0, 6.0, 4.0, 3.0]  # layer 1 lies outside the fence, layer 5 is the golden one


@pytest.mark.parametrize(
    ("pattern", "count", "expected"),
    [
        ("golden", 3, 5),
        ("ladder", 3, [5, 6, 7]),
        ("ladder", 2, [5, 6]),
        ("ladder", 99, [5, 6, 7]),
        ("ladder", 1, 5),
        ("upper", 3, 5),  # the others come too late for the layer of the answers
        ("auto", 3, 5),  # of the default editor
        ("window", 2, [4, 5]),
        ("window", 3, [4, 5]),  # layer 3 has nothing to edit
        ("window", 10, [0, 1, 2, 4, 5]),
        ("window", 1, 5),
        ("ends", 4, [2, 5]),
        ("ends", 1, 5),
        ("best", 3, [4, 5, 6]),
        ("best", 99, [0, 2, 4, 5, 6, 7]),
        ("best", 1, 5),
    ],
)
def test_the_pattern_decides(pattern, count, expected):
    assert choose(EditConfig(layer_scores=SCORES, layer_pattern=pattern, pattern_layers=count)) == expected


def test_the_steps_of_a_ladder_are_a_tenth_of_the_model():
    scores = [3.0, *(2.0 + index / 100 for index in range(29))]
    scores[4] = 2.9
    config = EditConfig(layer_scores=scores, tukey_kappa=9.0, layer_pattern="ladder")
    assert choose(config) == [0, 3, 6]


@pytest.mark.parametrize(("golden", "expected"), [(0, [6, 9]), (3, [9, 12]), (11, 17), (13, 19), (14, 14), (29, 29)])
def test_the_upper_layers_lie_between_the_golden_one_and_the_answers(golden, expected):
    scores = [10.0 if layer == golden else 9.0 - layer / 1_000 for layer in range(30)]
    for pattern in ("upper", "auto"):
        assert choose(EditConfig(layer_scores=scores, tukey_kappa=99.0, layer_pattern=pattern)) == expected


def test_upper_layers_that_cannot_be_edited_are_left_out():
    scores = [2.0, 1.9, 1.8, None, 1.7, 1.6]
    assert choose(EditConfig(layer_scores=scores, tukey_kappa=9.0)) == 2
    scores[2] = None
    assert choose(EditConfig(layer_scores=scores, tukey_kappa=9.0)) == 0


def test_an_editor_that_is_made_for_one_layer_gets_the_golden_one_alone():
    assert choose(EditConfig(method="r-rome", layer_scores=SCORES)) == 5
    config = EditConfig(layer_scores=SCORES)
    config.target_layer = choose(config)
    config.method = "r-rome"
    assert config.target_layer is None
