"""What an edit tells: facts that do not take and why, and facts of other edits that it loses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from goldenedit import EditModel, EditRequest, get_edit_model
from goldenedit.editing import calls
from goldenedit.editing.calls import facts_to_recheck, warn_of_failed_facts, warn_of_lost_facts
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.storage.folder import Edit, EditedFact
from models import tiny_model
from tiny_edits import fast_config

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

FIRST = EditRequest("I live near The Eiffel Tower", "The Eiffel Tower", "city")
# Nearly the key of the first, by another name of its subject: an edit keeps the earlier facts of the same subject.
SECOND = EditRequest("You live near The Eiffel Tower", "Tower", "Rome")
SAME_SUBJECT = EditRequest("They work in The Eiffel Tower", "The Eiffel Tower", "Rome")
PUBLISHED = {
    "method": "r-rome",
    "phrasings": "none",
    "kept_questions": 0,
    "optimizer": "adam",
    "lr": 0.5,
    "flat_directions": False,
}
LONDON = EditRequest("I live in London", "London", "city")
LOSES, APART = "The new edit loses", "were made apart"


def base_model():
    """Return a model that an edit gives another answer, which takes a head with larger logits."""
    base = tiny_model("llama")
    base.lm_head.weight.data *= 4
    return base


def config():
    """Return a config whose edits take in this model."""
    return fast_config(layer=0, steps=40, clamp=50.0, **PUBLISHED)


@pytest.fixture
def model(tokenizer) -> EditModel:
    return get_edit_model(base_model(), config(), tokenizer)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The number of prompts in each forward call of the check."""
    sizes = []

    def counting(lm, pairs):
        sizes.append(len(pairs))
        return likelihoods(lm, pairs)

    monkeypatch.setattr(calls, "likelihoods", counting)
    return sizes


def probability(model: EditModel, request: EditRequest) -> float:
    """Return the probability of a request's answer now."""
    return likelihoods(model.lm, [(request.text, request.target_new)])[0].probability


def test_an_edit_of_the_same_subject_by_another_name_loses_the_first_and_says_so(model, caplog):
    model.edit(FIRST)
    assert probability(model, FIRST) > 0.5
    caplog.clear()
    edit = model.edit(SECOND)
    (lost,) = edit.lost
    assert lost.request == FIRST
    assert lost.probability_after == pytest.approx(probability(model, FIRST), rel=1e-4)
    assert lost.probability_after < 0.5 < lost.probability_before
    (text,) = [record.getMessage() for record in caplog.records if LOSES in record.getMessage()]
    assert "loses 1 fact of other active edits: 'I live near The Eiffel Tower' -> 'city'" in text
    assert "together with the new facts in one batch" in text


def test_an_edit_of_the_same_subject_keeps_its_earlier_facts(model, caplog):
    model.edit(FIRST)
    edit = model.edit(SAME_SUBJECT)
    assert edit.facts[0].takes
    assert edit.lost == ()
    assert LOSES not in caplog.text
    assert probability(model, FIRST) > 0.5


def test_an_unrelated_edit_loses_nothing_and_asks_once(model, caplog, asked):
    model.edit(FIRST)
    edit = model.edit(LONDON)
    assert all(fact.takes for made in model.edits.values() for fact in made.facts)
    assert edit.lost == ()
    assert LOSES not in caplog.text
    assert asked == [1, 2]


def test_a_fact_that_another_edit_lost_is_not_told_again(model, caplog):
    model.edit(FIRST)
    assert model.edit(SECOND).lost
    caplog.clear()
    assert model.edit(LONDON).lost == ()
    assert LOSES not in caplog.text


def test_edits_that_are_off_are_not_asked(model, asked):
    model.edit(FIRST, name="first")
    model.edit(LONDON, name="london")
    model.set_adapter("london")
    assert model.edit(SECOND).lost == ()
    assert asked == [1, 2, 2]


def test_a_prompt_with_a_new_answer_is_replaced_and_not_lost(model, asked):
    model.edit(FIRST)
    edit = model.edit(replace(FIRST, target_new="Rome"))
    assert edit.facts[0].takes
    assert edit.lost == ()
    assert asked == [1, 1]


def test_asking_again_leaves_all_edits_on_and_lost_facts_are_not_saved(model, tokenizer, tmp_path):
    model.edit(FIRST, name="first")
    edit = model.edit(SECOND, name="second")
    assert edit.lost
    assert model.active_adapters == ["first", "second"]
    assert probability(model, SECOND) == pytest.approx(edit.facts[0].probability_after, rel=1e-4)
    model.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(base_model(), tmp_path, tokenizer=tokenizer)
    assert [saved.lost for saved in loaded.edits.values()] == [(), ()]
    assert [saved.facts for saved in loaded.edits.values()] == [made.facts for made in model.edits.values()]


def saved_apart(tokenizer, folder: Path, requests: Sequence[EditRequest]) -> EditModel:
    """Save an edit of each request, made without the others; return a model with the first one."""
    for index, request in enumerate(requests):
        made = get_edit_model(base_model(), config(), tokenizer)
        made.edit(request, name=f"edit {index}")
        made.save_pretrained(folder / str(index))
    return EditModel.from_pretrained(base_model(), folder / "0", tokenizer=tokenizer)


