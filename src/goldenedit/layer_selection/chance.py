"""A random layer, the baseline of all selectors."""

from __future__ import annotations

import random
from collections.abc import Sequence

from goldenedit.config import EditConfig
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest


@selector("random", depends_on=("seed",), is_scored=False, needs_facts=False)
def random_layer(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> list[int]:
    """Return one editable layer, chosen at random with the config's seed."""
    return [random.Random(config.seed).choice(sorted(lm.architecture.down_projections))]
