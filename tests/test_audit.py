"""The audit of edits: what their facts explain, and what they do not."""

from dataclasses import replace

import pytest
import torch

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.audit import UNEXPLAINED, audit, unexplained
from goldenedit.editing.delta import LowRankDelta
from goldenedit.storage.folder import write_edit_folder
from models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

TOWER = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
MERKEL = EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "German")
FAST = {"layer": 1, "steps": 4, "contexts": 2, "context_length": 3, "covariance_tokens": 300}


def edited(tokenizer, **options) -> EditModel:
    model = get_edit_model(tiny_model("llama"), EditConfig(**FAST | options), tokenizer)
    model.edit([TOWER], name="tower")
    model.edit([MERKEL], name="merkel")
    return model


def loaded(model: EditModel, tokenizer, tmp_path, **changes) -> EditModel:
    """Return what others load where the tower's edit was changed by hand, and signed anew."""
    content = model._content(["tower"])
    forged = replace(content, edits=[replace(content.edits[0], **changes)])
    write_edit_folder(tmp_path / "forged", forged, "")
    return EditModel.from_pretrained(tiny_model("llama"), tmp_path / "forged", tokenizer=tokenizer)


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "emmet", "pmet", "alphaedit"])
def test_an_honest_edit_is_explained_by_its_facts_and_a_hidden_one_is_not(method, tokenizer, tmp_path):
    model = edited(tokenizer, method=method)
    for found in audit(model):
        assert found.warnings == []
        assert all(module.unexplained < 1e-3 for module in found.modules)
    tower, merkel = (model.edits[name].deltas for name in ("tower", "merkel"))
    hidden = {path: delta.beside(merkel[path]) for path, delta in tower.items()}
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=hidden, state={}))
    assert any("changes in 2 directions, but 1 facts are listed" in warning for warning in found.warnings)
    # The same in one direction: the row answers to both subjects.
    (path,) = tower
    mixed = {path: LowRankDelta(tower[path].A + merkel[path].A * tower[path].norm / merkel[path].norm, tower[path].B)}
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=mixed, state={}))
    assert any("answers to none of the listed facts" in warning for warning in found.warnings)
    assert found.modules[0].unexplained > UNEXPLAINED


def test_a_saved_edit_is_explained_where_it_is_loaded(tokenizer, tmp_path):
    edited(tokenizer).save_pretrained(tmp_path / "edit")
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    assert [found.warnings for found in audit(again)] == [[], []]


def test_an_edit_that_does_not_do_what_it_lists_is_told(tokenizer, tmp_path):
    model = edited(tokenizer)
    fact = model.edits["tower"].facts[0]
    boast = [replace(fact, probability_after=1.0)]
    (found,) = audit(loaded(model, tokenizer, tmp_path, facts=boast))
    assert len(found.warnings) == 1
    assert "not the 1.000 that the edit lists" in found.warnings[0]


def test_rows_of_other_contexts_are_not_taken_for_those_of_the_edit(tokenizer, tmp_path):
    (found,) = audit(loaded(edited(tokenizer), tokenizer, tmp_path, contexts_hash="of another machine"))
    assert found.modules[0].unexplained is None
    assert found.warnings == []


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
