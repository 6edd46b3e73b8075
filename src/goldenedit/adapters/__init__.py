"""The adapters of edits in a model: deltas in and out of a stock PeftModel, beside adapters of the user's own."""

from goldenedit.adapters.adapters import Adapters
from goldenedit.adapters.layers import check_fits, is_conv1d, plain
from goldenedit.adapters.verbs import REFUSED_VERBS

__all__ = ["REFUSED_VERBS", "Adapters", "check_fits", "is_conv1d", "plain"]
