"""The rows that compute a neuron: found in every kind of MLP, and rewritten without a trace in the other neurons."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import adding_delta, evaluating, recording
from goldenedit.architecture.layers import probe_ids
from goldenedit.architecture.neurons import GATE, NeuronRows, find_neurons
from models import MLP_WIDTH, NUM_LAYERS, TINY_CONFIGS, WIDTH, tiny_model
from zoo import TARGET_MODULES, zoo_model

KINDS = (
    "bart",
    "bert",
    "bloom",
    "codegen",
    "cohere",
    "deepseek_v3",  # shared experts in its later layers
    "falcon_h1",  # multiplies its gates by a constant
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gptj",
    "granitemoeshared",
    "llama",
    "modernbert-decoder",
    "moshi",  # fuses gates and ups, with a narrower hidden state
    "mpt",
    "nemotron",  # squares its ReLU
    "openai-gpt",
    "opt",
    "phi",
    "phi3",
    "qwen2_moe",
    "rwkv",
    "stablelm",
    "starcoder2",
    "xlm",
    "xlstm",
    "zamba",  # one block shared by layers
)
OTHER_FORMS = (
    "apertus",  # its activation function leaks for negative inputs
    "bitnet",  # a norm before the down projection
    "deepseek_v4",  # clamps its gates
    "mamba",  # the map chosen by hand opens its layer
    "minimax_m3_vl_text",  # adds 1 to its ups
    "mixtral",  # fused experts
    "zamba2",  # adds an adapter of its own to gates and ups
)
LAYER, NEURON = 1, 5


def check_rewriting(model, neuron=NEURON, tolerance=1e-3):
    """Assert that a rewritten neuron has the key that `Neurons` states, and that the others keep theirs."""
    architecture = read_architecture(model)
    layer = next(index for index in architecture.down_projections if index >= LAYER)
    neurons = find_neurons(model, architecture, layer)
    down = architecture.down_projection(model, layer)
    assert neurons.count == architecture.shape(model, layer)[1]

    def run(gate=None, up=None):
        """Return the input of the gates and the keys of all neurons, with new rows of the gate and of the up."""
        modules = {"gate": model.get_submodule(neurons.gate.path), "down": down}
        with torch.no_grad(), evaluating(model), ExitStack() as stack:
            for rows, new in ((neurons.gate, gate), (neurons.up, up)):
                if rows is not None and new is not None:
                    delta = (new - rows.read(model, neuron)[0])[None]
                    unit = rows.output(model, neuron)
                    stack.enter_context(adding_delta(model.get_submodule(rows.path), delta, unit))
            with recording(modules) as record:
                model(input_ids=probe_ids(model), use_cache=False)
        return [record.inputs[name].flatten(0, -2).float() for name in modules]

    inputs, before = run()
    signs = torch.tensor([1.0, -1.0]).repeat(len(inputs))[: len(inputs)]
    solve = torch.linalg.pinv(inputs.double()).float()
    w, u = solve @ signs, solve @ torch.linspace(-2, 2, len(inputs))
    _, after = run(GATE * w, u / GATE)

    gates = inputs @ w + neurons.gate.read(model, neuron)[1] / GATE
    expected = neurons.response * gates.clamp(min=0) ** neurons.degree
    if neurons.up is not None:
        expected = expected * (inputs @ u + GATE * neurons.up.read(model, neuron)[1])
    clear = gates.abs() > 0.3  # the activation function has reached its asymptote there
    assert (gates[clear] > 0).any()
    assert (gates[clear] < 0).any()
    scale = expected.abs().max().item()
    torch.testing.assert_close(after[clear, neuron], expected[clear], rtol=tolerance, atol=tolerance * scale)
    assert (before[clear, neuron] - expected[clear]).abs().max() > 10 * tolerance * scale  # the rows did change it
    others = torch.arange(neurons.count) != neuron
    assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize("model_type", KINDS)
def test_rewritten_rows_make_the_key_of_their_neuron_and_leave_the_others(model_type):
    check_rewriting(zoo_model(model_type))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_half_precision_changes_the_keys_by_rounding(name):
    check_rewriting(tiny_model(name).bfloat16(), tolerance=5e-2)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_half_precision_does_not_change_what_is_found(name):
    model = tiny_model(name)
    architecture = read_architecture(model)
    found = find_neurons(model, architecture, LAYER)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = find_neurons(model.to(dtype), architecture, LAYER)
        assert (rounded.gate, rounded.up, rounded.degree) == (found.gate, found.up, found.degree)
        assert rounded.response == pytest.approx(found.response, rel=1e-2)


@pytest.mark.parametrize("neuron", [0, MLP_WIDTH - 1])
def test_first_and_last_neuron_have_rows_too(neuron):
    check_rewriting(tiny_model("llama"), neuron)
    check_rewriting(tiny_model("gpt2"), neuron)


def test_gate_and_up_are_told_apart():
    model = tiny_model("llama")
    neurons = find_neurons(model, read_architecture(model), 2)
    assert neurons.gate == NeuronRows("model.layers.2.mlp.gate_proj", 0, MLP_WIDTH)
    assert neurons.up == NeuronRows("model.layers.2.mlp.up_proj", 0, MLP_WIDTH)
    assert (neurons.response, neurons.degree) == (pytest.approx(1), 1)


def test_fused_gate_and_up_are_told_apart():
    model = zoo_model("phi3")
    neurons = find_neurons(model, read_architecture(model), 2)
    assert neurons.gate == NeuronRows("model.layers.2.mlp.gate_up_proj", 0, 64)
    assert neurons.up == NeuronRows("model.layers.2.mlp.gate_up_proj", 64, 64)


def test_without_gating_the_key_grows_as_the_activation_function():
    linear, squared = zoo_model("opt"), zoo_model("nemotron")
    neurons = [find_neurons(model, read_architecture(model), LAYER) for model in (linear, squared)]
    assert [found.up for found in neurons] == [None, None]
    assert [found.degree for found in neurons] == [1, 2]
    assert [found.response for found in neurons] == [GATE, GATE**2]


@pytest.mark.parametrize("model_type", OTHER_FORMS)
def test_mlps_of_another_form_have_no_such_neurons(model_type):
    model = zoo_model(model_type)
    architecture = read_architecture(model, TARGET_MODULES.get(model_type))
    assert all(find_neurons(model, architecture, layer) is None for layer in architecture.down_projections)


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.ReLU6(), nn.Identity()])
def test_bounded_and_leaking_activation_functions_make_no_such_neurons(activation):
    for name in ("llama", "gptj"):
        model = tiny_model(name)
        architecture = read_architecture(model)
        layer = architecture.layer(model, LAYER)
        assert find_neurons(model, architecture, LAYER) is not None
        attribute = "act_fn" if name == "llama" else "act"
        setattr(layer.mlp, attribute, activation)
        assert find_neurons(model, architecture, LAYER) is None


class Normed(nn.Module):
    """An activation function, then a norm over all neurons."""

    def forward(self, x):
        return nn.functional.rms_norm(nn.functional.relu(x), x.shape[-1:])


def test_a_norm_over_many_neurons_shows():
    model = tiny_model("gptj")
    architecture = read_architecture(model)
    mlp = model.transformer.h[LAYER].mlp
    mlp.fc_in, mlp.fc_out, mlp.act = nn.Linear(WIDTH, 20_000), nn.Linear(20_000, WIDTH), Normed()
    assert find_neurons(model, architecture, LAYER) is None


def test_inputs_that_differ_make_no_such_neurons():
    model = tiny_model("llama")
    architecture = read_architecture(model)
    up = model.model.layers[LAYER].mlp.up_proj
    up.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert find_neurons(model, architecture, LAYER) is None


def test_a_down_projection_chosen_by_hand_has_its_neurons():
    for name, path in (("llama", "model.layers.{}.mlp.down_proj"), ("gpt2", "transformer.h.{}.mlp.c_proj")):
        model = tiny_model(name)
        by_hand = find_neurons(model, read_architecture(model, path), LAYER)
        assert by_hand == find_neurons(model, read_architecture(model), LAYER)


def test_an_output_of_attention_chosen_by_hand_has_none():
    model = tiny_model("llama")
    architecture = read_architecture(model, "model.layers.{}.self_attn.o_proj")
    assert find_neurons(model, architecture, LAYER) is None


def test_a_layer_that_is_not_there_raises():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"Layer {NUM_LAYERS} cannot be edited"):
        find_neurons(model, read_architecture(model), NUM_LAYERS)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_and_biases_are_those_of_the_weights(name):
    model = tiny_model(name)
    gate = find_neurons(model, read_architecture(model), LAYER).gate
    linear = model.get_submodule(gate.path)
    weight = linear.weight.T if name == "gpt2" else linear.weight
    for dtype in (torch.float32, torch.bfloat16):
        row, bias = gate.read(model.to(dtype), NEURON)
        assert row.dtype == torch.float32
        assert torch.equal(row, weight[NEURON].to(dtype).float())
        assert bias == (linear.bias[NEURON].item() if name == "gpt2" else 0)


def test_a_neuron_that_is_not_there_raises():
    model = tiny_model("llama")
    gate = find_neurons(model, read_architecture(model), LAYER).gate
    for neuron in (-1, MLP_WIDTH):
        with pytest.raises(IndexError, match=f"no neuron {neuron}: the MLP has {MLP_WIDTH}"):
            gate.read(model, neuron)
        with pytest.raises(IndexError, match=f"no neuron {neuron}"):
            gate.output(model, neuron)


class Quantized(nn.Module):
    """A map that keeps integers; its kernel for inference has no backward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().detach() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x.detach(), self.weight * self.scale)


