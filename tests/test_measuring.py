"""A whole evaluation: what it finds, and that the model is afterwards as it was before."""

from __future__ import annotations

import json

import pytest
import torch

from goldenedit import EditRequest, get_edit_model
from goldenedit.architecture import replay
from goldenedit.editors import LowRankDelta
from goldenedit.evaluation.forms import FORMS, asked_forms
from goldenedit.evaluation.harm import KINDS
from goldenedit.evaluation.seen import SeenOptions, baseline, has_ended
from goldenedit.evaluation.verdicts import answer_of, contains, is_exact
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import greedy
from goldenedit.measuring import random_like
from models import tiny_model
from tiny_edits import MERKEL, TOWER, fast_config, logits, trainable

FACT = EditRequest(
    "The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris",
    paraphrases=("The Eiffel Tower stands in", "One finds The Eiffel Tower in"),
    neighborhood=("The Louvre is in", "Berlin is in"),
    portability=(("The Eiffel Tower is in the country of", "Italy"),),
    locality=(("The capital of Germany is", "Berlin"), ("The Eiffel Tower was made by", "Gustave Eiffel")),
    question="Where is The Eiffel Tower?",
)  # fmt: skip
FAST = {"max_new_tokens": 4}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """Compare a few packaged texts only."""
    for name, count in (("seen.plain_texts", 12), ("harm.unrelated_questions", 3)):
        module, function = name.split(".")
        full = getattr(__import__(f"goldenedit.evaluation.{module}", fromlist=[function]), function)
        monkeypatch.setattr(f"goldenedit.evaluation.{name}", lambda full=full, count=count: full()[:count])


def edited_model(tokenizer, kind="llama", *facts, **options):
    model = get_edit_model(tiny_model(kind), fast_config(steps=8, **options), tokenizer)
    for fact in facts or (FACT,):
        model.edit(fact)
    return model


def state_of(model):
    base = model.get_base_model()
    return {
        "active": list(model.active_adapters),
        "edits": list(model.edits),
        "configs": sorted(model.adapters.configs),
        "modules": sorted(name for name, _ in base.named_modules()),
        "trainable": trainable(base),
        "training": base.training,
        "logits": logits(base).tolist(),
    }


def test_a_second_evaluation_finds_the_same_and_the_model_is_as_before(tokenizer):
    model = edited_model(tokenizer, "llama", FACT, MERKEL)
    before = state_of(model)
    first = model.evaluate(**FAST)
    assert state_of(model) == before
    assert model.evaluate(**FAST) == first


def test_the_figures_are_json_with_the_documented_keys(tokenizer):
    evaluation = edited_model(tokenizer).evaluate(judge=lambda *_: True, **FAST)
    record = evaluation.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record) == {"edited", "base"}
    expected = {"says", "in_prompt", "unchanged", "text", "probability", "token_match"}
    assert expected <= set(record["edited"])
    assert set(record["edited"]["says"]) == set(FORMS) - {"chat", "second_turn", "prefix"}  # no template, and too long
    assert set(record["edited"]["unchanged"]) == set(KINDS)
    for scores in record["edited"]["says"].values():
        assert {"exact", "contains", "judge", "n", "intervals"} <= set(scores)
    for kind, scores in record["edited"]["unchanged"].items():
        assert {"same", "control", "kl", "n", "intervals"} <= set(scores)
        assert ("says_new" in scores) == (kind == "subject")
    assert {"kl", "agreement", "tokens", "worst", "control", "intervals"} <= set(record["edited"]["text"])


