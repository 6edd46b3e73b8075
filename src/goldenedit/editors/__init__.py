"""Editors: maths that turns keys, residuals and key statistics into a low-rank delta."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from goldenedit.editing.delta import LowRankDelta
from goldenedit.editing.keys import FactKeys
from goldenedit.editing.statistics import KeyStatistics
from goldenedit.editors.rome import r_rome, rome

Editor = Callable[[list[FactKeys], Tensor, KeyStatistics], LowRankDelta]

EDITORS: dict[str, Editor] = {"rome": rome, "r-rome": r_rome}

__all__ = ["EDITORS", "Editor"]
