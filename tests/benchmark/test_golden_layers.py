"""The benchmark from facts in files to its report, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.benchmark import golden_layers
from goldenedit.benchmark.golden_layers import PACKAGED, Setting, measure_model, usable_facts
from goldenedit.benchmark.report import render, summarize
from goldenedit.cli import app
from goldenedit.cost import Cost
from goldenedit.layer_selection import brute_force
from goldenedit.storage.atlas import read_golden_layers
from models import NUM_LAYERS, tiny_model

ZSRE = [
    {
        "subject": subject,
        "prompt": f"Who is the mother of {subject}?",
        "target_new": "Angela Merkel",
        "ground_truth": ["Paris"],
        "rephrase_prompt": f"The mother of {subject} is?",
        "locality": {"Relation_Specificity": [{"prompt": f"The city of {subject} is", "ground_truth": ["Rome"]}]},
        "portability": {
            "Reasoning": [{"prompt": f"The tongue of the mother of {subject} is", "ground_truth": "German"}]
        },
    }
    for subject in ("Berlin", "the lazy dog", "Cambodia", "the brown fox", "Rome")
]
OPTIONS = {"contexts": 2, "steps": 2, "covariance_tokens": 300, "proxy_size": 6}
ARGUMENTS = [
    *("--method", "r-rome", "--test", "3", "--chunk", "2"),
    *(x for k, v in OPTIONS.items() for x in ("--set", f"{k}={v}")),
]


@pytest.fixture
def zsre(tmp_path):
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(ZSRE))
    return str(path)


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def model(tokenizer, monkeypatch):
    # A random model prefers no answer.
    monkeypatch.setattr(golden_layers, "known_facts", lambda lm, requests: range(len(requests)))
    return EditModel(tiny_model("llama"), EditConfig(layer=0), tokenizer)


def setting(zsre, **changes) -> Setting:
    plain = Setting(
        {"zsre": zsre}, {"r-rome": None, "ft-m": 2}, test=3, dataset_proxy=2, chunk=2, traced=2, options=OPTIONS
    )
    return replace(plain, **changes)


def test_everything_is_measured_and_facts_of_selectors_are_not_those_of_the_test(model, zsre, tmp_path, monkeypatch):
    seen = {}
    plain = golden_layers.find_layers

    def spy(lm, config):
        seen[config.layer, config.lga_loss, isinstance(config.proxy, list)] = config.proxy
        return plain(lm, config)

    monkeypatch.setattr(golden_layers, "find_layers", spy)
    found = measure_model(model, "tiny", setting(zsre), tmp_path / "out")
    assert {key: curve.facts for key, curve in found.curves.items()} == {("zsre", "r-rome"): 3, ("zsre", "ft-m"): 2}
    for curve in found.curves.values():
        assert sorted(curve.outcomes) == list(range(NUM_LAYERS))
        assert curve.cost.flops > 0
        assert all(outcome.sight is not None for outcomes in curve.outcomes.values() for outcome in outcomes)
    names = {choice.name for choice in found.choices if choice.proxy == PACKAGED}
    assert {
        "lga sequence",
        "lga answer, no filter",
        "lga sequence, down projection, cosine",
        "auto",
        "causal_tracing",
    } <= names
    assert "published" not in names  # nothing is, for this model
    own = seen["lga", "sequence", True]
    assert [fact.subject for fact in own] == ["Rome", "the brown fox"]
    assert seen["auto", "sequence", True] == own


def test_selectors_of_an_editor_are_tested_on_its_edits(model, zsre, tmp_path):
    found = measure_model(model, "tiny", setting(zsre), tmp_path / "out")
    autos = [choice.methods for choice in found.choices if choice.name == "auto" and choice.proxy == PACKAGED]
    depths = {choice.methods: choice.selection.layers for choice in found.choices if choice.name == "published depth"}
    assert autos == [("r-rome",), ("ft-m",)]
    assert depths == {("r-rome",): [0], ("ft-m",): [2]}  # of 3 layers, at 5 and 21 of 32


def test_a_run_that_was_stopped_goes_on(model, zsre, tmp_path, monkeypatch):
    whole = measure_model(model, "tiny", setting(zsre), tmp_path / "whole")
    lines = (tmp_path / "whole" / "cells-0.jsonl").read_text().splitlines()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cells-0.jsonl").write_text("\n".join(lines[:5]) + "\n")
    calls, plain = [], brute_force._Layer.edits
    monkeypatch.setattr(brute_force._Layer, "edits", lambda *given: calls.append(1) or plain(*given))
    again = measure_model(model, "tiny", setting(zsre), tmp_path / "out")
    assert len(calls) == len(lines) - 5
    assert {key: curve.outcomes for key, curve in again.curves.items()} == {
        key: curve.outcomes for key, curve in whole.curves.items()
    }


def test_the_plan_is_told_before_edits_are_made(model, zsre, tmp_path):
    told = []
    measure_model(model, "tiny", setting(zsre), tmp_path, told.append)
    (plan,) = told
    assert "3 facts by r-rome, 2 facts by ft-m, of zsre, at 3 of 3 layers (0, 1, 2)" in plan
    assert "minutes" in plan


def test_a_grid_has_the_layers_that_selectors_choose(model, zsre, tmp_path):
    found = measure_model(model, "tiny", setting(zsre, grid=2), tmp_path)
    chosen = {layer for choice in found.choices for layer in choice.selection.layers}
    for curve in found.curves.values():
        assert set(curve.outcomes) == {0, 2} | chosen


@pytest.fixture
def clock(monkeypatch):
    """Edits of a fact at a layer take a second by this clock, or as many as are set in it."""
    rounds, clock = golden_layers._Rounds, {"now": 0.0, "seconds": 1.0}
    monkeypatch.setattr(golden_layers, "monotonic", lambda: clock["now"])
    plain = rounds._sweep

    def sweep(self, dataset, facts, methods, layers, about=""):
        before = len(self.store.cells)
        cells = plain(self, dataset, facts, methods, layers, about)
        clock["now"] += clock["seconds"] * len(facts) * (len(self.store.cells) - before)
        return {key: replace(cell, cost=Cost(1.0 * len(facts), cell.cost.flops)) for key, cell in cells.items()}

    monkeypatch.setattr(rounds, "_sweep", sweep)
    return clock


ALONE = {"r-rome": None}


@pytest.mark.parametrize(("seconds", "facts"), [(9, 3), (8, 2)])  # 3 for a fact
def test_a_budget_is_kept_with_fewer_facts(seconds, facts, model, zsre, tmp_path, clock):
    found = measure_model(model, "tiny", setting(zsre, methods=ALONE, budget=seconds / 60), tmp_path)
    assert found.curves["zsre", "r-rome"].facts == facts
    assert clock["now"] <= seconds


def test_a_budget_is_for_what_is_not_stored(model, zsre, tmp_path, clock):
    measure_model(model, "tiny", setting(zsre, methods=ALONE, budget=8 / 60), tmp_path)
    spent = clock["now"]
    found = measure_model(model, "tiny", setting(zsre, methods=ALONE, budget=3 / 60), tmp_path)
    assert found.curves["zsre", "r-rome"].facts == 3
    assert clock["now"] - spent == 3  # the third fact at three layers, and nothing twice


def test_what_a_slow_round_leaves_no_time_for_is_told(model, zsre, tmp_path, clock):
    told = []
    clock["seconds"] = 3.0
    found = measure_model(model, "tiny", setting(zsre, methods=ALONE, budget=25 / 60), tmp_path, told.append)
    assert found.curves["zsre", "r-rome"].facts == 2
    assert "facts 2 to 3 of zsre by r-rome are left out" in told[-1]


def test_an_editor_that_fails_everywhere_is_told_and_the_others_are_measured(model, zsre, tmp_path, monkeypatch):
    plain, told = brute_force._Layer.edits, []

    def edits(self, config):
        if config.method == "ft-m":
            raise ValueError("no step")
        return plain(self, config)

    monkeypatch.setattr(brute_force._Layer, "edits", edits)
    several = setting(zsre, methods={"r-rome": None, "ft-m": 2, "lora": None})
    found = measure_model(model, "tiny", several, tmp_path, told.append)
    assert {key: curve.facts for key, curve in found.curves.items()} == {("zsre", "r-rome"): 3, ("zsre", "lora"): 3}
    assert any("ft-m cannot edit facts 0 to 2 of zsre: no step" in text for text in told)


def test_a_budget_for_nothing_is_refused(model, zsre, tmp_path):
    with pytest.raises(ValueError, match="A budget of 1e-06 minutes is too small"):
        measure_model(model, "tiny", setting(zsre, budget=1e-6), tmp_path)


GOOD = EditRequest("Paris is in", "Paris", "Rome", locality=(("Berlin is", "a city"),))


def test_facts_that_fit_are_usable_and_known_ones_where_answers_are_compared(model, monkeypatch):
    silent = EditRequest("Rome is in", "Rome", "Paris", neighborhood=("Paris is in",))
    unreadable = EditRequest("Berlin is in" + 150 * " the city", "Berlin", "Paris", locality=GOOD.locality)
    unknown = EditRequest("Rome is a", "Rome", "fox", "city", paraphrases=("Rome, a",), neighborhood=("Paris is a",))
    twice = EditRequest("Paris is in", "Paris", "Berlin", locality=GOOD.locality)
    monkeypatch.setattr(golden_layers, "known_facts", lambda lm, requests: [])
    assert usable_facts(model, [GOOD, silent, unreadable, unknown, twice], 9) == [GOOD, silent]
    monkeypatch.setattr(golden_layers, "known_facts", lambda lm, requests: range(len(requests)))
    monkeypatch.setattr(golden_layers, "_BLOCK", 2)
    assert usable_facts(model, [unknown, silent, GOOD, twice], 9) == [unknown, silent, GOOD]
    assert usable_facts(model, [unknown, GOOD], 1) == [unknown]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"prompt": "Paris is in" + 150 * " the city", "subject": "Paris", "target_new": "Rome"}],
            "No fact of 'zsre' can be used",
        ),
        (
            [
                GOOD.to_dict(),
                {
                    "prompt": "Rome is a",
                    "subject": "Rome",
                    "target_new": "fox",
                    "target_true": "city",
                    "paraphrases": ["Rome, a"],
                    "neighborhood": ["Paris is a"],
                },
            ],
            "of two kinds",
        ),
    ],
)
def test_facts_that_do_not_do_are_told_before_anything_runs(model, tmp_path, records, message):
    (tmp_path / "facts.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        measure_model(model, "tiny", setting(str(tmp_path / "facts.json")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": 0}, "at least one fact"),
        ({"datasets": {PACKAGED: "facts.json"}}, "'packaged'"),
        ({"options": {"layer_pattern": "window"}}, "layer_pattern"),
        ({"options": {"stepz": 3}}, "stepz"),
        ({"methods": {"mend": None}}, "mend"),
        ({"methods": {}}, "an editor"),
        ({"methods": {"memit": 0}}, "at least one fact"),
        ({"grid": 1}, "at least 2 layers, got 1"),
        ({"budget": 0}, "positive number of minutes, got 0"),
        ({"neighbors": -1}, "neighbors=-1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Setting(**{"datasets": {"zsre": "zsre.json"}, **changes})


def test_a_model_whose_middle_layer_has_no_mlp_is_measured(model, zsre, tmp_path):
    without = {layer: path for layer, path in model.architecture.down_projections.items() if layer != 1}
    linears = {layer: model.architecture.mlp_linears[layer] for layer in without}
    model.architecture = model.lm.architecture = replace(
        model.architecture, down_projections=without, mlp_linears=linears
    )
    found = measure_model(model, "tiny", setting(zsre), tmp_path)
    summary = summarize(found)
    assert all(choice.selection.layers[0] in without for choice in found.choices)
    assert "| 2 |" in render([summary])


def test_the_command_writes_cells_summary_figures_and_report(folder, zsre, tmp_path):
    output = tmp_path / "out"
    command = ["benchmark", "golden-layers", folder, "--data", f"questions={zsre}", *ARGUMENTS, "-o", str(output)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "cells-0.jsonl",
        "golden_layers.json",
        "report.md",
        "tiny-questions.png",
        "tiny.summary.json",
    ]
    assert "| questions | r-rome | seen | 3 |" in (output / "report.md").read_text()
    (record,) = read_golden_layers(output / "golden_layers.json")
    assert (record.method, record.selector, record.facts) == ("r-rome", "sweep", 3)
    assert set(record.layers) <= set(record.plateau)
    for score, (low, high) in zip(record.scores, record.intervals, strict=True):
        assert low - 1e-9 <= score <= high + 1e-9


def test_two_processes_find_what_one_finds(folder, zsre, tmp_path):
    command = ["-m", "goldenedit", "benchmark", "golden-layers", folder, "--data", zsre, *ARGUMENTS]
    # `accelerate launch` starts several processes without GPUs by MPI alone, which is not everywhere.
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for name, launcher in (("one", []), ("two", two)):
        own = {**environment, "GOLDENEDIT_CACHE": str(tmp_path / f"cache-{name}")}
        arguments = [sys.executable, *launcher, *command, "-o", str(tmp_path / name)]
        done = subprocess.run(arguments, env=own, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    shares = [len((tmp_path / "two" / f"cells-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert sum(shares) == len((tmp_path / "one" / "cells-0.jsonl").read_text().splitlines())
    assert min(shares) > 0
    one, other = (json.loads((tmp_path / name / "tiny.summary.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one["curves"], other["curves"], strict=True):
        assert first["scores"] == pytest.approx(second["scores"], rel=1e-6)
    for first, second in zip(one["selections"], other["selections"], strict=True):
        assert first["layer"] == second["layer"]


def test_an_editor_may_have_a_number_of_facts_of_its_own(folder, zsre, tmp_path):
    command = ["benchmark", "golden-layers", folder, "--data", zsre, *ARGUMENTS[2:], "-o", str(tmp_path / "out")]
    wrong = CliRunner().invoke(app, [*command, "--method", "r-rome=few"])
    assert wrong.exit_code == 2
    assert "r-rome=32" in wrong.output.replace("\n", "")
    twice = CliRunner().invoke(app, [*command, "--method", "r-rome", "--method", "r-rome=2"])
    assert twice.exit_code == 2
    assert "twice" in twice.output
