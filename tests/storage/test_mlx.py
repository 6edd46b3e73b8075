"""Adapters for mlx-lm: the formula of its LoRA layer on these files gives the edits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from goldenedit import EditConfig, EditModel, get_edit_model
from goldenedit.storage.mlx import ADAPTER_CONFIG, ADAPTERS, export_mlx
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model
from tiny_edits import MERKEL, TOWER, fast_config


@pytest.fixture
def edited(tmp_path, tokenizer):
    model = EditModel(tiny_model("llama"), fast_config(layer=1), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    model.save_pretrained(tmp_path / "edit")
    return model


def test_the_factors_of_mlx_give_the_sum_of_the_edits(edited, tmp_path):
    content = read_edit_folder(tmp_path / "edit")
    export_mlx(content, edited.config, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / ADAPTERS)
    settings = json.loads((tmp_path / "mlx" / ADAPTER_CONFIG).read_text())
    parameters = settings["lora_parameters"]
    dense: dict[str, torch.Tensor] = {}
    for edit in content.edits:
        for path, delta in edit.deltas.items():
            dense[path] = dense.get(path, 0) + delta.dense()
    assert {key.rpartition(".")[0] for key in tensors} == set(dense)
    for path, change in dense.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        x = torch.randn(2, a.shape[0])
        added = parameters["scale"] * (x @ a) @ b
        torch.testing.assert_close(added, x @ change.T.float(), rtol=1e-4, atol=1e-5)
        layer = int(path.split(".layers.")[1].split(".")[0])
        assert layer >= edited.config.num_hidden_layers - settings["num_layers"]
        assert path.partition(f".{layer}.")[2] in parameters["keys"]
    assert settings["fine_tune_type"] == "lora"


def test_a_map_that_mlx_stores_otherwise_is_refused(tmp_path, tokenizer):
    config = EditConfig("r-rome", layer=1, steps=2, contexts=2, covariance="identity")
    model = get_edit_model(tiny_model("gpt2"), config, tokenizer)
    model.edit(TOWER)
    model.save_pretrained(tmp_path / "edit")
    with pytest.raises(ValueError, match="cannot be exported for mlx-lm"):
        export_mlx(read_edit_folder(tmp_path / "edit"), model.config, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    "path", ["model.language_model.layers.1.mlp.down_proj", "model.layers.1.mlp.experts.down_proj"]
)
def test_a_map_under_another_name_is_refused(path, edited, tmp_path):
    content = read_edit_folder(tmp_path / "edit")
    (edit, *_) = content.edits
    renamed = replace(edit, deltas={path: next(iter(edit.deltas.values()))})
    with pytest.raises(ValueError, match="cannot be exported for mlx-lm"):
        export_mlx(replace(content, edits=[renamed]), edited.config, tmp_path / "mlx")


def test_an_edit_folder_is_not_written_over(edited, tmp_path):
    content = read_edit_folder(tmp_path / "edit")
    with pytest.raises(ValueError, match="would be damaged"):
        export_mlx(content, edited.config, tmp_path / "edit")
    assert read_edit_folder(tmp_path / "edit").edits


def test_an_empty_folder_stays_the_same_folder(edited, tmp_path, monkeypatch):
    target = tmp_path / "mount"
    target.mkdir()
    before = target.stat().st_ino
    monkeypatch.chdir(target)
    edited.save_merged(".")
    assert target.stat().st_ino == before
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in Path.cwd().iterdir()}
    assert not [path for path in Path.cwd().iterdir() if path.is_dir()]


def test_a_merged_checkpoint_is_saved_whole_or_not_at_all(edited, tmp_path, tokenizer):
    ids = tokenizer("I live near", return_tensors="pt")
    with torch.no_grad():
        logits = edited(**ids).logits
    edited.save_merged(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (loaded(**ids).logits - logits).abs().max() < 1e-4
        assert torch.equal(edited(**ids).logits, logits)
    assert loaded.config.golden_layers
    files = sorted(path.name for path in (tmp_path / "merged").iterdir())
    with pytest.raises(FileExistsError, match="not empty"):
        edited.save_merged(tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit", "merged"]
