"""The audit of edits that rewrite neurons."""

import re
from dataclasses import replace

import pytest
import torch

from audited import FAST, MERKEL, TOWER, doubts, edited, loaded
from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.audit import UNEXPLAINED, audit
from goldenedit.editors.delta import LowRankDelta
from models import TINY_CONFIGS, tiny_model
from zoo import zoo_model

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

BORN = replace(MERKEL, prompt="Angela Merkel was born in", target_new="Rome")


@pytest.mark.parametrize("facts", [[TOWER], [TOWER, MERKEL], [MERKEL, BORN]], ids=["one", "two", "of one subject"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])  # two maps for neurons, one, and one fused of two
def test_an_honest_edit_that_rewrites_neurons_is_explained_at_all_layers(architecture, facts, tokenizer):
    base = tiny_model(architecture) if architecture in TINY_CONFIGS else zoo_model(architecture)
    model = get_edit_model(base, EditConfig(**FAST | {"layer": [0, 1]}), tokenizer)
    made = model.edit(facts)
    ranks = [delta.rank for path, delta in made.deltas.items() if path in model.architecture.down_projections.values()]
    assert ranks == [len({fact.subject for fact in facts})] * 2 + [len(facts)]
    (found,) = audit(model)
    assert doubts(found) == []
    assert all(module.unexplained < 1e-3 for module in found.modules)
    assert len(found.modules) == (9 if architecture == "llama" else 6)


def test_edits_behind_edits_that_rewrite_neurons_are_explained(tokenizer):
    model = edited(tokenizer, layer=[0, 1])
    assert len(model.edit([BORN], name="no neuron is left").deltas) == 2
    *gated, last = audit(model)
    for found in gated:
        assert doubts(found) == []
        assert all(module.unexplained < 1e-3 for module in found.modules)
    assert doubts(last) == []
    assert last.modules[0].unexplained < 1e-3


def at_neuron(delta: LowRankDelta) -> LowRankDelta:
    """Return a change of a down projection at the next neuron instead."""
    return replace(delta, A=delta.A.roll(1, 1))


def at_row(delta: LowRankDelta) -> LowRankDelta:
    """Return a change of a map at the next row instead."""
    return replace(delta, B=delta.B.roll(1, 0))


GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
ANSWER = ANSWER_GATE, ANSWER_UP, ANSWER_DOWN = tuple(path.replace(".1.", ".2.") for path in (GATE, UP, DOWN))
HIDDEN = {
    "a subject": (
        lambda tower, merkel: {path: delta.beside(merkel[path]) for path, delta in tower.items()},
        "gate_proj rewrites 2 neurons, but the number of listed subjects is 1",
    ),
    "a gate": (
        lambda tower, merkel: {GATE: tower[GATE].beside(merkel[GATE])},
        "gate_proj rewrites 2 neurons, but the number of listed subjects is 1",
    ),
    "a subject at the same neuron": (
        lambda tower, merkel: {GATE: tower[GATE].beside(replace(merkel[GATE], B=tower[GATE].B))},
        "no listed fact explains .* of the change of .*gate_proj",
    ),
    "a gate that opens elsewhere": (
        lambda tower, merkel: {GATE: replace(tower[GATE], A=-tower[GATE].A)},
        "no listed fact explains 100% of the change of .*gate_proj",
    ),
    "an up": (
        lambda tower, merkel: {UP: replace(tower[UP], A=tower[UP].A.flip(1))},
        "no listed fact explains .* of the change of .*up_proj",
    ),
    "an up of another neuron": (
        lambda tower, merkel: {UP: tower[UP].beside(at_row(tower[UP]))},
        "up_proj changes rows of neurons whose gates do not change",
    ),
    "a value of another neuron": (
        lambda tower, merkel: {DOWN: at_neuron(tower[DOWN])},
        "down_proj changes columns of neurons whose gates do not change",
    ),
    "a small rank": (
        lambda tower, merkel: {DOWN: tower[DOWN].beside(LowRankDelta(tower[DOWN].A.flip(1), 1e-3 * tower[DOWN].B))},
        "down_proj changes columns of neurons whose gates do not change",
    ),
    "a map of attention": (
        lambda tower, merkel: {"model.layers.1.self_attn.o_proj": LowRankDelta(torch.ones(1, 32), torch.ones(32, 1))},
        "o_proj is not a map of an edited MLP",
    ),
    "another layer": (
        lambda tower, merkel: {path.replace(".1.", ".0."): tower[path] for path in (GATE, UP, DOWN)},
        "layers.0.mlp.gate_proj is not a map of an edited MLP",
    ),
    "the values of another layer": (
        lambda tower, merkel: {DOWN.replace(".1.", ".0."): tower[DOWN]},
        "layers.0.mlp.down_proj changes columns of neurons whose gates do not change",
    ),
    "an answer": (
        lambda tower, merkel: {path: tower[path].beside(merkel[path]) for path in ANSWER},
        "layers.2.mlp.gate_proj rewrites 2 neurons, but the number of listed facts is 1",
    ),
    "an answer at the same neuron": (
        lambda tower, merkel: {
            ANSWER_GATE: tower[ANSWER_GATE].beside(replace(merkel[ANSWER_GATE], B=tower[ANSWER_GATE].B))
        },
        "no listed fact explains .* of the change of .*layers.2.mlp.gate_proj",
    ),
    "the answer of another fact": (
        lambda tower, merkel: {
            ANSWER_GATE: replace(merkel[ANSWER_GATE], B=tower[ANSWER_GATE].B),
        },
        "no listed fact explains .* of the change of .*layers.2.mlp.gate_proj",
    ),
    "an up of an answer": (
        lambda tower, merkel: {ANSWER_UP: replace(tower[ANSWER_UP], A=tower[ANSWER_UP].A.flip(1))},
        "no listed fact explains .* of the change of .*layers.2.mlp.up_proj",
    ),
    "an answer of another neuron": (
        lambda tower, merkel: {ANSWER_DOWN: at_neuron(tower[ANSWER_DOWN])},
        "layers.2.mlp.down_proj changes columns of neurons whose gates do not change",
    ),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_is_hidden_in_an_edit_that_rewrites_neurons_is_found(hidden, tokenizer, tmp_path):
    model = edited(tokenizer)
    tower, merkel = (model.edits[name].deltas for name in ("tower", "merkel"))
    assert not any(torch.equal(tower[path].B != 0, merkel[path].B != 0) for path in (GATE, UP))
    tamper, warning = HIDDEN[hidden]
    deltas = tower | tamper(tower, merkel)
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=deltas))
    assert any(re.search(warning, doubt) for doubt in doubts(found))
    if "explains" not in warning:  # this is found without the rows
        (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=deltas, contexts_hash=None))
        assert any(re.search(warning, doubt) for doubt in doubts(found))


@pytest.mark.parametrize("rank", [0, 1], ids=["gate", "up"])
def test_a_row_that_is_hidden_in_a_fused_map_is_found(rank, tokenizer):
    model = get_edit_model(zoo_model("phi3"), EditConfig(**FAST), tokenizer)
    tower = model.edit([TOWER], name="tower").deltas
    fused = "model.layers.1.mlp.gate_up_proj"
    hidden = tower[fused].beside(at_row(tower[fused].part(rank, rank + 1)))
    model.edits["tower"] = replace(model.edits["tower"], deltas=tower | {fused: hidden})
    (found,) = audit(model)
    warning = "rows of neurons whose gates do not change" if rank else "rewrites 2 neurons"
    assert any(re.search(f"{fused} .*{warning}", doubt) for doubt in doubts(found))


def test_edits_that_rewrite_neurons_are_explained_when_they_are_joined(tokenizer):
    model = edited(tokenizer)
    model.add_weighted_adapter(["tower", "merkel"], [1.0, 0.5], "both")
    model.set_adapter("both")
    (found,) = audit(model)
    assert doubts(found) == []
    assert all(module.unexplained < UNEXPLAINED for module in found.modules)


