"""The audit of edits: what their facts explain, and what they do not."""

import re
from dataclasses import replace

import pytest
import torch

from audited import FAST, TOWER, doubts, edited, loaded
from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.architecture.layers import plain_weight
from goldenedit.audit import UNEXPLAINED, _relative, audit, unexplained
from goldenedit.editors.delta import LowRankDelta
from models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "emmet", "pmet", "alphaedit"])
def test_an_honest_edit_is_explained_by_its_facts_and_a_hidden_one_is_not(method, tokenizer, tmp_path):
    model = edited(tokenizer, method=method)
    for found in audit(model):
        assert doubts(found) == []
        assert all(module.unexplained < 1e-3 for module in found.modules)
    tower, merkel = (model.edits[name].deltas for name in ("tower", "merkel"))
    hidden = {path: delta.beside(merkel[path]) for path, delta in tower.items()}
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=hidden, state={}))
    assert any("changes in 2 directions, but the number of listed facts is 1" in warning for warning in found.warnings)
    # The same in one direction: the row answers to both subjects.
    (path,) = tower
    mixed = {path: LowRankDelta(tower[path].A + merkel[path].A * tower[path].norm / merkel[path].norm, tower[path].B)}
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=mixed, state={}))
    assert any("no listed fact explains" in warning for warning in found.warnings)
    assert found.modules[0].unexplained > UNEXPLAINED


def test_an_edit_of_several_layers_is_no_hidden_one(tokenizer):
    model = edited(tokenizer, method="memit", layer=[0, 1, 2])
    for found in audit(model):
        assert doubts(found) == []
        first, *later = found.modules
        assert first.unexplained < 1e-3
        assert [module.unexplained for module in later] == [None, None]  # their keys depend on the first


def test_more_directions_than_facts_are_told_though_rows_cannot_be_computed(tokenizer, tmp_path):
    model = edited(tokenizer, method="null-space")
    tower, merkel = (model.edits[name].deltas for name in ("tower", "merkel"))
    hidden = {path: delta.beside(merkel[path]) for path, delta in tower.items()}
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=hidden, contexts_hash=None))
    (doubt,) = doubts(found)
    assert "changes in 2 directions, but the number of listed facts is 1" in doubt


def test_an_edit_is_audited_by_how_it_was_made_itself(tokenizer, tmp_path):
    edited(tokenizer, method="memit", layer=0).save_pretrained(tmp_path / "memit")
    model = edited(tokenizer)
    model.load_adapter(tmp_path / "memit", adapter_name="other")
    model.set_adapter(["tower", "merkel", "other"])
    assert [doubts(found) for found in audit(model)] == [[], [], []]


def test_a_strangers_edit_does_not_choose_what_text_is_loaded(tokenizer, tmp_path):
    model = edited(tokenizer)
    for change in ({"covariance": "someone/dataset"}, {"covariance_tokens": 10**9}, {"contexts": 10**7}):
        made = replace(model.edits["tower"].config, **change)
        (found,) = audit(loaded(model, tokenizer, tmp_path, configs=(made,)))
        assert {module.unexplained for module in found.modules} == {None}


def test_an_edit_without_neurons_to_rewrite_is_explained_by_its_keys(tokenizer):
    for found in audit(edited(tokenizer, covariance="identity")):
        assert doubts(found) == []
        (module,) = found.modules
        assert module.unexplained < 1e-3


def test_a_weight_that_is_elsewhere_has_no_norm(tokenizer):
    model = edited(tokenizer)
    module = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    weight = module.base_layer.weight
    assert _relative(1.0, plain_weight(module)) == pytest.approx(1 / weight.norm().item())
    module.base_layer.weight = torch.nn.Parameter(weight.to("meta"))
    assert _relative(1.0, plain_weight(module)) is None


def test_a_saved_edit_is_explained_where_it_is_loaded(tokenizer, tmp_path):
    edited(tokenizer).save_pretrained(tmp_path / "edit")
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    assert [doubts(found) for found in audit(again)] == [[], []]


