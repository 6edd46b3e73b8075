"""Edits beside quantized weights: found, made, saved, stacked and switched off, and never rounded into them."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch
from gguf.quants import quantize
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.architecture.hooks import evaluating
from goldenedit.architecture.layers import is_quantized, plain_weight
from goldenedit.architecture.neurons import find_neurons
from goldenedit.architecture.quantized import giving_backward
from goldenedit.editing.gates import _columns, rewritten
from goldenedit.layer_selection import lga_scores
from goldenedit.storage.fingerprint import fingerprint
from models import NUM_LAYERS, VOCAB_SIZE

TOWER = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
MERKEL = EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "German")
WIDTH, MLP_WIDTH = 64, 128  # quantizers take their weights in groups of 32 or 64


class IntegerLinear(nn.Linear):
    """A map that keeps integers, in another order once it ran; its kernel for inference has no backward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("scale", scale.detach())
        integers = (linear.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.reordered = False

    def _save_to_state_dict(self, *args):
        if self.reordered:
            self.scale.fill_(0)  # as bitsandbytes loses its own
        super()._save_to_state_dict(*args)

    def forward(self, x):
        if not self.training and not x.requires_grad and not self.reordered:
            self.weight.data, self.reordered = self.weight.data.flip(0), True
        if not self.reordered:
            return nn.functional.linear(x, self.weight * self.scale)
        return nn.functional.linear(x.detach(), self.weight.flip(0) * self.scale)


def config(layer=1, **options) -> EditConfig:
    fast = {"steps": 8, "contexts": 2, "context_length": 3, "covariance": "identity", "contrast": 0}
    return EditConfig(layer=layer, **fast | options)


def plain_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            intermediate_size=MLP_WIDTH,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    ).eval()


def with_integers() -> LlamaForCausalLM:
    model = plain_model()
    for path, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(model.model.get_submodule(parent), child, IntegerLinear(linear))
    return model


@pytest.fixture
def logits(tokenizer):
    @torch.no_grad()
    def run(model: nn.Module) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokenizer(TOWER.text)["input_ids"]])).logits.float()

    return run


def check_edits(load, tokenizer, logits, folder):
    """Assert all that an edit must show on a model that `load` makes, and return the model, with two edits on."""
    base = load()
    before, named = logits(base), fingerprint(base)
    assert fingerprint(load()) == named  # whether it ran or not
    model = get_edit_model(base, config(), tokenizer)
    (fact,) = model.edit(TOWER).facts
    assert fact.probability_after > 1.2 * fact.probability_before
    edited = logits(model)
    assert not torch.equal(edited, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(folder)
    assert torch.equal(logits(EditModel.from_pretrained(load(), folder, tokenizer=tokenizer)), edited)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), folder)), edited)
    model.edit(MERKEL)
    assert model.active_adapters == ["edit_1", "edit_2"]
    assert fingerprint(base) != ""  # its weights are wrapped by now, and read all the same
    model.set_adapter("edit_1")
    assert torch.equal(logits(model), edited)
    model.set_adapter(["edit_1", "edit_2"])
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    return model


def check_neurons(load, tokenizer, logits):
    """Assert that neurons of quantized maps can be rewritten for a subject and its fact, with nothing left of them."""
    base = load()
    before = logits(base)
    down = base.model.layers[1].mlp.down_proj
    columns = _columns(down, base.dtype)
    x = torch.randn(5, MLP_WIDTH)
    with torch.no_grad(), evaluating(base):
        dequantized = down(x.to(base.dtype)).float()
    assert (x @ columns.T - dequantized).abs().max() <= 0.05 * dequantized.abs().max()
    model = get_edit_model(base, config(covariance="sampled", covariance_tokens=200), tokenizer)
    edit = model.edit(TOWER)
    assert len(edit.deltas) == 6  # three maps of the edited layer, and three of the one that answers
    assert not torch.equal(logits(model), before)
    model.delete_adapter(edit.name)
    assert torch.equal(logits(model), before)


def check_refused(model, logits):
    stacked = logits(model)
    for merge in (model.merge_and_unload, model.adapters.merged().__enter__):
        with pytest.raises(ValueError, match=r"mlp\.down_proj (is|are) quantized"):
            merge()
        assert torch.equal(logits(model), stacked)
    assert list(model.edits) == ["edit_1", "edit_2"]


def test_integer_weights_carry_edits_and_are_never_merged(tokenizer, logits, tmp_path):
    check_refused(check_edits(with_integers, tokenizer, logits, tmp_path), logits)


def test_columns_of_integer_weights_are_those_of_the_dequantized_ones(tokenizer, logits):
    for dtype in (torch.float32, torch.bfloat16):
        check_neurons(lambda dtype=dtype: with_integers().to(dtype), tokenizer, logits)
    linear = with_integers().model.layers[1].mlp.down_proj
    torch.testing.assert_close(_columns(linear.eval(), torch.float32), linear.weight.flip(0) * linear.scale)


