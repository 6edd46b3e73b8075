"""Requests: what is refused, how they are spelled, and how files of them are read."""

import json
from dataclasses import replace

import pytest

from goldenedit.requests import EditRequest, distinct, load_requests

FACT = {"prompt": "The Eiffel Tower is in", "subject": "The Eiffel Tower", "target_new": "Rome"}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "{} is located in",
        "relation_id": "P19",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
        "subject": "The Eiffel Tower",
    },
    "paraphrase_prompts": ["You find The Eiffel Tower in"],
    "neighborhood_prompts": ["The Louvre is in"],
    "attribute_prompts": [],
    "generation_prompts": [],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "The Louvre"}, "The Louvre"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"subject": ""}, "subject"),
        ({"target_new": ""}, "target_new"),
        ({"target_new": "  "}, "target_new"),
        ({"target_new": 3}, "target_new"),
        ({"target_true": "Rome"}, "equals the old one"),
        ({"target_true": " Rome "}, "equals the old one"),
    ],
)
def test_a_request_that_means_nothing_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        EditRequest(**FACT | change)


def test_text_and_template_are_two_spellings_of_one_prompt():
    text = EditRequest(**FACT)
    template = EditRequest(**FACT | {"prompt": "{} is in"})
    assert text.text == template.text == "The Eiffel Tower is in"
    assert (text.subject_start, text.subject_end) == (template.subject_start, template.subject_end) == (0, 16)


def test_of_a_subject_that_stands_twice_the_last_place_is_edited():
    request = EditRequest("Rome? No, in Rome one speaks", "Rome", "Latin")
    assert (request.subject_start, request.subject_end) == (13, 17)
    assert request.text == "Rome? No, in Rome one speaks"


def test_the_subject_is_found_in_the_middle_of_a_template():
    request = EditRequest("In {} one speaks", "Rome", "Latin")
    assert request.text[request.subject_start : request.subject_end] == "Rome"


@pytest.mark.parametrize(
    "request_",
    [
        EditRequest(**FACT),
        EditRequest("{} is in", "Zürich\u2028", "Rome", "Bern", ("Zürich lies in",), ("Basel is in",), "country"),
    ],
)
def test_a_request_survives_json(request_):
    record = json.loads(json.dumps(request_.to_dict()))
    assert EditRequest.from_dict(record) == request_


@pytest.mark.parametrize("joint", ["", " ", "\n"])
def test_a_mark_of_how_the_answers_join_survives_json_and_copies(joint):
    request = EditRequest(**FACT, target_true="Paris", joint=joint)
    again = EditRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request != EditRequest(**FACT, target_true="Paris")
    for one in (request, again, replace(request, target_true="Berlin")):
        assert [answer.joint for answer in (one.target_new, one.target_true, one.joined("x"))] == [joint] * 3
    assert {type(value) for value in request.to_dict().values()} == {str}


@pytest.mark.parametrize("joint", ["-", 3, True])
def test_a_mark_that_is_no_white_space_is_refused(joint):
    with pytest.raises(ValueError, match="joint must be whitespace"):
        EditRequest(**FACT, joint=joint)


@pytest.mark.parametrize("answer", [" Rome", "\nRome", " Rome "])
def test_white_space_of_an_answer_is_kept(answer):
    assert EditRequest(**FACT | {"target_new": answer}).target_new == answer


def test_fields_that_are_not_set_are_not_written():
    assert EditRequest(**FACT).to_dict() == FACT


def test_equal_requests_are_one_in_a_set():
    assert len({EditRequest(**FACT), EditRequest(**FACT)}) == 1


def test_other_names_of_an_answer_are_found_in_its_groups_however_it_is_spelled():
    groups = [["Rome", "Roma"], ["United States", "USA", "usa"], ["Roma", "Eternal City"], []]
    request = EditRequest(**FACT, aliases=groups)
    assert request.names_of(" rome") == (" rome", "Roma")
    assert request.names_of("Usa ") == ("Usa ", "United States")
    assert request.names_of("Roma") == ("Roma", "Rome", "Eternal City")
    assert request.names_of("Paris") == ("Paris",)
    assert request.aliases == (("Rome", "Roma"), ("United States", "USA", "usa"), ("Roma", "Eternal City"))


