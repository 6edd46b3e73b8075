"""Many facts in one edit: the same change as of separate edits, of bounded rank, saved and gone on with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from goldenedit import EditModel, EditRequest, get_edit_model
from goldenedit.editors import LowRankDelta
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.perplexity import text_kl
from goldenedit.storage.folder import ADAPTER_WEIGHTS
from models import MLP_WIDTH, WIDTH, tiny_model
from tiny_edits import MERKEL, TOWER, assert_near, differ, fast_config, logits

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

LONDON = EditRequest("I live in London", "London", "Rome")
PLAIN = {"phrasings": "none", "kept_questions": 0, "method": "memit"}
FACTS = [EditRequest(f"House {number} is in the city of", f"House {number}", "Rome") for number in range(70)]
WAYS = pytest.mark.parametrize("name", ["llama", "gpt2"])


def model_of(tokenizer, name="llama", **options) -> EditModel:
    return get_edit_model(tiny_model(name), fast_config(**PLAIN | options), tokenizer)


@WAYS
@pytest.mark.parametrize("method", ["memit", "alphaedit", "ft-m"])
def test_facts_in_one_edit_change_what_they_change_in_edits_of_their_own(name, method, tokenizer):
    options = {"method": method, "covariance": "sampled", "covariance_tokens": 200}
    apart, into = model_of(tokenizer, name, **options), model_of(tokenizer, name, **options)
    for request in (TOWER, MERKEL, LONDON):
        own = apart.edit(request)
        edit = into.edit(request, into="facts")
        assert [fact.request for fact in edit.facts][-1] == request
        torch.testing.assert_close(edit.facts[-1].probability_after, own.facts[0].probability_after, rtol=1e-3, atol=0)
        assert into.active_adapters == list(into.edits) == ["facts"]
    assert len(edit.facts) == 3
    assert_near(logits(into), logits(apart), 1e-4)
    assert differ(logits(into), logits(tiny_model(name)))
    into.delete_adapter("facts")
    assert torch.equal(logits(into), logits(tiny_model(name)))


def test_the_rank_is_never_above_that_of_the_matrix(tokenizer):
    model = model_of(tokenizer, steps=1)
    ranks = [model.edit(FACTS[start : start + 14], into="facts").rank for start in range(0, 70, 14)]
    assert ranks == [14, 28, WIDTH, WIDTH, WIDTH]
    assert len(model.edits["facts"].facts) == 70


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 10), (10, 6)])
def test_a_compact_delta_is_the_same_change(d_out, d_in):
    delta = LowRankDelta(torch.randn(40, d_in), torch.randn(d_out, 40))
    compact = delta.compact()
    assert compact.rank == 6
    torch.testing.assert_close(compact.dense(), delta.dense(), rtol=1e-5, atol=1e-5)
    assert compact.compact() is compact
    small = delta.part(0, 6)
    assert small.compact() is small


def test_what_alphaedit_remembers_stays_as_wide_as_keys_and_is_the_same(tokenizer):
    options = {"method": "alphaedit", "covariance": "sampled", "covariance_tokens": 200, "steps": 1}
    model = model_of(tokenizer, **options)
    for start in range(0, 40, 20):
        model.edit(FACTS[start : start + 20], name=f"edit {start}")
    (path,) = model.edits["edit 0"].deltas
    every = torch.cat([edit.state[f"keys/{path}"] for edit in model.edits.values()], 1)
    assert every.shape[1] == 80 > MLP_WIDTH  # two of each fact
    again = model_of(tokenizer, **options)
    for start in range(0, 40, 20):
        again.edit(FACTS[start : start + 20], into="facts")
    found = again.edits["facts"].state[f"keys/{path}"]
    assert found.shape == (MLP_WIDTH, MLP_WIDTH)
    assert_near(found @ found.T, every @ every.T, 1e-4)


def test_one_name_of_an_edit_that_is_on(tokenizer):
    model = model_of(tokenizer)
    with pytest.raises(ValueError, match="not both"):
        model.edit(TOWER, name="one", into="other")
    model.edit(TOWER, into="facts")
    model.set_adapter([])
    with pytest.raises(ValueError, match=r"'facts' is switched off\. Switch it on \(set_adapter\)"):
        model.edit(MERKEL, into="facts")
    assert [len(edit.facts) for edit in model.edits.values()] == [1]


def test_an_edit_beside_it_stays(tokenizer):
    model = model_of(tokenizer)
    model.edit(TOWER, name="first")
    model.edit(LONDON, into="facts")
    model.edit(MERKEL, into="facts")
    assert model.active_adapters == ["first", "facts"]
    model.set_adapter("first")
    alone = model_of(tokenizer)
    alone.edit(TOWER)
    assert torch.equal(logits(model), logits(alone))


def test_an_evaluation_of_the_smaller_edit_is_forgotten(tokenizer):
    model = model_of(tokenizer)
    model.edit(TOWER, into="facts")
    model._evaluations = {("facts",): {"scores": {}}, ("other",): {}}
    model.edit(MERKEL, into="facts")
    assert list(model._evaluations) == [("other",)]


def test_an_error_while_an_edit_grows_leaves_it_as_it_was(tokenizer, monkeypatch):
    model = model_of(tokenizer)
    model.edit(TOWER, into="facts")
    before, facts = logits(model), model.edits["facts"].facts
    adapters = model.adapters
    add, calls = type(adapters).add, []

    def failing(self, name, deltas):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, name, deltas)

    monkeypatch.setattr(type(adapters), "add", failing)
    with pytest.raises(KeyboardInterrupt):
        model.edit(MERKEL, into="facts")
    monkeypatch.undo()
    assert list(model.edits) == model.active_adapters == ["facts"]
    assert model.edits["facts"].facts == facts
    assert torch.equal(logits(model), before)
    assert model.edit(MERKEL, into="facts").rank == 2


def test_batches_are_saved_one_after_another(tokenizer, tmp_path):
    model, folder = model_of(tokenizer, steps=1), tmp_path / "edits"
    sizes = []
    save = model.save_pretrained
    model.save_pretrained = lambda *args: sizes.append(len(model.edits["facts"].facts)) or save(*args)
    edit = model.edit_in_batches(FACTS, batch_size=30, save_directory=folder)
    assert sizes == [30, 60, 70]
    assert [fact.request for fact in edit.facts] == FACTS
    loaded = EditModel.from_pretrained(tiny_model("llama"), folder, tokenizer=tokenizer)
    assert torch.equal(logits(loaded), logits(model))
    assert len(loaded.edits["facts"].facts) == 70


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_a_run_that_was_ended_goes_on_where_it_was(method, tokenizer, tmp_path):
    options = {"method": method, "covariance": "sampled", "covariance_tokens": 200, "steps": 2}
    whole = model_of(tokenizer, **options)
    whole.edit_in_batches(FACTS[:40], batch_size=10)
    first, folder = model_of(tokenizer, **options), tmp_path / "edits"
    edit, calls = first.edit, []

    def ending(batch, into):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return edit(batch, into=into)

    first.edit = ending
    with pytest.raises(KeyboardInterrupt):
        first.edit_in_batches(FACTS[:40], batch_size=10, save_directory=folder)
    again = EditModel.from_pretrained(tiny_model("llama"), folder, tokenizer=tokenizer)
    assert len(again.edits["facts"].facts) == 20
    again.edit_in_batches(FACTS[:40], batch_size=10, save_directory=folder)
    assert [fact.request for fact in again.edits["facts"].facts] == FACTS[:40]
    assert_near(logits(again), logits(whole), 1e-4)
    size = (folder / ADAPTER_WEIGHTS).stat().st_size
    again.edit_in_batches(FACTS[:40], batch_size=10, save_directory=folder)  # nothing is left
    assert (folder / ADAPTER_WEIGHTS).stat().st_size == size


def test_a_batch_that_harms_ends_the_run_and_the_ones_before_stay(tokenizer, tmp_path):
    model = model_of(tokenizer)
    model.edit_config.max_text_kl = 10.0
    model.edit_in_batches([TOWER], batch_size=1, save_directory=tmp_path / "edits")
    model.edit_config.max_text_kl = 1e-9
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"max_text_kl=1e-09 allows, so the edit was undone\. Of 2 facts, 1 are edited"
    ):
        model.edit_in_batches([TOWER, MERKEL], batch_size=1)
    assert torch.equal(logits(model), before)
    assert len(model.edits["facts"].facts) == 1


@pytest.mark.parametrize(
    ("facts", "options", "text"), [([], {}, "at least one"), ([TOWER], {"batch_size": 0}, "batch_size")]
)
def test_bad_arguments_are_refused(facts, options, text, tokenizer):
    with pytest.raises(ValueError, match=text):
        model_of(tokenizer).edit_in_batches(facts, **options)


@pytest.mark.parametrize(("rehearsal", "holds"), [(1.0, True), (0.0, False)])
def test_earlier_facts_hold_because_they_are_rehearsed(rehearsal, holds, tokenizer):
    """Answers that contradict the earlier ones wherever the prompts are alike."""
    options = {"method": "locft", "finetune_lr": 0.15, "finetune_steps": 60, "finetune_cut": 0.0}
    model = model_of(tokenizer, finetune_rehearsal=rehearsal, **options)
    model.edit(FACTS[:8], into="facts")
    model.edit([replace(fact, target_new="London") for fact in FACTS[8:16]], into="facts")
    found = likelihoods(model.lm, [(fact.text, fact.target_new) for fact in FACTS[:8]])
    assert (sum(answer.accuracy == 1 for answer in found) >= 6) is holds


def test_a_penalty_bounds_what_many_batches_change_of_other_text(tokenizer):
    """Each batch sees the harm of those before it, and not of itself alone."""
    options = {"method": "crispedit", "covariance": "sampled", "covariance_tokens": 300, "crispedit_share": 1.0}
    harms = {}
    for weight in (0.0, 30.0):
        model = model_of(tokenizer, finetune_lr=0.1, crispedit_penalty=weight, **options)
        texts = [fact.text for fact in FACTS[40:60]]
        harms[weight] = []
        for start in range(0, 24, 8):
            model.edit(FACTS[start : start + 8], into="facts")
            harms[weight].append(text_kl(model.lm, texts, model.disable_adapter))
    assert harms[30.0][-1] < 0.5 * harms[0.0][-1]
    assert harms[30.0][-1] < 1.5 * harms[30.0][0]
