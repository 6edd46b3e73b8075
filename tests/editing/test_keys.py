"""Contrast keys: what enters the projection at the same last token behind other beginnings."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import recording
from goldenedit.editing.keys import contrast_keys
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest
from models import MLP_WIDTH, VOCAB_SIZE, tiny_model

REQUESTS = [
    EditRequest("{} is in the Kingdom of", "Battambang Province", "Rome"),
    EditRequest("The city of {} is in", "Rome", "London"),  # one token
    EditRequest("The mother tongue of {} is", "Angela Merkel", "German"),
]


def keys_of(model, tokenizer, layers=(0, 2), count=5, seed=0, requests=REQUESTS):
    return contrast_keys(LanguageModel(model, tokenizer), requests, list(layers), count, seed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_each_subject_of_several_tokens_has_its_keys(name, tokenizer):
    province, rome, merkel = keys_of(tiny_model(name), tokenizer)
    assert rome is None
    for one, other in zip(province, merkel, strict=True):  # by layer
        assert one.shape == other.shape == (MLP_WIDTH, 5)
        assert one.dtype == torch.float32
        assert not torch.allclose(one, other)
    assert len(province) == 2


@pytest.mark.parametrize("requests", [REQUESTS[1:2], []])
def test_nothing_runs_where_no_subject_has_a_beginning(requests, tokenizer):
    assert contrast_keys(LanguageModel(None, tokenizer), requests, [0], 5, 0) == [None] * len(requests)


def test_a_count_of_zero_gives_none(tokenizer):
    assert keys_of(tiny_model("llama"), tokenizer, count=0) == [None] * 3


def test_same_seed_same_keys_other_seed_others(tokenizer):
    model = tiny_model("llama")
    one, again, other = (keys_of(model, tokenizer, layers=[1], seed=seed)[0][0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_no_more_keys_than_there_are_subjects(tokenizer):
    keys = keys_of(tiny_model("llama"), tokenizer, count=10_000, requests=REQUESTS[:1])[0]
    assert 100 < keys[0].shape[1] < 10_000


def test_a_request_s_keys_do_not_depend_on_the_others(tokenizer):
    model = tiny_model("gpt2")
    together = keys_of(model, tokenizer)
    alone = keys_of(model, tokenizer, requests=[REQUESTS[2]])
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_keys_are_those_of_each_text_alone_at_the_subject_s_last_token(name, tokenizer):
    model = tiny_model(name).train()
    ran = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(kwargs), with_kwargs=True)
    architecture = read_architecture(model)
    ran.clear()
    (keys,) = contrast_keys(LanguageModel(model, tokenizer, architecture), REQUESTS[:1], [1], 4, 0)[0]
    handle.remove()
    assert model.training
    model.eval()
    (inputs,) = ran
    module = architecture.down_projection(model, 1)
    for index, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        text = ids[mask.bool()]
        assert tokenizer.decode(text).endswith(" Province")
        with torch.no_grad(), recording({"down": module}) as record:
            model(input_ids=text[None])
        expected = record.inputs["down"].view(len(text), -1)[-1]
        torch.testing.assert_close(keys[:, index], expected, rtol=1e-4, atol=1e-5)


def spaced_tokenizer(texts) -> PreTrainedTokenizerFast:
    """A tokenizer like that of Llama 2: a space is put before every text, and is part of the first word."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token spans words
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "<unk>"], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def test_a_subject_of_one_token_has_no_contrast_where_the_tokenizer_brings_the_space():
    tokenizer = spaced_tokenizer(["Rome is in Rome. "] * 2 + ["The city of Battambang Province"] * 2)
    assert len(tokenizer("Rome").input_ids) == 1
    assert keys_of(tiny_model("llama"), tokenizer, requests=REQUESTS[1:2]) == [None]


def test_no_logits_are_computed_for_keys(tokenizer):
    model = tiny_model("llama")
    ran = []
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    model.lm_head.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape))
    contrast_keys(lm, REQUESTS, [1], 4, 0)
    assert ran == []


def test_the_size_of_a_forward_does_not_grow_with_the_number_of_requests(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    sizes = {}
    for count in (30, 60):
        handle = model.model.register_forward_pre_hook(
            lambda _, args, kwargs, count=count: sizes.setdefault(count, []).append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        contrast_keys(lm, REQUESTS[:1] * count, [0], 8, 0)
        handle.remove()
    assert max(sizes[60]) == max(sizes[30])
