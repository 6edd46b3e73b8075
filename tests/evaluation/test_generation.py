"""Entropy of n-grams against its definition, and that texts that repeat have little of it."""

from __future__ import annotations

import math

import pytest

from goldenedit.evaluation.generation import fluency, ngram_entropy
from goldenedit.lm import LanguageModel
from models import tiny_model


def test_it_is_the_weighted_entropy_of_bigrams_and_trigrams():
    # Bigrams a b (2), b a (1), b c (1); trigrams a b a, b a b, a b c.
    bigrams = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert ngram_entropy("a b a b c") == pytest.approx((bigrams + 2 * math.log2(3)) / 3)


@pytest.mark.parametrize("text", ["", "one", "no no no no no no", "one two"])
def test_a_text_that_says_one_thing_has_none(text):
    assert ngram_entropy(text) == 0.0


def test_words_and_marks_count_and_spaces_do_not():
    assert ngram_entropy("Paris,  France.\nRome") == ngram_entropy("Paris , France . Rome")


def test_fluency_is_that_of_what_the_model_writes_and_is_the_same_twice(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    prompts = ["The Eiffel Tower", "Berlin is a city in"]
    first = fluency(lm, prompts, max_new_tokens=12)
    assert first == fluency(lm, prompts, max_new_tokens=12)
    assert first > 0
    assert first != fluency(lm, prompts, max_new_tokens=12, seed=1)
