"""What is found in each architecture, and that looking leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from goldenedit.architecture import UnsupportedArchitectureError, find_down_projections, read_architecture
from models import MLP_WIDTH, NUM_LAYERS, TINY_CONFIGS, UNSUPPORTED_CONFIGS, VOCAB_SIZE, WIDTH, tiny_model

DOWN_PROJECTIONS = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "gemma3": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "olmo2": "model.layers.{}.mlp.down_proj",
    "cohere": "model.layers.{}.mlp.down_proj",
}
ATTENTION_OUTPUTS = {
    "llama": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gptj": "attn.out_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "phi": "self_attn.dense",
    "gemma3": "self_attn.o_proj",
    "qwen3": "self_attn.o_proj",
    "olmo2": "self_attn.o_proj",
    "cohere": "self_attn.o_proj",
}
UP_PROJECTIONS = {  # what runs before it, by the last part of the name
    "llama": ("gate_proj", "up_proj"),
    "gpt2": ("c_fc",),
    "gptj": ("fc_in",),
    "gpt_neox": ("dense_h_to_4h",),
    "opt": ("fc1",),
    "bloom": ("dense_h_to_4h",),
    "falcon": ("dense_h_to_4h",),
    "phi": ("fc1",),
    "gemma3": ("gate_proj", "up_proj"),
    "qwen3": ("gate_proj", "up_proj"),
    "olmo2": ("gate_proj", "up_proj"),
    "cohere": ("gate_proj", "up_proj"),
}
every_architecture = pytest.mark.parametrize("name", TINY_CONFIGS)


@every_architecture
def test_each_layer_has_its_down_projection(name):
    expected = {index: DOWN_PROJECTIONS[name].format(index) for index in range(NUM_LAYERS)}
    assert find_down_projections(tiny_model(name)) == expected


@every_architecture
def test_each_layer_has_its_attention_s_output(name):
    architecture = read_architecture(tiny_model(name))
    expected = {index: f"{architecture.layers}.{index}.{ATTENTION_OUTPUTS[name]}" for index in range(NUM_LAYERS)}
    assert architecture.attention_outputs == expected


def test_an_attention_that_was_not_found_is_named():
    model = tiny_model("llama")
    architecture = read_architecture(model, "model.layers.{}.mlp.down_proj")
    assert architecture.attention_output(model, 1) is model.model.layers[1].self_attn.o_proj
    with pytest.raises(ValueError, match="No attention output projection was found in layer 9 of LlamaForCausalLM"):
        architecture.attention_output(model, 9)


@every_architecture
def test_layer_list_is_that_of_the_decoder(name):
    architecture = read_architecture(tiny_model(name))
    assert architecture.num_layers == NUM_LAYERS
    assert architecture.layers == DOWN_PROJECTIONS[name].split(".{}")[0]


@every_architecture
def test_mlp_linears_are_the_whole_mlp_and_end_with_the_down_projection(name):
    architecture = read_architecture(tiny_model(name))
    for index, paths in architecture.mlp_linears.items():
        assert {path.rsplit(".")[-1] for path in paths[:-1]} == set(UP_PROJECTIONS[name])
        assert len(paths) == 1 + len(UP_PROJECTIONS[name])
        assert paths[-1] == architecture.down_projections[index]


@every_architecture
def test_seed_of_the_weights_does_not_matter(name):
    assert find_down_projections(tiny_model(name, seed=1)) == find_down_projections(tiny_model(name))


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_matter(name, dtype):
    assert find_down_projections(tiny_model(name).to(dtype)) == find_down_projections(tiny_model(name))


@every_architecture
@pytest.mark.parametrize("training", [True, False])
def test_reading_leaves_the_model_as_it_was(name, training):
    model = tiny_model(name).train(training)
    model.get_input_embeddings().train(not training)  # a mode of its own
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    read_architecture(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", UNSUPPORTED_CONFIGS)
def test_unsupported_architecture_is_named_with_the_way_out(name):
    model = tiny_model(name)
    with pytest.raises(UnsupportedArchitectureError, match=rf"(?s){type(model).__name__}.*target_modules") as caught:
        find_down_projections(model)
    assert isinstance(caught.value, ValueError)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_target_modules_by_template_name_one_module_in_every_layer():
    architecture = read_architecture(tiny_model("mamba"), "backbone.layers.{}.mixer.out_proj")
    assert architecture.down_projections == {
        index: f"backbone.layers.{index}.mixer.out_proj" for index in range(NUM_LAYERS)
    }
    assert architecture.mlp_linears[1] == ("backbone.layers.1.mixer.out_proj",)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_target_modules_by_list_are_sorted_by_layer(name):
    path = DOWN_PROJECTIONS[name]
    architecture = read_architecture(tiny_model(name), [path.format(2), path.format(0)])
    assert list(architecture.down_projections.items()) == [(0, path.format(0)), (2, path.format(2))]
    assert architecture.num_layers == NUM_LAYERS


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.layers.{}.mlp.nothing", "matches no module"),
        ("model.layers.{}.mlp", "is not a linear map"),
        ("model.layers.{}.input_layernorm", "is not a linear map"),
        (["model.layers.7.mlp.down_proj"], "'model.layers.7.mlp.down_proj' is not a linear map"),
        (["model.embed_tokens"], "is not a linear map"),
        (["lm_head"], "'lm_head' is not inside the decoder layers, model.layers"),
    ],
)
def test_target_modules_that_do_not_fit_raise(target, message):
    with pytest.raises(UnsupportedArchitectureError, match=message):
        read_architecture(tiny_model("llama"), target)


def test_empty_target_modules_raise():
    with pytest.raises(UnsupportedArchitectureError):
        read_architecture(tiny_model("llama"), [])


@every_architecture
def test_accessors_return_the_modules_of_the_layer(name):
    model = tiny_model(name)
    architecture = read_architecture(model)
    module = architecture.down_projection(model, 1)
    assert module in set(architecture.layer(model, 1).modules())
    assert set(module.weight.shape) == {WIDTH, 4 * WIDTH if name == "bloom" else MLP_WIDTH}


@pytest.mark.parametrize("index", [-1, NUM_LAYERS])
def test_a_layer_that_is_not_there_cannot_be_edited(index):
    architecture = read_architecture(tiny_model("llama"))
    architecture.check_layer(0)
    with pytest.raises(ValueError, match=rf"Layer {index} cannot be edited.*3 decoder layers.*\[0, 1, 2\]"):
        architecture.check_layer(index)


def test_a_model_that_reads_later_tokens_is_refused():
    config = BertConfig(vocab_size=VOCAB_SIZE, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UnsupportedArchitectureError, match=r"BertLMHeadModel is not causal.*is_decoder=True"):
        read_architecture(BertLMHeadModel(config).eval())
    config.is_decoder = True
    assert read_architecture(BertLMHeadModel(config).eval()).num_layers == 2
