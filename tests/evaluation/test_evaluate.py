"""A whole evaluation against prompts one by one, and what `EditModel.evaluate` makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.evaluation.counterfact import fact_likelihoods
from goldenedit.evaluation.evaluate import measure, observe, observe_with_and_without
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.evaluation.scores import probability_scores
from goldenedit.lm import LanguageModel
from models import tiny_model

FACTS = [
    EditRequest(
        "The Eiffel Tower is in the city of",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=("The Eiffel Tower stands in", "One finds The Eiffel Tower in"),
        neighborhood=("The Louvre is in", "Berlin is in", "Paris is in"),
        portability=(("The Eiffel Tower is in the country of", "Italy"),),
        locality=(("The capital of Germany is", "Berlin"), ("Angela Merkel is", "a woman of Germany")),
    ),
    EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "the language of Cambodia"),
]


@pytest.fixture
def edited(tokenizer):
    config = EditConfig(layer=1, steps=8, contexts=2, context_length=3, covariance="identity", weight_decay=0.02)
    model = get_edit_model(tiny_model("llama"), config, tokenizer)
    model.edit(FACTS[0])
    return model


def test_every_score_is_that_of_its_prompts_one_by_one(edited, tokenizer):
    found = edited.evaluate(FACTS)
    base = edited.get_base_model()
    lm = LanguageModel(base, tokenizer)
    probability = replace(probability_scores([fact_likelihoods(lm, FACTS[0])]), paraphrase_accuracy=None)
    assert found.edited["probability"].scores == probability

    def accuracy(prompt, answer):
        return likelihoods(lm, [(prompt, answer)])[0].accuracy

    match = found.edited["token_match"].scores
    rewrites = [accuracy(fact.text, fact.target_new) for fact in FACTS]
    assert match.rewrite == pytest.approx(sum(rewrites) / 2)
    assert match.rephrase == pytest.approx(sum(accuracy(text, "Rome") for text in FACTS[0].paraphrases) / 2)
    assert match.portability == pytest.approx(accuracy(*FACTS[0].portability[0]))
    assert match.n == 2
    choices = {}
    for state in ("edited", "base"):
        with edited.disable_adapter() if state == "base" else torch.no_grad():
            choices[state] = [likelihoods(lm, [pair])[0].choices for pair in FACTS[0].locality]
    same = [
        sum(one == other for one, other in zip(*both, strict=True)) / len(both[0])
        for both in zip(choices["edited"], choices["base"], strict=True)
    ]
    assert match.locality == pytest.approx(sum(same) / 2)


def test_the_base_model_is_measured_beside_and_is_local_to_itself(edited):
    found = edited.evaluate(FACTS, generation=True)
    assert set(found.edited) == set(found.base) == {"probability", "token_match", "generation"}
    assert found.base["token_match"].scores.locality == 1.0
    assert edited.active_adapters == ["edit_1"]


def test_an_answer_is_found_in_what_the_model_writes_by_itself(tokenizer):
    model, prompt = tiny_model("llama"), FACTS[0].text
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=8)
    said = tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(prompt).split()[0]
    requests = [replace(FACTS[0], target_new=said), FACTS[1]]
    seen = observe(LanguageModel(model, tokenizer), requests, generation=True)
    assert seen.texts[prompt].strip().startswith(said)
    assert measure(requests, seen, seen)["generation"].scores.rewrite == 0.5


def test_by_default_the_facts_of_the_active_edits_are_measured(edited):
    assert edited.evaluate().edited["token_match"].scores.n == 1
    edited.set_adapter([])
    with pytest.raises(ValueError, match="no facts to evaluate"):
        edited.evaluate()


def test_all_figures_are_json_with_intervals_that_hold_them(edited):
    record = json.loads(json.dumps(edited.evaluate(FACTS).to_dict()))
    groups = ("says", "unchanged", "in_prompt")
    for state in record.values():
        figures = [state[name] for name in state if name not in groups]
        figures += [scores for name in groups for scores in state[name].values()]
        for scores in figures:
            for name, (low, high) in scores["intervals"].items():
                assert low <= scores[name] <= high


def test_facts_without_old_answers_have_no_probability_scores(tokenizer):
    model = tiny_model("llama")
    seen = observe(LanguageModel(model, tokenizer), FACTS[1:])
    assert set(measure(FACTS[1:], seen, seen)) == {"token_match"}


@pytest.mark.parametrize("layer", [0, 1])
def test_both_models_are_observed_as_each_is_alone(layer, tokenizer):
    model = get_edit_model(
        tiny_model("llama"), EditConfig(layer=layer, covariance="identity", contexts=1, steps=3), tokenizer
    )
    model.edit(FACTS[0])
    model.edit(FACTS[1])
    base = model.get_base_model()
    lm = LanguageModel(base, tokenizer)
    calls: list[int] = []
    handle = model.architecture.down_projection(base, 0).register_forward_hook(lambda *_: calls.append(0))
    now, before = observe_with_and_without(model.lm, FACTS, layer, model.disable_adapter, generation=True)
    shared = len(calls)
    calls.clear()
    alone = observe(lm, FACTS, generation=True)
    with model.disable_adapter():
        base_alone = observe(lm, FACTS, generation=True)
    handle.remove()
    assert now == alone
    assert before == base_alone
    assert now != before
    assert (shared < len(calls)) == (layer > 0)  # the layers before the edit ran once
