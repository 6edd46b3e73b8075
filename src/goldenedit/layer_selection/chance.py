"""A layer drawn at random: what every selector must beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from goldenedit.config import EditConfig
from goldenedit.layer_scores import selector
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest


@selector("random", is_scored=False, needs_facts=False)
def random_layer(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> list[int]:
    """Return one of the layers that can be edited, drawn by the config's seed."""
    return [random.Random(config.seed).choice(sorted(lm.architecture.down_projections))]
