"""GGUF adapters: the factors bit by bit under llama.cpp's names, and nothing on disk that it could not use."""

import dataclasses
import sys
from itertools import product

import gguf
import pytest
import torch
from contents import FIRST, SECOND, delta, edit_folder
from transformers import Gemma3Config

from goldenedit import EditConfig, get_edit_model
from goldenedit.architecture import find_down_projections, read_architecture
from goldenedit.architecture.neurons import find_neurons
from goldenedit.editors.delta import LowRankDelta
from goldenedit.storage.folder import Edit, fuse
from goldenedit.storage.gguf import ARCHITECTURES, export_gguf
from models import EXPERTS_CONFIGS, NUM_LAYERS, TINY_CONFIGS, UNSUPPORTED_CONFIGS, tiny_model
from tiny_edits import TOWER
from zoo import zoo_model

LLAMA = TINY_CONFIGS["llama"]()


def holding(*edits):
    return dataclasses.replace(edit_folder(), edits=list(edits))


def one_edit(deltas):
    return holding(Edit("edit_1", [], deltas))


def read(path):
    """Return the metadata and the tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def test_all_edits_are_one_adapter_of_one_rank(tmp_path):
    content = edit_folder()
    export_gguf(content, LLAMA, tmp_path / "new" / "edit.gguf")
    fields, tensors = read(tmp_path / "new" / "edit.gguf")
    rank, modules = fuse(content.edits)
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": rank,
    }
    assert len(tensors) == 4
    for layer, module in ((1, FIRST), (2, SECOND)):
        assert torch.equal(tensors[f"blk.{layer}.ffn_down.weight.lora_a"], modules[module].A)
        assert torch.equal(tensors[f"blk.{layer}.ffn_down.weight.lora_b"], modules[module].B)


def test_half_precision_is_widened(tmp_path):
    half = LowRankDelta(delta(2, 0).A.bfloat16(), delta(2, 0).B.bfloat16())
    export_gguf(one_edit({FIRST: half}), LLAMA, tmp_path / "edit.gguf")
    factor = read(tmp_path / "edit.gguf")[1]["blk.1.ffn_down.weight.lora_b"]
    assert factor.dtype == torch.float32
    assert torch.equal(factor, half.B.float())


@pytest.mark.parametrize("name", [name for name in TINY_CONFIGS if TINY_CONFIGS[name]().model_type in ARCHITECTURES])
def test_each_architecture_has_its_down_projections_in_linear_orientation(name, tmp_path):
    model = tiny_model(name)
    deltas = {path: delta(1, layer) for layer, path in find_down_projections(model).items()}
    export_gguf(one_edit(deltas), model.config, tmp_path / "edit.gguf")
    fields, tensors = read(tmp_path / "edit.gguf")
    assert fields["general.architecture"] == ARCHITECTURES[model.config.model_type]
    assert set(tensors) == {
        f"blk.{layer}.ffn_down.weight.lora_{factor}" for layer in range(NUM_LAYERS) for factor in "ab"
    }
    assert torch.equal(tensors["blk.2.ffn_down.weight.lora_a"], delta(1, 2).A)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_architecture_has_the_maps_that_compute_its_neurons(model_type, tmp_path):
    model = zoo_model(model_type)
    neurons = find_neurons(model, read_architecture(model), 1)
    paths = {block.path for block in (neurons.gate, neurons.up) if block is not None}
    deltas = {path: delta(1, index) for index, path in enumerate(sorted(paths))}
    export_gguf(one_edit(deltas), model.config, tmp_path / "edit.gguf")
    tensors = read(tmp_path / "edit.gguf")[1]
    gate = "ffn_gate" if len(paths) == 2 else "ffn_up"  # alone, or before the ups in one map
    assert len(tensors) == 2 * len(paths)
    assert torch.equal(tensors[f"blk.1.{gate}.weight.lora_a"], deltas[neurons.gate.path].A)
    if neurons.up is not None:
        assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], deltas[neurons.up.path].A)
        assert len(paths) == 2 or neurons.gate.offset == 0  # llama.cpp takes the first half for the gates


def test_the_factors_of_an_edit_that_rewrites_neurons_have_the_orientation_of_linear_maps(tokenizer, tmp_path):
    base = tiny_model("gpt2")
    fast = {"steps": 2, "contexts": 1, "context_length": 3, "covariance_tokens": 100}
    model = get_edit_model(base, EditConfig(layer=1, **fast), tokenizer)
    model.edit([TOWER], name="tower")
    export_gguf(model._content(["tower"]), base.config, tmp_path / "edit.gguf")
    tensors = read(tmp_path / "edit.gguf")[1]
    maps = (("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down"))
    layers = model.edits["tower"].layers  # that of the answers is the last
    assert len(layers) == 2
    merged, plain = model.merge_and_unload(), tiny_model("gpt2")
    for layer, (name, tensor) in product(layers, maps):
        path = f"transformer.h.{layer}.{name}"
        change = merged.get_submodule(path).weight - plain.get_submodule(path).weight  # Conv1D: (d_in, d_out)
        factors = [tensors.pop(f"blk.{layer}.{tensor}.weight.lora_{factor}") for factor in "ba"]
        assert torch.allclose(factors[0] @ factors[1], change.detach().T, atol=1e-5)
    assert not tensors


def test_the_text_part_of_a_larger_model_has_the_names_of_a_text_model(tmp_path):
    config = Gemma3Config(text_config={"num_hidden_layers": NUM_LAYERS})
    module = "model.language_model.layers.1.mlp.down_proj"
    export_gguf(one_edit({module: delta(1, 0)}), config, tmp_path / "edit.gguf")
    assert "blk.1.ffn_down.weight.lora_a" in read(tmp_path / "edit.gguf")[1]


def test_gguf_knows_every_architecture():
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize("name", ["gptj", "opt", "mixtral", "mamba"])
def test_a_model_that_llama_cpp_does_not_run_is_refused_by_name(name, tmp_path):
    config = (TINY_CONFIGS | EXPERTS_CONFIGS | UNSUPPORTED_CONFIGS)[name]()
    with pytest.raises(ValueError, match=f"{name!r} model cannot be exported to GGUF. Supported model types: bloom, "):
        export_gguf(edit_folder(), config, tmp_path / "edit.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"])
def test_a_module_that_llama_cpp_keeps_otherwise_is_refused_by_name(module, tmp_path):
    with pytest.raises(ValueError, match=f"know {module} as a gate, up or down projection of a 'llama' model"):
        export_gguf(one_edit({FIRST: delta(1, 0), module: delta(1, 1)}), LLAMA, tmp_path / "edit.gguf")
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    path = tmp_path / "edit.gguf"
    path.write_text("old")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(edit_folder(), LLAMA, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_without_gguf_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "goldenedit\[gguf\]"'):
        export_gguf(edit_folder(), LLAMA, tmp_path / "edit.gguf")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder\. Give the file to write, such as .*edit\.gguf"):
        export_gguf(edit_folder(), LLAMA, tmp_path)
    assert not list(tmp_path.iterdir())
