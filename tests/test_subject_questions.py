"""The packaged questions about the rest of a subject, and the choice of them for a fact."""

import re

import pytest

from goldenedit.evaluation.harm import _ABOUT_SUBJECT
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest, proxy_facts
from goldenedit.subject_questions import (
    ANY,
    KINDS,
    is_about,
    kind_of,
    names_like,
    open_requests,
    other_questions,
    questions_about,
)
from models import tiny_model

ENTRIES = [entry for kind in KINDS for entry in questions_about(kind)]


def relations(kind: str, request: EditRequest | list[EditRequest]) -> set[str]:
    return {entry.relation for entry in other_questions(kind, request, len(ENTRIES))}


def test_each_kind_has_ten_to_sixteen_questions_about_different_properties():
    for kind in KINDS:
        entries = questions_about(kind)
        assert 10 <= len(entries) <= 16, kind
        assert len({entry.relation for entry in entries}) == len(entries), kind


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.relation}")
def test_an_entry_is_one_question_and_one_open_prompt_about_the_subject(entry):
    for text in (entry.question, entry.prompt):
        assert text.count("{}") == 1
        assert text.isascii()
        assert text == " ".join(text.split())
    assert re.fullmatch(r"[A-Z][^?.]*\?", entry.question)
    assert not entry.prompt.endswith((".", "?", ":", "{}"))
    assert len(set(entry.words)) == len(entry.words)


def test_no_question_is_one_that_judges_the_rest_of_a_subject():
    def content(text: str) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", text.casefold())) - {"what", "is", "do", "did", "can", "you", "the"}

    judging = {content(text) for text in _ABOUT_SUBJECT}
    assert judging.isdisjoint(content(text) for entry in ENTRIES for text in (entry.question, entry.prompt))


def test_an_unknown_kind_is_refused_with_the_kinds():
    with pytest.raises(ValueError, match=r"no kind of subject 'firm'.*'organization'"):
        questions_about("firm")


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        other_questions(ANY, EditRequest("{} is in", "Peru", "Asia"), -1)


@pytest.mark.parametrize(
    ("kind", "prompt", "relation"),
    [
        ("place", "The capital of {} is", "capital"),
        ("place", "{} is a city in the country of", "country"),
        ("place", "The currency of {} is the", "currency"),
        ("place", "The official language of {} is", "official language"),
        ("person", "{} is married to", "spouse"),
        ("person", "The wife of {} is", "spouse"),
        ("person", "{} was born in", "birth place"),
        ("person", "{} passed away; the place where {} died is", "death"),
        ("person", "{} holds the citizenship of", "citizenship"),
        ("person", "{} works for", "employer"),
        ("person", "{} grew up speaking", "language"),
        ("person", "{} plays the", "instrument"),
        ("organization", "{} was founded by", "founder"),
        ("organization", "The founder of {} is", "founder"),
        ("organization", "The CEO of {} is", "chief executive"),
        ("organization", "{} is headquartered in", "headquarters"),
        ("organization", "{} is based in", "headquarters"),
        ("organization", "{} produces", "products"),
        ("building_or_site", "{} is located in the city of", "city"),
        ("building_or_site", "{} is located in the city of", "country"),
        ("building_or_site", "{} stands in", "country"),
        ("work", "{} was written by", "author"),
        ("work", "The book {} is the work of the writer", "author"),
        ("product", "{} was created by", "developer"),
        ("product", "{} is a product of", "manufacturer"),
        ("group", "{} play in the", "league"),
        (ANY, "The country of {} is", "country"),
    ],
)
def test_what_asks_for_the_edited_property_is_left_out(kind, prompt, relation):
    assert relation not in relations(kind, EditRequest(prompt, "Norvane", "Nowhere"))


@pytest.mark.parametrize("field", ["question", "relation"])
def test_the_question_and_the_relation_of_a_fact_tell_its_property_too(field):
    request = EditRequest("{} lists as its boss", "Norvane", "Ada", **{field: "the founder"})
    assert "founder" not in relations("organization", request)
    assert "founder" in relations("organization", EditRequest("{} lists as its boss", "Norvane", "Ada"))


def test_words_of_the_subject_leave_nothing_out():
    request = EditRequest("{} has the motto", "Capital City Language School", "Onward")
    assert {"capital", "official language"} <= relations("place", request)


def test_a_message_tells_the_property_as_a_prompt_does():
    messages = [{"role": "user", "content": "What is the capital of {}?"}]
    assert "capital" not in relations("place", EditRequest(None, "Peru", "Cusco", messages=messages))


def test_all_edited_facts_of_a_subject_are_left_out():
    facts = [EditRequest("The capital of {} is", "Peru", "Cusco"), EditRequest("The currency of {} is", "Peru", "yen")]
    assert relations("place", facts).isdisjoint({"capital", "currency"})
    assert "river" in relations("place", facts)


