"""The tokenizer that belongs to a model."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer from where the model was loaded, `model.name_or_path`.

    Raises:
        ValueError: There is no tokenizer.
    """
    try:
        if not model.name_or_path:
            raise OSError("the model has no name_or_path")
        revision = getattr(model.config, "_commit_hash", None)  # the revision that the model was loaded from
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path, revision=revision)
        return tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer was found for {model.name_or_path or 'this model'!r} ({error}): pass tokenizer=."
        ) from error