def test_an_edit_that_joins_one_that_rewrites_neurons_and_another_is_no_hidden_one(tokenizer, tmp_path):
    edited(tokenizer, method="memit").save_pretrained(tmp_path / "memit")
    model = edited(tokenizer)
    model.load_adapter(tmp_path / "memit", adapter_name="other")
    model.add_weighted_adapter(["tower", "other"], [1.0, 1.0], "both")
    model.set_adapter("both")
    (found,) = audit(model)
    assert doubts(found) == []
    assert {module.unexplained for module in found.modules} == {None}


def test_facts_of_earlier_edits_about_the_subject_count_for_the_rows_of_its_neuron(tokenizer):
    model = get_edit_model(tiny_model("llama"), EditConfig(**FAST), tokenizer)
    near = EditRequest("I live near The Eiffel Tower", "The Eiffel Tower", "city")
    first = model.edit(near, name="first")
    taken = replace(first.facts[0], probability_after=1.0, weakest_after=1.0)
    model.edits["first"] = replace(first, facts=[taken])
    model.edit(TOWER, name="second")
    for found in audit(model):
        assert doubts(found) == []
        assert all(module.unexplained < 1e-3 for module in found.modules)


@pytest.mark.parametrize("apart", [False, True], ids=["one after another", "apart"])
@pytest.mark.parametrize("company", ["stacked", "alone", "joined"])
def test_edits_of_several_subjects_are_explained_in_other_company_than_they_were_made_in(apart, company, tokenizer):
    model = get_edit_model(tiny_model("llama"), EditConfig(**FAST), tokenizer)
    for name, request in {"tower": TOWER, "merkel": MERKEL}.items():
        edit = model.edit(request, name=name)
        taken = replace(edit.facts[0], probability_after=1.0, weakest_after=1.0)
        model.edits[name] = replace(edit, facts=[taken])
        if apart:
            model.set_adapter([])
    if company == "joined":
        model.add_weighted_adapter(["tower", "merkel"], [1.0, 1.0], "both")
    model.set_adapter({"stacked": ["tower", "merkel"], "alone": ["merkel"], "joined": ["both"]}[company])
    for found in audit(model):
        assert doubts(found) == []
        assert all(module.unexplained < UNEXPLAINED for module in found.modules)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5)], ids=str)
def test_the_answers_of_joined_edits_are_compared_as_they_were_before(weights, tokenizer):
    model = edited(tokenizer)
    model.add_weighted_adapter(["tower", "merkel"], weights, "both")
    made = model.edits["both"].deltas
    model.edits["both"] = replace(
        model.edits["both"], deltas=made | {ANSWER_GATE: replace(made[ANSWER_GATE], A=-1 * made[ANSWER_GATE].A)}
    )
    model.set_adapter("both")
    (found,) = audit(model)
    (doubt,) = doubts(found)
    assert f"no listed fact explains 100% of the change of {ANSWER_GATE}" in doubt


def test_an_edit_without_neurons_for_answers_is_compared_in_its_other_layers(tokenizer, tmp_path):
    model = edited(tokenizer)  # as versions did that rewrote neurons of subjects alone
    older = {path: delta for path, delta in model.edits["tower"].deltas.items() if path not in ANSWER}
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=older))
    assert doubts(found) == []
    assert all(module.unexplained < 1e-3 for module in found.modules)


@pytest.mark.parametrize("layer", [1, 9])
def test_a_layer_of_answers_that_the_model_does_not_have_explains_nothing(layer, tokenizer, tmp_path):
    model = edited(tokenizer)
    config = replace(model.edits["tower"].config, answer_layer=layer)
    (found,) = audit(loaded(model, tokenizer, tmp_path, configs=(config,)))
    assert any(f"{ANSWER_GATE} is not a map of an edited MLP" in doubt for doubt in doubts(found))


def test_markers_of_any_size_hide_nothing(tokenizer, tmp_path):
    model = edited(tokenizer)
    deltas = model.edits["tower"].deltas
    huge = replace(deltas[DOWN], A=1e18 * deltas[DOWN].A, B=1e18 * deltas[DOWN].B)
    (found,) = audit(loaded(model, tokenizer, tmp_path, deltas=deltas | {DOWN: huge}))
    assert any("no listed fact explains" in doubt for doubt in doubts(found))
