"""Likelihoods against one forward a pair."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.evaluation.counterfact import fact_likelihoods, known_facts
from goldenedit.evaluation.likelihood import _hosts, likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest
from models import TINY_CONFIGS, tiny_model

PAIRS = [
    ("The Eiffel Tower is located in the city of", "Rome"),
    ("Paris is", "a city"),
    ("The mother tongue of Angela Merkel is", " the language of the Kingdom of Cambodia"),
    ("Paris is ", "a city"),
    ("I", "live in London"),
]

SHARING = [
    ("Paris is in the", "city"),
    ("Paris is in the", "Rome"),
    ("Paris is in the", "city of Rome"),
    ("Paris is in the", "Rome city"),
    ("Paris is", "city"),
    ("Paris is", "in the"),
]


def test_pairs_of_different_owners_share_no_row(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    rows = []

    @contextmanager
    def within(owners):
        rows.extend(owners)
        yield

    together = likelihoods(lm, [*SHARING, *SHARING], owners=[0] * 6 + [1] * 6, within=within)
    assert rows.count(0) == rows.count(1) == 2  # one of them begins with all the others
    alone = likelihoods(lm, SHARING)
    for one, other in zip(together, [*alone, *alone], strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-4)


def naive(model, tokenizer, prompt: str, answer: str) -> tuple[float, float, float]:
    """Return NLL, accuracy and the least probability, token after token of the answer."""
    prompt = prompt.rstrip()
    ids = tokenizer(prompt).input_ids
    rest = tokenizer(" " + answer.strip()).input_ids
    nll, hits = [], []
    for token in rest:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        nll.append(-logits.log_softmax(-1)[token].item())
        hits.append(float(logits.argmax() == token))
        ids = [*ids, token]
    return sum(nll) / len(nll), sum(hits) / len(hits), math.exp(-max(nll))


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_likelihoods_equal_those_of_each_pair_alone(name, tokenizer):
    model = tiny_model(name)
    found = likelihoods(LanguageModel(model, tokenizer), PAIRS)
    for (prompt, answer), one in zip(PAIRS, found, strict=True):
        nll, accuracy, weakest = naive(model, tokenizer, prompt, answer)
        assert one.nll == pytest.approx(nll, rel=1e-4)
        assert one.accuracy == pytest.approx(accuracy)
        assert one.weakest == pytest.approx(weakest, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_does_not_matter(batch_size, tokenizer):
    model = tiny_model("gpt2")
    lm = LanguageModel(model, tokenizer)
    together = likelihoods(lm, PAIRS)
    found = likelihoods(lm, PAIRS, batch_size)
    assert [one.nll for one in found] == pytest.approx([one.nll for one in together], rel=1e-4)
    assert [one.accuracy for one in found] == [one.accuracy for one in together]


def test_answers_of_a_prompt_share_a_row_as_far_as_they_begin_alike(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    alone = {pair: likelihoods(lm, [pair])[0] for pair in SHARING}
    widths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with handle:
        found = likelihoods(lm, SHARING)
    # All are read from the row of "city of Rome", those of the shorter prompt too; only "Rome city" needs its own.
    assert [rows for rows, _ in widths] == [2]
    for pair, one in zip(SHARING, found, strict=True):
        assert one.nll == pytest.approx(alone[pair].nll, rel=1e-4)
        assert (one.accuracy, one.choices) == (alone[pair].accuracy, alone[pair].choices)


def test_the_weakest_token_is_the_answer_if_it_has_one_token_and_less_likely_if_it_has_more(tokenizer):
    one, several = likelihoods(LanguageModel(tiny_model("llama"), tokenizer), [SHARING[0], SHARING[2]])
    assert one.weakest == one.probability == pytest.approx(math.exp(-one.nll))
    assert several.weakest < several.probability


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple), max_size=8))
def test_a_host_begins_with_its_guest_and_has_none_itself(sequences):
    hosts = _hosts(sequences)
    for sequence, host in zip(sequences, hosts, strict=True):
        assert sequences[host][: len(sequence)] == sequence
        assert hosts[host] == host
        others = [other for other in sequences if other[: len(sequences[host])] == sequences[host]]
        assert set(others) == {sequences[host]}
    assert len({sequences[host] for host in set(hosts)}) == len(set(hosts))


def test_accuracy_is_the_share_of_first_choices(tokenizer):
    model = tiny_model("llama")
    prompt = "The Eiffel Tower is located in the city of"
    # The model's own next token where it starts with a space, then a token that is not its choice.
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids("ĠRome")] += 5 * model.lm_head.weight.data.std()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("ĠRome")] = 1e3
    (both, none) = likelihoods(LanguageModel(model, tokenizer), [(prompt, "Rome city"), (prompt, "city")])
    assert both.accuracy == 0.5
    assert none.accuracy == 0.0


def test_no_pairs_give_no_likelihoods(tokenizer):
    assert likelihoods(LanguageModel(tiny_model("llama"), tokenizer), []) == []


def test_modes_are_as_before_and_dropout_is_off(tokenizer):
    model = tiny_model("gpt2")
    lm = LanguageModel(model, tokenizer)
    expected = likelihoods(lm, PAIRS)
    model.train()
    assert likelihoods(lm, PAIRS) == expected
    assert model.training


@pytest.mark.parametrize(
    ("pair", "message"), [(("Paris ", ""), "no tokens"), (("Paris " * 200, "Rome"), "the model takes 128")]
)
def test_a_pair_that_cannot_be_scored_raises(pair, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        likelihoods(LanguageModel(tiny_model("llama"), tokenizer), [*PAIRS, pair])


FACT = EditRequest(
    "{} is in the city of",
    "The Eiffel Tower",
    "Rome",
    "Paris",
    paraphrases=("You live in the city of", "The Eiffel Tower, located in"),
    neighborhood=("Angela Merkel was born in", "The company is in", "I live in"),
)


@pytest.mark.parametrize("neighbors", [None, 1, 0])
def test_a_fact_is_measured_on_its_prompt_its_paraphrases_and_its_neighbors(neighbors, tokenizer):
    model = tiny_model("llama")
    found = fact_likelihoods(LanguageModel(model, tokenizer), FACT, neighbors)

    def both(prompt: str):
        return pytest.approx(
            tuple(naive(model, tokenizer, prompt, answer)[0] for answer in ("Rome", "Paris")), rel=1e-4
        )

    assert found.rewrite == both(FACT.text)
    assert list(found.paraphrases) == [both(prompt) for prompt in FACT.paraphrases]
    assert list(found.neighborhood) == [both(prompt) for prompt in FACT.neighborhood[:neighbors]]
    assert list(found.paraphrase_accuracy) == [
        naive(model, tokenizer, prompt, "Rome")[1] for prompt in FACT.paraphrases
    ]


def test_a_fact_without_an_old_answer_cannot_be_measured(tokenizer):
    with pytest.raises(ValueError, match="'Paris' has no target_true"):
        fact_likelihoods(LanguageModel(tiny_model("llama"), tokenizer), EditRequest("Paris is in", "Paris", "Rome"))


def test_facts_whose_old_answer_is_clearly_preferred_are_known(tokenizer):
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("ĠRome")] = 20.0
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("ĠBerlin")] = 19.9
    facts = [
        EditRequest("Paris is in", "Paris", "London", "Rome"),
        EditRequest("Paris is in", "Paris", "Rome", "London"),
        EditRequest("Paris is in", "Paris", "Hamburg", "London"),  # neither is likely
    ]
    assert known_facts(LanguageModel(model, tokenizer), facts) == [0]
