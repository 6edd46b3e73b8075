"""The old place of `goldenedit.lm.chat`, until the next version."""

import warnings

from goldenedit.lm.chat import rendered

warnings.warn("goldenedit.chat is now goldenedit.lm.chat.", FutureWarning, stacklevel=2)

__all__ = ["rendered"]
