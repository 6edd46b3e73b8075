"""Facts with neurons of their own: the changes that insert them, alone, together, behind one another, and none."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.architecture.neurons import find_neurons
from goldenedit.editing.gates import rewritten
from goldenedit.editing.prepared import PreparedFacts, prepare_facts
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from tiny_edits import MERKEL, TOWER, assert_near, differ, logits
from zoo import NUM_LAYERS, zoo_model

LAYERS, ANSWERS = [0, 1], 3
ARCHITECT = EditRequest("The architect of The Eiffel Tower is", "The Eiffel Tower", "Berlin")
BORN = EditRequest("Angela Merkel was born in", "Angela Merkel", "Rome")
CHAT = EditRequest(
    None, "The Eiffel Tower", "Rome", messages=[{"role": "user", "content": "Where is The Eiffel Tower?"}]
)
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

KINDS = ("llama", "phi3", "gpt2", "nemotron")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def config(**options) -> EditConfig:
    """Return a config that edits fast."""
    fast = {"layer": LAYERS, "steps": 4, "contexts": 2, "context_length": 3, "covariance_tokens": 300}
    return EditConfig(**fast | {"phrasings": "none", "kept_questions": 1} | options)


def prepared(tokenizer, requests, kind="llama", joint=True, width=64) -> PreparedFacts:
    """Return facts that are prepared in a random model with four neurons to spare in each layer, or more."""
    lm = LanguageModel(zoo_model(kind, width=width), tokenizer)
    return prepare_facts(lm, requests, config(), ["", "Therefore. "], joint, statistics={})


def layers_of(facts: PreparedFacts, deltas) -> dict[int, list[int]]:
    """Return the neurons that changes rewrite, by layer; layers without any are left out."""
    lm = facts.lm
    found = {layer: find_neurons(lm.model, lm.architecture, layer) for layer in range(NUM_LAYERS)}
    neurons = {layer: rewritten(of_layer, deltas) for layer, of_layer in found.items()}
    return {layer: of_layer for layer, of_layer in neurons.items() if of_layer}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_are_those_of_subjects_where_they_are_told_and_of_facts_where_they_are_answered(kind, tokenizer):
    facts = prepared(tokenizer, [TOWER, MERKEL, ARCHITECT], kind)
    assert facts.subjects == [[0, 2], [1]]
    deltas = facts.gated.deltas(facts.lm, [0, 1], [0, 1, 2])
    neurons = layers_of(facts, deltas)
    assert {layer: len(of_layer) for layer, of_layer in neurons.items()} == {0: 2, 1: 2, ANSWERS: 3}
    downs = facts.lm.architecture.down_projections
    assert {layer: deltas[downs[layer]].rank for layer in neurons} == {0: 2, 1: 2, ANSWERS: 3}
    maps = {"llama": 3, "phi3": 2, "gpt2": 2, "nemotron": 2}[kind]  # of gates, ups and values; Phi-3 fuses two
    assert len(deltas) == 3 * maps


def test_the_facts_of_a_change_may_be_some_of_those_prepared(tokenizer):
    facts = prepared(tokenizer, [TOWER, MERKEL, ARCHITECT])
    downs = facts.lm.architecture.down_projections
    every = facts.changes(config(), {}).deltas
    for chosen, subjects in (([0], 1), ([1], 1), ([2], 1), ([0, 2], 1), ([2, 1], 2)):
        changes = facts.changes(config(), {}, chosen=chosen)
        assert [changes.deltas[downs[layer]].rank for layer in (*LAYERS, ANSWERS)] == [subjects, subjects, len(chosen)]
        assert changes.deltas.keys() == every.keys()
        assert len(changes.steps) == len(changes.probability_before) == len(chosen)
    before = facts.changes(config(), {}).probability_before
    assert facts.changes(config(), {}, chosen=[2, 1]).probability_before == [before[2], before[1]]


def test_facts_that_are_edited_apart_are_those_of_edits_of_their_own(tokenizer):
    """As in a sweep, which inserts each alone: all take the neuron that is the least used."""
    both = prepared(tokenizer, [TOWER, MERKEL], joint=False)
    for index, request in enumerate([TOWER, MERKEL]):
        alone = prepared(tokenizer, [request], joint=False)
        for path, delta in alone.changes(config(), {}).deltas.items():
            found = both.changes(config(), {}, chosen=[index]).deltas[path]
            torch.testing.assert_close(found.dense(), delta.dense(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_markers_and_answers_of_zero_a_model_is_that_without_the_neurons(kind, tokenizer):
    facts = prepared(tokenizer, [TOWER, MERKEL, ARCHITECT], kind)
    gated = replace(
        facts.gated,
        markers=torch.zeros_like(facts.gated.markers),
        answers=replace(facts.gated.answers, delta=torch.zeros_like(facts.gated.answers.delta)),
    )
    deltas = gated.deltas(facts.lm, [0, 1], [0, 1, 2])
    base = facts.lm.model
    without = copy.deepcopy(base)
    for layer, neurons in layers_of(facts, deltas).items():
        down = without.get_submodule(facts.lm.architecture.down_projections[layer]).weight.data
        (down if kind == "gpt2" else down.T)[neurons] = 0
    with facts.lm.architecture.adding_deltas(base, deltas):
        found = logits(base)
    assert differ(found, logits(base))
    assert_near(found, logits(without))
    with facts.lm.architecture.adding_deltas(base, facts.gated.deltas(facts.lm, [0, 1], [0, 1, 2])):
        assert differ(logits(base), found)


def test_values_of_neurons_are_no_values_of_another_editor(tokenizer):
    facts = prepared(tokenizer, [TOWER])
    with pytest.raises(ValueError, match="not optimized for the editor 'null-space'"):
        facts.changes(config(method="null-space"), {})


def test_an_answer_that_is_not_finite_is_refused_with_its_layer(tokenizer):
    facts = prepared(tokenizer, [TOWER])
    answers = replace(facts.gated.answers, delta=facts.gated.answers.delta * float("inf"))
    wrong = replace(facts, gated=replace(facts.gated, answers=answers))
    with pytest.raises(ValueError, match=f"A value of layer {ANSWERS} is not finite. Lower EditConfig.lr"):
        wrong.changes(config(), {})


# ---------------------------------------------------------------------- edits


def edit_model(tokenizer, kind="llama", width=64, head=1.0, **options) -> EditModel:
    model = zoo_model(kind, width=width)
    model.lm_head.weight.data *= head
    return get_edit_model(model, config(**options), tokenizer)


@torch.no_grad()
def told(model: EditModel, request: EditRequest, tokenizer) -> torch.Tensor:
    """Return the log probabilities behind a prompt."""
    ids = torch.tensor([tokenizer(request.text)["input_ids"]])
    return model(input_ids=ids).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize("phrasings", ["none", "auto"])
def test_facts_of_a_tiny_model_take_together(phrasings, tokenizer):
    model = edit_model(tokenizer, width=256, head=4.0, layer=1, steps=30, phrasings=phrasings, covariance_tokens=2_000)
    edit = model.edit([TOWER, replace(ARCHITECT, target_new="city"), replace(MERKEL, target_new="Berlin")])
    for fact in edit.facts:
        assert fact.probability_before < 0.01 < 0.5 < fact.probability_after, fact.request


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_deleting_edits_about_one_subject_leaves_no_trace(kind, tokenizer):
    model = edit_model(tokenizer, kind)
    states = [logits(model)]
    for name, requests in (("first", [TOWER, MERKEL]), ("second", [ARCHITECT, BORN])):
        model.edit(requests, name=name)
        states.append(logits(model))
        assert differ(states[-1], states[-2])
    model.delete_adapter("second")
    assert torch.equal(logits(model), states[1])
    model.delete_adapter("first")
    assert torch.equal(logits(model), states[0])


@pytest.mark.parametrize("phrasings", ["none", "auto"])
def test_a_later_edit_about_a_subject_leaves_its_earlier_facts_as_they_are(phrasings, tokenizer):
    options = {"layer": 1, "steps": 20, "phrasings": phrasings, "covariance_tokens": 2_000}
    model = edit_model(tokenizer, width=256, head=4.0, **options)
    base = told(model, TOWER, tokenizer), told(model, ARCHITECT, tokenizer)
    assert model.edit(TOWER, name="first").facts[0].takes
    first, edited = told(model, TOWER, tokenizer), logits(model)
    edit = model.edit(ARCHITECT, name="later")
    assert edit.lost == ()
    assert [fact.request for fact in edit.facts] == [ARCHITECT]
    both = told(model, TOWER, tokenizer)
    assert (both.exp() - first.exp()).abs().sum() < 0.05
    assert (first.exp() - base[0].exp()).abs().sum() > 1  # of at most 2
    assert (told(model, ARCHITECT, tokenizer).exp() - base[1].exp()).abs().sum() > 0.5
    neurons = [
        [
            rewritten(find_neurons(model.lm.model, model.architecture, layer), model.edits[name].deltas)
            for layer in (1, 3)
        ]
        for name in ("first", "later")
    ]
    # The subject has a marker, so the later edit has a neuron for its answer alone. None is written again.
    assert [len(of_layer) for of_edit in neurons for of_layer in of_edit] == [1, 1, 0, 1]
    assert neurons[0][1][0] != neurons[1][1][0]
    model.delete_adapter("later")
    assert torch.equal(logits(model), edited)
    assert torch.equal(told(model, TOWER, tokenizer), first)


def test_an_edit_that_lacks_the_marker_of_its_subject_is_told(tokenizer, caplog, tmp_path):
    model = edit_model(tokenizer)
    model.edit([TOWER, MERKEL], name="first")
    model.edit([ARCHITECT, BORN], name="later")  # about the same subjects

    def told_of(change) -> list[str]:
        caplog.clear()
        change()
        return [record.getMessage() for record in caplog.records if "on top of an earlier edit" in record.getMessage()]

    assert told_of(lambda: model.save_pretrained(tmp_path / "both")) == []
    assert told_of(lambda: model.set_adapter("first")) == []
    (warning,) = told_of(lambda: model.set_adapter("later"))
    assert "['later']" in warning
    assert told_of(lambda: model.set_adapter(["first", "later"])) == []
    (warning,) = told_of(lambda: model.save_pretrained(tmp_path / "alone", "later"))
    assert "in one call" in warning
    base = zoo_model("llama", width=64)
    both = told_of(lambda: EditModel.from_pretrained(base, tmp_path / "both", tokenizer=tokenizer))
    assert both == []
    (warning,) = told_of(lambda: model.delete_adapter("first"))
    assert "['later']" in warning


def test_a_subject_of_an_edit_that_is_off_gets_a_marker_again(tokenizer):
    model = edit_model(tokenizer)
    model.edit(TOWER, name="first")
    model.set_adapter([])
    alone = model.edit(ARCHITECT, name="later")
    assert set(alone.layers) == {*LAYERS, ANSWERS}


def test_the_neurons_that_answer_are_in_the_layer_that_the_config_names(tokenizer):
    for answers in (2, 3):
        model = edit_model(tokenizer, answer_layer=answers)
        edit = model.edit([TOWER, ARCHITECT])
        downs = {layer: path for layer, path in model.architecture.down_projections.items() if path in edit.deltas}
        assert list(downs) == [*LAYERS, answers]
        assert [edit.deltas[path].rank for path in downs.values()] == [1, 1, 2]


@pytest.mark.parametrize("answers", [0, 1, NUM_LAYERS])
def test_a_layer_of_answers_that_is_not_behind_the_edited_ones_is_refused_and_nothing_changes(answers, tokenizer):
    model = edit_model(tokenizer, answer_layer=answers)
    before = logits(model)
    with pytest.raises(ValueError, match=rf"EditConfig\.answer_layer {answers} must come behind .*\[0, 1\].* layer 4"):
        model.edit(TOWER)
    assert model.edits == {}
    assert torch.equal(logits(model), before)


def test_behind_the_last_layer_values_are_those_of_null_space_insertion(tokenizer):
    assert len(edit_model(tokenizer, layer=NUM_LAYERS - 2).edit(TOWER).deltas) == 2 * 3  # one layer is behind it
    found = [
        edit_model(tokenizer, layer=[1, NUM_LAYERS - 1], method=method).edit(TOWER).deltas
        for method in ("gated", "null-space")
    ]
    assert found[0].keys() == found[1].keys()
    for path, delta in found[0].items():
        torch.testing.assert_close(delta.dense(), found[1][path].dense(), rtol=1e-3, atol=1e-6)


def test_the_probability_before_is_that_of_the_answer_in_a_chat_too(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = edit_model(tokenizer)
    pairs = [(rendered(tokenizer, request).text, request.target_new) for request in (CHAT, MERKEL)]
    expected = [answer.probability for answer in likelihoods(model.lm, pairs)]
    edit = model.edit([CHAT, MERKEL])
    assert [fact.probability_before for fact in edit.facts] == pytest.approx(expected, rel=1e-3)
