"""The leverage of keys: larger where a subject's key is unlike other text, and a score for each layer of a model."""

from __future__ import annotations

import torch
from goldenedit_ridge.leverage import leverage

from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.layer_selection import subject_keys
from goldenedit.lm import LanguageModel

FACTS = [
    EditRequest("Angela Merkel was born in", "Angela Merkel", "Paris", "Hamburg"),
    EditRequest("The Louvre is in", "The Louvre", "Rome", "Paris"),
]


def test_without_a_covariance_it_is_the_mean_log_length_of_the_keys(base, tokenizer):
    lm = LanguageModel(base, tokenizer)
    scores = leverage(lm, FACTS, EditConfig(covariance="identity"))
    for score, keys in zip(scores, subject_keys(lm, FACTS, [0, 1, 2]), strict=True):
        torch.testing.assert_close(score, keys.double().square().mean(1).log().mean())


def test_a_config_finds_it_by_its_name(base, tokenizer):
    config = EditConfig(layer="leverage", layer_pattern="golden", proxy=FACTS, covariance_tokens=300, tukey_kappa=0.0)
    model = get_edit_model(base, config, tokenizer)
    scores = torch.tensor(config.layer_scores)
    assert config.target_layer == int(scores.argmax())
    assert model.layer_selection.selector == "leverage"
