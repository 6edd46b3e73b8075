"""Every dense decoder-only class of transformers is editable, and one or more of each other kind."""

from __future__ import annotations

import pytest

from conformance_checks import examine
from zoo import DENSE, TARGET_MODULES, category, causal_lm_types

NOT_EDITABLE = {  # with what the refusal must say
    "dbrx": "No dense down projection and no fused experts were found",
    "hrm_text": "several times for each token",
    "laguna": "this model has no such module",
    "xlnet": "is not causal",
    "prophetnet": "is not causal",
    "musicgen": "token ids of a single vocabulary",
    "reformer": "no list of decoder layers",
}
KINDS = (
    "afmoe",  # dense first layers, then experts with a shared one
    "deepseek_v2",  # latent attention
    "deepseek_v4",  # several residual streams
    "qwen2_moe",
    "granitemoeshared",
    "llama4_text",  # its router is a linear map that returns a tuple
    "longcat_flash",  # two MLPs a layer
    "bamba",
    "falcon_h1",
    "jamba",
    "nemotron_h",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba2",  # one block shared by layers
    "gemma3",
    "gemma4",  # keys and values shared by layers
    "llama4",
    "qwen3_5",
    "bart",
    "bert",
    "whisper",
    *TARGET_MODULES,
)


@pytest.mark.parametrize(
    "model_type", [name for name in causal_lm_types() if category(name) == DENSE and name not in NOT_EDITABLE]
)
def test_every_dense_class_is_editable(model_type, tokenizer):
    verdict = examine(model_type, tokenizer)
    assert (verdict.outcome, verdict.reason) == ("works", "")


@pytest.mark.parametrize("model_type", KINDS)
def test_every_kind_of_model_is_editable(model_type, tokenizer):
    assert examine(model_type, tokenizer).outcome.startswith("works")


@pytest.mark.parametrize("model_type", NOT_EDITABLE)
def test_what_cannot_be_edited_says_why(model_type, tokenizer):
    verdict = examine(model_type, tokenizer)
    assert verdict.outcome == "cannot"
    assert NOT_EDITABLE[model_type] in verdict.reason