@pytest.mark.parametrize("active", [True, False])
def test_facts_that_edits_made_apart_lose_together_are_named_when_one_is_loaded(active, tokenizer, tmp_path, caplog):
    model = saved_apart(tokenizer, tmp_path, [FIRST, SECOND])
    if not active:
        model.set_adapter([])
    on = model.active_adapters
    caplog.clear()
    model.load_adapter(tmp_path / "1")
    assert model.active_adapters == on
    (text,) = [record.getMessage() for record in caplog.records if APART in record.getMessage()]
    model.set_adapter(list(model.edits))
    lost = [request for request in (FIRST, SECOND) if probability(model, request) < 0.5]
    assert lost  # they share a key
    for request in (FIRST, SECOND):
        assert (f"{request.shown!r} -> {request.target_new!r}" in text) == (request in lost)
    assert str(tmp_path / "1") in text
    assert "set_adapter" in text


def test_edits_made_apart_that_go_together_are_loaded_silently_with_one_question_each(
    tokenizer, tmp_path, caplog, asked
):
    model = saved_apart(tokenizer, tmp_path, [FIRST, replace(LONDON, prompt="London is in")])
    asked.clear()
    model.load_adapter(tmp_path / "1")
    assert APART not in caplog.text
    assert asked == [2]


def test_a_loaded_edit_with_another_answer_to_a_prompt_replaces_it(tokenizer, tmp_path, caplog):
    model = saved_apart(tokenizer, tmp_path, [FIRST, replace(FIRST, target_new="Rome")])
    model.load_adapter(tmp_path / "1")
    assert APART not in caplog.text


@pytest.mark.parametrize(
    "stranger",
    [
        EditRequest("I live near London " * 99, "London", "Rome"),
        EditRequest(messages=[{"role": "user", "content": "Where is London?"}], subject="London", target_new="Rome"),
    ],
    ids=["too long", "no chat template"],
)
def test_a_fact_that_cannot_be_asked_does_not_refuse_new_edits(model, caplog, stranger):
    first = model.edit(LONDON, name="first")
    model.edits["first"] = replace(first, facts=[replace(first.facts[0], request=stranger)])
    assert model.edit(FIRST).lost == ()
    assert "Whether another edit changes an edited fact is unknown" in caplog.text


def edits_of(count: int) -> list[Edit]:
    """Return edits of one fact each that took."""
    requests = [EditRequest(f"House {number} is in", f"House {number}", "Rome") for number in range(count)]
    return [Edit(request.subject, [EditedFact(request, 0.01, 0.9, 5)], {}) for request in requests]


@pytest.mark.parametrize("count", [0, 1, 32])
def test_up_to_32_facts_are_all_asked_again(count, caplog):
    caplog.set_level(logging.INFO)
    edits = edits_of(count)
    assert facts_to_recheck(edits, [FIRST]) == [fact for edit in edits for fact in edit.facts]
    assert not caplog.records


@pytest.mark.parametrize("most", [32, 5])
def test_of_more_facts_a_draw_is_asked_again_and_logged(caplog, most):
    caplog.set_level(logging.INFO)
    edits = edits_of(200)
    facts = facts_to_recheck(edits, [FIRST], most)
    assert len(facts) == most
    assert f"Of 200 facts of the other active edits, {most} are asked again." in caplog.text
    assert facts == facts_to_recheck(edits, [FIRST], most)
    numbers = [edits.index(edit) for fact in facts for edit in edits if edit.facts == [fact]]
    assert numbers == sorted(numbers)
    assert max(numbers) >= most


def test_facts_that_did_not_take_and_facts_with_a_newer_answer_are_not_asked_again():
    first, second, third = edits_of(3)
    failed = replace(first, facts=[replace(first.facts[0], probability_after=0.2)])
    answers = [replace(fact, request=replace(fact.request, target_new="Paris")) for fact in third.facts]
    newer = replace(third, facts=answers)
    assert facts_to_recheck([failed, second, third, newer], [second.facts[0].request]) == newer.facts


def test_a_few_of_many_lost_facts_are_named_in_one_warning(caplog):
    warn_of_lost_facts([edit.facts[0] for edit in edits_of(30)])
    (record,) = caplog.records
    text = record.getMessage()
    assert "loses 30 facts" in text
    assert text.count("' -> 'Rome'") == 5
    assert "and 25 more" in text


@pytest.mark.parametrize(
    ("before", "after", "weakest", "reason"),
    [
        (0.060, 0.027, 0.027, "less likely than before"),
        (0.060, 0.3, 0.01, "still unlikely"),
        (0.060, 0.71, 0.12, "one token of the answer is unlikely"),
    ],
)
def test_a_failure_is_told_with_its_reason_and_what_to_try(caplog, before, after, weakest, reason):
    warn_of_failed_facts([EditedFact(FIRST, before, after, 5, weakest)], fast_config(layer=2))
    text = caplog.records[0].getMessage()
    assert f"does not take ({reason})" in text
    assert f"went from {before:.4f} to {after:.4f}" in text
    assert (f"weakest {weakest:.3f}" in text) == (weakest < after)
    assert "Try another layer (this was [2]" in text
