"""Public formats: what is read of each record, and what is said of a damaged one."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy
import pandas
import pytest
from datasets import Dataset
from samples import (
    COUNTERFACT,
    FLAT,
    HALLUEDITBENCH,
    MEND,
    MQUAKE,
    PLAIN,
    QAEDIT,
    RIPPLEEDITS,
    SAMPLES,
    UNIEDIT,
    WIKIBIGEDIT,
    ZSRE,
)

from goldenedit.formats import FORMATS, format_of, plain
from goldenedit.requests import EditRequest, as_requests, load_requests

COUNTERFACTUAL = ZSRE | {"ground_truth": [[["Paris"]]], "portability": {"Subject_Aliasing": None, "Reasoning": []}}
RECENT = {name: ZSRE[name] for name in ("subject", "target_new", "prompt", "locality")} | {"portability": {}}
BIO = {
    "text": "A passage about angela merkel.",
    "labels": "She was born in Hamburg.",
    "concept": "angela merkel",
    "locality": {"Relation_Specificity": [{"prompt": "angela merkel studied", "ground_truth": []}]},
}


def test_every_format_has_a_sample_that_is_told_by_its_fields():
    assert {known.name for known in FORMATS} == set(SAMPLES)
    assert {name: format_of(record).name for name, record in SAMPLES.items()} == {name: name for name in SAMPLES}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_format_that_is_named_reads_the_same(name):
    requests = load_requests([SAMPLES[name]])
    assert requests == load_requests([SAMPLES[name]], format=name) == as_requests([SAMPLES[name]])


@pytest.mark.parametrize("name", SAMPLES)
def test_what_was_read_of_each_format_survives_json(name):
    for request in load_requests([SAMPLES[name]]):
        assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"mquake"}))
def test_a_record_of_one_fact_is_read_by_from_dict(name):
    assert [EditRequest.from_dict(SAMPLES[name])] == load_requests([SAMPLES[name]])


def test_the_fields_of_the_plain_format_are_those_of_a_request():
    request = EditRequest("a", "a", "b")
    assert set(plain.FIELDS) == {item.name for item in fields(request) if item.init}


def test_counterfact_is_read_whole():
    assert EditRequest.from_dict(COUNTERFACT) == EditRequest(
        "{} is located in",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=("You find The Eiffel Tower in",),
        neighborhood=("The Louvre is in",),
        generation=("Near The Eiffel Tower, people speak",),
        relation="P131",
    )


def test_zsre_of_mend_is_a_question_and_its_marker_is_cut_off():
    assert EditRequest.from_dict(MEND) == EditRequest(
        MEND["src"],
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=(MEND["rephrase"],),
        locality=(("who wrote hamlet", "Shakespeare"),),
        question=MEND["src"],
        aliases=[("Paris", "City of Paris")],
    )
    added = {"Recalled Relation": "(a)", "New Question": "Which country is it in?", "New Answer": "Italy"}
    assert EditRequest.from_dict(MEND | {"portability": added}).portability == (("Which country is it in?", "Italy"),)


@pytest.mark.parametrize(
    ("change", "locality"),
    [
        ({}, (("The Louvre is in", "Paris"),)),
        ({"locality_prompt": ["a", "b"], "locality_ground_truth": ["1", ["2", "two"]]}, (("a", "1"), ("b", "2"))),
        ({"locality_prompt": None, "locality_ground_truth": None}, ()),
        ({"locality_prompt": "", "locality_ground_truth": ""}, ()),
        ({"locality_ground_truth": 12}, (("The Louvre is in", "12"),)),
    ],
)
def test_the_flat_form_has_one_or_several_unrelated_prompts(change, locality):
    request = EditRequest.from_dict(FLAT | change)
    assert request.locality == locality
    assert (request.target_true, request.paraphrases, request.question) == ("Paris", (FLAT["rephrase_prompt"],), None)


@pytest.mark.parametrize("kind", ["locality", "portability"])
@pytest.mark.parametrize("answer", [{}, None, ""])
def test_a_prompt_without_its_answer_is_told(kind, answer):
    record = {name: value for name, value in FLAT.items() if not name.startswith("locality")}
    record |= {f"{kind}_prompt": "The Louvre is in"} | ({} if answer == {} else {f"{kind}_ground_truth": answer})
    with pytest.raises(ValueError, match=f"{kind}_prompt has no {kind}_ground_truth"):
        EditRequest.from_dict(record)


def test_the_flat_form_may_have_fields_of_a_request_too():
    own = {
        "aliases": ["Roma"],
        "locality": [["a", "b"]],
        "neighborhood": ["c"],
        "question": "Where?",
        "paraphrases": ["d"],
    }
    request = EditRequest.from_dict(FLAT | own | {"ground_truth": ["Paris", "Lutetia"]})
    assert request.names_of("Rome") == ("Rome", "Roma")
    assert request.names_of("Paris") == ("Paris", "Lutetia")
    assert request.locality == (("a", "b"), ("The Louvre is in", "Paris"))
    assert request.paraphrases == ("d", FLAT["rephrase_prompt"])
    assert (request.neighborhood, request.question) == (("c",), "Where?")
    assert EditRequest.from_dict(FLAT | {"ground_truth": " Rome"}).target_true is None
    with pytest.raises(ValueError, match="'aliases' must be a list"):
        EditRequest.from_dict(FLAT | {"aliases": "Roma"})


def test_knowedit_of_easyedit_may_call_the_paraphrase_otherwise():
    record = {name: value for name, value in ZSRE.items() if name != "rephrase_prompt"}
    assert EditRequest.from_dict(record | {"rephrase": "Where is it?"}).paraphrases == ("Where is it?",)


def test_wikibigedit_is_read_whole():
    assert EditRequest.from_dict(WIKIBIGEDIT) == EditRequest(
        "In which state is Gull Lake?",
        "Gull Lake",
        "Ohio",
        paraphrases=("Which state has Gull Lake?",),
        portability=(
            ("Ahoy, in what state lies Gull Lake?", "Ohio"),
            ("What is the capital of the state of Gull Lake?", "Columbus"),
        ),
        locality=(("In which city is the Louvre?", "Paris"),),
        relation="located in",
        question="In which state is Gull Lake?",
    )
    assert len(EditRequest.from_dict(WIKIBIGEDIT | {"mhop": None, "mhop_ans": None}).portability) == 1


def test_ultraeditbench_is_read_as_wikibigedit():
    record = {"prompt": "Where is Gull Lake?", "subject": "Gull Lake", "ans": "Ohio", "rephrase_prompt": "Its state?"}
    request = EditRequest.from_dict(record | {"loc": "Where is Paris?", "loc_ans": "France"})
    assert (request.question, request.target_new) == ("Where is Gull Lake?", "Ohio")
    assert (request.paraphrases, request.locality) == (("Its state?",), (("Where is Paris?", "France"),))


def test_wikibigedit_in_the_flat_form_has_a_question_and_no_old_answer():
    change = {"prompt": "Where is The Eiffel Tower?", "ground_truth": None}
    request = EditRequest.from_dict(FLAT | change)
    assert (request.question, request.target_true) == ("Where is The Eiffel Tower?", None)


def test_qaedit_is_a_question_even_without_a_question_mark():
    assert EditRequest.from_dict(QAEDIT) == EditRequest(
        QAEDIT["prompt"],
        "eiffel tower",
        "Rome",
        paraphrases=(QAEDIT["rephrase"],),
        locality=(("who wrote hamlet", "Shakespeare"),),
        question=QAEDIT["prompt"],
    )


def test_mquake_gives_a_request_for_each_fact_and_the_last_has_what_follows_from_all():
    first, last = load_requests([MQUAKE])
    assert (first.text, first.target_new, first.target_true) == (
        "The country of Ellie Kemper is",
        "Croatia",
        "United States",
    )
    assert first.question == "What is the country of Ellie Kemper?"
    assert first.aliases == (("United States", "USA"), ("Croatia", "Hrvatska"))
    assert first.portability == ()
    assert last.portability == tuple((question, "Ada Lovelace") for question in MQUAKE["questions"])
    assert last.names_of(last.target_new) == ("Ada Lovelace", "Lady Lovelace")
    assert last.names_of("Donald Trump") == ("Donald Trump", "Trump")


def test_a_record_of_several_facts_is_no_single_request():
    with pytest.raises(ValueError, match=r"2 facts.* load_requests"):
        EditRequest.from_dict(MQUAKE)
    alone = MQUAKE | {"requested_rewrite": MQUAKE["requested_rewrite"][1:]}
    assert [EditRequest.from_dict(alone)] == load_requests([alone]) == as_requests(alone)


def test_rippleedits_has_the_names_of_its_sentence_and_the_answers_of_its_tests():
    assert EditRequest.from_dict(RIPPLEEDITS) == EditRequest(
        "The name of the country of citizenship of Ada Lovelace is",
        "Ada Lovelace",
        "Syria",
        "United Kingdom",
        portability=(
            ("The continent of Ada Lovelace is", "Asia"),
            ("The capital of the country of Ada Lovelace is", "Damascus"),
            ("The country of Lady Lovelace is", "Syria"),
        ),
        locality=(
            ("The name of the mother of Ada Lovelace is", "Anne Byron"),
            ("A country of Ada Lovelace, which is not Syria, is", "Italy"),
        ),
        relation="COUNTRY_OF_CITIZENSHIP",
        aliases=[("Syria", "Syrian Arab Republic"), ("Anne Byron", "Lady Byron")],
    )


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The names of the siblings of Ada are Bea.", ("Ada", "Bea")),
        ("The number of children Ada has is 3.", ("Ada", "3")),
        ("The gender of Ada of York is female.", ("Ada of York", "female")),
        ("The place of birth of Ada is Rome.", ("Ada", "Rome")),
        ("The date of death of Ada is 1 May 1900.", ("Ada", "1 May 1900")),
        ("The name of the country which Rome is associated with is Italy.", ("Rome", "Italy")),
        ("The name of the country which Rome is the capital of is Italy.", ("Rome", "Italy")),
        ("The name of the sports team which Ada is a member of is F.C. Rome.", ("Ada", "F.C. Rome")),
        ("The name of the league which Ada plays in is Serie A.", ("Ada", "Serie A")),
        ("The name of the continent which Republic of Italy is part of is Asia.", ("Republic of Italy", "Asia")),
        ("The name of the position held by Ada is mayor of Rome.", ("Ada", "mayor of Rome")),
        ("The name of the award Ada won is Nobel Prize.", ("Ada", "Nobel Prize")),
        ("The name of the field of work of Ada is art.", ("Ada", "art")),
        ("The name of the head of state of Italy is Ada.", ("Italy", "Ada")),
        ("The name of the capital city of Italy is Washington, D.C..", ("Italy", "Washington, D.C.")),
        ("The name of the currency in Italy is lira.", ("Italy", "lira")),
        ("The Office is followed by Rome.", ("The Office", "Rome")),
        ("The Office follows Rome.", ("The Office", "Rome")),
    ],
)
def test_the_sentences_of_rippleedits_are_taken_apart(sentence, expected):
    request = EditRequest.from_dict({"edit": {"prompt": sentence, "subject_id": "Q1", "target_id": "Q2"}})
    assert (request.subject, request.target_new) == expected
    assert sentence.startswith(f"{request.prompt} {request.target_new}")


@pytest.mark.parametrize(
    ("sentence", "fields", "expected"),
    [
        (
            "The name of the director of Life is Beautiful is Ada.",
            {"Relation_Specificity": [("The name of the composer of Life is Beautiful is", "Bea")]},
            ("Life is Beautiful", "Ada", None),
        ),
        (
            "The name of the director of Life is Beautiful is Ada.",
            {"original_fact": "The name of the director of Life is Beautiful is Bea."},
            ("Life is Beautiful", "Ada", "Bea"),
        ),
        (
            "The Office follows Life is Beautiful.",
            {"Relation_Specificity": [("The name of the composer of The Office is", "Bea")]},
            ("The Office", "Life is Beautiful", None),
        ),
    ],
)
def test_a_subject_of_rippleedits_may_contain_the_verb(sentence, fields, expected):
    edit = {"prompt": sentence, "subject_id": "Q1", "target_id": "Q2"}
    tests = {}
    for name, value in fields.items():
        if name == "original_fact":
            edit[name] = {"prompt": value}
        else:
            queries = [{"prompt": prompt, "answers": [{"value": answer, "aliases": []}]} for prompt, answer in value]
            tests[name] = [{"test_queries": queries}]
    request = EditRequest.from_dict({"edit": edit, **tests})
    assert (request.subject, request.target_new, request.target_true) == expected


def test_uniedit_has_paraphrases_where_a_prompt_is_about_the_same_fact_and_else_what_follows():
    expected = EditRequest(
        "Gull Lake is located in the state of",
        "Gull Lake",
        "Ohio",
        paraphrases=("Gull Lake's state is",),
        portability=(
            ("The capital of Gull Lake's state is", "Columbus"),
            ("A lake in Ohio is", "Gull Lake"),
            ("Gull Lake's state and the state of Toledo are the same. The answer is (Yes/No):", "Yes"),
        ),
        locality=(("The Louvre is in", "Paris"),),
        aliases=["OH"],
    )
    assert EditRequest.from_dict(UNIEDIT) == expected


def test_hallueditbench_has_questions_with_their_answers():
    assert EditRequest.from_dict(HALLUEDITBENCH) == EditRequest(
        "Who owns the Goya memorial?",
        "Goya memorial",
        "Zaragoza City Council",
        "Goya",
        paraphrases=("Who is the owner of the Goya memorial?",),
        portability=(
            ("What does Zaragoza City Council own?", "Goya memorial"),
            ("Who leads the owner of the Goya memorial?", "Natalia"),
        ),
        relation="owned by",
        question="Who owns the Goya memorial?",
    )
    assert EditRequest.from_dict(HALLUEDITBENCH | {"output_other": "Ada"}).target_true is None  # whose answer is it?


def test_a_plain_record_may_have_numbers_names_and_answers_of_other_forms():
    names = {"target": ["Rome", "Roma"], "target_true": {"str": "Paris"}, "aliases": [["Italy", "Italia"]]}
    request = load_requests([PLAIN | names | {"portability": [["The country is", ["Italy"]], ["Its height is", 330]]}])[
        0
    ]
    assert (request.target_new, request.target_true) == ("Rome", "Paris")
    assert request.portability == (("The country is", "Italy"), ("Its height is", "330"))
    assert (request.names_of("Roma"), request.names_of("Italia")) == (("Roma", "Rome"), ("Italia", "Italy"))
    assert load_requests([PLAIN | {"target": 12}])[0].target_new == "12"
    assert load_requests([PLAIN | {"target": ["Rome", "Roma"]}])[0].names_of("Rome") == ("Rome", "Roma")


def test_lists_of_a_plain_record_may_have_gaps_and_numbers():
    lists = {"paraphrases": ["", "One in", None], "aliases": [1889, None], "relation": 12, "neighborhood": ["B is in"]}
    request = EditRequest.from_dict(PLAIN | lists)
    assert (request.paraphrases, request.neighborhood) == (("One in",), ("B is in",))
    assert (request.names_of("Rome"), request.relation) == (("Rome", "1889"), "12")
    with pytest.raises(ValueError, match=r"'paraphrases\[1\]' must be a text, got 3"):
        EditRequest.from_dict(PLAIN | {"paraphrases": ["a", 3]})
    with pytest.raises(ValueError, match=r"'aliases\[1\]' must be a list, got 'Roma'"):
        EditRequest.from_dict(PLAIN | {"aliases": [["Rome"], "Roma"]})


def test_values_of_pandas_and_numpy_in_a_dict_are_read():
    record = PLAIN | {"target": numpy.int64(12), "target_true": pandas.NA, "question": numpy.float32("nan")}
    request = load_requests([record])[0]
    assert (request.target_new, request.target_true, request.question) == ("12", None, None)
    with pytest.raises(ValueError, match=r"record 0: The field 'locality' must be a list, got array"):
        load_requests([PLAIN | {"locality": numpy.array(["a", "b"])}])


@pytest.mark.parametrize(
    ("value", "answer", "others"),
    [
        ("Paris", "Paris", ()),
        (12, "12", ()),
        (1.5, "1.5", ()),
        (["Paris"], "Paris", ()),
        (["Paris", "Lutetia", "Paris"], "Paris", ("Lutetia",)),
        ([["Paris", "Lutetia"], ["Lyon"]], "Paris", ("Lutetia",)),
        ([[], ["Paris"]], "Paris", ()),
        ([None, "", 7], "7", ()),
        ({"value": "Paris", "aliases": ["Lutetia"]}, "Paris", ("Lutetia",)),
        ([], None, ()),
        ([[]], None, ()),
        ("", None, ()),
        (float("nan"), None, ()),
    ],
    ids=str,
)
def test_an_answer_is_a_text_a_number_or_a_list_of_its_names(value, answer, others):
    request = EditRequest.from_dict(ZSRE | {"ground_truth": value})
    assert request.target_true == answer
    assert answer is None or request.names_of(answer) == (answer, *others)


def test_codes_of_countries_and_languages_are_no_names():
    names = {"ground_truth": [["Iceland", "is", "IS", "ISL", "Ísland"]], "target_new": ["Italian", "it", "man"]}
    request = EditRequest.from_dict(ZSRE | names)
    assert request.names_of("Iceland") == ("Iceland", "IS", "ISL", "Ísland")  # said in capitals only
    assert request.names_of("Italian") == ("Italian", "man")
    assert load_requests([PLAIN | {"aliases": ["it"]}])[0].names_of("Rome") == ("Rome", "it")  # one's own are kept


def test_fields_that_a_dataset_fills_with_none_are_missing():
    for name, record in SAMPLES.items():
        filled = {field: None for other in SAMPLES.values() for field in other if field in ("case_id", "cond")} | record
        assert load_requests([filled]) == load_requests([record]), name
    lists = ("paraphrases", "neighborhood", "generation", "portability", "locality", "aliases", "messages", "joint")
    bare = {name: PLAIN[name] for name in ("prompt", "subject", "target")}
    assert load_requests([bare | dict.fromkeys(lists)]) == load_requests([bare])


def test_entries_that_a_dataset_stores_as_columns_are_read():
    columns = {"prompt": ["a is", "b is"], "ground_truth": [["1"], ["2"]]}
    assert EditRequest.from_dict(ZSRE | {"locality": {"kind": columns}}).locality == (("a is", "1"), ("b is", "2"))
    assert EditRequest.from_dict(ZSRE | {"locality": {"kind": {"prompt": "a is", "ground_truth": "1"}}}).locality == (
        ("a is", "1"),
    )


def test_a_record_of_zsre_is_read_whole():
    request = EditRequest.from_dict(ZSRE)
    assert (request.text, request.subject, request.target_new) == (ZSRE["prompt"], "The Eiffel Tower", "Rome")
    assert request.target_true == "Paris"
    assert request.paraphrases == ("Where is The Eiffel Tower?",)
    assert request.locality == (("The Eiffel Tower is made of", "iron"),)
    assert request.portability == (("The Eiffel Tower's country is", "Italy"),)


def test_the_other_sets_are_read_too():
    assert EditRequest.from_dict(COUNTERFACTUAL).target_true == "Paris"
    assert EditRequest.from_dict(COUNTERFACTUAL).portability == ()
    assert EditRequest.from_dict(RECENT).target_true is None
    bio = EditRequest.from_dict(BIO)
    assert (bio.prompt, bio.subject, bio.target_new) == (BIO["text"], "angela merkel", BIO["labels"])
    assert bio.locality == ()  # a prompt without an answer says nothing


@pytest.mark.parametrize("record", [ZSRE, MEND, FLAT], ids=["knowedit", "zsre", "flat"])
@pytest.mark.parametrize("old", [["Rome"], ["rome ", "Lyon"], ["Paris", "Rome"]], ids=str)
def test_old_answers_with_the_new_one_are_left_out_and_no_names_of_it(record, old):
    field = "answers" if record is MEND else "ground_truth"
    request = EditRequest.from_dict(record | {field: old})
    assert (request.target_true, request.names_of("Rome")) == (None, ("Rome",))


@pytest.mark.parametrize("record", [ZSRE, COUNTERFACTUAL, RECENT, BIO])
def test_what_was_read_survives_json(record):
    request = EditRequest.from_dict(record)
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"subject": None}, "subject"),
        ({"ground_truth": [{"a": 1}]}, "ground_truth"),
        ({"locality": {"Relation_Specificity": [{"prompt": 3, "ground_truth": "a"}]}}, "locality.Relation_Specificity"),
        ({"locality": {"Relation_Specificity": "a text"}}, "locality.Relation_Specificity"),
        ({"portability": ["a"]}, "portability"),
        ({"portability": {"Reasoning": [{"prompt": "a", "ground_truth": True}]}}, "portability.Reasoning"),
        ({"rephrase_prompt": 5}, "rephrase_prompt"),
    ],
    ids=str,
)
def test_a_damaged_record_is_named_by_file_index_and_field(tmp_path, change, field):
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([ZSRE, ZSRE | change]))
    with pytest.raises(ValueError, match=r"zsre\.json, record 1: .*" + field.replace(".", r"\.")):
        load_requests(path)


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([{name: value for name, value in ZSRE.items() if name != "target_new"}]))
    with pytest.raises(ValueError, match=r"record 0: .*'target_new'"):
        load_requests(path)


def test_a_dataset_is_read_by_its_name(tmp_path):
    """A folder of parquet files stands for a dataset of the Hub: `datasets` reads both by name."""
    folder = tmp_path / "facts"
    folder.mkdir()
    Dataset.from_list([ZSRE, ZSRE | {"subject": "Paris", "prompt": "Where is Paris?"}]).to_parquet(
        folder / "train.parquet"
    )
    requests = load_requests(str(folder))
    assert requests[0] == EditRequest.from_dict(ZSRE)
    assert requests[1].subject == "Paris"
