"""Precision of float32 products, set by the older way or by the newer one."""

from __future__ import annotations

import pytest
import torch

from goldenedit.precision import matmul_precision


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_the_user_set_is_read(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        assert matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_settings_that_the_older_getter_refuses_count_as_rounded(monkeypatch):
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert matmul_precision() == "high"
