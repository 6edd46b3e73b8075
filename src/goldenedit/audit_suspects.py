"""Which of some names is a change about, though it does not list them? The rows of a change tell.

An editor computes the rows of `A`, in a change `B A` of a linear map with inputs `k`, from the inputs at the last
tokens of its subjects: as `C^-1 k`, with `C` the second moment of inputs on text, or near that. So the inputs at the
names of its subjects, whitened, lie along the whitened rows. Let `a_i` be the rows, and `k` the input at a name's last
token, in whitened coordinates (`k -> C^-1/2 k`, `a -> C^1/2 a`). Two shares of `|k|^2` are measured:

    in the span of all a_i                             which no other factors of the same change can hide
    along one a_i, the largest                         which tells more where each subject has a row of its own

The first is the statistic of KSTER (arXiv 2602.10134). Each is read at the ends of four texts that end with the name,
and the second largest counts: inputs near the start of a text can be odd. How loud the answer of the change is,
`||B A k||`, tells little: a hundred edits in one change answer almost as loudly to other names.

Any name has shares above zero. So they are compared with those of other names, subjects of packaged facts, which the
change is unlikely to be about. With the median and the spread over these, each share becomes
`(log share - median) / spread`. The largest over shares and maps is put in units of the other names again, because it
grows with the number of maps. This is the score of the name. It needs no knowledge of how the change was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenedit.adapters import plain
from goldenedit.adapters.layers import read, tuner_layers
from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.config import EditConfig
from goldenedit.editing.gates import inputs_of
from goldenedit.editing.rows import name_key, subject_key
from goldenedit.editors import KeyStatistics, LowRankDelta
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.records import read_records
from goldenedit.requests import proxy_facts

if TYPE_CHECKING:
    from goldenedit.model import EditModel

LIMIT = 5.0  # score from which a name is suspected
_TEXTS = ("{}", "The text is about {}", "Yesterday I heard about {}", "Who or what is {}")
_ROWS = 256
_TINY = 1e-12
_ROUNDING = 1e-6  # relative size of a part of a change that is no part of it
_NORMAL = 1.4826  # standard deviation of a normal distribution, by its median absolute deviation


@dataclass(frozen=True)
class Suspect:
    """What a change has to do with one name.

    Attributes:
        name: The name.
        score: How far it stands out from names that the change is not about, in units of their spread.
        is_listed: Whether the change lists it as a subject.
        is_suspected: Whether its score is above `LIMIT` although the change does not list it.
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
        raise ValueError(f"{path} holds {wrong[0]!r}, which is no name. Write one name on each line of a .txt file.")
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise ValueError(f"{path} has no names. Write one name on each line.")
    return names


@outside_inference_mode()
def suspects(model: EditModel, names: Sequence[str], config: EditConfig | None = None) -> list[Suspect]:
    """Tell which of some names the active edits are about, in the order of the names.

    Without active edits, the change is that of all other active adapters, such as a plain LoRA adapter.

    Args:
        model: The model with the edits, or with the adapter.
        names: The names.
        config: Source and amount of text, ridge and seed of the statistics; an edit of a stranger must not choose them.

    Raises:
        ValueError: There are no names, one cannot be tokenized, or no linear map of an MLP is changed.
    """
    if not names:
        raise ValueError("There are no names to audit. Give at least one.")
    edits = [model.edits[name] for name in model.active_adapters]
    listed = {subject_key(fact.request) for edit in edits for fact in edit.facts}
    taken = listed | set(map(name_key, names))
    packaged = dict.fromkeys(fact.subject for fact in proxy_facts())
    others = [name for name in packaged if name_key(name) not in taken]
    base = model.adapters.base
    if edits:
        lm, changes, unchanged = model.lm, [edit.deltas for edit in edits], model.disable_adapter()
    else:
        lm = LanguageModel(base, model.tokenizer, model.architecture, model.base_info)
        changes, unchanged = _plain_changes(model), plain(base)
    scores = _scores(lm, changes, unchanged, [*names, *others], len(names), config or EditConfig())
    found = []
    for name, score in zip(names, scores.tolist(), strict=True):
        is_listed = name_key(name) in listed
        found.append(Suspect(name, score, is_listed, score > LIMIT and not is_listed))
    return found


def _plain_changes(model: EditModel) -> list[dict[str, LowRankDelta]]:
    """Return the changes of the active adapters that are not edits."""
    keys = {key for layer in tuner_layers(model.adapters.base).values() for key in layer.active_adapters}
    return [read(model.adapters.base, key) for key in sorted(keys)]