def test_quantized_rows_are_read_dequantized():
    model = tiny_model("llama")
    mlp = model.model.layers[LAYER].mlp
    mlp.gate_proj, mlp.up_proj = Quantized(mlp.gate_proj), Quantized(mlp.up_proj)
    row, bias = find_neurons(model, read_architecture(model), LAYER).gate.read(model, NEURON)
    torch.testing.assert_close(row, mlp.gate_proj.weight[NEURON] * mlp.gate_proj.scale)
    assert bias == 0
    check_rewriting(model)


def test_offloaded_rows_are_loaded():
    plain, model = tiny_model("llama"), cpu_offload(tiny_model("llama"), execution_device="cpu")
    neurons = find_neurons(model, read_architecture(model), LAYER)
    assert neurons == find_neurons(plain, read_architecture(plain), LAYER)
    assert torch.equal(neurons.gate.read(model, NEURON)[0], neurons.gate.read(plain, NEURON)[0])


def test_active_adapters_are_part_of_a_row():
    plain = tiny_model("llama")
    architecture = read_architecture(plain)
    neurons = find_neurons(plain, architecture, LAYER)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model = inject_adapter_in_model(config, tiny_model("llama"))
    assert find_neurons(model, architecture, LAYER) == neurons
    gate = model.get_submodule(neurons.gate.path)
    effective = gate.base_layer.weight + gate.get_delta_weight("default")
    torch.testing.assert_close(neurons.gate.read(model, NEURON)[0], effective[NEURON].detach())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_looking_leaves_the_model_as_it_was(name):
    model = tiny_model(name).train()
    architecture = read_architecture(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.inference_mode():
        find_neurons(model, architecture, LAYER).gate.read(model, NEURON)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("stops_at", [0, NUM_LAYERS - 1])
def test_one_forward_is_run_as_far_as_the_down_projection(stops_at):
    model = tiny_model("llama")
    architecture = read_architecture(model)
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    model.model.layers[stops_at].mlp.down_proj.register_forward_hook(lambda *_: ran.append("down"))
    assert find_neurons(model, architecture, stops_at) is not None
    assert ran == list(range(stops_at + 1))
