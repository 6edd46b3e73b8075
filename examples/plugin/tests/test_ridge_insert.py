"""Ridge insertion: its formula without a model, and an edit that saves and loads with one."""

from __future__ import annotations

import pytest
import torch
from goldenedit_ridge.ridge_insert import RidgeOptions, ridge_insert

from goldenedit import EditConfig, EditModel, get_edit_model
from goldenedit.editors import EDITORS, Problem

D_IN, D_OUT, FACTS = 24, 10, 5
FACT = ("The Eiffel Tower is in", "The Eiffel Tower", "Rome")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def test_the_update_is_its_formula():
    K, R = torch.randn(D_IN, FACTS), torch.randn(D_OUT, FACTS)
    delta = ridge_insert(Problem.of(K, R, options=RidgeOptions(ridge=0.5)))
    assert delta.rank == FACTS
    expected = R @ K.T @ torch.linalg.inv(K @ K.T + 0.5 * torch.eye(D_IN))
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-4, atol=1e-5)


def test_the_ridge_is_measured_against_the_keys():
    problem = Problem.of(10 * torch.randn(D_IN, FACTS), torch.randn(D_OUT, FACTS))
    options = EDITORS.get("ridge-insert").resolve({"ridge": 0.5}, relative_constants=True, problem=problem)
    assert options.ridge == pytest.approx(0.5 * problem.keys.square().sum(0).mean().item())


def test_an_edit_saves_and_loads_with_its_options(base, tokenizer, tmp_path):
    config = EditConfig(method="ridge-insert", layer=1, options={"ridge": 0.5}, contexts=2, weight_decay=0.02)
    model = get_edit_model(base, config, tokenizer)
    (fact,) = model.edit(*FACT).facts
    assert fact.probability_after > fact.probability_before
    model.save_pretrained(tmp_path)
    edited = logits(model)

    loaded = EditModel.from_pretrained(model.unload(), tmp_path, tokenizer=tokenizer)
    assert loaded.edit_config.options == {"ridge": 0.5}
    assert loaded.edit_config.ridge == EditConfig().ridge  # that of the key statistics: another option
    torch.testing.assert_close(logits(loaded), edited)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "ridge-insert" in card
    assert "ridge 0.5" in card


@pytest.mark.parametrize("options", [{"ridge": -1.0}, {"ridge": "much"}, {"rigde": 0.5}])
def test_what_means_nothing_is_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EditConfig(method="ridge-insert", options=options)
