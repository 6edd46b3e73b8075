"""Outcomes of edits that run together, against each edit alone, measured the plain way."""

from __future__ import annotations

from contextlib import nullcontext
from statistics import fmean

import pytest
import torch

from goldenedit import EditRequest
from goldenedit.editors import LowRankDelta
from goldenedit.evaluation.evaluate import matches_of, observe
from goldenedit.evaluation.generation import ngram_entropy
from goldenedit.evaluation.harm import compare
from goldenedit.evaluation.seen import has_ended
from goldenedit.evaluation.verdicts import answer_of, contains
from goldenedit.layer_selection.trials import Trial, Trials
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import greedy
from models import tiny_model

FACTS = [
    EditRequest(
        "The Eiffel Tower is in the city of",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=("One finds The Eiffel Tower in",),
        neighborhood=("The Louvre is in", "Berlin is in the city of", "Rome is in"),
    ),
    EditRequest("Angela Merkel was born in", "Angela Merkel", "Berlin", locality=(("Paris is a", "city"),)),
    EditRequest("The Kingdom of Cambodia is a", "Cambodia", "city", "fox", portability=(("Cambodia is", "a city"),)),
]


def random_delta(lm: LanguageModel, layer: int, seed: int) -> dict[str, LowRankDelta]:
    d_out, d_in = lm.architecture.shape(lm.model, layer)
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator)
    return {lm.architecture.down_projections[layer]: LowRankDelta(A, 0.3 * B)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])  # the last has fused experts
def test_outcomes_are_those_of_each_edit_alone(name, tokenizer):
    lm = LanguageModel(tiny_model(name), tokenizer)
    trials = Trials(lm, FACTS, neighbors=2, sees=True)
    edits = [Trial([fact], random_delta(lm, 1, fact)) for fact in range(len(FACTS))]
    edits.append(Trial([0, 2], random_delta(lm, 1, 7)))
    found = trials.outcomes(edits, layer=1)
    base = trials.base
    before = observe(lm, FACTS, neighbors=2)
    assert [len(of_edit) for of_edit in found] == [1, 1, 1, 2]
    for edit, of_edit in zip(edits, found, strict=True):
        with lm.architecture.adding_deltas(lm.model, edit.deltas):
            after = observe(lm, [FACTS[fact] for fact in edit.facts], neighbors=2)
        compared = compare(
            lm,
            base.rows,
            0,
            nullcontext,
            {"edit": lambda edit=edit: lm.architecture.adding_deltas(lm.model, edit.deltas)},
        )["edit"]
        for fact, outcome in zip(edit.facts, of_edit, strict=True):
            matches = matches_of(FACTS[fact], after.likelihoods, before.likelihoods)
            assert outcome.matches == matches
            assert (outcome.likelihoods is not None) == bool(FACTS[fact].neighborhood)
            sight = outcome.sight
            texts = compared[len(base.others) :]
            assert sight.kl == pytest.approx(fmean(value for text in texts for value in text.kl), rel=1e-3)
            assert sight.agreement == pytest.approx(fmean(agrees for text in texts for agrees in text.same))
            assert sight.unchanged.keys() == sight.kept.keys()
            for kind in sight.unchanged:
                same = [
                    compared[place].same
                    for place, other in enumerate(base.others)
                    if other.kind == kind and other.fact in (fact, -1)
                ]
                assert sight.unchanged[kind] == pytest.approx(fmean(map(all, same)))
                assert sight.kept[kind] == pytest.approx(fmean(map(fmean, same)))
            asked = [text for text in base.asked if text.fact == fact]
            with lm.architecture.adding_deltas(lm.model, edit.deltas):
                for form, share in sight.says.items():
                    said = [
                        contains(answer_of(greedy(lm, [text.prompt], 24, has_ended)[0].text), text.answers, text.old)
                        for text in asked
                        if text.form == form
                    ]
                    assert share == pytest.approx(fmean(said))
                written = greedy(lm, [FACTS[fact].text], 24)[0].text
            assert sight.fluency == pytest.approx(ngram_entropy(FACTS[fact].text + written))


def test_what_a_user_sees_is_left_out_unless_asked_for(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    ((outcome,),) = Trials(lm, FACTS).outcomes([Trial([0], random_delta(lm, 1, 0))], layer=1)
    assert outcome.sight is None


def test_an_edit_that_changes_nothing_leaves_everything_as_it_was(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    ((outcome,),) = Trials(lm, FACTS, sees=True).outcomes([Trial([1], {})], layer=1)
    assert outcome.matches.locality == [1.0]
    assert set(outcome.sight.unchanged.values()) == {1.0}
    assert outcome.sight.kl == pytest.approx(0, abs=1e-6)
    assert outcome.sight.agreement == 1
