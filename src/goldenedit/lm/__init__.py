"""A causal LM as editing sees it, and the words of the trade: tokens, chats, sampled texts, key statistics."""
