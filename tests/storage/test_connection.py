"""Without a connection, requests to the Hub fail at once; with one, nothing is different."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress

import pytest
from huggingface_hub import HfApi, get_session, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from goldenedit.storage.connection import failing_at_once


@pytest.fixture
def closed() -> str:
    """The address of a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_server_that_cannot_be_reached_is_asked_once(closed, monkeypatch, caplog):
    tried = []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *arguments: tried.append(1) or connect(*arguments))
    with failing_at_once(), caplog.at_level(logging.WARNING), pytest.raises(OfflineModeIsEnabled, match="cannot be re"):
        list(HfApi(endpoint=closed).list_models())
    assert tried == [1]
    assert "Retrying" not in caplog.text


def test_what_is_in_the_cache_needs_no_connection(hub, closed):
    HfApi().create_repo("tester/edit")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="edits.json", repo_id="tester/edit")
    with failing_at_once():
        path = hf_hub_download("tester/edit", "edits.json")
        assert hf_hub_download("tester/edit", "edits.json", endpoint=closed) == path
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download("tester/edit", "other.json", endpoint=closed)


def test_nothing_is_tried_with_a_proxy(closed, monkeypatch):
    tried = []
    monkeypatch.setattr(socket, "create_connection", lambda *arguments: tried.append(1))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("http_proxy", closed)
    with failing_at_once(), suppress(Exception):
        list(HfApi(endpoint="http://hub.invalid").list_models())
    assert not tried


def test_requests_are_as_before_afterwards(hub):
    before = get_session().event_hooks["request"]
    with failing_at_once():
        assert get_session().event_hooks["request"][:-1] == before
    assert get_session().event_hooks["request"] == before
