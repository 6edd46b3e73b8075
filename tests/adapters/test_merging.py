"""Edits written into the weights: the same weights whichever verb writes them, and rounded once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load
from torch import Tensor

from goldenedit import EditModel, get_edit_model
from goldenedit.adapters.layers import tuner_layers
from goldenedit.storage.fingerprint import fingerprint
from models import tiny_model
from tiny_edits import IDS, MERKEL, TOWER, assert_near, fast_config, logits

pytestmark = [
    # What stock PEFT 0.21 says when an adapter is added to a model of transformers 5 that has no name.
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # how huggingface_hub 2.4 calls its client
]

DOWN = {"llama": "down_proj", "gpt2": "mlp.c_proj", "mixtral": "gate"}  # Mixtral's experts are edited, not its router
BESIDE = [None, "lora", "dora"]
kinds = pytest.mark.parametrize(("name", "beside"), [(name, kind) for name in DOWN for kind in BESIDE])
in_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


def two_edits(name: str, beside: str | None, dtype: torch.dtype, tokenizer) -> EditModel:
    """Return a model with two edits of one matrix, beside an adapter of the user's on it."""
    model = tiny_model(name).to(dtype)
    if beside is not None:
        targets = ["q_proj"] if name == "mixtral" else [DOWN[name]]
        lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", use_dora=beside == "dora")
        model = get_peft_model(model, lora).eval()
        generator = torch.Generator().manual_seed(0)
        for path, parameter in model.named_parameters():
            if ".lora_B." in path:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    edited = get_edit_model(model, fast_config(steps=8), tokenizer)
    edited.edit(TOWER)
    edited.edit(MERKEL)
    return edited


def as_checkpoint(model: EditModel) -> dict[str, Tensor]:
    with model.adapters.merged() as plain:
        return {path: tensor.clone() for path, tensor in plain.state_dict().items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [path for path, tensor in actual.items() if not torch.equal(tensor, expected[path])] == []


@kinds
@in_dtypes
def test_a_merge_for_good_and_an_edited_checkpoint_are_the_same_weights(name, beside, dtype, tokenizer):
    model = two_edits(name, beside, dtype, tokenizer)
    edited, parameters = logits(model), {id(parameter) for parameter in model.adapters.base.parameters()}
    inside = as_checkpoint(model)
    assert torch.equal(logits(model), edited)
    merged = model.merge_and_unload(safe_merge=True)
    assert not tuner_layers(merged)
    assert {id(parameter) for parameter in merged.parameters()} <= parameters
    assert_same_tensors(merged.state_dict(), inside)
    assert all(tensor.dtype == dtype for tensor in inside.values())
    if dtype == torch.float32:  # in bfloat16 a router may choose another expert
        assert_near(logits(merged), edited, 1e-4)


@pytest.mark.parametrize("name", DOWN)
def test_push_merged_to_hub_writes_the_weights_of_merge_and_unload(hub, name, tokenizer):
    model = two_edits(name, None, torch.bfloat16, tokenizer)
    model.push_merged_to_hub("tester/merged")
    files = hub.repositories["tester/merged"].files()
    model.merge_and_unload().push_to_hub("tester/by_hand")
    by_hand = hub.repositories["tester/by_hand"].files()
    assert_same_tensors(load(files["model.safetensors"]), load(by_hand["model.safetensors"]))
    assert json.loads(files["config.json"])["golden_layers"] == json.loads(by_hand["config.json"])["golden_layers"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sum_of_edits_is_rounded_once(name, tokenizer):
    model = two_edits(name, None, torch.bfloat16, tokenizer)
    (path,) = model.edits["edit_1"].deltas
    total = tiny_model(name).bfloat16().get_submodule(path).weight.float()
    for edit in model.edits.values():
        dense = edit.deltas[path].dense()
        total += dense.T if name == "gpt2" else dense
    assert torch.equal(as_checkpoint(model)[f"{path}.weight"], total.bfloat16())


def test_only_the_active_edits_are_written(tokenizer):
    model = two_edits("llama", None, torch.float32, tokenizer)
    model.set_adapter("edit_2")
    edited = logits(model)
    assert_near(logits(model.merge_and_unload()), edited, 1e-5)


def test_a_sum_that_is_not_finite_is_refused_and_nothing_has_changed(tokenizer):
    model = two_edits("llama", "lora", torch.float32, tokenizer)
    before = {path: tensor.clone() for path, tensor in model.adapters.base.state_dict().items()}
    layer = tuner_layers(model.adapters.base)["model.layers.1.mlp.down_proj"]
    layer.lora_B["edit_1"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not be finite"):
        model.merge_and_unload()
    layer.lora_B["edit_1"].weight.data[0, 0] = before["model.layers.1.mlp.down_proj.lora_B.edit_1.weight"][0, 0]
    assert_same_tensors(model.adapters.base.state_dict(), before)
    assert list(model.edits) == ["edit_1", "edit_2"]
    assert model(input_ids=IDS).logits.isfinite().all()


def test_a_merge_of_the_users_adapter_alone_is_a_new_base_model(tokenizer, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_edit_model(get_peft_model(tiny_model("llama"), lora), fast_config(), tokenizer)
    before = model.base_info
    merged = model.merge_and_unload()
    assert model.base_info.fingerprint == fingerprint(merged) != before.fingerprint
    model.edit(TOWER)
    model.save_pretrained(tmp_path)
    assert list(EditModel.from_pretrained(model.unload(), tmp_path, tokenizer=tokenizer).edits) == ["edit_1"]


def test_a_merge_is_seen_by_the_other_edit_models_of_the_base(tokenizer, tmp_path):
    base = tiny_model("llama")
    one = get_edit_model(base, fast_config(), tokenizer)
    other = get_edit_model(base, fast_config(layer="lga", proxy=[TOWER]), tokenizer)
    before = other.base_info
    one.edit(TOWER)
    one.save_pretrained(tmp_path / "old")
    merged = one.merge_and_unload()
    with pytest.raises(ValueError, match="No layer selector has run"):  # on these weights
        other.golden_layers()
    assert other.base_info == one.base_info != before
    assert other.base_info.fingerprint == fingerprint(merged)
    with pytest.raises(ValueError, match="were made on"):
        other.load_adapter(tmp_path / "old")
    other.edit(MERKEL)
    assert other.lm.weights == one.base_info
    other.save_pretrained(tmp_path / "new")
    assert list(EditModel.from_pretrained(other.unload(), tmp_path / "new", tokenizer=tokenizer).edits) == ["edit_1"]


def test_a_merge_of_nothing_leaves_the_base_model_as_it_was(tokenizer):
    model = get_edit_model(tiny_model("llama"), fast_config(), tokenizer)
    model.base_info = before = replace(model.base_info, revision="0" * 40)
    model.merge_and_unload()
    assert model.base_info == before
    model.edit(TOWER)
    model.set_adapter([])
    model.merge_and_unload()
    assert model.base_info == before
