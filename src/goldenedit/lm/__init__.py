"""A causal LM as editing sees it, and the words of the trade: tokens, chats, sampled texts, key statistics."""

from goldenedit.lm.language_model import LanguageModel

__all__ = ["LanguageModel"]
