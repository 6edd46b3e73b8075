"""`goldenedit evaluate`, `goldenedit compare` and `goldenedit edit --verify`, from arguments to output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import BY_HAND, NEAR, run
from goldenedit import EditModel
from goldenedit.lm.decoding import greedy
from goldenedit.storage.card import own_card
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model

OTHER = ["--prompt", "I live near Angela Merkel", "--subject", "Angela Merkel", "--target", "Paris"]
TASK = """\
task: cities
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_json_alone_is_on_stdout_with_the_figures_of_both_models(edit, capsys):
    code, output, errors = run(capsys, "evaluate", edit, "--json")
    assert code == 0
    figures = json.loads(output)
    assert set(figures) == {"edited", "base"}
    for state in figures.values():
        assert {"exact", "contains", "n"} <= set(state["says"]["completion"])
        assert {"same", "n"} <= set(state["unchanged"]["unrelated"])
        assert {"kl", "agreement", "tokens"} <= set(state["text"])
        assert {"exact", "contains"} <= set(state["in_prompt"]["completion"])
    assert "says the new answer" in errors
    assert figures["base"]["text"]["kl"] == 0


def test_only_the_forms_that_are_named_are_asked(edit, capsys):
    output = run(capsys, "evaluate", edit, "--json", "--forms", "completion, prefix", "--no-unchanged")[1]
    assert list(json.loads(output)["edited"]["says"]) == ["completion"]  # a prefix does not fit in this model's context


def test_a_form_that_does_not_exist_is_named_before_a_model_is_loaded(edit, capsys):
    code, _, errors = run(capsys, "evaluate", edit, "--forms", "poem", "--model", "no/such/model")
    assert code == 1
    assert "There is no form 'poem'" in errors


def test_questions_are_shown_with_both_answers_and_facts_that_are_not_said_are_told(edit, tmp_path, capsys):
    facts = tmp_path / "facts.csv"
    facts.write_text("prompt,subject,target\nI live near Berlin,Berlin,Hamburg\n")
    output = run(capsys, "evaluate", edit, "--file", str(facts), "--texts", "1", "--no-unchanged")[1]
    assert "base model" in output
    assert "The edited model does not say 1 of 1 facts:" in output
    assert "'I live near Berlin': expected 'Hamburg'" in " ".join(output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "http://localhost:1/v1"], "--judge needs --judge-model"),
        (["--judge-model", "judge"], "--judge-model needs --judge"),
        (["--lm-eval-limit", "3"], "need --lm-eval"),
        (["--output", "no/such/folder/scores.json"], "which is no folder"),
    ],
)
def test_options_that_cannot_work_are_refused_before_a_model_is_loaded(tmp_path, capsys, options, message):
    code, _, errors = run(capsys, "evaluate", str(tmp_path), "--model", "no/such/model", *options)
    assert code != 0
    assert message in " ".join(errors.replace("\u2502", " ").split())


def test_general_ability_of_both_models_goes_into_scores_and_card(edit, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    items = [{"question": "I live near", "choices": ["Rome", "Paris"], "label": label} for label in (0, 1)]
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, items)) + "\n")
    task = tmp_path / "cities.yaml"
    task.write_text(TASK.format(data=data))
    code, output, _ = run(capsys, "evaluate", edit, "--no-unchanged", "--lm-eval", str(task), "--card", "--json")
    assert code == 0
    general = json.loads(output)["general"]
    assert general["edited"]["cities"]["acc"]["value"] == general["base"]["cities"]["acc"]["value"] == 0.5
    assert read_edit_folder(Path(edit)).evaluation["general"] == general
    assert own_card(Path(edit)) is None
    card = (tmp_path / "edit" / "README.md").read_text()
    assert "cities" in card
    assert "general ability" not in card.split("Not measured:")[1].split("\n")[0]


def test_tasks_of_the_harness_that_do_not_exist_are_an_error_before_anything_is_asked(edit, capsys, monkeypatch):
    monkeypatch.setattr(EditModel, "evaluate", lambda *_, **__: pytest.fail("the model was asked"))
    code, _, errors = run(capsys, "evaluate", edit, "--lm-eval", "no such task")
    assert code == 1
    assert "no such task" in errors or "not installed" in errors


def test_edits_are_set_side_by_side_on_the_facts_of_all(folder, edit, tmp_path, capsys, monkeypatch):
    other = str(tmp_path / "other")
    assert run(capsys, "edit", folder, *OTHER, *BY_HAND, "-o", other)[0] == 0
    asked: list[str] = []

    def counted(lm, prompts, *arguments, **options):
        asked.extend(prompts)
        return greedy(lm, prompts, *arguments, **options)

    monkeypatch.setattr("goldenedit.lm.language_model.greedy", counted)
    code, output, errors = run(capsys, "compare", edit, other, "--json", "--forms", "completion")
    assert code == 0
    one, two = json.loads(output)
    assert one["edited"]["says"]["completion"]["n"] == two["edited"]["says"]["completion"]["n"] == 2
    assert one["base"] == two["base"]
    assert one["edited"] != two["edited"]
    assert "plain text: KL" in errors
    assert len(asked) == len(set(asked)) > 40  # the base model is asked once for all edits


def test_edits_of_different_models_are_not_compared(edit, tmp_path, tokenizer, capsys):
    model = tiny_model("llama", seed=1)
    model.save_pretrained(tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    other = str(tmp_path / "other")
    assert run(capsys, "edit", str(tmp_path / "second"), *NEAR, *BY_HAND, "-o", other)[0] == 0
    code, _, errors = run(capsys, "compare", edit, other)
    assert code == 1
    assert "different base models" in errors


def test_folders_that_give_a_prompt_different_answers_need_facts_to_compare_on(folder, edit, tmp_path, capsys):
    other = str(tmp_path / "other")
    assert run(capsys, "edit", folder, *NEAR[:-1], "London", *BY_HAND, "-o", other)[0] == 0
    code, _, errors = run(capsys, "compare", edit, other)
    assert code == 1
    assert "--file" in errors


def test_a_verified_edit_shows_what_the_model_writes_before_and_after(folder, capsys):
    code, output, _ = run(capsys, "edit", folder, *NEAR, *BY_HAND, "--verify")
    assert code == 0
    for part in ("completion: 'I live near The Eiffel Tower'", "before:", "after:", "changed answers:"):
        assert part in output
