"""A causal LM as editing sees it, with its tokens, chats, sampled texts and key statistics."""

from goldenedit.lm.language_model import LanguageModel

__all__ = ["LanguageModel"]