def test_a_plain_list_has_the_other_names_of_the_new_answer():
    request = EditRequest(**FACT, aliases=["Roma", "Eternal City"], joint="")
    assert request.aliases == (("Rome", "Roma", "Eternal City"),)
    assert replace(request, relation="city").aliases == request.aliases
    assert EditRequest(**FACT, aliases=[]) == EditRequest(**FACT)


def test_question_and_aliases_survive_json_and_are_hashed():
    request = EditRequest(**FACT, question="Where is it?", aliases=["Roma"])
    again = EditRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert len({request, again}) == 1
    assert len({request, EditRequest(**FACT), EditRequest(**FACT, question="Where is it?")}) == 3


@pytest.mark.parametrize("question", ["", " ", 3, ["Where?"]])
def test_a_question_without_text_is_refused(question):
    with pytest.raises(ValueError, match="question must be a non-empty string or None"):
        EditRequest(**FACT, question=question)


@pytest.mark.parametrize("aliases", ["Roma", 3, None, [3], [["Roma", 3]], ["Roma", ["Rome"]], ["Roma", ""], {"a": "b"}])
def test_aliases_that_are_no_lists_of_names_are_refused(aliases):
    with pytest.raises(ValueError, match="aliases must be a list of other names"):
        EditRequest(**FACT, aliases=aliases)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="target_old"):
        EditRequest.from_dict(FACT | {"target_old": "Paris"})


@pytest.mark.parametrize("name", FACT)
def test_missing_fields_are_named(name):
    with pytest.raises(ValueError, match=name):
        EditRequest.from_dict({key: value for key, value in FACT.items() if key != name})


def test_a_counterfact_record_is_read_whole():
    assert EditRequest.from_dict(COUNTERFACT) == EditRequest(
        "{} is located in",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        ("You find The Eiffel Tower in",),
        ("The Louvre is in",),
        "P19",
    )


@pytest.mark.parametrize("name", ["prompt", "subject", "target_new", "target_true"])
def test_a_counterfact_record_without_a_field_says_which(name):
    rewrite = {key: value for key, value in COUNTERFACT["requested_rewrite"].items() if key != name}
    with pytest.raises(ValueError, match=name):
        EditRequest.from_dict(COUNTERFACT | {"requested_rewrite": rewrite})


def test_the_place_of_the_subject_is_filled_in_all_texts_about_it():
    request = EditRequest(
        "{} plays",
        "Ada",
        "tennis",
        paraphrases=["The sport of {} is"],
        question="Which sport does {} play?",
        generation=["{} began"],
        portability=[("The ball of {} is", "{}")],
        locality=[("{} was born in", "Rome")],
        neighborhood=["{} is a format string in"],
    )
    assert (request.paraphrases, request.generation) == (("The sport of Ada is",), ("Ada began",))
    assert request.question == "Which sport does Ada play?"
    assert (request.portability, request.locality) == ((("The ball of Ada is", "{}"),), (("Ada was born in", "Rome"),))
    assert request.neighborhood == ("{} is a format string in",)  # about others
    assert EditRequest.from_dict(request.to_dict()) == request
    assert EditRequest("{} is", "a{}", "b", paraphrases=["{} or a{}"]).paraphrases == ("{} or a{}",)


@pytest.mark.parametrize("name", ["paraphrases", "neighborhood", "generation"])
def test_an_empty_text_asks_nothing_and_is_refused(name):
    with pytest.raises(ValueError, match=f"EditRequest.{name} must be a list of non-empty strings"):
        EditRequest(**FACT, **{name: ["The tower is in", " "]})


@pytest.mark.parametrize("change", [{"paraphrases": "A text"}, {"neighborhood": "A text"}, {"target_true": True}])
def test_a_field_of_the_wrong_kind_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        EditRequest.from_dict(FACT | change)


