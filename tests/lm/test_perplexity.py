"""Perplexity against its definition, one text at a time."""

from __future__ import annotations

import math

import pytest
import torch

from goldenedit.lm import LanguageModel
from goldenedit.lm.perplexity import perplexity, sample_texts
from models import tiny_model

TEXTS = [
    "The Eiffel Tower is in the city of Rome.",
    "Berlin is a city.",
    "The quick brown fox jumps over the lazy dog.",
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_the_exponent_of_the_mean_over_tokens(name, batch_size, tokenizer):
    model = tiny_model(name)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert perplexity(LanguageModel(model, tokenizer), TEXTS, batch_size) == pytest.approx(
        math.exp(total / count), rel=1e-4
    )


def test_no_text_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="text"):
        perplexity(LanguageModel(tiny_model("llama"), tokenizer), ["", "a"[:0]])


def test_the_sample_is_plain_text_of_many_kinds():
    texts = sample_texts()
    assert len(texts) == len(set(texts)) == 50
    assert not any("{}" in text for text in texts)
