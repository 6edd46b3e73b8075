"""What the package says of itself and needs: one version, true lower bounds, and errors that name a missing extra."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

import goldenedit
from goldenedit.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    """Return the versions in a file of constraints, by the names of the packages as pip compares them."""
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return {normalized(line.split("==")[0]): line.split("==")[1] for line in lines}


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def bounds() -> dict[str, str]:
    """Return the lower bounds of all dependencies and extras."""
    needed = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    pairs = [requirement.split(">=") for requirement in needed if not requirement.startswith("goldenedit[")]
    return {normalized(name): version for name, version in pairs}


def test_one_version_is_told_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert {goldenedit.__version__, PROJECT["version"], cited[1]} == {PROJECT["version"]}


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() == bounds().keys()
    for name, bound in bounds().items():
        assert re.match(rf"{re.escape(bound)}(\.|$)", oldest[name]), name


def test_no_pin_is_below_a_lower_bound():
    def numbers(version: str) -> list[int]:
        return [int(number) for number in version.split(".")]

    pinned = pins("constraints.txt")
    assert bounds().keys() <= pinned.keys()
    assert all(numbers(pinned[name]) >= numbers(bound) for name, bound in bounds().items())


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("matplotlib", "plot", ["locate", "no-model", "--plot", "layers.png"]),
        ("gradio", "playground", ["playground", "no-model"]),
    ],
)
def test_a_command_names_the_missing_extra_before_it_loads_a_model(module, extra, arguments, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "goldenedit.playground" or name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it was not installed
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 1
    assert f'pip install "goldenedit[{extra}]"' in " ".join(capsys.readouterr().err.split())


def test_help_needs_no_extra(monkeypatch):
    for name in ("matplotlib", "gradio", "gguf", "lm_eval"):
        monkeypatch.setitem(sys.modules, name, None)
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0


def test_the_extension_of_hf_is_this_command_line(tmp_path):
    """`hf extensions install` puts `hf-goldenedit` into an environment, and `hf goldenedit` runs it from there."""
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    hf, ours = (shutil.which(name, path=str(Path(sys.executable).parent)) for name in ("hf", "hf-goldenedit"))
    if hf is None or ours is None:
        pytest.skip("not installed in this environment")
    manifest = extensions.ExtensionManifest(
        "org", "hf-goldenedit", "org/hf-goldenedit", "goldenedit", ours, "python", datetime.now(UTC)
    )
    manifest.save(tmp_path / ".local/share/hf/extensions/hf-goldenedit")
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run([hf, "goldenedit", "--version"], env=os.environ | home, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert f"goldenedit {goldenedit.__version__}" in told.stdout
