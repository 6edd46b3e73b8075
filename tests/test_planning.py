"""What an edit will cost: formulas against arithmetic that is written out, and against what is really allocated."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import goldenedit
from command import run, saved_model
from goldenedit import EditConfig, EditModel, Plan, plan
from goldenedit.architecture import UnsupportedArchitectureError
from goldenedit.architecture.sizes import Shape
from goldenedit.commands.plan import numbers
from goldenedit.cost import measuring
from goldenedit.editing.gates import known_neurons
from goldenedit.lm.statistics import second_moments
from goldenedit.planning import Work
from goldenedit.plans import plan_of
from goldenedit.storage.folder import ADAPTER_WEIGHTS
from models import EXPERTS_CONFIGS, MLP_WIDTH, TINY_CONFIGS, UNSUPPORTED_CONFIGS, tiny_model
from tiny_edits import MERKEL, TOWER, fast_config

GB = 10**9
# Llama 3 8B
L, D, M, V, P = 32, 4096, 14336, 128256, 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
LLAMA3 = LlamaConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=M,
    num_hidden_layers=L,
    num_attention_heads=32,
    num_key_value_heads=8,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def llama3() -> Shape:
    return Shape.of(LLAMA3)


def phases(shape: Shape, facts: int = 1, memory: int = 64 * GB, **options) -> dict[str, goldenedit.planning.Phase]:
    return {phase.name: phase for phase in plan_of(shape, EditConfig(**options), facts, memory).phases}


def test_the_sizes_of_llama_3_8b(llama3):
    assert llama3.editable == tuple(range(32))
    assert (llama3.layers, llama3.width, llama3.key_width, llama3.vocabulary) == (L, D, M, V)
    assert llama3.linear_weights == P == 218_103_808
    assert llama3.attention_width == 4096
    assert llama3.cache_width == 32 * 2 * 8 * 128
    assert llama3.weights == {"bfloat16": 16_060_522_496}


def test_a_forward_multiplies_by_each_weight_once(llama3):
    work = Work(llama3, EditConfig(layer=3), 1, 0)
    # 10 tokens in rows of 5, 2 of which are read: products with weights, q k^T and weights times values, the head.
    assert work.forward(10, 5, 32, 2) == 32 * (2 * 10 * P + 2 * 2 * 10 * 5 * 4096) + 2 * 2 * 128_256 * 4096
    assert work.backward(10, 5, 32, 2) == 32 * (2 * 10 * P + 5 * 2 * 10 * 5 * 4096) + 2 * 2 * 128_256 * 4096


def test_lga_keeps_the_activations_of_eight_rows(llama3):
    phase = phases(llama3)["layer selection"]
    activations = 32 * 8 * 17 * (16 * 4096 + 4 * 14336) * 2
    logits = 8 * 16 * 128_256 * 16
    assert phase.bytes == activations + logits + 8 * 17 * 8 * (4096 + 14336)
    ghosts = 11 * 11 * 2 * 3 * (4096 + 14336) * 32
    passes = 32 * (4 * 22 * P + 14 * 22 * 11 * 4096) + 4 * 22 * 128_256 * 4096
    assert phase.flops == 100 * (passes + ghosts)


def test_key_statistics_of_all_layers_are_computed_in_groups(llama3):
    keys = 4 * 5_000 * M  # of a layer; 5,000 tokens are fewer than a key has dimensions
    few = {"layer": "auto", "covariance_tokens": 5_000}
    every = phases(llama3, **few)["key statistics"]
    assert every.bytes == 2 * keys + 2 * keys  # two layers, and two copies while one is written
    assert every.kept_bytes == 0  # they are read from the cache, one layer at a time
    work = Work(llama3, EditConfig(**few), 1, 0)
    assert every.flops == work.sampling(5_000)[1] + sum(work.forward(5_000, 32, last) for last in range(2, 33, 2))
    moment = 4 * M**2
    wide = phases(llama3, layer="auto", covariance_tokens=20_000)["key statistics"]
    assert wide.bytes == 3 * moment  # one layer
    assert (
        phases(llama3, layer="auto")["key statistics"]
        == phases(llama3, layer="auto", covariance_tokens=3 * M)["key statistics"]
    )
    one = phases(llama3, layer=3, method="r-rome", covariance_tokens=20_000)["key statistics"]
    assert one.bytes == max(3 * moment, moment + 2048 * ((4 * D + 3 * M) * 2 + M * 6))
    assert one.kept_bytes == moment


def test_inverting_key_statistics_takes_float64(llama3):
    many = {"layer": 3, "covariance_tokens": 20_000}
    assert phases(llama3, **many, method="r-rome")["detectors"].bytes == 20 * M**2
    assert phases(llama3, **many, method="r-rome")["detectors"].flops == M**3 // 3
    assert phases(llama3, **many, method="alphaedit")["detectors"].bytes == 36 * M**2
    assert phases(llama3, **many, method="alphaedit")["detectors"].flops == 9 * M**3  # eigenvectors
    few = phases(llama3, layer=3, method="r-rome", covariance_tokens=5_000)["detectors"]
    assert few.bytes == 4 * 5_000 * M + 16 * 5_000**2
    assert few.flops == 5_000**3 // 3 + 2 * M * 5_000**2


def test_gates_and_markers_are_solved_in_float64(llama3):
    found = phases(llama3, layer=3)
    assert found["gates"].bytes == 112 * 4096**2 + 4 * 270 * 33 * 4096
    cache = (15 * 80 + 13 * 55) * 65_536 * 2
    activations = ((21 - 3) * 160 + (32 - 3) * 210) * (16 * 4096 + 4 * 14336) * 2
    assert found["markers"].bytes == 48 * 4096**2 + cache + activations + 18 * 145 * 128_256
    assert "key statistics" not in found


def test_values_run_from_the_layer_that_gives_the_answers(llama3):
    cache, activations = 30 * 81 * 65_536 * 2, (32 - 21) * 83 * (16 * 4096 + 4 * 14336) * 2
    one = cache + activations + 34 * 83 * 128_256
    assert phases(llama3, layer=3)["values"].bytes == one
    assert phases(llama3, layer=3, facts=5, batch_size=2)["values"].bytes == 2 * one
    assert phases(llama3, layer=3, facts=100, memory=900 * GB)["values"].bytes == 16 * one
    assert phases(llama3, layer=3, facts=100, memory=0)["values"].bytes == one  # at least one fact runs


def test_the_file_has_one_row_and_one_column_for_each_map():
    found = plan(LLAMA3, EditConfig(layer=[3, 5]), memory=GB)
    assert found.edit_bytes == 3 * 3 * (4 * (4096 + 14336) + 240)
    assert plan(LLAMA3, EditConfig(layer=3, method="memit"), facts=7).edit_bytes == 7 * 4 * (4096 + 14336) + 240


def test_the_peak_counts_what_earlier_phases_keep(llama3):
    found = plan_of(llama3, EditConfig(layer=3, method="r-rome"), 1, 64 * GB)
    statistics, detectors, values = (phase for phase in found.phases[:2] + found.phases[3:4])
    held = statistics.kept_bytes + detectors.kept_bytes
    assert found.peak_bytes == 16_060_522_496 + max(
        statistics.bytes, statistics.kept_bytes + detectors.bytes, held + values.bytes
    )
    assert found.flops == sum(phase.flops for phase in found.phases)
    assert found.fits(found.peak_bytes)
    assert not found.fits(found.peak_bytes - 1)


def test_an_accelerator_holds_the_weights_and_main_memory_the_inverses(llama3):
    found = plan_of(llama3, EditConfig(layer=3, method="r-rome"), 1, 64 * GB)
    assert found.host_bytes >= 4 * 5_000 * M + 16 * 5_000**2
    assert found.accelerator_bytes < found.peak_bytes
    assert found.fits(found.host_bytes, found.accelerator_bytes)
    assert not found.fits(found.host_bytes - 1, found.accelerator_bytes)
    assert not found.fits(found.host_bytes, found.accelerator_bytes - 1)


def test_remedies_name_the_settings_with_which_an_edit_fits(llama3):
    auto = plan_of(llama3, EditConfig(layer="auto", method="alphaedit", covariance_tokens=20_000), 1, 64 * GB)
    lga = plan_of(llama3, replace(auto.config, layer="lga"), 1, 64 * GB)
    assert lga.peak_bytes < auto.peak_bytes
    assert "layer='lga'" in auto.remedies(lga.peak_bytes)
    assert auto.remedies(100 * GB) == []  # it fits
    assert auto.remedies(10 * GB) == []  # the weights alone do not


def test_a_remedy_may_be_the_precision(llama3):
    found = plan_of(llama3.in_precision("float32"), EditConfig(layer=3), 1, 24 * GB)
    assert found.shape.weight_bytes == 2 * 16_060_522_496
    assert found.remedies(24 * GB) == ["dtype=torch.bfloat16"]


def test_remedies_that_help_only_together_are_named_together(llama3):
    config = EditConfig(layer=3, method="alphaedit", covariance_tokens=20_000)
    found = plan_of(llama3.in_precision("float32"), config, 1, 20 * GB)
    (remedy,) = found.remedies(20 * GB)
    assert "dtype=torch.bfloat16" in remedy
    assert "covariance_tokens=1000" in remedy


def test_half_precision_halves_weights_and_activations():
    config = TINY_CONFIGS["llama"]()
    whole, half = (plan(config, EditConfig(layer=0), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.shape.weight_bytes * 2 == whole.shape.weight_bytes
    assert half.peak_bytes < whole.peak_bytes
    assert half.flops == whole.flops


def test_more_layers_and_facts_cost_more(llama3):
    text = {"covariance_tokens": 5_000}
    one = plan_of(llama3, EditConfig(layer=3, **text), 1, 64 * GB)
    assert plan_of(llama3, EditConfig(layer=[3, 4], **text), 1, 64 * GB).flops > one.flops
    ten, alone = (phases(llama3, layer=3, facts=facts) for facts in (10, 1))
    for name in ("wordings", "markers", "values"):
        assert ten[name].flops == 10 * alone[name].flops
    for name in ("MLP statistics", "spare neurons", "first marker"):  # once for each model
        assert ten[name].flops == alone[name].flops
    assert plan_of(llama3, EditConfig(layer="sweep", **text), 1, 64 * GB).flops > 1000 * one.flops


@pytest.mark.parametrize("name", [name for name in TINY_CONFIGS if name != "gpt2"])
def test_forwards_cost_what_is_counted(name):
    model, work = tiny_model(name), Work(Shape.of(TINY_CONFIGS[name]()), EditConfig(layer=0), 1, 0)
    with torch.no_grad(), measuring() as cost:
        model(input_ids=torch.arange(24).view(2, 12), use_cache=False)
    assert work.forward(24, 12, 3, 24) == pytest.approx(cost().flops, rel=0.05)


def test_second_moments_have_the_planned_size(tokenizer):
    lm = EditModel(tiny_model("llama"), EditConfig(layer=1), tokenizer).lm
    text = ["The Eiffel Tower is in the city of Rome." * 20]
    for tokens, rows in ((100, MLP_WIDTH), (10, 10)):
        moments = second_moments(lm, text, [0, 1, 2], tokens, hold_keys=True)
        options = {"layer": [0, 1, 2], "method": "memit", "covariance_tokens": tokens}
        found = phases(Shape.of(TINY_CONFIGS["llama"]()), **options)["key statistics"]
        assert found.kept_bytes == sum(moment.nbytes for moment in moments.values()) == 3 * 4 * rows * MLP_WIDTH


def test_moments_of_mlps_have_the_planned_size(tokenizer):
    config = EditConfig(layer=0, covariance_tokens=100)
    model = EditModel(tiny_model("llama"), config, tokenizer)
    moments = known_neurons(model.lm, config, [0, 2])
    size = sum(tensor.nbytes for _, of_layer in moments.values() for tensor in vars(of_layer).values())
    assert plan(TINY_CONFIGS["llama"](), config).phases[0].kept_bytes == size


@pytest.mark.parametrize(("name", "method"), [("llama", "r-rome"), ("gpt2", "memit"), ("mixtral", "r-rome")])
def test_the_edit_on_disk_has_the_planned_size(name, method, tokenizer, tmp_path):
    config = fast_config(method=method)
    model = EditModel(tiny_model(name), config, tokenizer)
    model.edit([TOWER, MERKEL])
    model.save_pretrained(tmp_path / "edit")
    planned = plan((TINY_CONFIGS | EXPERTS_CONFIGS)[name](), config, facts=2).edit_bytes
    assert (tmp_path / "edit" / ADAPTER_WEIGHTS).stat().st_size == pytest.approx(planned, abs=80)


def test_an_edit_by_neurons_has_the_planned_size(tokenizer, tmp_path):
    config = fast_config(layer=0, covariance="sampled", covariance_tokens=200, answer_layer=2, kept_questions=2)
    model = EditModel(tiny_model("llama"), config, tokenizer)
    edit = model.edit([TOWER])
    assert len(edit.deltas) == 6  # gate, up and down of two layers
    model.save_pretrained(tmp_path / "edit")
    size = (tmp_path / "edit" / ADAPTER_WEIGHTS).stat().st_size
    assert size == pytest.approx(plan(TINY_CONFIGS["llama"](), config).edit_bytes, abs=400)


def test_a_model_is_planned_in_its_precision():
    model = tiny_model("llama").to(torch.bfloat16)
    found = plan(model, EditConfig(layer=0))
    assert found.shape.weights == {"bfloat16": sum(parameter.nbytes for parameter in model.parameters())}


def test_the_text_of_a_plan(llama3):
    text = str(plan_of(llama3, EditConfig(layer="lga", covariance_tokens=5_000), 1, 64 * GB))
    assert text.startswith("weights: 16.1 GB\nlayer selection: 1.4 GB, ")
    assert re.search(r"\npeak: [\d.]+ GB, [\d.]+ TFLOP\nedit on disk: [\d.]+ kB$", text)


def test_a_plan_is_frozen_and_says_what_it_leaves_out(llama3):
    found = plan_of(llama3, EditConfig(layer="causal_tracing", method="ft-l"), 1, GB)
    assert isinstance(found, Plan)
    assert len(found.notes) == 2
    with pytest.raises(AttributeError):
        found.facts = 2


def test_errors_name_the_remedy():
    with pytest.raises(UnsupportedArchitectureError, match="target_modules="):
        plan(UNSUPPORTED_CONFIGS["mamba"]())
    with pytest.raises(ValueError, match=r"Layer 7 cannot be edited.*choose one"):
        plan(TINY_CONFIGS["llama"](), EditConfig(layer=7))
    with pytest.raises(TypeError, match="AutoConfig"):
        plan("llama")
    wide = replace(Shape.of(EXPERTS_CONFIGS["mixtral"]()), key_width=100_000)
    with pytest.raises(ValueError, match="covariance='identity'"):
        plan_of(wide, EditConfig(layer=0), 1, GB)
    assert plan_of(wide, EditConfig(layer=0, covariance="identity"), 1, GB).phases


def test_numbers_of_layers():
    assert numbers([3]) == "3"
    assert numbers(range(32)) == "0 to 31"
    assert numbers([0, 1, 2, 5, 7, 8]) == "0 to 2, 5 and 7 to 8"


def test_the_command_prints_the_plan(capsys, tmp_path, tokenizer):
    folder = saved_model(tmp_path / "model", tokenizer)
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()  # the config is enough
    code, output, _ = run(capsys, "plan", folder, "--layer", "1", "--set", "steps=4")
    assert code == 0
    assert "3 layers, of which 0 to 2 can be edited" in " ".join(output.split())
    assert "Weights in float32" in output
    assert re.search(r"Teaching the answers .* [kM]B .* [MG]FLOP", output)
    assert "fits into" in output
    assert "less than a minute" in " ".join(output.split())


def test_the_time_is_that_of_the_operations_at_the_speed_of_a_product(llama3, monkeypatch):
    asked = []

    def speed(*arguments):
        asked.append(arguments)
        return 1e9

    monkeypatch.setattr("goldenedit.plans.product_speed", speed)
    planned = plan_of(llama3, EditConfig())
    assert planned.seconds() == planned.flops / 1e9
    assert asked == [(4096, 14336, torch.bfloat16)]
    quantized = replace(planned, shape=replace(planned.shape, weights={"uint8": 4 * GB, "float32": GB}))
    quantized.seconds()
    assert asked[1][2] == torch.bfloat16


def test_the_command_names_what_would_make_it_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("goldenedit.editing.budget.free_memory", lambda device: 24 * GB)
    LLAMA3.save_pretrained(tmp_path)
    many = ("--method", "alphaedit", "--set", "covariance_tokens=20000")
    code, output, _ = run(capsys, "plan", str(tmp_path), "--layer", "auto", *many)
    text = " ".join(output.split())
    assert code == 0
    assert "does not fit into 24.0 GB of free memory" in text
    assert "covariance_tokens=1000" in text
    code, output, _ = run(capsys, "plan", str(tmp_path), "--dtype", "float32", "--layer", "3", "--facts", "2")
    assert "It would fit with dtype=torch.bfloat16" in " ".join(output.split())
    monkeypatch.setattr("goldenedit.editing.budget.free_memory", lambda device: GB)
    code, output, _ = run(capsys, "plan", str(tmp_path))
    assert "No setting makes it fit." in output


def test_the_command_refuses_what_cannot_be_edited(capsys, tmp_path):
    UNSUPPORTED_CONFIGS["mamba"]().save_pretrained(tmp_path)
    code, _, errors = run(capsys, "plan", str(tmp_path))
    assert code == 1
    assert "Error: No dense down projection" in errors
    assert run(capsys, "plan", str(tmp_path), "--dtype", "int4")[0] == 2
