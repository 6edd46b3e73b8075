"""Edits on top of a LoRA on quantized weights, as QLoRA has it: here integers with a scale."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from goldenedit import EditModel, get_edit_model
from models import tiny_model
from tiny_edits import TOWER, assert_near, differ, fast_config, logits, trainable

# What stock PEFT 0.21 says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")


class IntegerLinear(nn.Linear):
    """A linear map of integers with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def users_model(targets: list[str]) -> PeftModel:
    """Return a model of integers with a trained adapter of the user's."""
    base = tiny_model("llama")
    for path, linear in list(base.model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(base.model.get_submodule(parent), child, IntegerLinear(linear))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"), "mine").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj", "v_proj"]], ids=["same module", "other modules"])
def test_an_edit_is_made_saved_and_loaded_beside_it_and_never_merged(targets, tokenizer, tmp_path):
    user = users_model(targets)
    before, asked = logits(user), trainable(user)
    model = get_edit_model(user, fast_config(), tokenizer)
    edit = model.edit(TOWER)
    assert edit.facts[0].probability_after > edit.facts[0].probability_before
    assert [entry.name for entry in edit.beside] == ["mine"]
    edited = logits(model)
    assert differ(edited, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert_near(logits(EditModel.from_pretrained(users_model(targets), tmp_path, tokenizer=tokenizer)), edited)
    stock = users_model(targets)
    stock.load_adapter(tmp_path, "edit")
    stock.base_model.set_adapter(["mine", "edit"])
    assert_near(logits(stock), edited)
    with pytest.raises(ValueError, match="quantized"):
        model.merge_and_unload()
    assert torch.equal(logits(model), edited)
    assert model.unload() is user
    assert torch.equal(logits(user), before)
    assert trainable(user) == asked
