"""Golden layers as a file: what was found comes back, and what cannot be trusted is refused with the file's name."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldenedit.storage.atlas import (
    GOLDEN_LAYERS,
    GoldenLayers,
    GoldenLayersError,
    dump_golden_layers,
    read_golden_layers,
    record_for,
    with_record,
)

LLAMA = GoldenLayers(
    "org/llama",
    "0" * 32,
    "lga",
    [3],
    [None, 0.5, -1.0, 2.25],
    "r-rome",
    "a1b2c3",
    "LlamaForCausalLM",
    100,
    "abcdef",
    12.5,
    40.0,
    {"goldenedit": "0.1.0"},
)
SWEPT = replace(LLAMA, selector="sweep", layers=[2, 3], scores=None)
MEMIT = replace(LLAMA, method="memit", layers=[1])
GEMMA = GoldenLayers("org/gemma", "f" * 32, "published", [0])


@pytest.fixture
def path(tmp_path):
    (tmp_path / GOLDEN_LAYERS).write_text(dump_golden_layers([LLAMA, GEMMA]), encoding="utf-8")
    return tmp_path / GOLDEN_LAYERS


def test_what_was_found_comes_back(path):
    assert read_golden_layers(path) == [LLAMA, GEMMA]


def test_a_file_of_nothing_is_fine(path):
    path.write_text(dump_golden_layers([]))
    assert read_golden_layers(path) == []


def test_the_file_is_one_that_people_read():
    content = json.loads(dump_golden_layers([LLAMA]))
    assert content["format_version"] == 1
    assert content["golden_layers"][0].keys() == {entry.name for entry in fields(GoldenLayers)}
    assert "Zürich" in dump_golden_layers([replace(LLAMA, model="Zürich")])
    assert dump_golden_layers([LLAMA]).endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_json_cannot_say_is_not_written(value):
    with pytest.raises(ValueError, match="JSON"):
        dump_golden_layers([replace(LLAMA, scores=[value])])


texts = st.text(max_size=20)


@given(
    st.builds(
        GoldenLayers,
        model=texts,
        fingerprint=texts,
        selector=texts,
        layers=st.lists(st.integers(0, 200), min_size=1, max_size=5),
        scores=st.none() | st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), max_size=5),
        method=texts,
        revision=st.none() | texts,
        proxy_hash=st.none() | texts,
        plateau=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=5),
        intervals=st.none() | st.lists(st.none() | st.just([0.25, 0.5]), max_size=5),
        signs=st.none() | texts,
        dtype=st.none() | texts,
        facts=st.integers(0, 10**6),
        versions=st.dictionaries(texts, texts, max_size=3),
    )
)
def test_any_record_comes_back(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / GOLDEN_LAYERS
    path.write_text(dump_golden_layers([record]), encoding="utf-8")
    assert read_golden_layers(path) == [record]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"not JSON",
            b"\xff",
            b"null",
            b"3",
            b"[]",
            b"{}",
            b'"text"',
            b"9" * 5000,
            b"[" * 100_000 + b"]" * 100_000,
        ),
        b'{"format_version": 1}',
        b'{"format_version": 1, "golden_layers": 3}',
        b'{"format_version": 1, "golden_layers": [3]}',
        b'{"format_version": 1, "golden_layers": [null]}',
        b'{"format_version": 1, "golden_layers": ["text"]}',
        b'{"format_version": 1, "golden_layers": [{}]}',
        json.dumps({"format_version": 1, "golden_layers": [asdict(replace(LLAMA, model="org/\ud800"))]}).encode(),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_a_file_of_something_else_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(GoldenLayersError, match=GOLDEN_LAYERS):
        read_golden_layers(path)


def test_a_file_that_is_not_there_and_a_folder_are_named(tmp_path):
    (tmp_path / GOLDEN_LAYERS).mkdir()
    for path in (tmp_path / GOLDEN_LAYERS, tmp_path / "nothing"):
        with pytest.raises(GoldenLayersError, match=path.name):
            read_golden_layers(path)


@pytest.mark.parametrize("version", [2, 0, None, "1", True, [1]])
def test_another_format_version_is_named(path, version):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": version}))
    with pytest.raises(GoldenLayersError, match=f"{GOLDEN_LAYERS}.*version"):
        read_golden_layers(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", value) for value in (None, [], 3, "3", [1.5], [-1], [True], ["3"], [[3]], [None], {"3": 1})),
        *(("scores", value) for value in (3, "text", {}, ["x"], [[1.0]], [math.nan], [math.inf], [10**400])),
        *(("plateau", value) for value in ([], 3, [1.5], [-1])),
        *(("intervals", value) for value in (3, [0.5], [[0.5]], [[0.1, "x"]], [[0.1, math.inf]])),
        *((name, value) for name in ("model", "fingerprint", "selector", "method") for value in (None, 3, ["x"])),
        *(("revision", 3), ("architecture", None), ("proxy_hash", []), ("facts", "many"), ("seconds", "long")),
        *(("forward_equivalents", None), ("versions", 3), ("versions", {"a": 1})),
        ("stray", 1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_field_that_means_nothing_is_named(path, field, value):
    content = json.loads(path.read_text())
    content["golden_layers"][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(GoldenLayersError, match=f"{GOLDEN_LAYERS}.*{field}"):
        read_golden_layers(path)


@pytest.mark.parametrize("field", ["model", "fingerprint", "selector", "layers"])
def test_a_field_that_is_missing_is_named(path, field):
    content = json.loads(path.read_text())
    del content["golden_layers"][0][field]
    path.write_text(json.dumps(content))
    with pytest.raises(GoldenLayersError, match=f"{GOLDEN_LAYERS}.*{field}"):
        read_golden_layers(path)


def test_a_field_that_is_optional_may_be_missing(path):
    content = {
        "format_version": 1,
        "golden_layers": [{"model": "m", "fingerprint": "0", "selector": "s", "layers": [0]}],
    }
    path.write_text(json.dumps(content))
    assert read_golden_layers(path) == [GoldenLayers("m", "0", "s", [0])]


# ---------------------------------------------------------------------- several records


def test_a_record_takes_the_place_of_the_one_of_the_same_weights_selector_and_editor():
    newer = replace(LLAMA, layers=[1], revision="b")
    assert with_record([LLAMA, GEMMA], newer) == [GEMMA, newer]
    assert with_record([], LLAMA) == [LLAMA]


def test_a_record_of_another_model_selector_or_editor_is_kept():
    records = [LLAMA]
    for other in (GEMMA, SWEPT, MEMIT):
        records = with_record(records, other)
    assert records == [LLAMA, GEMMA, SWEPT, MEMIT]


def test_the_last_record_of_the_weights_and_the_editor_is_taken():
    records = [LLAMA, MEMIT, SWEPT, GEMMA]
    assert record_for(records, LLAMA, "r-rome", "org/layers") is SWEPT
    assert record_for(records, LLAMA, "memit", "org/layers") is MEMIT
    assert record_for(records, GEMMA, "r-rome", "org/layers") is GEMMA


def test_a_record_of_the_same_weights_in_another_precision_is_taken_where_there_is_no_other():
    half = replace(LLAMA, fingerprint="1" * 32, signs="5", dtype="float16")
    full, other = replace(LLAMA, signs="5", dtype="float32"), replace(GEMMA, signs="6", dtype="float32")
    assert record_for([full, other], half, "r-rome", "org/layers") is full
    assert record_for([half, full, half], full, "r-rome", "org/layers") is full
    with pytest.raises(GoldenLayersError):
        record_for([other, replace(full, signs=None)], half, "r-rome", "org/layers")


def test_an_editor_without_a_record_takes_the_last_of_the_weights():
    assert record_for([MEMIT, LLAMA, GEMMA], LLAMA, "alphaedit", "org/layers") is LLAMA


@pytest.mark.parametrize("records", [[], [LLAMA], [LLAMA, SWEPT]])
def test_other_weights_are_an_error_that_says_whose_golden_layers_there_are(records):
    with pytest.raises(GoldenLayersError) as caught:
        record_for(records, GEMMA, "r-rome", "org/layers")
    message = str(caught.value)
    assert "org/layers" in message
    assert GEMMA.fingerprint in message
    assert message.count("org/llama") == (1 if records else 0)
    assert ("none" in message) == (not records)