def test_what_each_model_says_is_what_it_writes(tokenizer):
    model = edited_model(tokenizer)
    evaluation = model.evaluate(control=False, **FAST)
    asked = asked_forms(tokenizer, [FACT], set(FORMS) - {"prefix"})  # which does not fit into the model's context
    with model.disable_adapter():
        base = [answer_of(greedy(model.lm, [text.prompt], 4, has_ended)[0].text) for text in asked]
        informed = [answer_of(greedy(model.lm, [text.informed], 4, has_ended)[0].text) for text in asked]
    edited = [answer_of(greedy(model.lm, [text.prompt], 4, has_ended)[0].text) for text in asked]
    texts = evaluation.texts[: len(asked)]
    assert [text.kind for text in texts] == [text.form for text in asked]
    assert [text.base for text in texts] == base
    assert [text.informed for text in texts] == informed
    assert [text.edited for text in texts] == edited
    for form, scores in evaluation.says.items():
        answers = [(text, answer) for text, answer in zip(asked, edited, strict=True) if text.form == form]
        said = [contains(answer, text.answers, text.old) for text, answer in answers]
        exact = [is_exact(answer, text.answers) for text, answer in answers]
        assert scores.contains.value == pytest.approx(sum(said) / len(said))
        assert scores.exact.value == pytest.approx(sum(exact) / len(exact))
        assert scores.n == 1


def test_what_is_unchanged_is_what_both_models_write_alike(tokenizer):
    model = edited_model(tokenizer)
    evaluation = model.evaluate(control=False, **FAST)
    options = SeenOptions(max_new_tokens=4)
    with model.disable_adapter():
        base = baseline(model.lm, tokenizer, [FACT], options)
    after = greedy(model.lm, [other.prompt for other in base.others], options.continuation)
    same = {kind: [] for kind in KINDS}
    for other, one, text in zip(base.others, base.continuations, after, strict=True):
        same[other.kind].append((one.tokens, one.finished) == (text.tokens, text.finished))
    for kind, values in same.items():
        assert evaluation.unchanged[kind].n == len(values)
    assert evaluation.unchanged["neighbors"].same.value == pytest.approx(sum(same["neighbors"]) / 2)
    holds = [text.holds for text in evaluation.texts if text.kind in KINDS]
    assert holds == [
        (one.tokens, one.finished) == (text.tokens, text.finished)
        for one, text in zip(base.continuations, after, strict=True)
    ]


def test_the_base_figures_are_those_of_the_unedited_model(tokenizer):
    evaluation = edited_model(tokenizer).evaluate(**FAST)
    plain = get_edit_model(tiny_model("llama"), fast_config(), tokenizer)
    unedited = plain.evaluate([FACT], **FAST)
    assert evaluation.base == unedited.base
    assert evaluation.base_seen.says == unedited.base_seen.says
    assert evaluation.in_prompt == unedited.in_prompt
    assert [text.base for text in evaluation.texts] == [text.base for text in unedited.texts]
    for scores in evaluation.base_seen.unchanged.values():
        assert scores.same.value == 1.0
        assert scores.kl == 0.0
    assert evaluation.base_seen.text.agreement == 1.0


def test_without_an_active_edit_nothing_has_changed(tokenizer):
    model = edited_model(tokenizer)
    model.set_adapter([])
    before = state_of(model)
    evaluation = model.evaluate([FACT], **FAST)
    assert state_of(model) == before
    says = {form: scores for form, scores in evaluation.says.items() if form != "negation"}
    assert says == {form: scores for form, scores in evaluation.base_seen.says.items() if form != "negation"}
    for scores in evaluation.unchanged.values():
        assert scores.same.value == 1.0
        assert scores.kl < 1e-6
        assert scores.control is None
    assert evaluation.text.agreement == 1.0
    assert evaluation.text.control is None


def test_figures_of_the_model_with_its_edits_off_are_not_kept_as_those_of_the_edits(tokenizer):
    model = edited_model(tokenizer)
    model.evaluate(forms=["completion"], **FAST)
    kept = dict(model._evaluations["edit_1",])
    with model.disable_adapter():
        off = model.evaluate(forms=["completion"], **FAST)
    assert off.says["completion"] == off.base_seen.says["completion"]
    assert off.text.control is None
    assert model._evaluations["edit_1",] == kept


