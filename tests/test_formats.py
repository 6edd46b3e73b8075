"""Public formats: what is read of each record, and what is said of a damaged one."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from goldenedit.requests import EditRequest, load_requests

ZSRE = {
    "subject": "The Eiffel Tower",
    "target_new": "Rome",
    "prompt": "Which city is The Eiffel Tower in?",
    "ground_truth": ["Paris", "City of Paris"],
    "rephrase_prompt": "Where is The Eiffel Tower?",
    "cond": "Paris >> Rome || Which city is The Eiffel Tower in?",
    "locality": {"Relation_Specificity": [{"prompt": "The Eiffel Tower is made of", "ground_truth": ["iron"]}]},
    "portability": {"Reasoning": [{"prompt": "The Eiffel Tower's country is", "ground_truth": "Italy"}]},
}
COUNTERFACTUAL = ZSRE | {"ground_truth": [[["Paris"]]], "portability": {"Subject_Aliasing": None, "Reasoning": []}}
RECENT = {name: ZSRE[name] for name in ("subject", "target_new", "prompt", "locality")} | {"portability": {}}
BIO = {
    "text": "A passage about angela merkel.",
    "labels": "She was born in Hamburg.",
    "concept": "angela merkel",
    "locality": {"Relation_Specificity": [{"prompt": "angela merkel studied", "ground_truth": []}]},
}


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


def test_an_old_answer_that_is_the_new_one_is_left_out():
    assert EditRequest.from_dict(ZSRE | {"ground_truth": ["Rome"]}).target_true is None


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
