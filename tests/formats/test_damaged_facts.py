"""Whatever stands in a record, it gives requests or a ValueError that names the record and its field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import SAMPLES

from goldenedit.formats import plain
from goldenedit.requests import EditRequest, load_requests

TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["Rome", "The Eiffel Tower", "{}", "{} is in", "is", " ", "[1]"])
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
NAMES = sorted({name for record in SAMPLES.values() for name in record} | {"str", "value", "aliases", "loc", "prompt"})
VALUES = st.recursive(
    SCALARS,
    lambda part: st.one_of(
        st.lists(part, max_size=3), st.dictionaries(st.one_of(st.sampled_from(NAMES), TEXTS), part, max_size=4)
    ),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a record."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        yield (*path, step)
        yield from places(part, (*path, step))


def check(record: Any) -> None:
    """Read a record, and check what is told of it."""
    try:
        requests = load_requests([record])
    except ValueError as error:
        message = str(error)
        assert message.startswith("record ")
        if isinstance(record, dict):
            assert any(name in message for name in (*plain.FIELDS, *NAMES)), message
    else:
        assert requests
        assert all(isinstance(request, EditRequest) for request in requests)
        for request in requests:
            assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@settings(deadline=None, max_examples=200)
@given(VALUES)
def test_any_json_value_is_read_or_told(value):
    check(value)


@pytest.mark.parametrize("name", SAMPLES)
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_change_of_a_record_is_read_or_told(name, data):
    record = copy.deepcopy(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(list(places(record))))
        part = record
        for step in path:
            part = part[step]
        if data.draw(st.booleans()):
            part[last] = data.draw(VALUES)
        else:
            del part[last]
        if not record:
            break
    check(record)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_field_is_told_by_its_name(name):
    for path in places(SAMPLES[name]):
        record = copy.deepcopy(SAMPLES[name])
        part = record
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = None
        check(record)


def test_a_list_that_is_nested_very_deeply_is_told():
    nested: Any = "Rome"
    for _ in range(5000):
        nested = [nested]
    for name, record in SAMPLES.items():
        for field in record:
            check(record | {field: nested}), name
