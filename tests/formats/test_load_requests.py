"""Facts from files, tables, datasets and dicts: what is read, what is told, and what is left out."""

from __future__ import annotations

import json
import logging

import pandas
import pytest
from datasets import Dataset, DatasetDict
from samples import COUNTERFACT, FLAT, HALLUEDITBENCH, MEND, MQUAKE, PLAIN, QAEDIT, SAMPLES, UNIEDIT, ZSRE

from goldenedit.requests import EditRequest, as_requests, load_requests

FACT = {"prompt": "The Eiffel Tower is in", "subject": "The Eiffel Tower", "target_new": "Rome"}
EIFFEL = EditRequest(**FACT)
LOUVRE = EditRequest("The Louvre is in", "The Louvre", "Rome", "Paris, France")
TABLE = """\
prompt,subject,target,target_true
The Eiffel Tower is in,The Eiffel Tower,Rome,
{} is in,The Louvre,Rome,"Paris, France"
"""


def read(tmp_path, text: str | bytes, name: str = "facts.csv", **options) -> list[EditRequest]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_requests(path, **options)


@pytest.mark.parametrize(
    "data",
    [
        TABLE.encode(),
        b"\xef\xbb\xbf" + TABLE.encode(),
        TABLE.replace("\n", "\r\n").encode(),
        TABLE.replace("\n", "\n\n").encode(),
        TABLE.encode("utf-16"),
        TABLE.replace("prompt,subject,target,target_true", "Prompt, Subject,TARGET , Target true").encode(),
        TABLE.replace(",Rome", ", Rome").encode(),
        TABLE.replace("Rome", "Rome ").replace(" in,", " in ,").replace('France"', 'France "').encode(),
        TABLE.replace("\n", "\n,,,\n").encode(),
    ],
    ids=[
        "plain",
        "BOM",
        "CRLF",
        "blank lines",
        "UTF-16",
        "names of columns",
        "spaces before",
        "spaces behind",
        "empty rows",
    ],
)
def test_a_table_is_read_however_it_was_saved(tmp_path, data):
    first, second = read(tmp_path, data)
    assert (first, second.text, second.target_true) == (EIFFEL, LOUVRE.text, "Paris, France")


@pytest.mark.parametrize(("name", "separator"), [("facts.tsv", "\t"), ("facts.csv", ";"), ("facts.CSV", "\t")])
def test_a_table_has_the_separator_of_its_first_row(tmp_path, name, separator):
    rows = [FACT.keys(), FACT.values(), ["{} is in", "Louvre", "a, b"]]
    first, second = read(tmp_path, "\n".join(map(separator.join, rows)), name)
    assert (first, second.target_new) == (EIFFEL, "a, b")


def test_a_cell_may_have_several_lines_a_list_or_a_single_item_of_a_list(tmp_path):
    rows = [
        "prompt,subject,target,paraphrases,aliases,locality",
        '"First\n\nThe Eiffel Tower is in",The Eiffel Tower,12,One in,"[""Roma"", ""Urbs""]","[[""a is"", ""b""]]"',
        "{} is in,The Louvre,Rome,\"['One in', 'Two in']\",Roma,",
    ]
    first, second = read(tmp_path, "\n".join(rows))
    assert (first.prompt, first.target_new) == ("First\n\nThe Eiffel Tower is in", "12")
    assert (first.paraphrases, first.aliases) == (("One in",), (("12", "Roma", "Urbs"),))
    assert first.locality == (("a is", "b"),)
    assert (second.paraphrases, second.aliases) == (("One in", "Two in"), (("Rome", "Roma"),))


@pytest.mark.parametrize("names", ["src,alt", "concept,text", "object,question"])
def test_columns_of_ones_own_make_no_other_format_of_a_table_with_prompts(tmp_path, names):
    text = f"prompt,subject,target,{names}\nA is in,A,Rome,x,y\n"
    assert [request.target_new for request in read(tmp_path, text)] == ["Rome"]


