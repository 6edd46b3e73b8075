"""PMET's update against the inverse written out."""

from __future__ import annotations

import torch
from goldenedit.editors.pmet import pmet
from matrices import second_moment

from goldenedit.editors.statistics import KeyStatistics


def test_the_update_is_the_least_squares_one():
    C, K, R = second_moment(24), torch.randn(24, 5).double(), torch.randn(10, 5).double()
    expected = R @ K.T @ torch.linalg.inv(0.3 * C + K @ K.T)
    found = pmet(K.float(), R.float(), KeyStatistics(C), 0.3).dense().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
