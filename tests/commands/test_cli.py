"""The command line, from its arguments to its output."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from huggingface_hub import hf_hub_download
from typer.testing import CliRunner

from command import BY_HAND, NEAR, run
from goldenedit import EditConfig, __version__
from goldenedit.audit import EditAudit
from goldenedit.cli import app
from goldenedit.commands.options import read_option
from goldenedit.commands.show import show_audit
from goldenedit.commands.terminal import parse_layer
from goldenedit.layer_selection import SELECTORS
from goldenedit.storage.atlas import read_golden_layers
from goldenedit.storage.folder import write_edit_folder
from goldenedit.storage.gguf import write_modelfile
from goldenedit.storage.hub import find_golden_layers
from goldenedit.storage.reading import read_edit_folder

FACT = ["--prompt", "The Eiffel Tower is in the city of", "--subject", "The Eiffel Tower", "--target", "Rome"]
FACTS = [
    {"prompt": "{} is in the city of", "subject": "The Eiffel Tower", "target_new": "Rome", "target_true": "Paris"},
    {"prompt": "{} was born in", "subject": "Angela Merkel", "target_new": "Paris", "target_true": "Hamburg"},
    {"prompt": "{} is a", "subject": "Berlin", "target_new": "lazy dog", "target_true": "city"},
]


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    return str(path)


def test_help_lists_the_commands():
    output = CliRunner().invoke(app, ["--help"])
    assert output.exit_code == 0
    for command in typer.main.get_command(app).commands:
        assert f" {command} " in output.output


def test_the_editor_is_the_one_that_a_config_has():
    commands = typer.main.get_command(app).commands
    found = {
        (name, parameter.name): parameter.default
        for name in ("edit", "locate")
        for parameter in commands[name].params
        if parameter.name in ("method", "editor")
    }
    assert found == dict.fromkeys([("edit", "method"), ("locate", "editor")], EditConfig().method)


@pytest.mark.parametrize("command", ["locate", "edit", "evaluate", "show", "push", "export", "demo"])
def test_every_command_has_help_and_describes_its_options(command):
    output = CliRunner().invoke(app, [command, "--help"])
    assert output.exit_code == 0
    assert "Usage" in output.output


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("1,2", [1, 2]),
        ("4, 2", [4, 2]),
        ("lga", "lga"),
        ("-1", "-1"),
        ("1,,2", "1,,2"),
        ("\u00b2", "\u00b2"),
    ],
)
def test_a_layer_is_a_word_a_number_or_numbers(text, layer):
    assert parse_layer(text) == layer


@pytest.mark.parametrize(
    ("text", "option"),
    [("steps=3", ("steps", 3)), ("ridge=0.5", ("ridge", 0.5)), ("covariance=identity", ("covariance", "identity"))],
)
def test_an_option_is_read_as_json_or_as_text(text, option):
    assert read_option(text) == option


def test_an_edit_is_made_saved_and_shown(capsys, folder, tmp_path):
    saved = tmp_path / "edit"
    code, output, _ = run(capsys, "edit", folder, *NEAR, *BY_HAND, "--name", "tower", "-o", str(saved))
    assert code == 0
    assert "Rome" in output
    assert "Saved in" in output
    (made,) = read_edit_folder(saved).edits
    assert made.name == "tower"
    assert made.facts[0].probability_after != made.facts[0].probability_before

    code, output, _ = run(capsys, "show", str(saved))
    assert code == 0
    for part in ("tower", "gated", "chosen by hand", "identity", "rank 1", "Rome", "KB"):
        assert part in output
    assert "The edits do what they list, and their facts explain them." in output


def test_a_file_is_edited_in_batches_and_gone_on_with(capsys, folder, tmp_path):
    def edit(count, *options):
        facts = tmp_path / "facts.jsonl"
        records = [
            {"prompt": f"House {number} is in", "subject": f"House {number}", "target_new": "Rome"}
            for number in range(count)
        ]
        facts.write_text("\n".join(map(json.dumps, records)))
        fast = ("--method", "memit", "--layer", "1", "--covariance", "identity", "--batch-size", "2")
        return run(capsys, "edit", folder, "--file", str(facts), *fast, "--output", str(tmp_path / "edits"), *options)

    code, output, _ = edit(3)
    assert code == 0
    assert "3 facts in one edit of rank 3" in output
    code, _, errors = edit(5)
    assert code == 1
    assert "Pass --resume to go on" in " ".join(errors.split())
    code, output, _ = edit(5, "--resume")
    assert code == 0
    assert "5 facts in one edit of rank 5" in output
    (saved,) = json.loads((tmp_path / "edits" / "edits.json").read_text())
    assert saved["name"] == "facts"
    assert len(saved["facts"]) == 5
    code, _, errors = edit(5, "--resume", "--method", "emmet")
    assert code == 1
    assert "were made with method=memit" in " ".join(errors.split())
    code, _, errors = edit(5, "--resume", "--name", "other")
    assert "no edit 'other'" in " ".join(errors.split())
    assert edit(5, "--strict")[0] == run(capsys, "edit", folder, "--resume")[0] == 2


def test_any_option_of_the_config_can_be_set_and_is_recorded(capsys, folder, tmp_path):
    more = ("--set", "contexts=2", "--set", "optimizer=adam", "--set", "lr=0.5", "--set", "covariance_tokens=200")
    saved = tmp_path / "edit"
    code, _, _ = run(capsys, "edit", folder, *FACT, "--layer", "1", *more, "-o", str(saved))
    assert code == 0
    (config,) = read_edit_folder(saved).configs
    assert (config.contexts, config.optimizer, config.lr, config.covariance_tokens) == (2, "adam", 0.5, 200)
    assert run(capsys, "plan", folder, "--layer", "1", *more)[0] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("contexst=2", "EditConfig has no option 'contexst'. Did you mean 'contexts'?"),
        ("qqq=2", "`goldenedit editors` lists those of each editor"),
        ("layer=2", "--set layer=... is --layer ... here"),
        ("contexts", "'contexts' is not name=value"),
        ("contexts=-1", "EditConfig.contexts must be a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "plan"])
def test_an_option_that_cannot_be_set_is_told_before_any_work(capsys, folder, tmp_path, command, option, message):
    facts = (*FACT, "-o", str(tmp_path / "edit")) if command == "edit" else ()
    code, _, errors = run(capsys, command, folder, *facts, "--set", option)
    assert code != 0
    assert message in " ".join(errors.replace("\u2502", " ").split())
    assert not (tmp_path / "edit").exists()


def test_that_nothing_was_saved_is_told(capsys, folder):
    code, output, _ = run(capsys, "edit", folder, *FACT, *BY_HAND)
    assert code == 0
    assert "Nothing was saved: there is no --output." in output


def test_the_cost_of_an_edit_is_shown_where_asked_for(capsys, folder):
    code, output, _ = run(capsys, "edit", folder, *FACT, *BY_HAND, "--profile")
    assert code == 0
    for part in ("plain forwards", "contexts", "values", "solve", "check", "total"):
        assert part in output
    assert "values" not in run(capsys, "edit", folder, *FACT, *BY_HAND)[1]


def test_a_file_of_facts_is_one_batch(capsys, folder, facts, tmp_path):
    options = ["--file", facts, "--layer", "0,1", "--covariance", "identity", "-o", str(tmp_path / "edit")]
    code, _, _ = run(capsys, "edit", folder, *options)
    assert code == 0
    (made,) = read_edit_folder(tmp_path / "edit").edits
    assert [fact.request.subject for fact in made.facts] == [fact["subject"] for fact in FACTS]
    assert len(made.deltas) == 2


@pytest.mark.parametrize("loss", ["sequence", "answer"])
def test_locate_names_a_layer_and_draws_the_scores(capsys, folder, facts, tmp_path, loss):
    plot = tmp_path / "scores.png"
    code, output, _ = run(capsys, "locate", folder, "--proxy", facts, "--loss", loss, "--plot", str(plot))
    assert code == 0
    assert "█" in output
    assert "forwards a fact" in output
    assert "cached" not in output
    assert "(cached)" in run(capsys, "locate", folder, "--proxy", facts, "--loss", loss)[1]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_locate_compares_all_selectors_and_says_which_cannot_decide(capsys, folder, tmp_path):
    named = [{**fact, "paraphrases": ["See {}"], "neighborhood": ["Rome is in", "Paris is a"]} for fact in FACTS]
    for fact in named:
        fact["paraphrases"] = [text.replace("{}", fact["subject"]) for text in fact["paraphrases"]]
    (tmp_path / "named.json").write_text(json.dumps(named))
    plot = tmp_path / "all.png"
    options = ["--method", "all", "--sweep", "1", "--proxy", str(tmp_path / "named.json"), "--plot", str(plot)]
    code, output, _ = run(capsys, "locate", folder, *options)
    assert code == 0
    for name in SELECTORS.names():
        assert f" {name} " in output or f"{name}:" in output
    assert "published: No layer is published" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--set", "steps"], ["--set", "=3"]])
def test_options_of_a_benchmark_are_names_with_values(capsys, arguments):
    code, _, complaint = run(capsys, "benchmark", "golden-layers", "model", "--data", "facts.json", *arguments)
    assert code == 2
    assert "name=value" in complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "{}", *FACT, "--layer", "middle"], "layer selector 'middle'"),
        (["edit", "{}", *FACT, "--layer", "-1"], "layer selector '-1'"),
        (["edit", "{}", *FACT, "--layer", "99", "--covariance", "identity"], "Layer 99"),
        (["edit", "{}", *FACT, "--method", "mend"], "method 'mend'"),
        (["edit", "{}", *FACT, *BY_HAND, "--name", "a/b"], "'a/b'"),
        (["edit", "{}", *FACT[:3], "The Louvre", *FACT[4:], *BY_HAND], "'The Louvre' is not in the prompt"),
        (["edit", "{}", "--file", "no-such-file.json"], "no-such-file.json"),
        (["edit", "no/such/model/here", *FACT, *BY_HAND], "no/such/model/here"),
        (["edit", "no/such/model/here", *FACT, *BY_HAND, "--name", "a/b"], "'a/b'"),  # before loading
        (["edit", "{}", *FACT, "--layer", "\u00b2"], "layer selector '\u00b2'"),
        (["locate", "{}", "--proxy", "no-such-file.json"], "no-such-file.json"),
        (["locate", "{}", "--loss", "mean"], "lga_loss 'mean'"),
        (["show", "no-such-folder"], "no-such-folder"),
        (["show", "{}"], "edit_config.json"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_without_a_traceback(capsys, folder, arguments, message):
    code, _, complaint = run(capsys, *(folder if argument == "{}" else argument for argument in arguments))
    assert code == 1
    assert "Traceback" not in complaint
    assert complaint.lstrip().startswith("Error:") or "\nError:" in complaint
    assert message.replace(" ", "") in "".join(complaint.split())


@pytest.mark.parametrize(
    "options", [[], FACT[:4], [*FACT, "--file", "facts.json"], ["--target", "Rome", "--file", "facts.json"]]
)
def test_a_fact_is_given_whole_or_as_a_file(capsys, options):
    code, _, complaint = run(capsys, "edit", "model", *options)
    assert code == 2
    assert "--file" in complaint


@pytest.mark.parametrize(
    "arguments",
    [
        *(["edit", "no/such/model", *FACT, "-o", "{file}"], ["demo", "--model", "no/such/model", "-o", "{file}"]),
        *(["locate", "no/such/model", "--plot", "{folder}"], ["evaluate", "no/such/edit", "-o", "{folder}"]),
        ["export", "no/such/edit", "--gguf", "{folder}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_of_the_wrong_kind_is_refused_before_anything_is_loaded(capsys, tmp_path, arguments):
    (tmp_path / "file").touch()
    paths = {"{file}": str(tmp_path / "file"), "{folder}": str(tmp_path)}
    code, _, complaint = run(capsys, *(paths.get(argument, argument) for argument in arguments))
    assert code == 2
    assert re.search("is a (file|directory)", " ".join(complaint.replace("│", " ").split()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "{model}", "--file", "{facts}", "--method", "memmit"], "Did you mean 'memit'?"),
        (["edit", "{model}", "--file", "{facts}", "--layer", "lgaa"], "layer selector 'lgaa'"),
        (["locate", "{model}", "--method", "brute"], "Unknown layer selector 'brute'"),
        (["edit", "{model}", "--file", "{facts}n"], "Did you mean 'facts.json'?"),
        (["edit", "{model}", "--file", "{contradicting}"], "contradict each other"),
        (["edit", "{model}", "--file", "{columns}"], "Rename them to prompt, subject and target"),
        (["show", "{facts}"], "is a file. An edit is a folder"),
        (["playground", "smolm2", "--no-browser"], "Did you mean 'smollm2'?"),
    ],
)
def test_what_is_misspelled_is_told_before_a_model_is_loaded(
    capsys, facts, tmp_path, hub, monkeypatch, arguments, message
):
    monkeypatch.setattr("goldenedit.loading.load_model", None)
    (tmp_path / "contradicting.csv").write_text("prompt,subject,target\n{} is in,X,Rome\n{} is in,X,Oslo\n")
    (tmp_path / "columns.csv").write_text("Entity,Answer\nX,Rome\n")
    names = {name: str(tmp_path / f"{name}.csv") for name in ("contradicting", "columns")}
    filled = [argument.format(model="no-model", facts=facts, **names) for argument in arguments]
    code, output, errors = run(capsys, *filled)
    assert code == 1
    assert message in " ".join(errors.split())
    assert "..." not in output


def test_markup_in_what_is_shown_is_text(capsys, folder, tmp_path):
    saved = tmp_path / "edit"
    assert run(capsys, "edit", folder, *NEAR, *BY_HAND, "-o", str(saved))[0] == 0
    content = read_edit_folder(saved)
    named = replace(content.base_model, name_or_path="org/[red]model")
    write_edit_folder(saved, replace(content, base_model=named), "")
    shown = run(capsys, "show", str(saved))[1]
    assert "org/[red]model" in shown
    assert "The base model was not found" in shown
    assert "The edits do what they list" in run(capsys, "show", str(saved), "--model", folder)[1]
    assert "The base model" not in run(capsys, "show", str(saved), "--no-replay")[1]


def test_facts_that_are_not_answered_are_named_and_counted(capsys, folder, tmp_path):
    facts = tmp_path / "facts.json"
    near = {"prompt": "I live near {}", "subject": "The Eiffel Tower", "target_new": "Rome"}
    facts.write_text(json.dumps([near, FACTS[1]]))
    saved = str(tmp_path / "edit")
    assert run(capsys, "edit", folder, "--file", str(facts), *BY_HAND, "--method", "memit", "-o", saved)[0] == 0
    code, output, _ = run(capsys, "show", saved)
    assert code == 0
    text = " ".join(output.split())
    assert "'Angela Merkel was born in' -> 'Paris' is not answered" in text
    assert "'Rome' is not answered" not in text
    assert "1 of 2 listed facts is not answered." in text
    assert "The edits do what they list" not in text


def test_an_edit_that_hides_another_is_told(capsys, folder, tmp_path):
    facts, hiding = tmp_path / "facts.json", tmp_path / "hiding"
    facts.write_text(json.dumps(FACTS[:2]))
    assert run(capsys, "edit", folder, "--file", str(facts), *BY_HAND, "-o", str(hiding))[0] == 0
    content = read_edit_folder(hiding)
    (made,) = content.edits
    write_edit_folder(hiding, replace(content, edits=[replace(made, facts=made.facts[:1])]), "")
    code, output, _ = run(capsys, "show", str(hiding))
    assert code == 0
    assert "changes in 2 directions, but the number of listed facts is 1" in " ".join(output.split())
    assert "The edits do what they list" not in output


def test_an_edit_is_pushed_and_shown_from_the_hub(capsys, folder, tmp_path, hub):
    saved = str(tmp_path / "edit")
    assert run(capsys, "edit", folder, *FACT, *BY_HAND, "--name", "tower", "-o", saved)[0] == 0
    code, output, _ = run(capsys, "push", saved, "tester/edit", "--private", "--revision", "first")
    assert code == 0
    assert "tester/edit" in output
    assert run(capsys, "push", saved, "tester/edit")[0] == 0
    code, output, _ = run(capsys, "show", "tester/edit")
    assert code == 0
    assert "tower" in output
    assert run(capsys, "push", saved, "tester/merged", "--merged")[0] == 0
    config = hf_hub_download("tester/merged", "config.json")
    assert json.loads(Path(config).read_text())["golden_layers"] == [1]
    code, _, complaint = run(capsys, "show", "tester/nothing")
    assert code == 1
    assert "tester/nothing" in complaint


def test_golden_layers_are_shared_and_used(capsys, folder, tmp_path, hub):
    small = ["--size", "3"]
    assert run(capsys, "locate", folder, *small, "--push", "tester/atlas")[0] == 0
    assert run(capsys, "locate", folder, *small, "--method", "random", "--push", "tester/atlas")[0] == 0
    records = read_golden_layers(find_golden_layers("tester/atlas"))
    assert [(record.selector, record.facts) for record in records] == [("lga", 3), ("random", 0)]
    saved = tmp_path / "edit"
    options = ["--layer", "hub:tester/atlas", "--covariance", "identity", "-o", str(saved)]
    assert run(capsys, "edit", folder, *FACT, *options)[0] == 0
    assert read_edit_folder(saved).config.target_layers == records[1].layers  # the last that was pushed
    code, _, complaint = run(capsys, "edit", folder, *FACT, "--layer", "hub:tester/nothing")
    assert code == 1
    assert "tester/nothing" in complaint


def test_an_edit_is_exported_for_other_programs(capsys, folder, tmp_path):
    saved, target = str(tmp_path / "edit"), tmp_path / "out" / "edit.gguf"
    assert run(capsys, "edit", folder, *FACT, *BY_HAND, "-o", saved)[0] == 0
    places = ["--mlx", str(tmp_path / "mlx"), "--merged", str(tmp_path / "merged")]
    code, output, _ = run(capsys, "export", saved, "--gguf", str(target), "--ollama", "smollm2:135m", *places, "--json")
    assert code == 0
    assert set(json.loads(output)) == {"gguf", "modelfile", "mlx", "merged"}
    assert target.read_bytes()[:4] == b"GGUF"
    assert (target.parent / "Modelfile").read_text() == "FROM smollm2:135m\nADAPTER ./edit.gguf\n"
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["fine_tune_type"] == "lora"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["golden_layers"] == [1]


@pytest.mark.parametrize("options", [[], ["--ollama", "smollm2"], ["--mlx", "m", "--ollama", "smollm2"]])
def test_what_to_export_is_named(capsys, tmp_path, options):
    code, _, errors = run(capsys, "export", str(tmp_path), *options)
    assert code == 2
    assert "--gguf" in errors


def test_a_modelfile_of_someone_else_stays(tmp_path):
    (tmp_path / "Modelfile").write_text("FROM mine\n")
    with pytest.raises(ValueError, match="exists already"):
        write_modelfile(tmp_path / "edit.gguf", "smollm2")
    with pytest.raises(ValueError, match="line break"):
        write_modelfile(tmp_path / "edit.gguf", "a\nSYSTEM b")
    assert (tmp_path / "Modelfile").read_text() == "FROM mine\n"


def test_an_evaluation_is_written_into_the_card(capsys, folder, facts, tmp_path):
    saved = tmp_path / "edit"
    assert run(capsys, "edit", folder, "--file", facts, *BY_HAND, "-o", str(saved))[0] == 0
    before = read_edit_folder(saved)
    assert run(capsys, "evaluate", str(saved), "--card")[0] == 0
    assert "### Scores of papers" in (saved / "README.md").read_text()
    assert read_edit_folder(saved).edits[0].facts == before.edits[0].facts


def test_what_someone_wrote_into_a_card_stays(capsys, folder, tmp_path, hub):
    saved = tmp_path / "edit"
    assert run(capsys, "edit", folder, *FACT, *BY_HAND, "-o", str(saved))[0] == 0
    assert run(capsys, "push", str(saved), "tester/edit")[0] == 0
    assert '"tester/edit"' in hub.repositories["tester/edit"].files()["README.md"].decode()
    card = (saved / "README.md").read_text() + "\nWhy: a test.\n"
    (saved / "README.md").write_text(card)
    assert run(capsys, "evaluate", str(saved), "--card")[0] == 0
    assert (saved / "README.md").read_text() == card
    assert read_edit_folder(saved).evaluation is not None
    assert run(capsys, "push", str(saved), "tester/edit")[0] == 0
    assert hub.repositories["tester/edit"].files()["README.md"].decode() == card


def test_an_edit_is_evaluated_beside_its_base_model(folder, facts, tmp_path, capsys):
    edit, figures = str(tmp_path / "edit"), tmp_path / "figures.json"
    assert run(capsys, "edit", folder, "--file", facts, *BY_HAND, "-o", edit)[0] == 0
    code, output, _ = run(capsys, "evaluate", edit, "--generation", "-o", str(figures))
    assert code == 0
    for word in ("probability, n = 3", "token match, n = 3", "generation, n = 3", "efficacy", "rewrite"):
        assert word in output
    record = json.loads(figures.read_text())
    assert record["edited"]["probability"]["n"] == 3
    assert f"{record['base']['probability']['efficacy']:.3f}" in output

    one = tmp_path / "one.json"
    one.write_text(json.dumps(FACTS[:1]))
    code, output, _ = run(capsys, "evaluate", edit, "--file", str(one), "--model", folder)
    assert code == 0
    assert "probability, n = 1" in output


def test_facts_that_cannot_be_read_are_left_out_on_request(folder, tmp_path, capsys, caplog):
    table, edit = tmp_path / "facts.csv", str(tmp_path / "edit")
    table.write_text(
        "prompt,subject,target\nThe Eiffel Tower is in,The Eiffel Tower,Rome\nno subject,The Louvre,Rome\n"
    )
    code, _, complaint = run(capsys, "edit", folder, "--file", str(table), *BY_HAND, "-o", edit)
    assert code == 1
    assert "line 3" in complaint
    assert "--skip-bad" in complaint
    assert run(capsys, "edit", folder, "--file", str(table), "--skip-bad", *BY_HAND, "-o", edit)[0] == 0
    assert "1 of 2 records cannot be read and were left out" in caplog.text
    assert run(capsys, "evaluate", edit, "--file", str(table), "--skip-bad", "--model", folder)[0] == 0
    assert run(capsys, "locate", folder, "--proxy", str(table), "--skip-bad", "--method", "key_response")[0] == 0
    code, _, complaint = run(capsys, "edit", folder, "--file", str(table), "--format", "memit", *BY_HAND)
    assert (code, "The format 'memit' is unknown" in " ".join(complaint.split())) == (1, True)


def test_of_many_warnings_about_an_edit_the_first_are_shown(monkeypatch, capsys):
    audited = EditAudit("edit_1", [], [], [f"fact {number} is not answered" for number in range(3000)], [False] * 3000)
    monkeypatch.setattr("goldenedit.audit.audit", lambda model: [audited])
    show_audit(None)
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("Warning: ") == 50
    assert "Edit 'edit_1' has 2950 more warnings." in output
    assert "3000 of 3000 listed facts are not answered." in output


def test_the_version_and_short_help_are_as_users_of_other_commands_expect_them():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"goldenedit {__version__}\n")
    for command in ([], ["edit"], ["cache", "ls"]):
        short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
        assert (short.exit_code, short.stdout) == (0, long.stdout)