@pytest.mark.parametrize("column", ["ground_truth", "rephrase_prompt"])
def test_a_single_text_in_a_column_of_a_list_is_its_only_item_beside_columns_of_easyedit_too(tmp_path, column):
    text = f"prompt,subject,target,aliases,neighborhood,{column}\nA is in,A,Rome,Roma,B is in,Paris\n"
    (request,) = read(tmp_path, text)
    assert (request.aliases, request.neighborhood) == ((("Rome", "Roma"),), ("B is in",))


def test_other_columns_of_a_table_are_ignored_and_named_once(tmp_path, caplog):
    text = "fact_id,prompt,subject,target,targets\n1,A is in,A,Rome,x\n2,B is in,B,Rome,y\n"
    assert [request.target_new for request in read(tmp_path, text)] == ["Rome", "Rome"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "ignored: fact_id, targets" in warning


def test_a_misspelled_column_is_named_if_the_one_that_it_stands_for_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"line 2: The column 'targets' is unknown\. Did you mean 'target'"):
        read(tmp_path, "prompt,subject,targets\nA is in,A,Rome\n")
    with pytest.raises(ValueError, match=r"line 2: The field 'subject' is missing or empty"):
        read(tmp_path, "prompt,subject,place,target\nA is in,,x,Rome\n")


def test_other_fields_beside_those_of_easyedit_are_named(caplog):
    load_requests([FACT | {"locality_prompt": "The sky is", "locality_ground_truth": "blue", "image": "x.png"}])
    assert "ignored: image." in caplog.text


def test_a_misspelled_field_of_json_is_an_error_and_another_one_is_ignored(caplog):
    assert load_requests([FACT | {"fact_id": 1, "subject_id": "Q1", "source": "x"}]) == [EIFFEL]
    assert "ignored: fact_id, source, subject_id" in caplog.text
    with pytest.raises(ValueError, match=r"record 0: The field 'paraprases' is unknown\. Did you mean 'paraphrases'"):
        load_requests([FACT | {"paraprases": ["a"]}])
    with pytest.raises(ValueError, match="The field 'target_new or target' is missing"):
        load_requests([{"prompt": "A is in", "subject": "A"}])
    with pytest.raises(ValueError, match="The fields 'target_new' and 'target' mean the same"):
        load_requests([FACT | {"target": "Rome"}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("A is in,A,Rome,more", r"line 3: the row has 4 cells for 3 columns\. Put cells"),
        ("A is in,A,", r"line 3: The field 'target' is missing or empty"),  # as the file calls it
        ("A is in", r"line 3: The field 'subject' is missing or empty"),
        ("A is in,B,Rome", r"line 3: The subject 'B' is not in the prompt"),
    ],
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=r"facts\.csv, " + message):
        read(tmp_path, f"prompt,subject,target\nA is in,A,Rome\n{rows}\n")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_table_whose_rest_is_lost_behind_an_open_quote_is_refused(tmp_path, skip_bad):
    text = 'prompt,subject,target\nA is in,A,Rome\n"A is in,A,Rome\nA is in,A,Rome\n'
    with pytest.raises(ValueError, match=r"facts\.csv, line 3: not valid CSV \(unexpected end of data\)\. Close all"):
        read(tmp_path, text, skip_bad=skip_bad)


def test_the_line_of_a_row_counts_the_lines_in_cells(tmp_path):
    with pytest.raises(ValueError, match=r"line 6: "):
        read(tmp_path, 'prompt,subject,target\n"A\nis\nin",A,Rome\n\nB is in,C,Rome\n')


def test_a_column_without_a_name_is_ignored_and_told_if_it_has_content(tmp_path, caplog):
    assert len(read(tmp_path, "prompt,subject,target,\nA is in,A,Rome,\n")) == 1
    assert not caplog.records
    assert len(read(tmp_path, ",prompt,subject,target\n0,A is in,A,Rome\n")) == 1
    assert "ignored: column 1" in caplog.text


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"facts\.csv, line 1: several columns are named \['target'\]"):
        read(tmp_path, "prompt,subject,target,Target\nA is in,A,Rome,Paris\n")
    with pytest.raises(ValueError, match=r"the DataFrame: several columns are named \['target'\]"):
        load_requests(pandas.DataFrame([[1, 2]], columns=["target", "Target"]))


