"""Brute force: cells against single edits made and measured the plain way, and sweeps that were stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.editors import LowRankDelta, option
from goldenedit.editors import editor as register
from goldenedit.evaluation.scores import FactLikelihoods, FactMatches
from goldenedit.layer_selection import CellStore, Outcome, SweepOptions, brute_force, edit_score, sweep
from goldenedit.lm import covariance
from models import NUM_LAYERS, tiny_model
from plugins import restore_registries

FACTS = [
    EditRequest(
        "The Eiffel Tower is in the city of",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=("One finds The Eiffel Tower in",),
        neighborhood=("The Louvre is in", "Berlin is in the city of"),
    ),
    EditRequest("Angela Merkel was born in", "Angela Merkel", "Berlin", locality=(("Paris is a", "city"),)),
    EditRequest("The Kingdom of Cambodia is a", "Cambodia", "city", "fox", portability=(("Cambodia is", "a city"),)),
]
CONFIG = EditConfig("r-rome", layer=0, contexts=2, steps=4, covariance="identity")


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "cells.jsonl")


@pytest.fixture
def model(tokenizer):
    return EditModel(tiny_model("llama"), replace(CONFIG), tokenizer)


def run(model, store, facts=FACTS, config=CONFIG, **options):
    return sweep(model.lm, facts, config, store, SweepOptions(**options))


@pytest.mark.parametrize("method", ["r-rome", "pmet", "ft-m", "crispedit", "gated"])
def test_each_fact_is_edited_alone_and_measured(method, model, store):
    text = {"covariance": "sampled", "covariance_tokens": 200} if method in ("crispedit", "gated") else {}
    facts = FACTS[:1] if method == "gated" else FACTS  # a tiny model has few neurons to rewrite
    options = replace(CONFIG, method=method, **text)
    cells = run(model, store, facts, config=options)
    assert sorted(cells) == [(method, layer) for layer in range(NUM_LAYERS)]
    for layer in range(NUM_LAYERS):
        for fact, outcome in zip(facts, cells[method, layer].outcomes, strict=True):
            config = replace(options, layer=layer, target_layer=None)
            plain = EditModel(tiny_model("llama"), config, model.tokenizer)
            plain.edit(fact)
            scores = plain.evaluate([fact]).edited
            matched = scores["token_match"].scores
            assert outcome.matches.rewrite == pytest.approx(matched.rewrite)
            if fact.locality:
                assert outcome.matches.locality == pytest.approx([matched.locality])
            assert (outcome.likelihoods is not None) == bool(fact.neighborhood)
            if outcome.likelihoods is not None:
                assert edit_score([outcome]) == pytest.approx(scores["probability"].scores.score)


def test_the_layer_of_a_cell_is_its_own_whatever_was_selected_before(model, store, tmp_path):
    cells = run(model, store)
    chosen = replace(CONFIG, layer="lga", layer_pattern="window", target_layer=[1, 2], layer_scores=[0.0, 1.0, 2.0])
    again = run(model, CellStore(tmp_path / "again.jsonl"), config=chosen)
    assert [cell.outcomes for cell in again.values()] == [cell.outcomes for cell in cells.values()]
    assert len({str(cell.outcomes) for cell in cells.values()}) == NUM_LAYERS


def test_editors_of_batches_insert_all_facts_at_once(model, store):
    together = run(model, store, methods=["memit"], in_batches=True)
    alone = run(model, store, methods=["memit"])
    assert [one.outcomes for one in together.values()] != [one.outcomes for one in alone.values()]
    plain = EditModel(tiny_model("llama"), replace(CONFIG, method="memit", layer=1, target_layer=None), model.tokenizer)
    plain.edit(FACTS)
    found = plain.evaluate(FACTS).edited["token_match"].scores
    assert [one.matches.rewrite for one in together["memit", 1].outcomes] == pytest.approx(
        [plain.evaluate([fact]).edited["token_match"].scores.rewrite for fact in FACTS]
    )
    assert found.n == len(FACTS)


def test_values_are_found_under_the_change_of_each_editor_and_cost_each_of_them(model, store, monkeypatch):
    calls, plain = [], brute_force.prepare_facts
    monkeypatch.setattr(brute_force, "prepare_facts", lambda *given: calls.append(1) or plain(*given))
    own = replace(CONFIG, phrasings="none", kept_questions=0)  # answers of the model are asked for once
    cells = run(model, store, config=own, methods=["rome", "r-rome", "memit", "pmet"], layers=[1])
    assert len(calls) == 4
    rome, r_rome = cells["rome", 1].cost, cells["r-rome", 1].cost
    assert rome.flops == pytest.approx(r_rome.flops, rel=0.05)


def test_a_sweep_that_was_stopped_goes_on(model, store, tmp_path, monkeypatch):
    whole = run(model, CellStore(tmp_path / "whole.jsonl"))
    run(model, store, layers=[0])
    text = store.path.read_text()
    store.path.write_text(text + text[: len(text) // 2])  # killed in the middle of a line
    again, calls, plain = CellStore(store.path), [], brute_force.prepare_facts
    monkeypatch.setattr(brute_force, "prepare_facts", lambda *given: calls.append(1) or plain(*given))
    cells = run(model, again)
    assert len(calls) == NUM_LAYERS - 1
    assert [cell.outcomes for cell in cells.values()] == [cell.outcomes for cell in whole.values()]
    kept = CellStore(store.path)
    assert len(kept.cells) == NUM_LAYERS
    assert run(model, kept) == cells
    assert [json.loads(line)["layer"] for line in store.path.read_text().splitlines() if line.endswith("}")] == [
        0,
        1,
        2,
    ]


def test_cells_depend_on_the_edits_and_on_nothing_else(model, store):
    run(model, store, layers=[0])
    for other in (replace(CONFIG, proxy_size=3), replace(CONFIG, lga_loss="answer"), replace(CONFIG, layer=2)):
        run(model, store, layers=[0], config=other)
    assert len(store.cells) == 1
    for other in (replace(CONFIG, steps=3), replace(CONFIG, seed=1)):
        run(model, store, layers=[0], config=other)
    run(model, store, FACTS[:2], layers=[0])
    run(model, store, layers=[0], neighbors=1)
    torch.set_float32_matmul_precision("medium")
    try:
        run(model, store, layers=[0])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(store.cells) == 6


def test_cells_of_other_processes_are_read_and_those_of_this_one_written(model, tmp_path):
    mine, theirs = tmp_path / "cells-0.jsonl", tmp_path / "cells-1.jsonl"
    run(model, CellStore(theirs), layers=[0, 1], about={"model": "tiny"})
    assert json.loads(theirs.read_text().splitlines()[0])["model"] == "tiny"
    run(model, CellStore(mine, [mine, theirs]))
    assert len(mine.read_text().splitlines()) == 1


def test_the_model_is_left_as_it_was(model, store):
    ids = torch.tensor([model.tokenizer(FACTS[0].text)["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        run(model, store, methods=["r-rome", "lora"], layers=[1])
        assert torch.equal(model(input_ids=ids).logits, before)


def test_s_is_of_the_family_that_all_facts_have():
    likelihoods = FactLikelihoods((1.0, 2.0), [(1.0, 2.0), (2.0, 1.0)], [(2.0, 1.0)])
    both = Outcome(FactMatches(0.5, [0.25]), likelihoods)
    matched = Outcome(FactMatches(1.0, [0.75], locality=[0.5]))
    assert edit_score([both]) == pytest.approx(3 / (1 + 1 / 0.5 + 1))
    assert edit_score([both, matched]) == pytest.approx(3 / (1 / 0.75 + 1 / 0.5 + 1 / 0.5))


def test_a_cell_is_read_as_it_was_written(model, store):
    cell = run(model, store, layers=[0])["r-rome", 0]
    (read,) = CellStore(store.path).cells.values()
    assert read == cell


def test_a_layer_where_an_editor_fails_is_left_out_and_told(model, store, monkeypatch, caplog):
    plain = brute_force.prepare_facts

    def fail_at(*layers):
        def prepare(*given):
            if given[2].target_layers[0] in layers:
                raise ValueError("there is no null space")
            return plain(*given)

        monkeypatch.setattr(brute_force, "prepare_facts", prepare)

    fail_at(1)
    assert sorted(run(model, store)) == [("r-rome", 0), ("r-rome", 2)]
    assert "Layer 1 is skipped for r-rome: there is no null space" in caplog.text
    fail_at(0, 1, 2)
    with pytest.raises(ValueError, match="null space"):
        run(model, store, config=replace(CONFIG, steps=3))


def test_key_statistics_are_computed_in_one_pass_for_all_layers(model, store, monkeypatch):
    passes = []
    plain = covariance.second_moments
    monkeypatch.setattr(covariance, "second_moments", lambda *given, **more: passes.append(given[2]) or plain(*given))
    run(model, store, config=replace(CONFIG, covariance="sampled", covariance_tokens=200))
    assert passes == [[0, 1, 2]]


@pytest.mark.parametrize("answer_layer", [None, 1])  # 1 is not behind layer 1, where no edit can be made
def test_moments_of_mlps_are_computed_in_one_pass_with_the_layers_of_answers(answer_layer, model, store, monkeypatch):
    passes, plain = [], covariance.input_moments
    monkeypatch.setattr(covariance, "input_moments", lambda *given: passes.append(sorted(given[2])) or plain(*given))
    text = {"covariance": "sampled", "covariance_tokens": 200}
    config = replace(CONFIG, method="gated", answer_layer=answer_layer, **text)
    layers = [0] if answer_layer is None else [0, 1]
    assert sorted(run(model, store, FACTS[:1], config, layers=layers)) == [("gated", 0)]
    assert passes == [[0, 2] if answer_layer is None else [0, 1]]


def test_cells_that_a_user_asked_for_must_be_kept(tmp_path, model):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(model, CellStore(tmp_path / "file" / "cells.jsonl"))


def test_cells_of_a_cache_are_measured_whether_they_can_be_kept_or_not(tmp_path, model, store):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        found = run(model, CellStore(tmp_path / "file" / "cells.jsonl", is_cache=True))
    assert {cell: made.outcomes for cell, made in found.items()} == {
        cell: made.outcomes for cell, made in run(model, store).items()
    }


def test_cells_that_cannot_be_read_are_an_error_but_in_a_cache(tmp_path, monkeypatch):
    def refused(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "cells.jsonl"
    path.touch()
    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(PermissionError):
        CellStore(path)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert CellStore(path, is_cache=True).cells == {}


@dataclass
class Strength:
    """The option of an editor of another package."""

    strength: float = option(1.0, least=0.0, help="How much.")


def test_options_of_an_editor_are_its_own_among_other_editors(model, store, monkeypatch):
    restore_registries(monkeypatch)

    @register("mine", options=Strength)
    def mine(problem):
        keys = problem.keys / problem.keys.square().sum(0)
        return LowRankDelta(problem.options.strength * keys.T, problem.residuals)

    config = replace(CONFIG, method="mine", options={"strength": 0.0})
    cells = run(model, store, config=config, methods=["mine", "rome"], layers=[1])
    assert set(cells) == {("mine", 1), ("rome", 1)}
    assert cells["rome", 1] == run(model, store, config=replace(CONFIG, method="rome"), layers=[1])["rome", 1]
    stronger = run(model, store, config=replace(config, options={"strength": 1.0}), layers=[1])
    assert stronger["mine", 1].outcomes != cells["mine", 1].outcomes


def test_layers_whose_cells_are_not_stored_are_told(model, store):
    options = SweepOptions(layers=range(NUM_LAYERS))
    assert brute_force.missing_layers(model.lm, FACTS, CONFIG, store, options) == list(range(NUM_LAYERS))
    run(model, store, layers=[1])
    assert brute_force.missing_layers(model.lm, FACTS, CONFIG, store, options) == [0, 2]
    assert brute_force.missing_layers(model.lm, FACTS[:2], CONFIG, store, options) == [0, 1, 2]
