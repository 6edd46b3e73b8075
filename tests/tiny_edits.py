"""Fast edits of tiny models, and what is compared before and behind them."""

from __future__ import annotations

import torch
from torch import nn

from goldenedit import EditConfig, EditRequest

TOWER = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
MERKEL = EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "German")
IDS = torch.arange(3, 35).view(2, 16)


def fast_config(**options) -> EditConfig:
    """Return a config that edits fast."""
    fast = {"layer": 1, "steps": 4, "contexts": 2, "context_length": 3, "covariance": "identity", "contrast": 0}
    return EditConfig(**fast | options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return what a model says of some tokens."""
    return model(input_ids=IDS).logits.float()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Assert that logits agree, relative to the largest of them."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether logits differ by more than rounding."""
    return bool((one - other).abs().max() > 1e-3 * one.abs().max())


def trainable(model: nn.Module) -> set[str]:
    """Return the names of the parameters that ask for gradients, without PEFT's parts of them."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names}