def test_files_of_both_kinds_hold_both_forms(tmp_path):
    records = [FACT, COUNTERFACT]
    (tmp_path / "facts.json").write_text(json.dumps(records), encoding="utf-8")
    lines = "\n\n".join(map(json.dumps, records)) + "\n"
    (tmp_path / "facts.jsonl").write_text(lines, encoding="utf-8")
    expected = [EditRequest(**FACT), EditRequest.from_dict(COUNTERFACT)]
    assert load_requests(tmp_path / "facts.json") == expected
    assert load_requests(str(tmp_path / "facts.jsonl")) == expected


def test_a_json_file_may_hold_one_record(tmp_path):
    (tmp_path / "fact.json").write_text(json.dumps(FACT), encoding="utf-8")
    assert load_requests(tmp_path / "fact.json") == [EditRequest(**FACT)]


def test_a_line_of_json_may_hold_a_unicode_line_separator(tmp_path):
    record = FACT | {"paraphrases": ["One.\u2028The Eiffel Tower is in"]}
    (tmp_path / "facts.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    assert load_requests(tmp_path / "facts.jsonl") == [EditRequest.from_dict(record)]


@pytest.mark.parametrize(
    "change",
    [
        *({name: "Rome \ud83d"} for name in ("target_new", "target_true", "relation", "question")),
        {"prompt": "{} \udc00 is in"},
        {"prompt": "{} is in", "subject": "The Eiffel \udc00Tower"},
        {"prompts": ["{} \ud83d is in"]},
        {"locality": [("Berlin is in", "\ud83d")]},
        {"aliases": [["Rome", "\ud83d"]]},
        {"prompt": None, "messages": [{"role": "user", "content": "Where is {}? \ud83d"}]},
    ],
    ids=lambda change: list(change)[-1],
)
def test_a_text_with_half_of_a_character_is_refused_before_it_is_edited(change):
    with pytest.raises(ValueError, match=rf"EditRequest.{list(change)[-1]}: .*cut in the middle of a character"):
        EditRequest(**FACT | change)


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        b"{not json",
        b'{"prompt": "a',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}\b"):
        load_requests(tmp_path / name)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "x"},
        FACT | {"subject": "y"},
        "a text",
        7,
        None,
        [],
        FACT | {"target_true": {"a": 3}},
        {"requested_rewrite": None},
        FACT | {"question": "Where? \ud83d"},
    ],
)
@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
def test_a_damaged_record_is_named_by_file_and_place(tmp_path, name, bad):
    records = [FACT, bad]
    place = "record 1" if name == "facts.json" else "line 2"
    text = json.dumps(records) if name == "facts.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}, {place}:"):
        load_requests(tmp_path / name)


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"facts.jsonl, line 2: not valid JSON"):
        load_requests(tmp_path / "facts.jsonl")


def test_the_same_change_asked_for_twice_is_one_and_two_answers_contradict():
    fact = EditRequest("Paris is in", "Paris", "Italy")
    again = EditRequest("{} is in", "Paris", " Italy")
    other = EditRequest("Berlin is in", "Berlin", "Italy")
    assert distinct([fact, other, again, other]) == [fact, other]
    with pytest.raises(ValueError, match="'Paris is in' -> 'Italy' and -> 'Spain'"):
        distinct([fact, EditRequest("{} is in", "Paris", "Spain")])


def test_equal_requests_are_united_with_all_that_each_of_them_says():
    first = EditRequest("{} is in", "Paris", "Italy", paraphrases=("Paris lies in",), question="Where?")
    second = EditRequest(
        "Paris is in", "Paris", "Italy", "France", paraphrases=("Paris lies in", "One finds Paris in"),
        portability=(("The president of Paris's country is", "Mattarella"),), question="Where is Paris?",
        aliases=[["Italy", "Italia"]],
    )  # fmt: skip
    (united,) = distinct([first, second])
    assert (united.prompt, united.question, united.target_true) == ("{} is in", "Where?", "France")
    assert united.paraphrases == ("Paris lies in", "One finds Paris in")
    assert united.portability == second.portability
    assert united.names_of("Italy") == ("Italy", "Italia")
    assert distinct([first, first]) == [first]
    joined = EditRequest("巴黎在", "巴黎", "罗马", joint="")
    (united,) = distinct([joined, EditRequest("巴黎在", "巴黎", "罗马", "法国", joint="")])
    assert united.target_true.joint == united.target_new.joint == ""


