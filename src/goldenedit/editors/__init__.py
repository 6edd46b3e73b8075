"""Editors: the maths that turns keys, residuals and key statistics into a low-rank delta, one file per method.

An editor is one function with a decorator (see `editor`). `EditConfig(method=...)` finds it by its name, in this folder
and in installed packages with an entry point in the group `goldenedit.editors`. Editors use no model, no tokenizer and
no file, and import only torch. `docs/extending.md` adds an editor, step by step.
"""

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.keys import FactKeys
from goldenedit.editors.options import TrainingOptions, option, relative
from goldenedit.editors.problem import GradientProblem, Problem, TrainingProblem
from goldenedit.editors.record import EDITORS, Editor, editor
from goldenedit.editors.statistics import KeyStatistics

__all__ = [
    "EDITORS",
    "Editor",
    "FactKeys",
    "GradientProblem",
    "KeyStatistics",
    "LowRankDelta",
    "Problem",
    "TrainingOptions",
    "TrainingProblem",
    "editor",
    "option",
    "relative",
]
