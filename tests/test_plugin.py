"""The example package of docs/extending.md: installed beside the library, and edits of its editor where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from goldenedit import EditConfig, EditModel
from goldenedit.cli import app
from models import tiny_model

PLUGIN = Path(__file__).resolve().parents[1] / "examples" / "plugin"
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

SAVES = """
import sys
import torch
from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.audit import audit
from models import tiny_model, tiny_tokenizer

facts = [EditRequest("The Louvre is in", "The Louvre", "Rome", "Paris")]
config = EditConfig(
    method="ridge-insert", layer="leverage", proxy=facts, options={"ridge": 0.5}, covariance_tokens=300, contexts=2
)
model = get_edit_model(tiny_model("llama"), config, tiny_tokenizer())
model.edit("The Eiffel Tower is in", "The Eiffel Tower", "Rome", name="moved")
(checked,) = audit(model)
doubts = [warning for warning in checked.warnings if "is not answered" not in warning]
assert not doubts and checked.modules[0].unexplained < 0.01, checked
model.save_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(30)[None]).logits, sys.argv[2])
"""

LOADS = """
import sys
from goldenedit import EditConfig, EditModel, get_edit_model
from goldenedit.editors import EDITORS
from models import tiny_model, tiny_tokenizer

loaded = EditModel.from_pretrained(tiny_model("llama"), sys.argv[1], tokenizer=tiny_tokenizer())
assert list(loaded.edits) == ["moved"]
assert "r-rome" in [editor.name for editor in EDITORS.available()]
config = EditConfig(layer=1, covariance="identity", contexts=2, contrast=0)
get_edit_model(loaded.unload(), config, tiny_tokenizer()).edit("Berlin is in", "Berlin", "Rome")
EditConfig(method="ridge-insert")
"""


def run(*command: str | Path, packages: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with what is importable here and the packages of a folder."""
    paths = os.pathsep.join([str(packages), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "GOLDENEDIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with the example package, installed from a copy: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("packages")
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--target", folder)
    done = run("-m", "pip", "install", *options, source, packages=folder, cache=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def saved(packages, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """An edit by the package's editor at the layer of its selector, and the logits with it."""
    folder = tmp_path_factory.mktemp("saved")
    done = run("-c", SAVES, folder / "edit", folder / "logits.pt", packages=packages, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "edit", torch.load(folder / "logits.pt")


def test_the_package_passes_its_own_tests(packages, tmp_path):
    tests = shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    done = run(*command, packages=packages, cache=tmp_path)
    assert done.returncode == 0, done.stdout


def test_the_command_line_lists_its_editor_and_its_selector(packages, tmp_path):
    done = run("-m", "goldenedit", "editors", packages=packages, cache=tmp_path)
    assert "ridge-insert" in done.stdout
    assert "leverage" in done.stdout


def test_where_it_is_missing_its_edit_still_works_and_what_does_not_is_told(saved, tokenizer, caplog):
    folder, logits = saved
    model = EditModel.from_pretrained(tiny_model("llama"), folder, tokenizer=tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=torch.arange(30)[None]).logits, logits, rtol=0, atol=0)
    assert "['ridge-insert'], which is not installed" in caplog.text
    assert "goldenedit.editors" in caplog.text
    with pytest.raises(ValueError, match=r"Unknown editor 'ridge-insert'.*entry point 'goldenedit\.editors'"):
        model.edit("Berlin is in", "Berlin", "Rome")
    model.edit_config = EditConfig(layer=1, covariance="identity", contexts=2, contrast=0)
    model.edit("Berlin is in", "Berlin", "Rome", name="next")
    assert model.active_adapters == ["moved", "next"]


def test_where_it_is_missing_the_edit_is_saved_again_with_its_options(saved, tokenizer, tmp_path):
    folder, _ = saved
    model = EditModel.from_pretrained(tiny_model("llama"), folder, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "edits.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    (config,) = (
        EditModel.from_pretrained(tiny_model("llama"), tmp_path / "again", tokenizer=tokenizer).edits["moved"].configs
    )
    assert (config.method, config.layer, config.options) == ("ridge-insert", "leverage", {"ridge": 0.5})
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "ridge 0.5" in card
    assert "chosen by leverage" in card


def test_where_it_is_missing_show_shows_the_edit(saved, tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    result = CliRunner().invoke(app, ["show", str(saved[0]), "--model", str(tmp_path / "base")])
    assert result.exit_code == 0, result.output
    assert "Rome" in result.output


def test_where_it_is_missing_its_names_are_refused_with_the_group_to_look_for():
    with pytest.raises(ValueError, match=r"Unknown \w+ 'ridge-insert'.*entry point 'goldenedit\.editors'"):
        EditConfig(method="ridge-insert")
    with pytest.raises(ValueError, match=r"Unknown layer selector 'leverage'.*goldenedit\.layer_selectors"):
        EditConfig(layer="leverage")


def test_where_it_is_broken_everything_else_works(packages, saved, tmp_path):
    broken = shutil.copytree(packages, tmp_path / "packages")
    for name in ("ridge_insert", "leverage"):
        (broken / "goldenedit_ridge" / f"{name}.py").write_text("import a_module_that_went_away\n", encoding="utf-8")
    done = run("-c", LOADS, saved[0], packages=broken, cache=tmp_path / "cache")
    last = done.stderr.strip().splitlines()[-1]
    assert "'ridge-insert' of goldenedit_ridge.ridge_insert cannot be loaded" in last, done.stderr
    assert "a_module_that_went_away" in last


def test_a_config_with_its_options_is_checked_when_it_is_loaded(packages, saved, tmp_path):
    damaged = "from goldenedit import EditConfig; EditConfig.read({'method': 'ridge-insert', 'options': {'ridge': -1}})"
    done = run("-c", damaged, packages=packages, cache=tmp_path)
    assert "options.ridge must be a number above 0.0, got -1" in done.stderr
