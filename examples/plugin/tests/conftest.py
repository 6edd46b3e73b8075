"""A model and a tokenizer that are small enough to be built for each test: nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", *(chr(code) for code in range(33, 127)), "Ġ"]


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters."""
    inner = Tokenizer(models.BPE({word: index for index, word in enumerate(WORDS)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def base() -> LlamaForCausalLM:
    """A Llama of three layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2, **sizes
    )
    return LlamaForCausalLM(config).eval()
