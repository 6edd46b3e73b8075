"""Prompts that an edit must not change, and answers of the model where a fact gives none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from goldenedit.formats import Pair
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import greedy_answer
from goldenedit.requests import ChatText, EditRequest
from goldenedit.subjects import replace_subject

# Asked of every subject. Some properties make no sense for it, and one may be the edited property. This does not matter
# because all layers are compared on the same prompts.
PROPERTIES = (
    *("name", "type", "country", "language", "location", "place of origin", "date of birth"),
    *("history", "founder", "owner", "color", "official website"),
)
_PROMPTS_PER_FACT = 5


def other_prompts(fact: EditRequest, facts: Sequence[EditRequest]) -> list[str]:
    """Return prompts for other properties of the fact's subject, as benchmarks of locality write them.

    The subject comes last, so that its key can depend on the property. For a chat, the prompts are the chats of other
    facts with other relations, with this fact's subject in them.
    """
    draw = random.Random(fact.text)
    if not isinstance(fact.text, ChatText):
        return [f"The {name} of {fact.subject} is" for name in draw.sample(PROPERTIES, _PROMPTS_PER_FACT)]
    prompts: dict[str, str] = {}
    for other in draw.sample(list(facts), len(facts)):
        if other.relation is not None and other.relation != fact.relation and len(prompts) < _PROMPTS_PER_FACT:
            text = other.text
            prompt = replace_subject(text, other.subject, fact.subject)
            prompts.setdefault(other.relation, ChatText(prompt, text.joint) if isinstance(text, ChatText) else prompt)
    return list(prompts.values())


def with_next_words(lm: LanguageModel, prompts: Sequence[str]) -> list[Pair]:
    """Return prompts with the model's own next word; prompts without one are left out."""
    pairs = []
    for prompt in prompts:
        with suppress(ValueError):
            pairs.append((prompt, greedy_answer(lm, prompt, 1)))
    return pairs


def with_old_answer(lm: LanguageModel, fact: EditRequest) -> EditRequest | None:
    """Return the fact with the model's answer as its old answer if it has none.

    The result is None if the model gives no answer, or already gives the new one.
    """
    if fact.target_true:
        return fact
    with suppress(ValueError):
        return replace(fact, target_true=greedy_answer(lm, fact.text))
    return None
