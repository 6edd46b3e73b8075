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
from goldenedit.layer_selection import brute_force
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
    "--test",
    "3",
    "--proxy",
    "1",
    "--chunk",
    "2",
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
    # A random model prefers no answer: the packaged facts are few, and known.
    few = golden_layers.proxy_facts()[:6]
    monkeypatch.setattr(golden_layers, "proxy_facts", lambda: few)
    monkeypatch.setattr(golden_layers, "known_facts", lambda lm, requests: range(len(requests)))
    return EditModel(tiny_model("llama"), EditConfig(layer=0), tokenizer)


def setting(zsre, **changes) -> Setting:
    plain = Setting({"zsre": zsre}, ("r-rome", "memit"), test=3, proxy=2, dataset_proxy=2, chunk=2, traced=2)
    return replace(plain, options=OPTIONS, **changes)


def test_everything_is_measured_and_facts_of_selectors_are_not_those_of_the_test(model, zsre, tmp_path, monkeypatch):
    seen = {}
    plain = golden_layers.find_layers

    def spy(lm, config):
        seen[config.layer, config.lga_loss, isinstance(config.proxy, list)] = config.proxy
        return plain(lm, config)

    monkeypatch.setattr(golden_layers, "find_layers", spy)
    found = measure_model(model, "tiny", setting(zsre), tmp_path / "out")
    assert set(found.curves) == {(name, method) for name in (PACKAGED, "zsre") for method in ("r-rome", "memit")}
    for (name, _), curve in found.curves.items():
        assert sorted(curve.outcomes) == list(range(NUM_LAYERS))
        assert curve.facts == (2 if name == PACKAGED else 3)
        assert curve.cost.flops > 0
    names = {name for proxy, name in found.selections if proxy == PACKAGED}
    assert {"lga sequence", "lga answer, no filter", "auto", "selectivity", "causal_tracing", "middle"} <= names
    assert "published" not in names  # nothing is, for this model
    own = seen["lga", "sequence", True]
    assert [fact.subject for fact in own] == ["Rome", "the brown fox"]
    assert seen["auto", "sequence", True] == own


def test_a_run_that_was_stopped_goes_on(model, zsre, tmp_path, monkeypatch):
    whole = measure_model(model, "tiny", setting(zsre), tmp_path / "whole")
    lines = (tmp_path / "whole" / "cells-0.jsonl").read_text().splitlines()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cells-0.jsonl").write_text("\n".join(lines[:5]) + "\n")
    calls, plain = [], brute_force._Layer.cell
    monkeypatch.setattr(brute_force._Layer, "cell", lambda *given: calls.append(1) or plain(*given))
    again = measure_model(model, "tiny", setting(zsre), tmp_path / "out")
    assert len(calls) == len(lines) - 5
    assert {key: curve.outcomes for key, curve in again.curves.items()} == {
        key: curve.outcomes for key, curve in whole.curves.items()
    }


GOOD = EditRequest("Paris is in", "Paris", "Rome", locality=(("Berlin is", "a city"),))


def test_facts_are_usable_where_scores_say_something_of_them(model, monkeypatch):
    silent = EditRequest("Rome is in", "Rome", "Paris", neighborhood=("Paris is in",))
    unreadable = EditRequest("Berlin is in" + 150 * " the city", "Berlin", "Paris", locality=GOOD.locality)
    unknown = EditRequest("Rome is a", "Rome", "fox", "city", paraphrases=("Rome, a",), neighborhood=("Paris is a",))
    twice = EditRequest("Paris is in", "Paris", "Berlin", locality=GOOD.locality)
    monkeypatch.setattr(golden_layers, "known_facts", lambda lm, requests: [])
    assert usable_facts(model, [GOOD, silent, unreadable, unknown, twice], 9) == [GOOD]
    monkeypatch.setattr(golden_layers, "known_facts", lambda lm, requests: range(len(requests)))
    monkeypatch.setattr(golden_layers, "_BLOCK", 2)
    assert usable_facts(model, [unknown, silent, GOOD, twice], 9) == [unknown, GOOD]
    assert usable_facts(model, [unknown, GOOD], 1) == [unknown]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "Paris is in", "subject": "Paris", "target_new": "Rome"}], "No fact of 'zsre' can be used"),
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
        ({"methods": ("mend",)}, "mend"),
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
    assert all(selection.layers[0] in without for selection in found.selections.values())
    assert "| 2 |" in render([summary])


def test_the_command_writes_cells_summary_figures_and_report(folder, zsre, tmp_path):
    output = tmp_path / "out"
    command = ["benchmark", "golden-layers", folder, "--data", f"questions={zsre}", *ARGUMENTS, "-o", str(output)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "cells-0.jsonl",
        "report.md",
        "tiny-layers.png",
        "tiny-selectors.png",
        "tiny.summary.json",
    ]
    assert "| questions | r-rome | 3 |" in (output / "report.md").read_text()


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
