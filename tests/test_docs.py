"""The Python of the documents runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a document may take for given.
GIVEN = {
    "docs/extending.md": "from models import tiny_model, tiny_tokenizer\n"
    "base, tokenizer = tiny_model('llama'), tiny_tokenizer()\n",
}


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a document in a language."""
    return [match[2] for match in BLOCK.finditer(text) if match[1] == language]


def script(text: str) -> str:
    """Return the Python blocks of a document as one script, each at its own lines, so that tracebacks point there."""
    lines = [""] * len(text.splitlines())
    for match in BLOCK.finditer(text):
        if match[1] == "python":
            start = text.count("\n", 0, match.start(2))
            code = match[2].splitlines()
            lines[start : start + len(code)] = code
    return "\n".join(lines) + "\n"


def run(document: Path, given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the Python of a document in a folder, after what it takes for given, in a process of its own."""
    code = script(document.read_text(encoding="utf-8"))
    runner = f"names = {{}}\nexec({given!r}, names)\nexec(compile({code!r}, {str(document)!r}, 'exec'), names)\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", runner], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("name", GIVEN)
def test_every_python_block_runs(name, tmp_path):
    done = run(ROOT / name, GIVEN[name], tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_block_that_fails_is_told_by_its_line(tmp_path):
    document = tmp_path / "a.md"
    document.write_text(
        "# A\n\n```python\na = 1\n```\n\ntext\n\n```bash\nls\n```\n\n```python\na + b\n```\n", encoding="utf-8"
    )
    done = run(document, "", tmp_path)
    assert done.returncode != 0
    assert f'File "{document}", line 14' in done.stderr


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/extending.md", "examples/plugin/README.md"])
def test_every_python_block_is_python_and_every_file_it_points_to_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    compile(script(text), name, "exec")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", BLOCK.sub("", text))
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


def test_the_entry_points_of_the_document_are_those_of_the_example_package():
    (text,) = blocks((ROOT / "docs/extending.md").read_text(encoding="utf-8"), "toml")
    package = tomllib.loads((ROOT / "examples/plugin/pyproject.toml").read_text(encoding="utf-8"))
    assert tomllib.loads(text)["project"]["entry-points"] == package["project"]["entry-points"]
