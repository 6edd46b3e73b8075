"""Why an edit failed, where the error of a formula does not tell: looked for only after it failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import token_embeddings
from goldenedit.editing.keys import subject_keys
from goldenedit.editing.values import NotFiniteError
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode_request
from goldenedit.requests import EditRequest

_SHOWN = 3  # names of weights
_TEXT = "The capital of France is Paris."


@contextmanager
def explained(
    model: nn.Module, lm: LanguageModel | None = None, facts: Sequence[EditRequest] = (), layers: Sequence[int] = ()
) -> Iterator[None]:
    """Turn errors inside this context into errors that name their cause, if it lies in the weights.

    Args:
        model: The model.
        lm: The model with its tokenizer, for the keys of facts.
        facts: The facts that are edited.
        layers: The layers that are edited, ascending.

    Raises:
        ValueError: A weight is not finite, a subject has no key, or a linear system has no solution.
    """
    try:
        yield
    except (ValueError, LinAlgError) as error:
        if names := non_finite_weights(model):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(
                f"The model cannot be edited, because weights are not finite: {', '.join(names[:_SHOWN])}{more}. Load "
                "another checkpoint."
            ) from error
        is_numeric = isinstance(error, LinAlgError | NotFiniteError)
        if lm is not None and is_numeric and (subject := _without_key(lm, facts, layers)) is not None:
            name, layer = subject
            raise ValueError(
                f"The MLP of layer {layer} is silent at {name!r}: its key is zero, so nothing can be inserted there. "
                "Edit another layer (EditConfig.layer)."
            ) from error
        if isinstance(error, LinAlgError):
            raise ValueError(
                f"A linear system of the editor has no solution ({error}). Edit another layer (EditConfig.layer), or "
                "give the key statistics more text (EditConfig.covariance_tokens)."
            ) from error
        raise


def non_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that have NaN or infinity in them."""
    weights = ((name, weight) for name, weight in model.named_parameters() if weight.is_floating_point())
    return [name for name, weight in weights if not weight.is_meta and not weight.isfinite().all()]


def _without_key(lm: LanguageModel, facts: Sequence[EditRequest], layers: Sequence[int]) -> tuple[str, int] | None:
    """Return the first subject and layer whose key is zero."""
    for layer, keys in zip(layers, subject_keys(lm, facts, layers) if facts and layers else (), strict=False):
        for fact, key in zip(facts, keys, strict=True):
            if not key.any():
                return fact.subject, layer
    return None


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, facts: Sequence[EditRequest] = (), longest: int | None = None
) -> None:
    """Raise ValueError if a fact, or any text if there are no facts, has a token that the model has no embedding of.

    Args:
        longest: The largest number of tokens that the model takes; a longer fact raises as well.
    """
    tokens = {
        fact.text: encode_request(tokenizer, fact, fact.target_new, max_length=longest).input_ids for fact in facts
    }
    known = getattr(token_embeddings(model), "num_embeddings", None)
    for text, ids in (tokens or {_TEXT: tokenizer(_TEXT)["input_ids"]}).items():
        highest = max(ids, default=0)
        if known is not None and highest >= known:
            raise ValueError(
                f"The tokenizer writes {text!r} with token {highest}, but the model has embeddings of {known} "
                "tokens. Pass the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
            )