def test_layer_gradients_are_those_of_the_dequantized_weights(tokenizer, logits):
    dense = plain_model()
    for path, linear in with_integers().named_modules():
        if isinstance(linear, IntegerLinear):
            dense.get_submodule(path).weight.data = linear.weight * linear.scale
    model = with_integers()
    logits(model)  # turns to the kernels without a backward
    found, wanted = (lga_scores(EditModel(base, config(), tokenizer).lm, [TOWER, MERKEL]) for base in (model, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_the_backward_that_is_given_is_the_transpose():
    linear = IntegerLinear(nn.Linear(4, 3, bias=False)).eval()
    x = torch.randn(2, 5, 4)
    linear(x)
    hooks = len(linear._forward_hooks)
    with giving_backward(linear):
        given = x.clone().requires_grad_()
        output = linear(given)
        assert torch.equal(output, linear(x))
        (gradient,) = torch.autograd.grad(output.square().sum(), given)
    assert len(linear._forward_hooks) == hooks
    weight = linear.weight.flip(0) * linear.scale
    torch.testing.assert_close(gradient, 2 * output.detach() @ weight)


def test_a_backward_that_is_there_is_left_alone():
    linear = IntegerLinear(nn.Linear(4, 3, bias=False)).train()
    with giving_backward(linear):
        output = linear(torch.randn(2, 4, requires_grad=True))
    assert "Mm" in type(output.grad_fn).__name__


def test_other_integers_make_another_fingerprint():
    one = with_integers()
    other = copy.deepcopy(one)
    other.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1
    assert fingerprint(one) != fingerprint(other)


def test_quantized_weights_have_no_plain_form():
    model = with_integers()
    assert is_quantized(model.model.layers[0].mlp.up_proj)
    assert plain_weight(model.model.layers[0].mlp.up_proj) is None
    assert not is_quantized(model.lm_head)


def write_gguf(path, model):
    """Write a Llama as llama.cpp's converter does, its matrices in Q8_0."""
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    tensors = {
        f"blk.{index}.{ours}": f"model.layers.{index}.{its}" for ours, its in names.items() for index in range(3)
    }
    tensors |= {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP_WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB_SIZE)
    for name, its in tensors.items():
        weight = model.get_parameter(f"{its}.weight").detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_loaded_dequantized_and_merges(tokenizer, logits, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", plain_model())

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)

    model = check_edits(load, tokenizer, logits, tmp_path / "edit")
    stacked = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), stacked, rtol=1e-4, atol=1e-4)


def test_an_edit_that_was_made_apart_is_moved_to_other_neurons(tokenizer, tmp_path):
    options = {"covariance": "sampled", "covariance_tokens": 200}
    for name, request in (("tower", TOWER), ("merkel", MERKEL)):
        model = get_edit_model(with_integers(), config(**options), tokenizer)
        model.edit(request, name=name)
        model.save_pretrained(tmp_path / name)
    alone = EditModel.from_pretrained(with_integers(), tmp_path / "merkel", tokenizer=tokenizer)
    both = EditModel.from_pretrained(with_integers(), tmp_path / "tower", tokenizer=tokenizer)
    both.load_adapter(tmp_path / "merkel")
    both.set_adapter("merkel")
    found = []
    for model in (alone, both):
        neurons = find_neurons(model.lm.model, model.architecture, 1)
        (neuron,) = rewritten(neurons, model.edits["merkel"].deltas)
        rows = [of.read(model.lm.model, neuron)[0] for of in (neurons.gate, neurons.up)]
        down = model.architecture.down_projection(model.lm.model, 1)
        with torch.no_grad():
            column = down(torch.eye(MLP_WIDTH)[[neuron]])[0]
        found.append((neuron, *rows, column))
    (old, *expected), (new, *actual) = found
    assert old != new
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def by_config(folder, quantization):
    """Return a function that loads the tiny model from `folder`, quantized."""
    plain_model().save_pretrained(folder)
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quanto(weights, tokenizer, logits, tmp_path):
    pytest.importorskip("optimum.quanto")
    load = by_config(tmp_path / "base", QuantoConfig(weights=weights))
    check_refused(check_edits(load, tokenizer, logits, tmp_path / "edit"), logits)
    check_neurons(load, tokenizer, logits)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(name, tokenizer, logits, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    load = by_config(tmp_path / "base", TorchAoConfig(getattr(torchao, name)()))
    check_refused(check_edits(load, tokenizer, logits, tmp_path / "edit"), logits)
    check_neurons(load, tokenizer, logits)


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_bitsandbytes(options, tokenizer, logits, tmp_path):
    pytest.importorskip("bitsandbytes")
    load = by_config(tmp_path / "base", BitsAndBytesConfig(**options))
    check_refused(check_edits(load, tokenizer, logits, tmp_path / "edit"), logits)
    check_neurons(load, tokenizer, logits)


def test_hqq(tokenizer, logits, tmp_path):
    hqq = pytest.importorskip("hqq.core.quantize")

    def load():
        model = plain_model()
        for path, linear in list(model.model.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, child = path.rpartition(".")
                bits = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
                made = hqq.HQQLinear(linear, bits, compute_dtype=torch.float32, device="cpu")
                setattr(model.model.get_submodule(parent), child, made)
        return model

    check_refused(check_edits(load, tokenizer, logits, tmp_path / "edit"), logits)
    check_neurons(load, tokenizer, logits)
