"""The documents: their Python runs, their commands have the options that they show, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from goldenedit.cli import app
from goldenedit.packaged import is_installed, packaged_model

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATTERNS = ("*.md", "benchmarks/*.md", "docs/*.md", "docs/tutorials/*.md", "examples/*/*.md", "model_cards/*.md")
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))

# Code that runs before the Python of a document: the document assumes what it defines.
SETUP = {
    "docs/coming-from-other-tools.md": "",
    "docs/evaluation.md": "from models import tiny_model, tiny_tokenizer\n"
    "base, tokenizer = tiny_model('llama'), tiny_tokenizer()\n",
    "docs/facts.md": "from pathlib import Path\n"
    "Path('facts.csv').write_text('prompt,subject,target\\nRome is in,Rome,Spain\\n')\n",
    "docs/extending.md": "from models import tiny_model, tiny_tokenizer\n"
    "base, tokenizer = tiny_model('llama'), tiny_tokenizer()\n",
    "examples/plugin/README.md": f"import sys; sys.path.insert(0, {str(ROOT / 'examples/plugin/src')!r})\n"
    "import goldenedit_ridge.leverage, goldenedit_ridge.ridge_insert\n"
    "from transformers import AutoModelForCausalLM\n"
    "from models import tiny_model, tiny_tokenizer\n"
    "tiny_model('llama').save_pretrained('base'); tiny_tokenizer().save_pretrained('base')\n"
    "base = AutoModelForCausalLM.from_pretrained('base')\n",
}

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in the README; another model takes its place

# Documents that load a model by this name: a tiny chat model of six layers takes its place, which edits harm more.
ON_A_TINY_MODEL = (
    "README.md",
    "docs/coming-from-peft.md",
    "docs/get-started.md",
    "docs/index.md",
    *(f"docs/tutorials/{name}.md" for name in ("company-facts", "large-models", "layer-of-your-model", "many-edits")),
    *(f"docs/tutorials/{name}.md" for name in ("share-and-load", "undo")),
)
TINY = {"[18, 21, 24]": "[2, 3, 4]", "[9, 12]": "[2, 3]", "max_text_kl=0.5": "max_text_kl=50.0"}

# The README loads a LoRA adapter that its reader has trained.
TRAINED_LORA = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
get_peft_model(AutoModelForCausalLM.from_pretrained({base!r}), lora).save_pretrained("my-lora")
"""


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


def run(code: str, setup: str, folder: Path, name: str = "README.md") -> subprocess.CompletedProcess[str]:
    """Run the Python of a document in a folder, after its setup, in a process of its own."""
    runner = f"names = {{}}\nexec({setup!r}, names)\nexec(compile({code!r}, {name!r}, 'exec'), names)\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", runner], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("name", SETUP)
def test_every_python_block_runs(name, tmp_path):
    done = run(script((ROOT / name).read_text(encoding="utf-8")), SETUP[name], tmp_path, name)
    assert done.returncode == 0, done.stderr


def on_smollm2(blocks_of_code: int | None = None) -> tuple[str, str]:
    """Return the first Python blocks of the README on the packaged SmolLM2, and their setup."""
    base = str(packaged_model("smollm2"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ends = [match.end() for match in BLOCK.finditer(text) if match[1] == "python"]
    code = script(text if blocks_of_code is None else text[: ends[blocks_of_code - 1]])
    assert f'"{HUB_NAME}"' in code
    return code.replace(HUB_NAME, base), TRAINED_LORA.format(base=base)


@pytest.mark.real
@pytest.mark.skipif(not is_installed("smollm2"), reason="the package with the weights of SmolLM2 is not installed")
def test_the_readme_begins_with_edits_that_take_on_the_packaged_model(tmp_path):
    done = run(*on_smollm2(2), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "does not take" not in done.stderr
    assert "eiffel-in-rome" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not is_installed("smollm2"), reason="the package with the weights of SmolLM2 is not installed")
def test_every_python_block_of_the_readme_runs_on_the_packaged_model(tmp_path):
    done = run(*on_smollm2(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "does not take" not in done.stderr
    folders = ["eiffel-in-rome", "louvre-in-rome", "my-facts", "my-lora"]
    assert sorted(path.name for path in tmp_path.iterdir()) == folders


@pytest.mark.parametrize("name", ON_A_TINY_MODEL)
def test_every_python_block_runs_on_a_tiny_model(name, tmp_path):
    base = str(tmp_path / "base")
    code = script((ROOT / name).read_text(encoding="utf-8"))
    assert f'"{HUB_NAME}"' in code
    for old, new in {HUB_NAME: base, **TINY}.items():
        code = code.replace(old, new)
    tiny = f"from models import save_tiny_chat_model; save_tiny_chat_model({base!r})\n"
    lora = TRAINED_LORA.format(base=base) if "my-lora" in code else ""
    done = run(code, tiny + lora, tmp_path, name)
    assert done.returncode == 0, done.stderr
    if name == "README.md":
        folders = ["base", "eiffel-in-rome", "louvre-in-rome", "my-facts", "my-lora"]
        assert sorted(path.name for path in tmp_path.iterdir()) == folders


def test_every_document_with_python_is_run():
    with_python = {name for name in DOCUMENTS if blocks((ROOT / name).read_text(encoding="utf-8"), "python")}
    assert with_python == {*ON_A_TINY_MODEL, *SETUP}


def test_a_block_that_fails_is_reported_by_its_line(tmp_path):
    text = "# A\n\n```python\na = 1\n```\n\ntext\n\n```bash\nls\n```\n\n```python\na + b\n```\n"
    done = run(script(text), "", tmp_path, "a.md")
    assert done.returncode != 0
    assert 'File "a.md", line 14' in done.stderr


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_python_block_is_python_and_every_linked_file_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    compile(script(text), name, "exec")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", BLOCK.sub("", text))
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_has_the_options_that_a_document_shows(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for block in blocks(text, "bash") for line in block.splitlines() if line.startswith("goldenedit ")]
    for line in lines:
        command, words = get_command(app), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_the_entry_points_of_the_document_are_those_of_the_example_package():
    (text,) = blocks((ROOT / "docs/extending.md").read_text(encoding="utf-8"), "toml")
    package = tomllib.loads((ROOT / "examples/plugin/pyproject.toml").read_text(encoding="utf-8"))
    assert tomllib.loads(text)["project"]["entry-points"] == package["project"]["entry-points"]


def test_what_is_cited_is_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in cited
    assert f"\nlicense: {project['license']}\n" in cited


def test_the_site_is_built_without_a_warning(tmp_path):
    options = ["-W", "--keep-going", "-q", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert {"index.html", "api.html", "tutorials/undo.html", "generated/editor-memit.html"} <= pages
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "kept_questions" in reference
    assert "goldenedit benchmark golden-layers" in (tmp_path / "generated/command-line.html").read_text("utf-8")
