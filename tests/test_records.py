"""One reader for all files of texts and facts: what a record is, and where a damaged one stands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from goldenedit import EditConfig, EditRequest, load_requests
from goldenedit.layer_selection import proxy_set
from goldenedit.lm.covariance import dataset_texts
from goldenedit.records import read_records

FACT = {"prompt": "The Eiffel Tower is in", "subject": "The Eiffel Tower", "target_new": "Rome"}
LINE_ENDS = "one\u2028two\u2029three\x85four\x0bfive\x0csix"  # where str.splitlines splits
BOM = "\ufeff"


def facts_of(path) -> list[EditRequest]:
    """Return the facts of a file; those that layers are compared on are read from it as well."""
    facts = load_requests(path)
    assert proxy_set(EditConfig(proxy=path)) == facts
    return facts


@pytest.mark.parametrize("begin", ["", BOM, "\n", " \n\t\n"])
@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n", "\n \r\n\t\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson"])
def test_lines_end_with_a_line_feed_alone_and_blank_ones_are_skipped(tmp_path, begin, between, suffix):
    path = tmp_path / f"lines{suffix}"
    facts = [FACT, FACT | {"paraphrases": [LINE_ENDS + " The Eiffel Tower is in"]}]
    path.write_bytes((begin + between.join(json.dumps(fact, ensure_ascii=False) for fact in facts) + between).encode())
    assert facts_of(path) == [EditRequest.from_dict(fact) for fact in facts]
    texts = [{"text": LINE_ENDS}, "plain", {"text": "last"}]
    path.write_bytes((begin + between.join(json.dumps(text, ensure_ascii=False) for text in texts)).encode())
    assert list(dataset_texts(str(path))) == [LINE_ENDS, "plain", "last"]


@pytest.mark.parametrize("suffix", [".txt", ".text", ""])
def test_a_file_of_texts_has_one_a_line(tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    path.write_bytes(f"{BOM}first \r\n\n  \n{LINE_ENDS}\nlast".encode())
    assert list(dataset_texts(str(path))) == ["first ", LINE_ENDS, "last"]


@pytest.mark.parametrize(
    ("wrap", "count"),
    [
        (lambda fact: fact, 1),
        (lambda fact: [fact, fact], 2),
        (lambda fact: {"data": [fact, fact], "version": 1}, 2),
        (lambda fact: {"facts": [fact, fact, fact]}, 3),
    ],
    ids=["one record", "a list", "a list under data", "nothing but a list"],
)
def test_an_object_is_one_record_or_holds_one_list_of_them(tmp_path, wrap, count):
    path = tmp_path / "facts.json"
    path.write_text(BOM + json.dumps(wrap(FACT)), encoding="utf-8")
    assert facts_of(path) == [EditRequest(**FACT)] * count
    path.write_text(json.dumps(wrap({"text": LINE_ENDS, "title": "a" * 99})), encoding="utf-8")
    assert list(dataset_texts(str(path))) == [LINE_ENDS] * count


def test_a_chat_is_one_record_though_its_messages_are_a_list_of_objects(tmp_path):
    path = tmp_path / "chat.json"
    chat = {"messages": [{"role": "user", "content": "Where is Rome?"}], "subject": "Rome", "target_new": "Spain"}
    path.write_text(json.dumps(chat))
    assert facts_of(path) == [EditRequest(**chat)]


@pytest.mark.parametrize("read", [load_requests, lambda path: list(dataset_texts(str(path)))])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"text": "a', "line 3: not valid JSON"),
        (b'"\xff"', "line 3: not valid UTF-8"),
        (b"[" * 100_000, "line 3: JSON is nested too deeply"),
    ],
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path, read, damage, message):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(json.dumps(FACT).encode() + b"\n\n" + damage)
    with pytest.raises(ValueError, match=rf"facts\.jsonl, {message}"):
        read(path)


def test_lines_in_a_file_that_says_it_is_one_json_are_read(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(f"{json.dumps(FACT)}\n\n{json.dumps(FACT)}\n")
    assert facts_of(path) == [EditRequest(**FACT)] * 2
    path.write_text(f"{json.dumps(FACT)}\n{json.dumps(FACT)[:-1]}\n")
    with pytest.raises(ValueError, match=r"facts\.json, line 2: not valid JSON"):
        load_requests(path)


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.json"])
def test_half_of_a_character_is_named_by_file_and_place(tmp_path, name):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, [{"text": "whole \U0001f600"}, {"text": ["half \ud83d"]}])))
    with pytest.raises(ValueError, match=rf"{name}, line 2: 'half .*ud83d' was cut in the middle"):
        list(read_records(path))


def test_long_files_are_read_as_far_as_they_are_asked_for(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('"first"\n{damaged\n')
    assert next(iter(read_records(path))).content == "first"


def test_reading_imports_neither_torch_nor_transformers():
    code = "import sys, goldenedit.records, goldenedit.requests; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_the_texts_of_a_table_are_those_of_its_column(suffix, separator, tmp_path):
    path = tmp_path / f"texts{suffix}"
    path.write_text(f"id{separator}text\n1{separator}The sky is blue.\n2{separator}So is the sea.\n")
    assert list(dataset_texts(str(path))) == ["The sky is blue.", "So is the sea."]
