"""Where key statistics come from, and that they are computed once."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from goldenedit import EditModel
from goldenedit.architecture import read_architecture
from goldenedit.cache import cache_dir
from goldenedit.config import EditConfig
from goldenedit.lm import LanguageModel, covariance
from goldenedit.lm.covariance import (
    dataset_texts,
    key_statistics,
    mlp_moments,
    output_gradient_moments,
    sampled_texts,
)
from goldenedit.lm.statistics import second_moments
from goldenedit.storage.fingerprint import WeightHashes
from models import MLP_WIDTH, TINY_CONFIGS, WIDTH, tiny_model

TEXTS = ["The Eiffel Tower is in the city of Paris.", "Rome is a city", "I live in London"]


def statistics_of(model, tokenizer, layers=(0, 1), fingerprint="base", **options):
    config = EditConfig(**{"covariance_tokens": 200, **options})
    return key_statistics(LanguageModel(model, tokenizer, weights=WeightHashes(fingerprint)), list(layers), config)


def forwards(model) -> list[None]:
    ran: list[None] = []
    model.register_forward_pre_hook(lambda *_: ran.append(None))
    return ran


def test_identity_needs_no_text(tokenizer):
    found = statistics_of(tiny_model("llama"), tokenizer, covariance="identity")
    assert [found[layer].second_moment for layer in (0, 1)] == [None, None]
    assert not cache_dir().joinpath("key_statistics").exists()


def test_statistics_made_inside_inference_mode_are_those_made_outside(tokenizer):
    model = tiny_model("llama")
    expected = statistics_of(model, tokenizer, [1])[1].second_moment
    with torch.inference_mode():
        found = statistics_of(model, tokenizer, [1], fingerprint="other")[1].second_moment
    assert torch.equal(found, expected)


def test_statistics_are_computed_once_for_model_layer_source_and_seed(tokenizer):
    model = tiny_model("llama")
    first = statistics_of(model, tokenizer)
    assert first[0].second_moment.shape == (MLP_WIDTH, MLP_WIDTH)
    cached = set(cache_dir().rglob("*.safetensors"))
    assert len(cached) == 2
    again = statistics_of(model, tokenizer)
    assert all(torch.equal(first[layer].second_moment, again[layer].second_moment) for layer in (0, 1))
    assert set(cache_dir().rglob("*.safetensors")) == cached
    for options in ({"fingerprint": "other"}, {"seed": 1}, {"covariance_tokens": 100}):
        statistics_of(model, tokenizer, layers=[0], **options)
    assert len(set(cache_dir().rglob("*.safetensors"))) == 5


def test_cached_statistics_run_nothing(tokenizer):
    model = tiny_model("llama")
    architecture = read_architecture(model)
    config = EditConfig(covariance_tokens=200, ridge=0.5)
    key_statistics(LanguageModel(model, tokenizer, architecture, WeightHashes("base")), [0, 2], config)
    ran = forwards(model)
    found = key_statistics(LanguageModel(model, tokenizer, architecture, WeightHashes("base")), [2, 0], config)
    assert ran == []
    assert found[0].ridge == 0.5


def test_output_gradients_are_computed_once_for_model_layer_source_and_seed(tokenizer, tmp_path):
    model, path = tiny_model("llama"), tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))

    def of_seed(seed, layers=(0, 2)):
        config = EditConfig(covariance=str(path), seed=seed)
        lm = LanguageModel(model, tokenizer, read_architecture(model), WeightHashes("base"))
        return output_gradient_moments(lm, layers, config)

    first = of_seed(0)
    assert first[2].shape == (WIDTH, WIDTH)
    assert len(list(cache_dir().rglob("output_gradients/*.safetensors"))) == 2
    again = of_seed(0, layers=(2, 0))
    assert all(torch.equal(again[layer], first[layer]) for layer in (0, 2))
    other_labels = of_seed(1, layers=(0,))
    assert not torch.equal(other_labels[0], first[0])
    assert len(list(cache_dir().rglob("output_gradients/*.safetensors"))) == 3


def test_output_gradients_need_text(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    with pytest.raises(ValueError, match="'identity' has no text"):
        output_gradient_moments(lm, [0], EditConfig(covariance="identity"))


def moments_of(model, tokenizer, layers=(0, 2), fingerprint="base", architecture=None, **options):
    config = EditConfig(**{"covariance_tokens": 200, **options})
    lm = LanguageModel(model, tokenizer, architecture, WeightHashes(fingerprint))
    return mlp_moments(lm, {layer: model.model.layers[layer].mlp.gate_proj for layer in layers}, config)


def test_moments_of_mlps_are_computed_once_for_model_layer_source_and_seed(tokenizer):
    model = tiny_model("llama")
    first = moments_of(model, tokenizer)
    assert [moment.shape for moment in vars(first[2]).values()] == [(WIDTH,), (WIDTH, WIDTH), (MLP_WIDTH,)]
    assert len(list(cache_dir().rglob("mlp_moments/*.safetensors"))) == 2
    architecture = read_architecture(model)
    ran = forwards(model)
    again = moments_of(model, tokenizer, layers=(2, 0), architecture=architecture)
    assert ran == []
    for layer in (0, 2):
        for name, moment in vars(first[layer]).items():
            assert torch.equal(getattr(again[layer], name), moment)
    for options in ({"fingerprint": "other"}, {"seed": 1}, {"covariance_tokens": 100}):
        moments_of(model, tokenizer, layers=[0], **options)
    assert len(list(cache_dir().rglob("mlp_moments/*.safetensors"))) == 5


def test_a_damaged_file_of_moments_is_computed_again(tokenizer):
    model = tiny_model("llama")
    first = moments_of(model, tokenizer, [0])[0]
    (path,) = cache_dir().rglob("mlp_moments/*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    again = moments_of(model, tokenizer, [0])[0]
    assert torch.equal(again.second_moment, first.second_moment)
    assert torch.equal(again.energy, first.energy)


def test_a_damaged_cache_file_is_computed_again(tokenizer):
    model = tiny_model("llama")
    first = statistics_of(model, tokenizer, [0])
    (path,) = cache_dir().rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    again = statistics_of(model, tokenizer, [0])
    assert torch.equal(first[0].second_moment, again[0].second_moment)
    assert torch.equal(statistics_of(model, tokenizer, [0])[0].second_moment, first[0].second_moment)


def test_a_text_file_gives_the_statistics_of_its_lines(tokenizer, tmp_path):
    model = tiny_model("gpt2")
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    found = statistics_of(model, tokenizer, [1], covariance=str(path))
    expected = second_moments(LanguageModel(model, tokenizer), TEXTS, [1], 200)
    assert found[1].second_moment is None  # three lines have fewer tokens than a key is wide
    torch.testing.assert_close(found[1].keys.T @ found[1].keys, expected[1])
    again = statistics_of(model, tokenizer, [1], covariance=str(path))  # from the cache
    assert torch.equal(again[1].keys, found[1].keys)


def test_a_changed_file_is_read_again(tokenizer, tmp_path):
    model = tiny_model("llama")
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS[0], encoding="utf-8")
    first = statistics_of(model, tokenizer, [1], covariance=str(path))[1].keys
    path.write_text(TEXTS[1], encoding="utf-8")
    assert not torch.equal(first, statistics_of(model, tokenizer, [1], covariance=str(path))[1].keys)


@pytest.mark.parametrize("tokens", [20, 200], ids=["keys", "moments"])
@pytest.mark.parametrize("stores", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_streamed_statistics_are_computed_in_groups_that_fit(tokenizer, monkeypatch, tokens, stores, at_once):
    model = tiny_model("llama")
    config = EditConfig(covariance_tokens=tokens)
    layers = list(range(model.config.num_hidden_layers))
    expected = key_statistics(LanguageModel(model, tokenizer), layers, config)
    size = 4 * MLP_WIDTH * min(tokens, MLP_WIDTH)
    monkeypatch.setattr(covariance, "GROUP_BYTES", at_once * size + size // 2)
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(cache_dir() / "other"))
    if not stores:
        monkeypatch.setattr(covariance, "save_second_moment", lambda *_: None)
    passes = []
    monkeypatch.setattr(
        covariance, "second_moments", lambda *args, **kw: passes.append(args[2]) or second_moments(*args, **kw)
    )
    samplings = []
    monkeypatch.setattr(covariance, "sampled_texts", lambda *args: samplings.append(args) or sampled_texts(*args))
    streamed = covariance.StreamedStatistics(LanguageModel(model, tokenizer), layers, config)
    groups = [layers[start : start + at_once] for start in range(0, len(layers), at_once)]
    assert passes == groups
    for layer in layers:
        moment = "keys" if tokens < MLP_WIDTH else "second_moment"
        assert torch.equal(getattr(streamed[layer], moment), getattr(expected[layer], moment))
        assert len(streamed.in_memory) <= (0 if stores else at_once)
    assert len(samplings) == 1
    if stores:
        assert passes == groups
    else:  # once more, group by group
        assert len(passes) <= 2 * len(groups)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_files_of_every_kind_give_their_texts(suffix, tmp_path):
    path = tmp_path / f"texts{suffix}"
    records = [{"text": TEXTS[0], "note": "x" * 99}, {"title": "I", "body": TEXTS[1]}, TEXTS[2]]
    content = {
        ".txt": "\n".join(TEXTS),
        ".json": json.dumps(records),
        ".jsonl": "\n".join(map(json.dumps, records)),
    }
    path.write_text(content[suffix], encoding="utf-8")
    assert list(dataset_texts(str(path))) == TEXTS


def test_sampled_texts_hold_about_the_tokens_asked_for_and_follow_the_seed(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    texts = sampled_texts(lm, 500, seed=0)
    assert 400 < sum(len(tokenizer(text).input_ids) for text in texts) < 900
    assert sampled_texts(lm, 500, seed=0) == texts
    assert sampled_texts(lm, 500, seed=1) != texts


@pytest.mark.parametrize(("width", "tokens"), [(MLP_WIDTH, 5_000), (6_001, 18_003)])
def test_text_follows_the_width_of_the_keys_unless_it_is_given(width, tokens, tokenizer):
    config = TINY_CONFIGS["llama"]()
    config.intermediate_size = width
    model = LlamaForCausalLM(config)
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    assert lm.text_tokens(EditConfig()) == tokens
    assert lm.text_tokens(EditConfig(covariance_tokens=7)) == 7


def test_an_edit_records_the_tokens_that_its_model_needs(tokenizer):
    config = EditConfig(layer=1, method="ft-m", finetune_steps=1)
    model = EditModel(tiny_model("llama"), config, tokenizer)
    (made,) = model.edit("I live in London", "London", "Rome").configs
    assert made.covariance_tokens == 5_000
    assert model.edit_config.covariance_tokens is None


def test_text_of_fewer_tokens_than_dimensions_is_told_when_it_is_read(tokenizer, caplog):
    model = tiny_model("llama")
    statistics_of(model, tokenizer, covariance_tokens=MLP_WIDTH)
    assert not caplog.text
    for _ in range(2):
        statistics_of(model, tokenizer, covariance_tokens=20)
    (message,) = caplog.messages  # the second time they are read from the cache
    assert f"of 20 tokens of text, but keys have {MLP_WIDTH} dimensions" in message
    assert "covariance_tokens" in message
