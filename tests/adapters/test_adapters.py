"""Adapters where PEFT takes names of modules for those that fused experts had: weights are named instead."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from conformance_checks import FACTS
from goldenedit import EditConfig, EditModel, EditRequest
from zoo import zoo_model


@pytest.fixture
def edited(tokenizer) -> EditModel:
    """A mixture of experts with edits of a dense layer, of a shared expert, and of both, which differ in width."""
    config = EditConfig(layer=0, covariance="identity", contexts=2, context_length=3, steps=2)
    model = EditModel(zoo_model("deepseek_v2"), config, tokenizer)
    model.edit(FACTS[0])
    model.edit_config.target_layer = 2
    model.edit(FACTS[1])
    model.edit_config.target_layer = [0, 2]
    model.edit_config.method = "memit"
    model.edit("Rome is a", "Rome", "quick brown fox")
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 19).view(2, 8)).logits


def test_edits_of_different_layers_stack(edited):
    modules = {name: sorted(edit.deltas) for name, edit in edited.edits.items()}
    assert modules == {
        "edit_1": ["model.layers.0.mlp.down_proj"],
        "edit_2": ["model.layers.2.mlp.shared_experts.down_proj"],
        "edit_3": ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.shared_experts.down_proj"],
    }
    for name, edit in edited.edits.items():
        assert set(edited.peft_config[name].target_parameters) == {f"{path}.weight" for path in edit.deltas}
    written = zoo_model("deepseek_v2")
    before = logits(written)
    for edit in edited.edits.values():
        for path, delta in edit.deltas.items():
            written.get_submodule(path).weight.data += delta.dense()
    torch.testing.assert_close(logits(edited), logits(written), rtol=1e-4, atol=1e-4)
    with edited.disable_adapter():
        assert torch.equal(logits(edited), before)


def test_they_are_loaded_by_goldenedit_and_by_peft(edited, tmp_path, tokenizer):
    edited.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(zoo_model("deepseek_v2"), tmp_path, tokenizer=tokenizer)
    assert list(loaded.edits) == list(edited.edits)
    assert all(edit.by_parameter for edit in loaded.edits.values())
    torch.testing.assert_close(logits(loaded), logits(edited), rtol=1e-4, atol=1e-4)
    stock = PeftModel.from_pretrained(zoo_model("deepseek_v2"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(edited), rtol=1e-4, atol=1e-4)


def test_one_of_them_is_deleted_and_the_rest_merged(edited):
    edited.delete_adapter("edit_2")
    after = logits(edited)
    torch.testing.assert_close(logits(edited.merge_and_unload()), after, rtol=1e-4, atol=1e-4)


def test_the_last_one_leaves_a_plain_model(edited):
    for name in list(edited.edits):
        edited.delete_adapter(name)
    assert torch.equal(logits(edited), logits(zoo_model("deepseek_v2")))
    assert not any("lora" in name for name, _ in edited.get_base_model().named_parameters())


def test_what_peft_has_no_place_for_is_refused_and_leaves_no_trace(tokenizer):
    base = zoo_model("laguna")
    before = copy.deepcopy(base.state_dict())
    model = EditModel(base, EditConfig(layer=1, covariance="identity", contexts=1, steps=1), tokenizer)
    with pytest.raises(ValueError, match="renames weights as transformers does with checkpoints"):
        model.edit(FACTS[0])
    assert model.edits == {}
    after = model.get_base_model().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # by module, and by parameter
def test_an_adapter_added_beside_others_leaves_their_factors_where_they_are(kind, tokenizer):
    config = EditConfig(layer=1, covariance="identity", contexts=1, steps=1)
    model = EditModel(zoo_model(kind), config, tokenizer)
    for fact in (*FACTS, EditRequest("Rome is a", "Rome", "quick brown fox")):
        before = {name: factors(model, name) for name in model.edits}
        edit = model.edit(fact)
        assert list(tuner_layer(model).lora_A) == list(model.edits)
        for name, kept in before.items():
            assert all(one is other for one, other in zip(factors(model, name), kept, strict=True))
        (delta,) = edit.deltas.values()
        for factor, stored in zip(factors(model, edit.name), delta.stored(), strict=True):
            assert torch.equal(factor, stored)
    assert tuner_layer(model).active_adapters == list(model.edits)


def tuner_layer(model: EditModel) -> LoraLayer:
    (found,) = (module for module in model.get_base_model().modules() if isinstance(module, LoraLayer))
    return found


def factors(model: EditModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = tuner_layer(model)
    return layer.lora_A[name].weight, layer.lora_B[name].weight