def test_nothing_is_asked_that_was_not_wanted(tokenizer):
    model = edited_model(tokenizer)
    evaluation = model.evaluate(forms=(), unchanged=False)
    assert evaluation.says == evaluation.in_prompt == evaluation.unchanged == {}
    assert evaluation.text is None
    assert evaluation.texts == ()
    assert evaluation.edited
    some = model.evaluate(forms="completion", unchanged=False, in_prompt=False, **FAST)
    assert set(some.says) == {"completion"}
    assert some.in_prompt == {}
    assert all(text.informed is None for text in some.texts)
    only_others = model.evaluate(forms=(), control=False, **FAST)
    assert only_others.says == {}
    assert set(only_others.unchanged) == set(KINDS)
    assert only_others.text.control is None


def test_neighbors_are_the_first_of_each_fact(tokenizer):
    evaluation = edited_model(tokenizer).evaluate(forms=(), neighbors=1, control=False)
    assert evaluation.unchanged["neighbors"].n == 1
    assert [text.question for text in evaluation.texts if text.kind == "neighbors"] == ["The Louvre is in"]


def test_bad_arguments_are_an_error_before_anything_runs(tokenizer, monkeypatch):
    model = edited_model(tokenizer)
    monkeypatch.setattr(LanguageModel, "answers", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="There is no form 'riddle'"):
        model.evaluate(forms=["riddle"])
    with pytest.raises(ValueError, match="no facts to evaluate"):
        model.evaluate([])
    with pytest.raises(ValueError, match="tokens, but the model takes"):
        model.evaluate([FACT, EditRequest("The Louvre " * 300 + "is in", "The Louvre", "Rome")])


def test_a_fact_that_a_later_edit_replaced_is_not_asked_for(tokenizer):
    model = edited_model(tokenizer)
    model.edit(EditRequest(FACT.prompt, FACT.subject, "Berlin", question=FACT.question))
    evaluation = model.evaluate(forms=["completion"], unchanged=False, in_prompt=False, **FAST)
    assert evaluation.says["completion"].n == 1
    assert [text.answers for text in evaluation.texts] == [("Berlin",)]


def test_facts_that_are_passed_are_told_from_the_edited_ones(tokenizer):
    model = edited_model(tokenizer)
    options = {"forms": (), "unchanged": False}
    longer = EditRequest(FACT.prompt, FACT.subject, "Rome", paraphrases=("One sees The Eiffel Tower in",))
    for facts, is_own in (([longer], True), ([MERKEL], False), ([FACT, MERKEL], False)):
        model.evaluate(facts, **options)
        assert model._evaluations["edit_1",]["own_facts"] is is_own


def test_an_adapter_that_was_switched_on_since_changes_the_base_model(tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=64)
    get_peft_model(tiny_model("llama"), lora).save_pretrained(tmp_path)
    model, fresh = edited_model(tokenizer), edited_model(tokenizer)
    options = {"forms": ["completion"], "in_prompt": False, "control": False, "max_new_tokens": 8}
    before = model.evaluate(**options)
    for one in (model, fresh):
        one.load_adapter(tmp_path, "beside")
        one.set_adapter(["edit_1", "beside"])
    after = model.evaluate(**options)
    assert [text.base for text in after.texts] != [text.base for text in before.texts]
    assert after == fresh.evaluate(**options)


def test_a_judge_sees_question_answer_and_text(tokenizer):
    calls = []

    def judge(question, answer, text):
        calls.append((question, answer, text))
        return question == FACT.text

    evaluation = edited_model(tokenizer).evaluate(
        forms=["completion", "portability"], unchanged=False, judge=judge, **FAST
    )
    texts = {text.kind: text for text in evaluation.texts}
    for kind, answer in (("completion", "Rome"), ("portability", "Italy")):
        for written in (texts[kind].edited, texts[kind].base, texts[kind].informed):
            assert (texts[kind].question, answer, written) in calls
    assert len(calls) == len(set(calls))  # also where both models write the same
    assert evaluation.says["completion"].judge.value == 1.0
    assert evaluation.says["portability"].judge.value == 0.0


