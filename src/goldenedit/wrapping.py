"""What can be wrapped for editing: a causal LM of transformers, its config and its tokenizer, each as an object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.architecture.layers import UnsupportedArchitectureError
from goldenedit.config import EditConfig
from goldenedit.parallel import is_sharded


def check_arguments(model: object, edit_config: object, tokenizer: object) -> None:
    """Raise TypeError if one of the arguments of `EditModel` is not of its type.

    Args:
        model: A causal LM, or a wrapper of accelerate or torch around one.
        edit_config: An EditConfig.
        tokenizer: A tokenizer, or None.
    """
    if isinstance(model, str | Path):
        name = str(model)
        raise TypeError(
            f"Expected a causal LM, got the name {name!r}. Load it: AutoModelForCausalLM.from_pretrained({name!r})."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a causal LM of transformers, got {type(model).__name__}.")
    if not isinstance(edit_config, EditConfig):
        spread = ": EditConfig(**options)" if isinstance(edit_config, dict) else ""
        raise TypeError(f"edit_config must be an EditConfig, got {type(edit_config).__name__}{spread}.")
    if isinstance(tokenizer, str):
        raise TypeError(
            f"Expected a tokenizer, got the name {tokenizer!r}. Load it: AutoTokenizer.from_pretrained({tokenizer!r})."
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"Expected a tokenizer of transformers, got {type(tokenizer).__name__}.")


def check_editable_model(model: nn.Module) -> PreTrainedModel | PeftModel:
    """Return a model that can be edited.

    Raises:
        TypeError: It is not a model of transformers.
        UnsupportedArchitectureError: It is no causal LM.
        ValueError: Its weights are not there as whole matrices that gradients pass through.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"Expected a causal LM of transformers, got {type(model).__name__}.")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    if base.config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{name} is an encoder-decoder. Only causal LMs can be edited.")
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            "The model was loaded inside torch.inference_mode(), and no gradient passes through such weights: load it "
            "outside. All methods of an EditModel may be called inside."
        )
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # loaded when it is needed
    if all(parameter.is_meta for parameter in parameters) and not is_offloaded:
        raise ValueError(f"The weights of {name} are on the meta device, where there are no numbers. Load them.")
    if is_sharded(model):
        raise ValueError(
            "The weights are divided among processes (tp_plan, or FSDP), and edits need whole matrices. Load the model "
            'without tp_plan, with device_map="auto" if one device is too small. The saved edit is a LoRA adapter, '
            "which can be served in any way."
        )
    return model
