"""Texts that the model writes itself are a function of model, seed and nothing else."""

from __future__ import annotations

import pytest
import torch

from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import sample_contexts, sample_continuations
from models import tiny_model

OPENINGS = ["The", "Rome is a", "Angela Merkel", "I", "Paris is in"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_same_seed_same_texts_other_seed_others(name, tokenizer):
    model = tiny_model(name)
    lm = LanguageModel(model, tokenizer)
    texts = sample_contexts(lm, 6, 8, seed=3)
    assert sample_contexts(lm, 6, 8, seed=3) == texts
    assert sample_contexts(lm, 6, 8, seed=4) != texts


def test_the_first_context_is_empty_and_the_others_are_sentences(tokenizer):
    texts = sample_contexts(LanguageModel(tiny_model("llama"), tokenizer), 7, 8, seed=0)
    assert len(texts) == 7
    assert texts[0] == ""
    assert [text.split()[0][0] for text in texts[1:]] == list("TTBIYT")  # The, Therefore, Because, I, You
    assert all(text.endswith(". ") and "\n" not in text for text in texts[1:])


def test_an_opening_without_tokens_is_told(tokenizer):
    with pytest.raises(ValueError, match=r"no tokens for '', .*EditConfig\.covariance"):
        sample_continuations(LanguageModel(tiny_model("llama"), tokenizer), ["Rome is a", ""], 3, seed=0)


def test_one_context_is_the_empty_one_and_runs_nothing(tokenizer):
    assert sample_contexts(LanguageModel(None, tokenizer), 1, 8, seed=0) == [""]


def test_the_global_random_state_is_neither_used_nor_changed(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    texts = sample_contexts(lm, 4, 8, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample_contexts(lm, 4, 8, seed=0) == texts


def test_sampling_runs_without_dropout_and_leaves_the_mode(tokenizer):
    model = tiny_model("gpt2")
    lm = LanguageModel(model, tokenizer)
    texts = sample_contexts(lm, 4, 8, seed=0)
    model.train()
    assert sample_contexts(lm, 4, 8, seed=0) == texts
    assert model.training


def test_continuations_keep_the_order_of_their_openings(tokenizer):
    texts = sample_continuations(LanguageModel(tiny_model("llama"), tokenizer), OPENINGS, 5, seed=0)
    assert all(text.startswith(opening) for text, opening in zip(texts, OPENINGS, strict=True))


def test_nothing_follows_an_end_of_text(tokenizer):
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[tokenizer.eos_token_id] = 1e4
    assert sample_continuations(LanguageModel(model, tokenizer), OPENINGS, 5, seed=0) == OPENINGS


def test_sampling_follows_the_model_s_own_distribution(tokenizer):
    model = tiny_model("llama")
    ids = tokenizer("The", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    texts = sample_continuations(LanguageModel(model, tokenizer), ["The"] * 4000, 1, seed=0, batch_size=4000)
    best = int(expected.argmax())
    share = sum(text == "The" + tokenizer.decode([best]) for text in texts) / len(texts)
    assert share == pytest.approx(expected[best].item(), abs=0.03)


def test_the_likeliest_token_alone_is_the_greedy_text(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    texts = sample_continuations(lm, OPENINGS, 5, seed=0, top_k=1)
    assert texts == sample_continuations(lm, OPENINGS, 5, seed=9, top_k=1)
    for opening, text in zip(OPENINGS, texts, strict=True):
        ids = torch.tensor([tokenizer(opening)["input_ids"]])
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert text == tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_contexts_that_the_model_cannot_take_are_refused_before_sampling(name, tokenizer):
    lm = LanguageModel(tiny_model(name), tokenizer)
    assert lm.max_length is not None
    for length in (lm.max_length, 999):
        with pytest.raises(ValueError, match=rf"Contexts of {length} tokens .* EditConfig\.context_length"):
            sample_contexts(lm, 3, length, seed=0)
    assert len(sample_contexts(lm, 3, lm.max_length - 10, seed=0)) == 3