@pytest.mark.parametrize(
    ("before", "after", "listed"),
    [
        (0.0, 1.0, "but the edit lists 1.000"),
        (0.0, 0.2, "; the edit lists 0.200, still unlikely"),
        (0.06, 0.027, "; the edit lists 0.027, less likely than before"),
    ],
)
def test_a_fact_that_is_not_answered_is_told_whatever_the_edit_lists(before, after, listed, tokenizer, tmp_path):
    model = edited(tokenizer)
    fact = model.edits["tower"].facts[0]
    claimed = [replace(fact, probability_before=before, probability_after=after, weakest_after=None)]
    (found,) = audit(loaded(model, tokenizer, tmp_path, facts=claimed))
    (warning,) = found.warnings
    assert f"'Rome' is not answered: it has a probability of {found.probabilities[0]:.3f}" in warning
    assert listed in warning
    assert found.answered == [False]


def test_a_fact_with_one_unlikely_token_is_not_answered(tokenizer):
    base = tiny_model("llama")
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(base.config.vocab_size))
    base.lm_head.bias.data[tokenizer.convert_tokens_to_ids("ĠRome")] = 1e3
    model = get_edit_model(base, EditConfig(**FAST), tokenizer)
    model.edit(replace(TOWER, target_new="Rome city"), name="tower")
    (found,) = audit(model)
    assert found.answered == [False]
    assert re.search(r"a probability of \S+, weakest 0\.000", found.warnings[0])


def test_a_fact_that_a_later_edit_overwrites_is_not_answered_and_the_later_one_is(tokenizer):
    base = tiny_model("llama")
    base.lm_head.weight.data *= 4  # so that edits take
    options = {"method": "null-space", "layer": 0, "steps": 40, "clamp": 50.0, "kept_questions": 6}
    config = EditConfig(**FAST | options)
    model = get_edit_model(base, config, tokenizer)
    near = EditRequest("I live near The Eiffel Tower", "The Eiffel Tower", "city")
    model.edit(near, name="first")
    (alone,) = audit(model)
    assert (alone.answered, alone.warnings) == ([True], [])
    model.edit(replace(near, target_new="Rome"), name="second")
    first, second = audit(model)
    assert (first.answered, second.answered) == ([False], [True])
    assert "'city' is not answered" in first.warnings[0]
    assert doubts(first) == second.warnings == []


def test_rows_of_other_contexts_are_not_taken_for_those_of_the_edit(tokenizer, tmp_path):
    (found,) = audit(loaded(edited(tokenizer), tokenizer, tmp_path, contexts_hash="of another machine"))
    assert {module.unexplained for module in found.modules} == {None}
    assert doubts(found) == []


@pytest.mark.parametrize("method", ["ft-m", "lora"])
def test_a_trained_edit_has_no_rows_but_a_norm(method, tokenizer):
    model = edited(tokenizer, method=method, finetune_steps=3)
    for found in audit(model):
        assert all(module.unexplained is None for module in found.modules)
        for module in found.modules:
            (delta,) = model.edits[found.name].deltas.values()
            weight = dict(tiny_model("llama").named_parameters())[f"{module.path}.weight"]
            assert module.norm == pytest.approx((delta.dense().norm() / weight.norm()).item(), rel=1e-4)


def test_what_is_outside_of_the_span_is_unexplained():
    generator = torch.Generator().manual_seed(0)
    rows, B = torch.randn(3, 8, generator=generator), torch.randn(5, 2, generator=generator)
    inside = torch.randn(2, 3, generator=generator) @ rows
    outside = torch.randn(2, 8, generator=generator)
    outside -= outside @ torch.linalg.pinv(rows) @ rows
    assert unexplained(inside, B, rows) < 1e-6
    assert unexplained(outside, B, rows) == pytest.approx(1.0)
    dense = B @ (inside + outside)
    projected = dense @ torch.linalg.pinv(rows) @ rows
    expected = ((dense - projected).norm() / dense.norm()).item()
    assert unexplained(inside + outside, B, rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("change", [{"context_length": 999}, {"contrast_weight": 10**30}], ids=str)
def test_constants_that_no_machine_computes_with_leave_an_edit_unexplained(change, tokenizer, tmp_path):
    model = edited(tokenizer, method="r-rome")
    config = replace(model.edits["tower"].config, **change)
    (found,) = audit(loaded(model, tokenizer, tmp_path, configs=(config,)))
    assert found.modules[0].unexplained is None