def test_damaged_records_are_told_together_and_left_out_on_request(tmp_path, caplog):
    lines = [
        FACT,
        "text",
        FACT | {"subject": "The Louvre"},
        FACT,
        {**FACT, "target_new": ""},
        FACT | {"target_new": {}},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{broken\n\xff\n"
    data = text.encode("latin-1")
    with pytest.raises(
        ValueError, match=r"(?s)line 2: .*line 3: .*line 5: .*\n6 of 8 records cannot .*skip_bad=True"
    ) as told:
        read(tmp_path, data, "facts.jsonl")
    assert "line 6" not in str(told.value)
    assert read(tmp_path, data, "facts.jsonl", skip_bad=True) == [EIFFEL, EIFFEL]
    assert "6 of 8 records cannot be read and were left out" in caplog.text
    assert "line 2: " in caplog.text


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_source_without_a_good_record_is_an_error(tmp_path, skip_bad):
    with pytest.raises(ValueError, match="2 of 2 records cannot be read"):
        read(tmp_path, json.dumps([FACT | {"target_new": ""}, 7]), "facts.json", skip_bad=skip_bad)
    for name, text in {"facts.json": "[]", "facts.jsonl": "\n\n", "facts.csv": "prompt,subject,target\n"}.items():
        with pytest.raises(ValueError, match=rf"{name} has no facts"):
            read(tmp_path, text, name, skip_bad=skip_bad)
    with pytest.raises(ValueError, match="The source has no facts"):
        load_requests([], skip_bad=skip_bad)


def test_an_unknown_format_is_told_with_its_fields_and_the_known_formats(tmp_path):
    with pytest.raises(
        ValueError, match=r"record 0: No known format has the fields \['Text', 'Title'\].*counterfact.*src"
    ):
        read(tmp_path, json.dumps([{"Title": "a", "Text": "b"}] * 9), "facts.json", skip_bad=True)
    with pytest.raises(ValueError, match=r"The format 'mquak' is unknown\. Did you mean 'mquake'\?"):
        load_requests([FACT], format="mquak")
    with pytest.raises(ValueError, match=r"The format 'memit' is unknown\. The formats are \['auto', .*'mquake'"):
        load_requests([FACT], format="memit")


def test_the_format_that_was_read_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "goldenedit")
    load_requests([MEND, MEND, QAEDIT])
    assert "Read 2 records in the format zsre from memory" in caplog.text
    assert "Read 1 records in the format qaedit from memory" in caplog.text


def test_a_damaged_record_is_read_in_the_format_of_the_others(tmp_path):
    with pytest.raises(ValueError, match=r"facts\.json, record 1: The field 'requested_rewrite' is missing or empty"):
        read(tmp_path, json.dumps([COUNTERFACT, {"case_id": 3}]), "facts.json")


def test_a_file_of_records_by_their_names_is_read(tmp_path):
    assert read(tmp_path, json.dumps({"17": UNIEDIT, "18": UNIEDIT}), "art.json") == load_requests([UNIEDIT, UNIEDIT])
    with pytest.raises(
        ValueError, match=r"art\.json, record '18': The field 'edit\.target' must contain|'edit\.target' is"
    ):
        read(tmp_path, json.dumps({"17": UNIEDIT, "18": {"edit": UNIEDIT["edit"] | {"target": None}}}), "art.json")


def test_hallueditbench_is_read_from_its_table(tmp_path):
    frame = pandas.DataFrame([HALLUEDITBENCH, HALLUEDITBENCH])
    assert read(tmp_path, frame.to_csv(index=False)) == load_requests([HALLUEDITBENCH] * 2)


@pytest.mark.parametrize("suffix", [".json", ".JSONL", ".ndjson", ".txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_lines_of_json_are_read_in_files_of_any_name(tmp_path, suffix, encoding, end):
    text = end.join([json.dumps(ZSRE), json.dumps(FLAT | {"target_new": "Köln"}, ensure_ascii=False)]) + end
    assert read(tmp_path, text.encode(encoding), f"facts{suffix}") == load_requests(
        [ZSRE, FLAT | {"target_new": "Köln"}]
    )


def test_facts_come_from_a_data_frame_with_numbers_and_gaps():
    frame = pandas.DataFrame(
        {
            "fact id": [1, 2],
            "Prompt": ["The height of {} is", "{} is in"],
            "Subject": ["The Eiffel Tower", "The Louvre"],
            "Target": [330, 12],
            "target_true": [None, 7],
            "paraphrases": [["a", "b"], None],
        }
    )
    first, second = load_requests(frame)
    assert (first.target_new, first.target_true, first.paraphrases) == ("330", None, ("a", "b"))
    assert (second.target_new, second.target_true, second.paraphrases) == ("12", "7", ())


@pytest.mark.parametrize("name", SAMPLES)
def test_each_format_is_read_from_a_dataset(name):
    records = [SAMPLES[name], SAMPLES[name]]
    dataset = Dataset.from_list(records)
    assert load_requests(dataset) == load_requests(records)
    assert load_requests(DatasetDict({"train": dataset, "test": dataset.select([0])}), split="test") == load_requests(
        records[:1]
    )


def test_facts_come_from_dicts_of_any_format_and_from_requests():
    facts = [EIFFEL, COUNTERFACT, MQUAKE, PLAIN]
    requests = as_requests(facts)
    assert requests == load_requests(iter(facts)) == [EIFFEL, *load_requests([COUNTERFACT, MQUAKE, PLAIN])]
    assert len(requests) == 5
    assert as_requests(EIFFEL) == as_requests([EIFFEL]) == [EIFFEL]
    assert as_requests([]) == []
    assert load_requests(COUNTERFACT) == as_requests(COUNTERFACT)
    with pytest.raises(ValueError, match="Facts must be a file, a dataset or records, got 7"):
        load_requests(7)
    with pytest.raises(ValueError, match="Read files with load_requests"):
        as_requests("facts.json")
    with pytest.raises(ValueError, match="record 1: A record must map names of fields to values, got 7"):
        as_requests([EIFFEL, 7])


@pytest.mark.parametrize(("name", "start"), [("facts.xlsx", b"PK\x03\x04\xff"), ("facts.csv", b"\x1f\x8b\x08")])
def test_a_spreadsheet_or_an_archive_is_told_with_what_to_do(tmp_path, name, start):
    with pytest.raises(ValueError, match=rf"{name} is a spreadsheet or an archive, no text\. Save it as CSV"):
        read(tmp_path, start + b"\x00\xe9" * 9, name)


def test_a_dataset_that_cannot_be_read_is_told_with_the_reason(tmp_path):
    (tmp_path / "train.json").write_text('[{"prompt": 1')
    with pytest.raises(ValueError, match=rf"The dataset '{tmp_path}' cannot be read \(.*position 13"):
        load_requests(str(tmp_path))


def test_a_folder_with_a_damaged_archive_is_told_with_the_reason(tmp_path):
    (tmp_path / "train.json.gz").write_bytes(b"\x1f\x8b123")
    with pytest.raises(ValueError, match=rf"The dataset '{tmp_path}' cannot be read \(.*Pass one of its files"):
        load_requests(str(tmp_path))


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_told(name):
    with pytest.raises(ValueError, match="The name of the facts is empty"):
        load_requests(name)


def test_a_name_that_is_neither_file_nor_dataset_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is neither a file nor a dataset .* Check the name"):
        load_requests(tmp_path / "empty")


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("gone.json", "gone.csv", "gone"):
        with pytest.raises(FileNotFoundError, match=name):
            load_requests(tmp_path / name)
