"""Fluency of generated text, as the entropy of its n-grams.

Meng et al. 2022 (arXiv 2202.05262), section 3.4: a model that is broken by a bad edit repeats itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import sample_continuations


def ngram_entropy(text: str) -> float:
    """Return the entropy of a text's bigrams and trigrams in bits, weighted 1/3 and 2/3; 0 for a text without n-grams.

    Short texts have low entropy. ROME's code splits words slightly differently, and its tables multiply by 100.

    Example:
        ```python
        >>> ngram_entropy("so so so so so so")
        0.0
        >>> round(ngram_entropy("the quick brown fox jumps over"), 2)
        2.11
        ```
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return (_entropy(words, 2) + 2 * _entropy(words, 3)) / 3


def _entropy(words: Sequence[str], size: int) -> float:
    counts = Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if len(counts) > 1 else 0.0


def fluency(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int = 100,
    seed: int = 0,
) -> float:
    """Return the mean n-gram entropy of the prompts with their sampled continuations.

    Tokens are sampled from the five most likely ones, as in ROME's code.
    """
    texts = sample_continuations(lm, prompts, max_new_tokens, seed, top_k=5)
    return fmean(ngram_entropy(text) for text in texts)