def test_a_judge_that_fails_leaves_the_model_as_it_was(tokenizer):
    model = edited_model(tokenizer)
    before = state_of(model)

    def judge(question, answer, text):
        raise RuntimeError("no answer from the judge")

    with pytest.raises(RuntimeError, match="no answer from the judge"):
        model.evaluate(judge=judge, **FAST)
    assert state_of(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(error, calls, tokenizer, monkeypatch):
    model = edited_model(tokenizer, "llama", FACT, MERKEL)
    before = state_of(model)
    replayed = replay.Replayer.__call__
    count = 0

    def interrupted(self, captured):
        nonlocal count
        count += 1
        if count > calls:
            raise error("in the middle")
        return replayed(self, captured)

    monkeypatch.setattr(replay.Replayer, "__call__", interrupted)
    with pytest.raises(error, match="in the middle"):  # the first one may only make the check fall back
        model.evaluate(**FAST)
    monkeypatch.undo()
    assert state_of(model) == before
    assert "_control" not in model.adapters.configs


def test_an_edit_may_have_the_name_of_the_control(tokenizer):
    model = get_edit_model(tiny_model("llama"), fast_config(steps=8), tokenizer)
    model.edit(FACT, name="_control")
    before = state_of(model)
    evaluation = model.evaluate(forms=(), **FAST)
    assert evaluation.text.control is not None
    assert state_of(model) == before


def test_adapters_of_the_user_stay_on(tokenizer):
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    )
    model = get_edit_model(peft_model, fast_config(steps=8), tokenizer)
    model.edit(FACT)
    before = state_of(model)
    model.evaluate(forms=("completion",), **FAST)
    assert state_of(model) == before
    assert before["trainable"]


def test_inference_mode_changes_nothing(tokenizer):
    model, other = edited_model(tokenizer), edited_model(tokenizer)
    expected = other.evaluate(**FAST)
    with torch.inference_mode():
        assert model.evaluate(**FAST) == expected
    model.edit(MERKEL)  # what was cached can still be differentiated


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gemma3", "bloom"])
def test_other_architectures_are_evaluated_and_left_as_they_were(kind, tokenizer):
    model = edited_model(tokenizer, kind)
    before = state_of(model)
    evaluation = model.evaluate(**FAST)
    assert evaluation.text.kl > 0
    assert evaluation.text.control > 0
    assert state_of(model) == before


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_control_has_the_rank_and_the_norm_of_the_edits(kind, tokenizer):
    model = edited_model(tokenizer, kind, TOWER, MERKEL)
    deltas = model._control_deltas()
    own = [model._edit(name).deltas for name in model.active_adapters]
    assert set(deltas) == {path for edit in own for path in edit}
    for path, delta in deltas.items():
        dense = sum(edit[path].dense() for edit in own if path in edit)
        assert delta.rank == sum(edit[path].rank for edit in own if path in edit)
        assert delta.experts == own[0][path].experts
        assert delta.dense().norm().item() == pytest.approx(dense.norm().item(), rel=1e-3)
        assert not torch.allclose(delta.dense(), dense, rtol=0.5)


@pytest.mark.parametrize("experts", [1, 4])
def test_a_random_change_is_drawn_from_its_generator_alone(experts):
    delta = LowRankDelta(torch.randn(3, 8), torch.randn(5, 3), experts)
    drawn = [random_like(delta, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].dense(), drawn[1].dense())
    assert not torch.equal(drawn[0].dense(), drawn[2].dense())
    assert drawn[0].norm == pytest.approx(delta.norm, rel=1e-4)
    assert (drawn[0].rank, drawn[0].experts) == (3, experts)
    nothing = LowRankDelta(torch.zeros(3, 8), torch.zeros(5, 3), experts)
    assert random_like(nothing, torch.Generator()).norm == 0.0
