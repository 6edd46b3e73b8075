"""What all tests share: a Hub of their own, a tokenizer trained on the spot, and caches of their own."""

# ruff: noqa: E402  # huggingface_hub reads the environment when it is imported

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hub import TOKEN, Hub

_SERVER = Hub().start()
_HUB_CACHE = Path(tempfile.mkdtemp(prefix="goldenedit-hub-"))
atexit.register(shutil.rmtree, _HUB_CACHE, ignore_errors=True)
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_ENDPOINT": _SERVER.url,
    "HF_TOKEN": TOKEN,
    "HF_HUB_CACHE": str(_HUB_CACHE),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",  # tiny models run fastest alone, and so do the programs that tests start
}

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from models import tiny_tokenizer


def pytest_configure() -> None:
    torch.set_num_threads(1)
    settings.register_profile("goldenedit", database=None, deadline=None, derandomize=True, max_examples=25)
    settings.load_profile("goldenedit")


@pytest.fixture(autouse=True)
def seeded():
    """Make what a test draws from torch's own generator the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_markers(tmp_path_factory) -> Path:
    """What markers start from: the one result that tests share, because most of them edit one of a few models."""
    return tmp_path_factory.mktemp("markers")


@pytest.fixture(autouse=True)
def isolated_cache(request, tmp_path_factory, shared_markers, monkeypatch):
    """Keep the tests out of the user's cache; those with real models use it, for the models converted there."""
    if request.node.get_closest_marker("real") is None:
        cache = tmp_path_factory.mktemp("cache")
        (cache / "markers").symlink_to(shared_markers)
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(cache))


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The Hub that the environment names, empty, as is the cache of what was downloaded from it."""
    _SERVER.reset()
    for path in _HUB_CACHE.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    yield _SERVER
    _SERVER.reset()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` tokens that knows ASCII, with offsets; it adds no special tokens."""
    return tiny_tokenizer()
