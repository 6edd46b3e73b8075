"""Leverage: the layers at which subjects stand out from other text.

The least harmful edit adds its value along `C^-1 k` (ROME), so its mean effect on other text is
`||r||^2 / (k^T C^-1 k)`: the larger the leverage `k^T C^-1 k` of a subject's key, the smaller this effect. That is half
of what makes a layer good. Leverage does not show whether the layer still reaches the answer, so the last layers may
score high without being good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from goldenedit import EditConfig, EditRequest
from goldenedit.layer_selection import selector, subject_keys
from goldenedit.lm import LanguageModel


@selector("leverage", depends_on=("covariance",))
def leverage(lm: LanguageModel, facts: Sequence[EditRequest], config: EditConfig) -> Tensor:
    """Return the mean log leverage of the subjects' keys at each layer, relative to the mean of other text, `d_in`."""
    scores = torch.full((lm.architecture.num_layers,), torch.nan, dtype=torch.float64)
    statistics = lm.streamed_statistics(config)
    layers = list(statistics)
    for layer, keys in zip(layers, subject_keys(lm, facts, layers), strict=True):  # (N, d_in) each
        K = keys.double().T
        lengths = (K * statistics[layer].solve(K)).sum(0)  # k^T C^-1 k, of each fact
        scores[layer] = (lengths / len(K)).log().mean()
    return scores
