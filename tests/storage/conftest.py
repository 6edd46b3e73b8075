"""Edit folders that tests of the storage share."""

import pytest
from contents import edit_folder, edits_with_state

from goldenedit.storage.folder import write_edit_folder


@pytest.fixture
def folder(tmp_path):
    """An edit folder."""
    write_edit_folder(tmp_path / "edit", edit_folder(), "the card")
    return tmp_path / "edit"


@pytest.fixture
def folder_with_state(tmp_path):
    """An edit folder whose first editor remembers something."""
    write_edit_folder(tmp_path / "with_state", edits_with_state(), "the card")
    return tmp_path / "with_state"