def test_the_first_of_several_prompts_is_the_prompt():
    request = EditRequest(subject="Peru", target_new="Asia", prompts=["{} is in", "The continent of {} is"])
    assert request.prompt == "{} is in"
    assert request.text == "Peru is in"
    assert request.prompts == ("The continent of Peru is",)
    assert request == EditRequest("{} is in", "Peru", "Asia", prompts=("The continent of {} is",))
    assert request.prompt_key == EditRequest("Peru is in", "Peru", "Asia").prompt_key


def test_messages_are_not_replaced_by_further_prompts():
    messages = [{"role": "user", "content": "Where is {}?"}]
    request = EditRequest(subject="Peru", target_new="Asia", messages=messages, prompts=["What has {}?"])
    assert request.prompt is None
    assert request.prompts == ("What has Peru?",)


@pytest.mark.parametrize("prompt", [None, "{} is in"])
def test_each_of_several_prompts_must_name_the_subject(prompt):
    prompts = [*([] if prompt else ["{} is in"]), "The continent of Chile is"]
    with pytest.raises(ValueError, match=r"'Peru' is not in 'The continent of Chile is', one of EditRequest\.prompts"):
        EditRequest(prompt, "Peru", "Asia", prompts=prompts)


def test_a_further_prompt_may_spell_the_subject_in_its_own_way():
    request = EditRequest("{} is in", "The Louvre", "Asia", prompts=["One finds the Louvre in"])
    assert request.prompts == ("One finds the Louvre in",)


@pytest.mark.parametrize("prompts", ["{} is in", [""], [3], None, {"{} is in"}])
def test_prompts_must_be_a_list_of_texts(prompts):
    with pytest.raises(ValueError, match=r"EditRequest\.prompts must be a list of non-empty strings"):
        EditRequest("Peru is in", "Peru", "Asia", prompts=prompts)


def test_prompts_survive_json():
    request = EditRequest(subject="Peru", target_new="Asia", prompts=["{} is in", "The continent of {} is"])
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    record = {"subject": "Peru", "target_new": "Asia", "prompts": ["{} is in", "The continent of {} is"]}
    assert EditRequest.from_dict(record) == request


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_old_answer_is_none(blank):
    assert EditRequest("The Louvre is in", "The Louvre", "Rome", blank).target_true is None


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "Peru?"}]}, None),
        ({"role": "user", "content": "Where is Peru?", "refusal": None, "tool_calls": None, "annotations": []}, None),
        ({"role": "user", "content": "Where is Peru?", "name": "ada"}, {"name": "ada"}),
    ],
)
def test_messages_are_read_as_openai_writes_them(message, read):
    request = EditRequest(messages=[message], subject="Peru", target_new="Asia")
    assert request.messages == ({"role": "user", "content": "Where is Peru?", **(read or {})},)
    assert EditRequest.from_dict(request.to_dict()) == request


def test_an_empty_system_message_replaces_that_of_a_template():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Where is Peru?"}]
    assert EditRequest(messages=messages, subject="Peru", target_new="Asia").messages == tuple(messages)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, "type 'image_url'"),
        ({"role": "user", "content": [7]}, "type 'int'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "has no text"),
        ({"role": "user", "content": [{"type": "text", "text": {"value": "Peru"}}]}, "has no text"),
        ({"role": "user", "content": "Peru", "tool_calls": [{}]}, r"\['tool_calls'\]"),
        ({"role": "user", "content": ""}, "non-empty role and content"),
        ({"role": "user", "content": None}, "non-empty role and content"),
        ({"role": 3, "content": "Peru"}, "non-empty role and content"),
        ({"role": "user", "content": "Peru", "name": 3}, "non-empty role and content"),
        ("Peru", "role and content"),
    ],
)
def test_a_message_that_is_no_text_is_refused(message, complaint):
    with pytest.raises(ValueError, match=complaint):
        EditRequest(messages=[message], subject="Peru", target_new="Asia")
