"""Selectivity against its definition, one text and one layer at a time."""

from __future__ import annotations

import pytest
import torch

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import recording
from goldenedit.editors.statistics import KeyStatistics
from goldenedit.layer_selection import selectivity_scores
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest
from models import MLP_WIDTH, NUM_LAYERS, tiny_model

FACTS = [
    EditRequest(
        "The Eiffel Tower is in the city of",
        "The Eiffel Tower",
        "Rome",
        paraphrases=("One finds The Eiffel Tower in", "It stands in"),
        neighborhood=("The Louvre is in", "Berlin is in the city of"),
    ),
    EditRequest("Paris is in", "Paris", "Italy", paraphrases=("Where is Paris",), neighborhood=("London is in",)),
    EditRequest("Berlin is in", "Berlin", "Italy"),  # says nothing
]


def keys_of(model, architecture, tokenizer, layer, text):
    with recording({"it": architecture.down_projection(model, layer)}) as record, torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    return record.inputs["it"].view(-1, MLP_WIDTH).double()


def plain_score(model, tokenizer, layer, C):
    architecture = read_architecture(model)
    total = 0.0
    for fact in FACTS[:2]:
        row = encode(tokenizer, fact.text, None, fact.subject_end)
        own = keys_of(model, architecture, tokenizer, layer, fact.text)[row.subject]
        u = torch.linalg.solve(C, own)
        para, neigh = [], []
        for text in fact.paraphrases:
            if fact.subject in text:
                subject = encode(tokenizer, text, None, text.rfind(fact.subject) + len(fact.subject)).subject
                para.append(u @ keys_of(model, architecture, tokenizer, layer, text)[subject] / (u @ own))
        for text in fact.neighborhood:
            neigh.append((keys_of(model, architecture, tokenizer, layer, text)[1:] @ u / (u @ own)).abs().max())
        total += (sum(para) / len(para) - sum(neigh) / len(neigh)).item() / 2
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("identity", [True, False])
def test_scores_are_those_of_the_definition(name, identity, tokenizer):
    model = tiny_model(name)
    X = torch.randn(200, MLP_WIDTH, generator=torch.Generator().manual_seed(0)).double()
    C = torch.eye(MLP_WIDTH).double() if identity else X.T @ X / 200
    statistics = dict.fromkeys(range(NUM_LAYERS), KeyStatistics(None if identity else C))
    found = selectivity_scores(LanguageModel(model, tokenizer), FACTS, statistics)
    expected = torch.tensor([plain_score(model, tokenizer, layer, C) for layer in range(NUM_LAYERS)]).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_paraphrase_names_the_subject_as_a_word_of_its_own(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    scores = []
    for paraphrase in ("Paris, not Parisian, is in", "Paris is in"):
        fact = EditRequest("Paris is in", "Paris", "Rome", paraphrases=(paraphrase,), neighborhood=("London is",))
        scores.append(selectivity_scores(lm, [fact], {1: KeyStatistics(None)})[1].item())
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)  # the key of a first token, whatever comes behind it


def test_layers_without_statistics_have_no_score(tokenizer):
    model = tiny_model("llama")
    found = selectivity_scores(LanguageModel(model, tokenizer), FACTS, {1: KeyStatistics(None)})
    assert found.isnan().tolist() == [index != 1 for index in range(NUM_LAYERS)]


def test_facts_that_say_nothing_are_refused(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="paraphrases that name the subject"):
        selectivity_scores(LanguageModel(model, tokenizer), FACTS[2:], {1: KeyStatistics(None)})
