"""What cannot be wrapped for editing is refused with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from goldenedit import EditConfig, EditModel
from goldenedit.architecture import UnsupportedArchitectureError
from models import TINY_CONFIGS, tiny_model

CONFIG = EditConfig(layer=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("org/model", CONFIG, None), r"name 'org/model'.*AutoModelForCausalLM\.from_pretrained\('org/model'\)"),
        ((Path("folder"), CONFIG, None), r"name 'folder'.*AutoModelForCausalLM\.from_pretrained\('folder'\)"),
        (({"a": 1}, CONFIG, None), r"Expected a causal LM of transformers, got dict"),
        ((torch.nn.Linear(2, 2), CONFIG, None), r"Expected a causal LM of transformers, got Linear"),
        ((None, {"layer": 1}, None), r"must be an EditConfig, got dict: EditConfig\(\*\*options\)"),
        ((None, None, None), r"must be an EditConfig, got NoneType"),
        ((None, CONFIG, "gpt2"), r"name 'gpt2'.*AutoTokenizer\.from_pretrained\('gpt2'\)"),
        ((None, CONFIG, len), r"Expected a tokenizer of transformers, got builtin"),
    ],
)
def test_an_argument_of_another_type_is_named_with_what_to_write(arguments, message, tokenizer):
    model, config, given = arguments
    if model is None:
        model = tiny_model("llama")
    with pytest.raises(TypeError, match=message):
        EditModel(model, config, given or tokenizer)


def headless():
    return tiny_model("llama").model


def encoder_decoder():
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 200}
    return T5ForConditionalGeneration(T5Config(**sizes))


def classifier():
    config: LlamaConfig = TINY_CONFIGS["llama"]()
    config.pad_token_id = 0
    return LlamaForSequenceClassification(config)


def token_classifier():
    return LlamaForTokenClassification(TINY_CONFIGS["llama"]())


def of_images():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes))


def without_numbers():
    with torch.device("meta"):
        return type(tiny_model("llama"))(TINY_CONFIGS["llama"]())


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (headless, UnsupportedArchitectureError, "LlamaModel has no logits for each token.*AutoModelForCausalLM"),
        (classifier, UnsupportedArchitectureError, "LlamaForSequenceClassification has no logits for each token"),
        (token_classifier, UnsupportedArchitectureError, "LlamaForTokenClassification has no logits for each token"),
        (of_images, UnsupportedArchitectureError, "CLIPModel does not take token ids of a single vocabulary"),
        (encoder_decoder, UnsupportedArchitectureError, "T5ForConditionalGeneration is an encoder-decoder"),
        (without_numbers, ValueError, "LlamaForCausalLM are on the meta device"),
    ],
)
def test_a_model_that_is_no_causal_lm_with_weights_is_refused_by_name(made, error, message, tokenizer):
    with pytest.raises(error, match=message):
        EditModel(made(), CONFIG, tokenizer)


def test_an_edit_model_is_not_wrapped_again(tokenizer):
    with pytest.raises(TypeError, match=r"an EditModel already\. Call its edit\(\)"):
        EditModel(EditModel(tiny_model("llama"), CONFIG, tokenizer), CONFIG, tokenizer)
