"""The notebook runs from its first cell to its last, and what it shows was made by running it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from models import save_tiny_chat_model

PATH = Path(__file__).resolve().parents[1] / "examples" / "first_edit.ipynb"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, 4)


def test_every_cell_runs_on_a_tiny_model(notebook, tmp_path, monkeypatch):
    assert f'NAME = "{NAME}"' in "\n".join(cell.source for cell in notebook.cells)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1] / "src"))
    save_tiny_chat_model(str(tmp_path / NAME))  # a folder goes before a name on the Hub
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert (tmp_path / "eiffel-in-rome" / "adapter_model.safetensors").exists()
    assert (tmp_path / "layers.png").exists()


def test_what_it_shows_is_of_a_run_of_the_real_model(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = "\n".join(str(output.get("data", {})) for cell in cells for output in cell.outputs)
    assert "Rome" in shown
    assert "image/png" in shown
    assert NAME in shown
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
