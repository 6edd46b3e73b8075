"""Which of some names does a change answer to, though it does not list them?

A fact that is hidden in weights must act where its subject is read, so a change tells its subjects by what it does
there. Let `h` be the output of a changed layer at the last token of a name without the change, and `h'` with it. The
name's response in that layer is the median of `||h' - h|| / ||h||` over a few texts that end with the name.

Any change does something to any name. So the responses are compared with those of other names, the subjects of the
packaged facts, which a change is unlikely to be about: with `m` the median and `s` the spread of their logarithms,

    score = max over layers  (log response - m) / s

A name is suspected if its score is above `LIMIT`. The method needs no knowledge of how the change was made. It is the
idea of KSTER (arXiv 2602.10134), which compares keys with the row space of a change, for changes of any kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenedit.adapters import plain
from goldenedit.adapters.layers import tuner_layers
from goldenedit.architecture.hooks import evaluating, outside_inference_mode, recording, stop_forward
from goldenedit.editing.rows import name_key, subject_key
from goldenedit.lm import LanguageModel
from goldenedit.lm.statistics import padded
from goldenedit.lm.tokens import encode
from goldenedit.records import read_records
from goldenedit.requests import proxy_facts

if TYPE_CHECKING:
    from goldenedit.model import EditModel

LIMIT = 4.0
_TEXTS = ("{}", "The text is about {}", "Yesterday I heard about {}", "Who or what is {}")
_BATCH = 32
_NONE = 1e-6  # relative change that is no response, but rounding
_NORMAL = 1.4826  # standard deviation of a normal distribution, by its median absolute deviation


@dataclass(frozen=True)
class Suspect:
    """What a change does at one name.

    Attributes:
        name: The name.
        score: How far its response is above that of other names, in units of their spread.
        is_listed: Whether the change lists it as a subject.
        is_suspected: Whether the change answers to it and does not list it.
    """

    name: str
    score: float
    is_listed: bool
    is_suspected: bool


def read_names(path: Path) -> list[str]:
    """Return the names in a text file with one name on each line, each of them once.

    Raises:
        ValueError: The file has no names, or is no text.
        OSError: The file cannot be read.
    """
    lines = [record.content for record in read_records(path, plain_text=True)]
    if wrong := [line for line in lines if not isinstance(line, str)]:
        raise ValueError(f"{path} holds {wrong[0]!r}, which is no name. Write one name on each line of a text file.")
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise ValueError(f"{path} has no names. Write one name on each line.")
    return names


@outside_inference_mode()
def suspects(model: EditModel, names: Sequence[str]) -> list[Suspect]:
    """Tell which of some names the active edits answer to, in the order of the names.

    Without active edits, the change is that of all other adapters on the model, such as a plain LoRA adapter.

    Raises:
        ValueError: There are no names, nothing is switched on, or a name has no token.
    """
    if not names:
        raise ValueError("There are no names to suspect. Give at least one.")
    listed = {subject_key(fact.request) for name in model.active_adapters for fact in model.edits[name].facts}
    layers = _changed_layers(model)
    asked = {name_key(name) for name in names} | listed
    packaged = dict.fromkeys(fact.subject for fact in proxy_facts())
    others = [name for name in packaged if name_key(name) not in asked]
    responses = _responses(model, [*names, *others], layers)
    scores = scores_of(responses[: len(names)], responses[len(names) :])
    return [
        Suspect(name, score, is_listed := name_key(name) in listed, score > LIMIT and not is_listed)
        for name, score in zip(names, scores.tolist(), strict=True)
    ]


def scores_of(responses: Tensor, others: Tensor) -> Tensor:
    """Return how far responses are above those of other names, `(n,)`: the largest over layers.

    Args:
        responses: `(n, layers)`.
        others: Those of other names, `(N, layers)`.
    """
    logs, of_others = (values.double().clamp_min(_NONE).log() for values in (responses, others))
    center = of_others.median(0).values
    spread = _NORMAL * (of_others - center).abs().median(0).values
    return ((logs - center) / spread.clamp_min(0.1)).amax(1)


def _changed_layers(model: EditModel) -> list[int]:
    """Return the layers that the active adapters change, ascending."""
    active = tuner_layers(model.adapters.base)
    paths = [path for path, layer in active.items() if set(layer.active_adapters) & set(layer.lora_A)]
    if not paths:
        raise ValueError("No adapter is switched on, so there is no change to audit. Load one, or call set_adapter().")
    return sorted(set(map(model.architecture.layer_of, paths)))


def _responses(model: EditModel, names: Sequence[str], layers: Sequence[int]) -> Tensor:
    """Return the relative change of the output of layers at the last token of each name, `(names, layers)`."""
    changed = _states(model.lm, names, layers)
    with model.disable_adapter() if model.active_adapters else plain(model.adapters.base):
        base = _states(model.lm, names, layers)
    change = (changed - base).norm(dim=-1) / base.norm(dim=-1).clamp_min(torch.finfo(base.dtype).tiny)
    return change.unflatten(0, (len(names), -1)).median(1).values


@torch.no_grad()
def _states(lm: LanguageModel, names: Sequence[str], layers: Sequence[int]) -> Tensor:
    """Return the outputs of layers at the end of each text about each name, `(names * texts, layers, d)`."""
    texts = [text.format(name) for name in names for text in _TEXTS]
    encoded = [encode(lm.tokenizer, text, None, len(text), lm.max_length) for text in texts]
    rows = [list(row.input_ids[: row.subject + 1]) for row in encoded]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    modules = {str(layer): lm.architecture.layer(lm.model, layer) for layer in layers}
    states = torch.empty(0)
    with evaluating(lm.model):
        for start in range(0, len(rows), _BATCH):
            group = order[start : start + _BATCH]
            ids, mask = padded([rows[index] for index in group], lm.padding_id)
            with stop_forward() as stop, recording(modules) as record:
                handle = modules[str(layers[-1])].register_forward_hook(lambda *_, stop=stop: stop())
                try:
                    lm.model(input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
                finally:
                    handle.remove()
            ends = mask.sum(1) - 1
            outputs = [record.outputs[str(layer)] for layer in layers]
            found = torch.stack([output[torch.arange(len(group)), ends.to(output.device)].float().cpu() for output in outputs], 1)
            if not len(states):
                states = found.new_zeros(len(rows), *found.shape[1:])
            states[group] = found
    return states
