"""What tests of commands share: a model in a folder, and an edit of it."""

from __future__ import annotations

import pytest

from command import BY_HAND, NEAR, run, saved_model


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A tiny model with its tokenizer, as AutoModel loads it."""
    return saved_model(tmp_path / "model", tokenizer)


@pytest.fixture
def edit(folder, tmp_path, capsys):
    """An edit of this model, in a folder."""
    assert run(capsys, "edit", folder, *NEAR, *BY_HAND, "-o", str(tmp_path / "edit"))[0] == 0
    return str(tmp_path / "edit")
