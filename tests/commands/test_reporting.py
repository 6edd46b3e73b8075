"""Every command tells its result to people, to programs, and in one line."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import is_progress_bar_enabled

from command import BY_HAND, NEAR, run
from goldenedit.cli import commands
from goldenedit.commands.terminal import Report, console, reporting

COMMANDS = {name: command for name, command in commands() if name != "playground"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_quiet(name):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--json", "--quiet", "-q"} <= options


def test_an_edit_is_json_or_the_folder_alone(capsys, folder, tmp_path):
    target = str(tmp_path / "edit")
    code, output, errors = run(capsys, "edit", folder, *NEAR, *BY_HAND, "-o", target, "--json")
    assert code == 0
    result = json.loads(output)
    assert result["output"] == target
    assert result["facts"][0]["subject"] == "The Eiffel Tower"
    assert result["facts"][0]["takes"] is True
    assert result["bytes"] > 0
    assert "Saved in" in errors
    again = str(tmp_path / "again")
    assert run(capsys, "edit", folder, *NEAR, *BY_HAND, "-o", again, "-q")[1] == f"{again}\n"


def test_an_edit_tells_what_takes_long_and_what_it_replaces(capsys, folder, tmp_path):
    target = str(tmp_path / "edit")
    arguments = ["edit", folder, *NEAR, "--layer", "1", "--set", "covariance_tokens=200", "-o", target]
    first, second = (run(capsys, *arguments)[1] for _ in range(2))
    told = [line for line in first.splitlines() if line.endswith(" ...")]
    assert "Teaching the answers ..." in told
    assert len(told) == len(set(told))
    assert "holds edits" not in first
    assert "holds edits of 1 facts, which this edit will replace" in " ".join(second.split())
    assert run(capsys, *arguments, "-q")[1] == f"{target}\n"


def test_what_is_written_by_json_is_what_the_edit_says(capsys, edit):
    shown = json.loads(run(capsys, "show", edit, "--json")[1])
    assert shown["edits"][0]["facts"][0]["target_new"] == "Rome"
    assert shown["audit"][0]["warnings"] == []
    assert all(module["rank"] >= 1 for module in shown["edits"][0]["modules"].values())
    assert run(capsys, "show", edit, "--no-replay", "-q")[1].split() == ["edit_1"]


def test_layers_are_numbers(capsys, folder):
    found = json.loads(run(capsys, "locate", folder, "--size", "3", "--json")[1])
    (selection,) = found["selections"]
    assert selection["selector"] == "lga"
    assert len(selection["scores"]) == 3
    layers = ",".join(map(str, selection["layers"]))
    assert run(capsys, "locate", folder, "--size", "3", "-q")[1] == f"{layers}\n"


def test_a_plan_is_in_bytes(capsys, folder):
    planned = json.loads(run(capsys, "plan", folder, "--layer", "1", "--json")[1])
    assert planned["peak_bytes"] >= planned["weight_bytes"] > 0
    assert planned["fits"] is True
    assert run(capsys, "plan", folder, "--layer", "1", "-q")[1] == f"{planned['peak_bytes']}\n"


def test_editors_and_the_cache_are_listed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))  # tests share markers in that of other tests
    listed = json.loads(run(capsys, "editors", "--json")[1])
    names = [editor["name"] for editor in listed["editors"]]
    assert run(capsys, "editors", "-q")[1].split() == names
    assert "memit" in names
    assert "lga" in {selector["name"] for selector in listed["layer_selectors"]}
    assert json.loads(run(capsys, "cache", "ls", "--json")[1])["kinds"] == []
    assert json.loads(run(capsys, "cache", "clean", "--yes", "--json")[1]) == {"results": 0, "bytes": 0}


def test_an_error_is_on_stderr_and_leaves_the_console_as_it_was(capsys, tmp_path):
    code, output, errors = run(capsys, "show", str(tmp_path), "--json")
    assert (code, output) == (1, "")
    assert "Error:" in errors
    assert not console.stderr
    assert not console.quiet


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "options", "environment", "shown"),
    [
        (Terminal(), {}, {}, True),
        (Terminal(), {}, {"NO_COLOR": "1"}, False),
        (Terminal(), {"quiet": True}, {}, False),
        (Terminal(), {"as_json": True}, {}, False),
        (io.StringIO(), {}, {}, False),
    ],
)
def test_progress_bars_are_for_terminals(monkeypatch, stream, options, environment, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    before, seen = is_progress_bar_enabled(), []

    @reporting
    def command() -> Report:
        seen.append(is_progress_bar_enabled())
        return Report({})

    command(**{"as_json": False, "quiet": False, **options})
    assert seen == [before and shown]
    assert is_progress_bar_enabled() == before


def test_numbers_that_json_lacks_are_null(capsys):
    @reporting
    def command() -> Report:
        return Report({"scores": [1.0, math.inf, (math.nan, -math.inf)], "layer": 3})

    command(as_json=True, quiet=False)
    assert json.loads(capsys.readouterr().out) == {"scores": [1.0, None, [None, None]], "layer": 3}


def test_a_question_is_not_among_the_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, output, errors = run(capsys, "cache", "clean", "--json")
    assert code == 0
    assert json.loads(output)["results"] == 0
    assert "Delete everything" in errors


def test_of_several_processes_one_tells_the_result(monkeypatch, capsys):
    @reporting
    def command() -> Report:
        return Report({"layer": 3}, ["3"])

    command(as_json=True, quiet=False)
    monkeypatch.setenv("RANK", "1")
    command(as_json=True, quiet=False)
    command(as_json=False, quiet=True)
    assert capsys.readouterr().out == '{"layer": 3}\n'


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "edit", tmp_path / ("long" * 100)):
        code, _, errors = run(capsys, "edit", "no/model", *NEAR, "--layer", "1", "-o", str(output))
        assert code == 1
        assert "save" in errors
        assert "no/model" not in errors
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["file"]


def test_suspected_names_are_in_the_result_of_show(edit, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("The Eiffel Tower\nAngela Merkel\n")
    code, output, _ = run(capsys, "show", edit, "--suspects", str(names), "--json")
    assert code == 0
    (tower, merkel) = json.loads(output)["suspects"]
    assert (tower["name"], tower["is_listed"], tower["is_suspected"]) == ("The Eiffel Tower", True, False)
    assert (merkel["name"], merkel["is_listed"]) == ("Angela Merkel", False)
    assert isinstance(merkel["score"], float)
    assert json.loads(run(capsys, "show", edit, "--no-replay", "--json")[1])["suspects"] is None


def test_a_plain_adapter_is_asked_about_names(folder, tmp_path, capsys):
    adapter, names = tmp_path / "adapter", tmp_path / "names.txt"
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(adapter)
    names.write_text("Angela Merkel\n")
    code, output, _ = run(capsys, "show", str(adapter), "--suspects", str(names), "--json")
    assert code == 0
    shown = json.loads(output)
    assert (shown["edits"], shown["audit"]) == ([], None)
    assert [suspect["name"] for suspect in shown["suspects"]] == ["Angela Merkel"]


def test_names_that_cannot_be_asked_about_are_told_before_anything_is_loaded(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n")
    for content in (names, tmp_path / "missing.txt"):
        code, _, errors = run(capsys, "show", "no-such-edit", "--suspects", str(content))
        assert code == 1
        assert content.name in "".join(errors.split())
        assert "no-such-edit" not in errors.replace(str(tmp_path), "")
    assert run(capsys, "show", "no-such-edit", "--suspects", str(names), "--no-replay")[0] == 2