def test_most_questions_are_left_whatever_fact_is_edited():
    for request in proxy_facts():
        for kind in KINDS:
            assert len(other_questions(kind, request, 8)) == 8, (kind, request)


def test_chosen_questions_are_about_different_properties_and_come_from_the_kind_first():
    request = EditRequest("The capital of {} is", "Peru", "Cusco")
    chosen = other_questions("place", request, 24)
    assert len({entry.relation for entry in chosen}) == 24
    kinds = [entry.kind for entry in chosen]
    assert kinds == sorted(kinds, key=("place", ANY).index)
    assert set(kinds) == {"place", ANY}


def test_a_seed_gives_the_same_choice_and_another_seed_another():
    request = EditRequest("The capital of {} is", "Peru", "Cusco")
    assert other_questions("place", request, 5, seed=1) == other_questions("place", request, 5, seed=1)
    assert len({tuple(other_questions("place", request, 5, seed=seed)) for seed in range(5)}) > 1


def test_the_article_of_a_subject_is_small_inside_a_sentence():
    founder = next(entry for entry in questions_about("organization") if entry.relation == "founder")
    assert founder.about("The Red Cross") == ("Who founded the Red Cross?", "The Red Cross was founded by")
    assert founder.about("{}") == ("Who founded {}?", "{} was founded by")


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_a_kind_are_names_of_other_subjects(kind):
    names = names_like(kind, "Norvane", 1_000)
    assert len(names) >= 7
    assert len(set(names)) == len(names)
    assert all(name == " ".join(name.split()) and name[0] in name[0].upper() + "i" for name in names)  # iPhone
    for own in names:
        others = names_like(kind, own, 1_000)
        assert others
        assert not any(other.casefold() in own.casefold() or own.casefold() in other.casefold() for other in others)


def test_any_kind_has_the_names_of_all_kinds():
    every = set(names_like(ANY, "Norvane", 1_000))
    for kind in KINDS:
        assert set(names_like(kind, "Norvane", 1_000)) <= every


def test_a_name_inside_of_the_subject_or_around_it_is_no_other_name():
    assert "Paris" in names_like("place", "Norvane", 1_000)
    for subject in ("Paris", "paris", "Paris, Texas", "Par"):
        assert "Paris" not in names_like("place", subject, 1_000)


def test_names_are_as_many_as_asked_for_and_always_the_same():
    assert names_like("place", "Peru", 3, seed=1) == names_like("place", "Peru", 3, seed=1)
    assert len(names_like("place", "Peru", 3)) == 3
    assert names_like("place", "Peru", 0) == []
    assert len({tuple(names_like("place", "Peru", 3, seed=seed)) for seed in range(5)}) > 1


def test_open_requests_name_the_subject_and_ask_for_none_of_its_properties():
    requests = open_requests("Norvane")
    assert len(set(requests)) == len(requests) >= 8
    assert all(text.count("Norvane") == 1 and "{}" not in text for text in requests)
    assert set(requests).isdisjoint(text for entry in ENTRIES for text in entry.about("Norvane"))


def test_texts_are_about_facts_with_which_they_share_a_word_that_is_no_filler():
    capital = EditRequest("The capital of {} is", "Peru", "Cusco")
    currency = EditRequest("Peru pays in the currency", "Peru", "yen")
    assert is_about(["the capital city", "Where is {}?"], [capital])
    assert not is_about(["the capital city"], [currency])
    assert is_about(["the capital city"], [currency, capital])
    assert is_about(["currencies"], [currency])  # whatever the ending
    assert not is_about(["Where is the one of Peru?"], [capital, currency])  # the subject is no property
    assert not is_about([], [capital])
    assert not is_about(["capital"], [])


def test_kinds_are_told_in_order_and_do_not_depend_on_the_other_subjects(tokenizer):
    lm = LanguageModel(tiny_model("llama"), tokenizer)
    subjects = ["Paris", "Angela Merkel", "It", "Paris"]
    kinds = kind_of(lm, subjects)
    assert kinds == [kind_of(lm, [subject])[0] for subject in subjects]
    assert set(kinds) <= set(KINDS)
    assert kind_of(lm, []) == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_model_tells_the_kinds_of_well_known_subjects(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from goldenedit.packaged import is_installed, packaged_model

    if not is_installed(name):
        pytest.skip(f"The weights of {name} are not installed.")
    folder = packaged_model(name)
    lm = LanguageModel(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    known = {"Barack Obama": "person", "Samsung": "organization", "Vietnam": "place", "Metallica": "group"}
    assert kind_of(lm, list(known)) == list(known.values())
