"""How much text do key statistics need, in tokens for each dimension of a key?

Values of development facts are optimized once, at the layer that LGA chooses. They are inserted with statistics of more
and more text, one by one and in one batch. *Exact* is the share of facts whose new answer is what the model writes
behind the edited prompt, token by token. *KL* is the divergence on packaged statements, in nats a token. *Leak* is the
energy of the response to other text, of which the statistics have seen nothing, in units of the response to the facts:
the mean of `||Delta k||^2` over its keys by that over the facts' keys. It is all that random models can tell.

    python benchmarks/tokens.py smollm2 gemma3 random-llama-4
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import applied, load, parser, prepare, record, timed
from plan import RANDOM, model_of
from torch import Tensor

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.editors import KeyStatistics, LowRankDelta
from goldenedit.evaluation.harm import State, compare, text_rows
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.perplexity import sample_texts

TOKENS = (0.25, 0.5, 1.0, 2.0, 3.0, 6.0)  # for each dimension of a key
HELD_OUT = 4.0
_TEXTS = 20
PLAIN: dict[str, Any] = {"phrasings": "none", "kept_questions": 0}
EDITORS = {"r-rome": False, "null-space": False, "alphaedit": True, "memit": True}  # whether all facts in one batch


def main() -> None:
    """Measure each model with each amount of text."""
    options = parser(__doc__)
    options.add_argument("models", nargs="*", default=["smollm2"])
    options.add_argument("--facts", type=int, default=8)
    options.add_argument("--tokens", type=float, nargs="+", default=TOKENS)
    arguments = options.parse_args()
    for name in arguments.models:
        record(f"tokens-{name}", measure(name, arguments))


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each editor and each amount of text."""
    is_real = name not in RANDOM
    model = load(name, EditConfig(layer="lga", layer_pattern="golden", **PLAIN)) if is_real else random_model(name)
    if is_real:
        model.select_layer()
    (layer,) = model.edit_config.target_layers
    width = model.architecture.shape(model.lm.model, layer)[1]
    facts = prepare(model, load_requests(arguments.data / "counterfact.json")[: arguments.facts])
    keys = torch.stack([fact.mean for fact in facts.keys(model.edit_config)[layer]], 1)
    held_out, _ = statistics(model, round(HELD_OUT * width), str(arguments.data / "wikibio.json"))
    rows = []
    for share in arguments.tokens:
        of_text, seconds = statistics(model, round(share * width), "sampled")
        for method, in_batch in EDITORS.items():
            config = replace(model.edit_config, method=method)
            groups = [list(range(arguments.facts))] if in_batch else [[index] for index in range(arguments.facts)]
            edits = {str(group): facts.changes(config, {layer: of_text}, chosen=group).deltas for group in groups}
            leaks = [
                leak(delta, keys[:, group], held_out)
                for group, deltas in zip(groups, edits.values(), strict=True)
                for delta in deltas.values()
            ]
            row = {"editor": method, "layer": layer, "width": width, "tokens a dimension": share, "leak": mean(leaks)}
            if is_real:
                states = {name: partial(applied, model, partial(dict, deltas)) for name, deltas in edits.items()}
                row |= success_and_harm(model, facts.requests, groups, states)
            rows.append({**row, "seconds for 10,000 tokens": round(seconds * 1e4 / (share * width), 1)})
            print(rows[-1], flush=True)
    return rows


def random_model(name: str) -> EditModel:
    """Return a model with random weights, to edit at its second layer with values that are not optimized."""
    base, tokenizer = model_of(name, torch.float32)
    return EditModel(base, EditConfig(layer=1, steps=1, **PLAIN), tokenizer)


def statistics(model: EditModel, tokens: int, source: str) -> tuple[KeyStatistics, float]:
    """Return the key statistics of a text at the edited layer, and the seconds that they took."""
    config = replace(model.edit_config, covariance_tokens=tokens, covariance=source)
    with timed() as seconds:
        (found,) = model.lm.statistics(config, config.target_layers).values()
    return found, seconds()


def leak(delta: LowRankDelta | Tensor, keys: Tensor, held_out: KeyStatistics) -> float:
    """Return the mean energy of the response to held-out keys, in units of that to the keys of facts `(d_in, n)`."""
    dense = delta if isinstance(delta, Tensor) else delta.dense()
    if held_out.keys is not None:
        response = (held_out.keys @ dense.T).square().sum()
    else:
        response = ((dense @ held_out.second_moment) * dense).sum()
    return (response / (dense @ keys.float()).square().sum(0).mean()).item()


def success_and_harm(
    model: EditModel, requests: Sequence[EditRequest], groups: list[list[int]], states: Mapping[str, State]
) -> dict[str, Any]:
    """Return the share of facts that hold in the state of their group, and the KL on packaged statements."""
    exact = []
    for group, state in zip(groups, states.values(), strict=True):
        with state():
            found = likelihoods(model.lm, [(requests[index].text, requests[index].target_new) for index in group])
        exact += [answer.accuracy == 1 for answer in found]
    compared = compare(
        model.lm, text_rows(model.lm, sample_texts(_TEXTS)), model.edit_config.target_layers[0], nullcontext, states
    )
    return {
        "exact": mean(exact),
        "KL": mean([value for texts in compared.values() for text in texts for value in text.kl]),
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean, rounded for a table."""
    return round(sum(values) / len(values), 5)


if __name__ == "__main__":
    main()
