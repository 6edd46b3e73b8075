"""A tiny random model of every causal LM class in transformers: its config's defaults, shrunk by fields' names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 200  # that of the `tokenizer` fixture
NUM_LAYERS = 4
WIDTH = 32

_WIDTHS = (
    "hidden_size d_model n_embd embedding_size emb_dim hidden_dim word_embed_proj_dim embedding_dim"
    " attention_hidden_size input_embedding_size output_embedding_size lru_width cross_attention_hidden_size"
    " backbone_hidden_size pronunciation_embed_dim shape_embed_dim"
)
_MLP_WIDTHS = (
    "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner ffn_hidden_size"
    " intermediate_size_mlp dense_intermediate_size feed_forward_size expert_ffn_hidden_size"
)
_EXPERT_WIDTHS = (  # unlike those of dense layers: layers differ in shape
    "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size"
    " moe_shared_expert_intermediate_size shared_experts_intermediate_size"
)
_LAYERS = "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"
_COUNTS = {
    2: "encoder_layers num_encoder_layers depth num_key_value_heads num_kv_heads swa_num_key_value_heads"
    " num_experts_per_tok num_experts_per_token moe_topk moe_k num_query_groups n_mamba_heads index_n_heads"
    " linear_num_key_heads linear_num_value_heads top_k",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
    " num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads"
    " num_experts n_routed_experts num_local_experts moe_num_experts state_size mamba_d_state ssm_state_size"
    " mamba_num_heads qk_rope_head_dim d_rel rotary_dim conv_kernel mamba_d_conv hidden_size_per_layer_input",
    8: "head_dim v_head_dim swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"
    " mamba_d_head d_head dim_head qk_nope_head_dim q_lora_rank kv_lora_rank attention_head_size kv_channels"
    " adapter_rank laurel_rank query_pre_attn_scalar sliding_window sliding_window_size time_step_rank"
    " mamba_dt_rank chunk_size mamba_chunk_size attention_window_size local_attention rel_extent mamba_head_dim"
    " num_mel_bins o_lora_rank hc_lowrank router_hidden_size linear_head_dim window_size",
    1: "n_group topk_group n_groups num_expert_group mamba_n_groups mamba_ngroups num_kv_shared_layers"
    " first_k_dense_replace n_shared_experts num_shared_experts zero_expert_num moe_num_shared_experts o_groups",
    128: "index_topk max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"
    " max_source_positions model_max_length original_max_position_embeddings",
    VOCAB_SIZE: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"
    " pronunciation_vocab_size shape_vocab_size",
}
_TINY: dict[str, Any] = {
    **{name: count for count, names in _COUNTS.items() for name in names.split()},
    **dict.fromkeys(_LAYERS.split(), NUM_LAYERS),
    **dict.fromkeys(_WIDTHS.split(), WIDTH),
    **dict.fromkeys(_MLP_WIDTHS.split(), 2 * WIDTH),
    **dict.fromkeys(_EXPERT_WIDTHS.split(), WIDTH + WIDTH // 2),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "is_decoder": True,
    "tie_word_embeddings": False,
}
# What the names of fields do not say.
# Two layers more than elsewhere: what the last two read of other tokens comes from the two before them.
_SHARED_KEYS = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
}
_GEMMA4 = {**_SHARED_KEYS, "global_head_dim": 8}
_QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "gemma3n_text": {**_SHARED_KEYS, "intermediate_size": 2 * WIDTH, "activation_sparsity_pattern": [0.5, 0.0] * 3},
    "blt": {
        "encoder_hash_byte_group_vocab": VOCAB_SIZE,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "dots3_note": {
        "text_config": {"use_sliding_window": False},
        "vision_config": {"pyramid_num_routed": [-1] * NUM_LAYERS, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": {"use_sliding_window": False},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": WIDTH}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "use_mamba_kernels": False},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24]},
    "zaya": {"num_experts_per_tok": 1},
}

_TYPES = {
    "mixture of experts": "afmoe aria_text axk1 axk2 beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32"
    " deepseek_v4 doge dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa"
    " gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jetmoe"
    " kolibri1 laguna llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral"
    " olmoe phimoe qwen2_moe qwen3_moe solar_open zaya",
    "state space, hybrid, recurrent": "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear"
    " lfm2 lfm2_moe lfm3 mamba mamba2 nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text"
    " recurrent_gemma rwkv xlstm zamba zamba2",
    "multimodal wrapper": "cohere_compass_text dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2"
    " llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe"
    " qwen4_exp",
    "encoder or encoder-decoder": "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small"
    " camembert data2vec-text electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta"
    " roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod",
    "other": "blt cpmant gemma4_assistant gemma4_unified_assistant reformer",
}
# Maps to edit in models without an MLP: what opens the mixer of each layer. PEFT refuses what closes it, which the
# models' own kernels read past it.
TARGET_MODULES = dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "backbone.layers.{}.mixer.in_proj")
DENSE = "dense decoder-only"
CATEGORIES = (DENSE, *_TYPES)

_DRAFT_HEADS = ("gemma4_assistant", "gemma4_unified_assistant")


def category(model_type: str) -> str:
    """Return the kind of architecture that a model type is; what is new in transformers counts as dense."""
    return next((name for name, types in _TYPES.items() if model_type in types.split()), DENSE)


def causal_lm_types() -> list[str]:
    """Return the model types of the causal LM mapping."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]  # EditModel has no config


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a small config of that type."""
    return _shrunk(CONFIG_MAPPING[model_type], _OVERRIDES.get(model_type, {}))


def zoo_model(model_type: str, seed: int = 0, width: int | None = None) -> PreTrainedModel:
    """Return a random model of that type in float32, ready to evaluate; the global random state is kept.

    Args:
        model_type: The type.
        seed: Seed of the weights.
        width: Width of the hidden state, and half that of the keys; by default that of the tiny config.

    Raises:
        ValueError: The type is no language model of its own.
    """
    if model_type in _DRAFT_HEADS:
        raise ValueError("A draft head: it takes the hidden states of another model and no text.")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type!r}")
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = tiny_config(model_type)
    if not isinstance(config, kind.config_class):  # the decoder of a larger model
        config = next((part for part in vars(config).values() if isinstance(part, kind.config_class)), config)
    if width is not None:
        sizes = {**dict.fromkeys(_WIDTHS.split(), width), **dict.fromkeys(_MLP_WIDTHS.split(), 2 * width)}
        for name in filter(partial(hasattr, config), sizes):
            setattr(config, name, sizes[name])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).float()
        _spread(model)
    return model.eval()


def _shrunk(kind: type[PretrainedConfig], overrides: Mapping[str, Any]) -> PretrainedConfig:
    fields: dict[str, Any] = {}
    default = vars(kind())  # reading a field that differs over layers raises
    for name in inspect.signature(kind.__init__).parameters:
        if isinstance(inner := default.get(name), PretrainedConfig):
            fields[name] = _shrunk(type(inner), overrides.get(name, {}))
        elif name in _TINY and name not in overrides and not isinstance(inner, list | tuple):
            fields[name] = _TINY[name]
    if "kv_lora_rank" in fields:  # latent attention has keys and values for every head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields["head_dim"] = fields["qk_rope_head_dim"]
    return kind(**{**overrides, **fields})


def _spread(model: nn.Module) -> None:
    """Make weights large enough that layers differ and attention attends, and biases and norms no zeros and ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.data = torch.randn_like(parameter)
            elif parameter.ndim in (2, 3) and (name == "weight" or "proj" in name):  # experts are fused, and have names
                parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
            elif name in ("weight", "bias"):
                parameter.data += 0.1 * torch.randn_like(parameter)
