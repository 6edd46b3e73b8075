"""The packaged proxy set keeps what its README promises."""

import json
from collections import Counter
from importlib import resources

import pytest

from goldenedit.requests import EditRequest, proxy_facts

FIELDS = {"relation", "subject", "prompt", "target_true", "target_new", "paraphrases", "neighborhood"}


@pytest.fixture(scope="module")
def facts() -> list[EditRequest]:
    return proxy_facts()


def test_there_are_enough_facts_of_enough_relations(facts):
    assert len(facts) >= 200
    assert len({fact.relation for fact in facts}) >= 15


def test_any_prefix_covers_many_relations(facts):
    assert len({fact.relation for fact in facts[:50]}) >= 15


def test_each_record_has_exactly_the_documented_fields():
    text = (resources.files("goldenedit.data") / "proxy_facts.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        record = json.loads(line)
        assert set(record) == FIELDS, record
        texts = [record["relation"], record["subject"], record["target_true"], record["target_new"]]
        texts += [record["prompt"], *record["paraphrases"], *record["neighborhood"]]
        assert all(isinstance(text, str) and text == text.strip() and text for text in texts), record


def test_prompts_are_templates_with_one_place_for_the_subject(facts):
    for fact in facts:
        assert fact.prompt.count("{}") == 1, fact
        assert fact.subject not in fact.prompt, fact
        assert fact.text[fact.subject_start : fact.subject_end] == fact.subject


def test_new_answers_differ_from_old_ones(facts):
    for fact in facts:
        assert fact.target_new.casefold() != fact.target_true.casefold(), fact


def test_paraphrases_contain_the_subject_and_neighborhood_prompts_do_not(facts):
    for fact in facts:
        assert len(set(fact.paraphrases)) == 2, fact
        assert len(set(fact.neighborhood)) == 3, fact
        assert all(fact.subject in text for text in fact.paraphrases), fact
        assert not any(fact.subject in text for text in fact.neighborhood), fact


def test_no_fact_is_there_twice(facts):
    counts = Counter((fact.subject, fact.prompt) for fact in facts)
    assert max(counts.values()) == 1
    assert len({fact.text for fact in facts}) == len(facts)


def test_no_text_leaks_an_answer(facts):
    for fact in facts:
        for text in (fact.text, *fact.paraphrases, *fact.neighborhood):
            assert fact.target_new not in text, fact
            assert fact.target_true not in text, fact


def test_no_text_ends_in_a_space_or_has_a_place_left_open(facts):
    for fact in facts:
        for text in (*fact.paraphrases, *fact.neighborhood):
            assert "{}" not in text
            assert text == text.strip()