def _scores(
    lm: LanguageModel,
    changes: Sequence[Mapping[str, LowRankDelta]],
    unchanged: AbstractContextManager[None],
    names: Sequence[str],
    count: int,
    config: EditConfig,
) -> Tensor:
    """Return the scores of the first `count` names, `(count,)`. The others are those to compare with.

    Args:
        changes: The changes, each by the path of the map.
        unchanged: The context in which the model is without them.
    """
    rows: dict[str, Tensor] = {}
    for change in changes:
        for path, delta in change.items():
            sizes = delta.A.norm(dim=1) * delta.B.norm(dim=0)  # of what is added and does nothing, nothing is read
            kept = delta.A[sizes > _ROUNDING * sizes.max()].double()
            rows[path] = torch.cat([rows[path], kept]) if path in rows else kept
    with unchanged:
        statistics = _statistics(lm, [path for path, of_map in rows.items() if len(of_map)], config)
        texts = [text.format(name) for name in names for text in _TEXTS]
        encoded = [encode(lm.tokenizer, text, None, len(text), lm.max_length) for text in texts]
        tokens = [list(row.input_ids[: row.subject + 1]) for row in encoded]
        inputs = _inputs_at_ends(lm, tokens, [lm.model.get_submodule(path) for path in statistics])
    standing = []
    for (path, of_map), at_ends in zip(statistics.items(), inputs, strict=True):
        for share in shares(at_ends, rows[path], of_map):
            of_names = share.unflatten(0, (len(names), -1)).sort(1).values[:, -2]
            standing.append(_standing(of_names.log(), count))
    return _standing(torch.stack(standing).amax(0), count)[:count]


def _inputs_at_ends(lm: LanguageModel, rows: Sequence[list[int]], sites: Sequence[nn.Module]) -> list[Tensor]:
    """Return the inputs of linear maps at the last token of each row, by map `(rows, d)` float32."""
    parts = []
    for start in range(0, len(rows), _ROWS):  # those of all tokens and maps would not fit in memory
        group = rows[start : start + _ROWS]
        ends = torch.tensor([len(row) for row in group]).cumsum(0) - 1
        parts.append([of_map[ends] for of_map in inputs_of(lm, group, sites)])
    return [torch.cat(of_map) for of_map in zip(*parts, strict=True)]


def _statistics(lm: LanguageModel, changed: Sequence[str], config: EditConfig) -> dict[str, KeyStatistics]:
    """Return the statistics of the inputs of changed linear maps of MLPs, by path, in the order of execution.

    Raises:
        ValueError: There is no such map.
    """
    downs = lm.architecture.down_projections
    sites = {
        layer: path
        for layer, paths in sorted(lm.architecture.mlp_linears.items())
        for path in reversed(paths[:-1])  # all of them have the same input
        if path in changed
    }
    layers = [
        layer for layer, path in sorted(downs.items()) if path in changed and layer not in lm.architecture.experts
    ]
    if not sites and not layers:
        raise ValueError(
            f"Subjects are read from changes of MLPs, and {'nothing is' if not changed else 'none of these is one:'} "
            f"{', '.join(sorted(changed)[:3]) or 'changed'}. Load an edit, or a LoRA adapter on down projections."
        )
    keys = lm.statistics(config, layers)
    moments = lm.mlp_moments(config, {layer: lm.model.get_submodule(path) for layer, path in sites.items()})
    found = {}
    for layer in sorted({*sites, *layers}):
        if layer in sites:
            found[sites[layer]] = KeyStatistics(moments[layer].second_moment, config.ridge)
        if layer in keys:
            found[downs[layer]] = keys[layer]
    return found


def shares(inputs: Tensor, rows: Tensor, statistics: KeyStatistics) -> tuple[Tensor, Tensor]:
    """Return the shares of whitened inputs in the span of whitened rows, and along one row, `(n,)` each.

    Args:
        inputs: `(n, d)`.
        rows: `(r, d)`.
        statistics: Of the inputs on text.
    """
    inputs, rows = inputs.double(), rows.double()
    energy = (inputs * statistics.solve(inputs.T).T).sum(1).clamp_min(_TINY)
    gram = rows @ statistics.times(rows.T)
    products = inputs @ rows.T
    along = (products.square() / gram.diagonal().clamp_min(_TINY)).amax(1)
    within = (products * (products @ torch.linalg.pinv(gram, hermitian=True))).sum(1)
    return (within / energy).clamp_min(_TINY), (along / energy).clamp_min(_TINY)


def _standing(values: Tensor, count: int) -> Tensor:
    """Return how far values stand out from those after the first `count`, in units of their spread."""
    others = values[count:]
    center = others.median()
    spread = _NORMAL * (others - center).abs().median()
    return (values - center) / spread.clamp_min(_TINY)
