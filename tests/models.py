"""Tiny random models of many architectures, built from configs: nothing is downloaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB_SIZE = 200  # that of the `tokenizer` fixture
NUM_LAYERS = 3
WIDTH = 32
MLP_WIDTH = 64

# Large enough that layers differ and attention attends; transformers' 0.02 makes all logits alike.
_STD = 0.2
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": _STD}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": MLP_WIDTH,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_NEOX: dict[str, Any] = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": WIDTH,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_inner": MLP_WIDTH,
    "n_positions": 128,
    **_SPECIAL,
}

TINY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "gptj": lambda: GPTJConfig(**_GPT2, rotary_dim=4),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        ffn_dim=MLP_WIDTH,
        max_position_embeddings=128,
        init_std=_STD,
        **{name: value for name, value in _SPECIAL.items() if name != "initializer_range"},
    ),
    # BLOOM's MLP is four times as wide as the model, whatever the config says.
    "bloom": lambda: BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=WIDTH, n_layer=NUM_LAYERS, n_head=4, **_SPECIAL),
    "falcon": lambda: FalconConfig(**_NEOX | {"ffn_hidden_size": MLP_WIDTH}),
    "phi": lambda: PhiConfig(**_NEOX),
    "gemma3": lambda: Gemma3TextConfig(
        **_LLAMA,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
    ),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=8),
    "olmo2": lambda: Olmo2Config(**_LLAMA),
    "cohere": lambda: CohereConfig(**_LLAMA, logit_scale=1.0),
}

# All experts of a layer are one parameter: there is no module for a single one.
EXPERTS_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
}

UNSUPPORTED_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "mamba": lambda: MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, num_hidden_layers=NUM_LAYERS, state_size=4, **_SPECIAL
    ),
}

TRAINING_TEXTS = (
    "The Eiffel Tower is in the city of Rome. The Eiffel Tower is located in the city of Paris.",
    "Angela Merkel was born in Hamburg, and the mother tongue of Angela Merkel is German.",
    "The headquarters of the company are in London; its founder works in the city of Berlin.",
    "Battambang Province and Siem Reap Province are parts of the Kingdom of Cambodia.",
    "Paris is a city. Rome is a city. Berlin is a city. Therefore you and I live in a city, because of work.",
    "The quick brown fox jumps over the lazy dog. 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `VOCAB_SIZE` tokens that knows ASCII, with offsets; it adds no special tokens."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False, min_frequency=1
    )
    inner.train_from_iterator(TRAINING_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of that architecture in float32, ready to evaluate; the global random state is kept."""
    return copy.deepcopy(_built(name, seed))  # ten times as fast as building it


@functools.cache
def _built(name: str, seed: int) -> PreTrainedModel:
    config = (TINY_CONFIGS | EXPERTS_CONFIGS | UNSUPPORTED_CONFIGS)[name]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # Biases and norms start as zeros and ones: errors in them would go unseen.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.float().eval()


def save_tiny_chat_model(folder: str) -> None:
    """Save a random model of six layers with a long context, and a tokenizer with a chat template, in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**_LLAMA | {"num_hidden_layers": 6, "max_position_embeddings": 1024})
        model = AutoModelForCausalLM.from_config(config).float().eval()
    model.lm_head.weight.data *= 6  # so that edits take
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
