"""Fused experts: their keys against what each expert reads, and edits of them against all else that must hold."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import linear, silu

from conformance_checks import FACTS, conform
from goldenedit import EditConfig, EditModel
from goldenedit.adapters import check_fits
from goldenedit.architecture import UnsupportedArchitectureError, read_architecture
from goldenedit.architecture.experts import expert_matrices, fused_parameter
from goldenedit.architecture.hooks import recording
from goldenedit.audit import audit
from goldenedit.editors import EDITORS, editor
from goldenedit.layer_selection import CellStore, SweepOptions, sweep
from goldenedit.lm import statistics
from goldenedit.storage.folder import EditFolderError
from models import MLP_WIDTH, NUM_LAYERS, WIDTH, tiny_model
from plugins import restore_registries
from storage.contents import change_tensors, resign
from zoo import zoo_model

EXPERTS = 4
TRAINED = [name for name in EDITORS.names() if EDITORS.get(name).learns != "values"]
# One of each kind: kept transposed and with biases; in a module that returns no vector a token; a router that skips.
KINDS = {"gpt_oss": "mlp.experts", "jetmoe": "mlp", "zaya": "mlp.experts", "mixtral": "mlp.experts"}
CONFIG = EditConfig(layer=1, contexts=3, context_length=4, steps=4, clamp=20.0, stop_loss=1e-6, covariance="identity")


def ids(count: int = 12) -> torch.Tensor:
    return torch.randint(100, (2, count), generator=torch.Generator().manual_seed(0))


def recorded(model, architecture, layer=1, tokens=12):
    with recording({"it": architecture.down_projection(model, layer)}) as record, torch.no_grad():
        model(input_ids=ids(tokens), use_cache=False)
    return record


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(), use_cache=False).logits


def edited(tokenizer, model=None, **options):
    return EditModel(tiny_model("mixtral") if model is None else model, replace(CONFIG, **options), tokenizer)


def test_the_experts_of_each_layer_are_found_with_the_module_that_sums_them_up():
    architecture = read_architecture(tiny_model("mixtral"))
    for layer in range(NUM_LAYERS):
        path = f"model.layers.{layer}.mlp.experts"
        assert architecture.down_projections[layer] == f"{path}.down_proj"
        assert architecture.mlp_linears[layer] == (f"{path}.gate_up_proj", f"{path}.down_proj")
        assert architecture.experts[layer].site == path
        assert architecture.shape(tiny_model("mixtral"), layer) == (WIDTH, EXPERTS * MLP_WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_the_smallest_whose_output_is_one_vector_a_token(kind):
    architecture = read_architecture(zoo_model(kind))
    assert architecture.experts[1].site == f"{architecture.layers}.1.{KINDS[kind]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_matter(dtype):
    model = tiny_model("mixtral")
    assert read_architecture(copy.deepcopy(model).to(dtype)) == read_architecture(model)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_asking_for_keys_leave_the_model_as_it_was(kind):
    model = zoo_model(kind)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    frozen = next(name for name in before if name.endswith(("down_proj", "output_linear.weight")))
    before[frozen][0].requires_grad_(False)
    architecture = read_architecture(model)
    architecture.keys(model, 1, recorded(model, architecture).calls["it"])
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.requires_grad == (name != frozen)
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_keys_are_what_each_expert_reads_times_the_weight_that_the_router_gives_it(implementation):
    model = tiny_model("mixtral")
    model.config._experts_implementation = implementation
    architecture = read_architecture(model)
    call = recorded(model, architecture).calls["it"]
    hidden, picked, weights = call[0]
    gate_up = model.model.layers[1].mlp.experts.gate_up_proj
    expected = torch.zeros(len(hidden), EXPERTS, MLP_WIDTH)
    for token in range(len(hidden)):
        for expert, weight in zip(picked[token].tolist(), weights[token], strict=True):
            gate, up = linear(hidden[token], gate_up[expert]).chunk(2)
            expected[token, expert] = weight * silu(gate) * up
    keys = architecture.keys(model, 1, call)
    torch.testing.assert_close(keys, expected.flatten(1))
    assert ((keys.view(-1, EXPERTS, MLP_WIDTH) != 0).any(2).sum(1) == 2).all()  # those of the others are zero


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 40])  # fewer, and more, than the model is wide
def test_the_output_moves_by_the_change_of_the_weights_times_the_key(kind, tokens):
    model = zoo_model(kind)
    architecture = read_architecture(model)
    before = recorded(model, architecture, tokens=tokens)
    keys = architecture.keys(model, 1, before.calls["it"])
    A, B = torch.randn(2, keys.shape[1]), torch.randn(WIDTH, 2)
    with architecture.adding_delta(model, 1, A, B):
        after = recorded(model, architecture, tokens=tokens)
    moved = (after.outputs["it"] - before.outputs["it"]).view(-1, WIDTH)
    torch.testing.assert_close(moved, keys @ A.T @ B.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_of_a_token_does_not_depend_on_which_others_are_asked_for(kind):
    model = zoo_model(kind)
    architecture = read_architecture(model)
    call = recorded(model, architecture).calls["it"]
    some = torch.tensor([20, 3, 11])
    torch.testing.assert_close(
        architecture.keys(model, 1, call, some), architecture.keys(model, 1, call)[some], rtol=1e-4, atol=1e-5
    )


# 14 of the 15 mixtures without a dense shared expert, and two in which some layers alone have experts.
@pytest.mark.parametrize(
    "kind",
    [
        "mixtral",
        "qwen3_moe",
        "olmoe",
        "phimoe",
        "gpt_oss",
        "minimax",
        "minimax_m2",
        "mellum",
        "flex_olmo",
        "zaya",
        "granitemoe",
        "jetmoe",
        "inkling_text",
        "inkling2_text",
        "jamba",
        "mimo_v2_flash",
    ],
)
def test_an_edit_of_experts_does_what_every_edit_does(kind, tokenizer):
    found = conform(zoo_model(kind), tokenizer)
    assert not found.failures()
    assert found.editable == found.layers


def test_experts_that_peft_cannot_change_are_refused():
    # One flat parameter of a module that is not called: PEFT changes parameters while their own module runs.
    with pytest.raises(UnsupportedArchitectureError, match="No dense down projection and no fused experts were found"):
        read_architecture(zoo_model("dbrx"))


def test_an_output_that_is_not_linear_in_the_experts_is_refused():
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda *_: None)  # hooks of others are left alone
        own = layer.mlp.experts.forward
        layer.mlp.experts.forward = lambda *args, own=own: own(*args).tanh()
    with pytest.raises(UnsupportedArchitectureError):
        read_architecture(model)


def test_an_edit_changes_the_experts_of_its_layer_alone_and_its_delta_comes_back(tokenizer):
    model = edited(tokenizer)
    edit = model.edit(FACTS[0])
    path = "model.layers.1.mlp.experts.down_proj"
    assert (list(edit.deltas), edit.deltas[path].experts) == ([path], EXPERTS)
    (found,) = model.adapters.read("edit_1").values()
    torch.testing.assert_close(found.dense(), edit.deltas[path].dense())
    assert edit.facts[0].probability_after > edit.facts[0].probability_before


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "pmet"])
def test_every_editor_that_inserts_values_under_keys_works(method, tokenizer):
    model = edited(tokenizer, method=method, layer=[0, 1] if method in ("memit", "pmet") else 1)
    edit = model.edit(FACTS)
    assert all(fact.probability_after > fact.probability_before for fact in edit.facts)


def test_an_editor_that_returns_a_dense_change_works(tokenizer, monkeypatch):
    restore_registries(monkeypatch)

    @editor("dense", reads=EDITORS.get("rome").reads)
    def dense(problem):
        return EDITORS.get("rome").function(problem).dense()

    deltas = [next(iter(edited(tokenizer, method=name).edit(FACTS[0]).deltas.values())) for name in ("dense", "rome")]
    assert [delta.experts for delta in deltas] == [EXPERTS, EXPERTS]
    torch.testing.assert_close(deltas[0].dense(), deltas[1].dense(), rtol=1e-3, atol=1e-5)


def test_alphaedit_works_where_there_is_a_second_moment(tokenizer):
    model = edited(tokenizer, method="alphaedit", covariance="sampled", covariance_tokens=100)
    assert set(model.edit(FACTS).state) == {"keys/model.layers.1.mlp.experts.down_proj"}


@pytest.mark.parametrize("options", [{"method": method} for method in TRAINED] + [{"regularizer": "rect"}], ids=str)
def test_what_cannot_be_done_to_experts_is_refused_with_the_way_out(options, tokenizer):
    (wrong,) = options.values()
    text = {"covariance": "sampled"} if wrong == "crispedit" else {}
    model = edited(tokenizer, **options, **text)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.experts\.down_proj.*{wrong!r}.*('r-rome'|None)"):
        model.edit(FACTS[0])
    assert not model.edits


def test_a_second_moment_of_wide_experts_is_refused_with_the_way_out(tokenizer, monkeypatch):
    monkeypatch.setattr(statistics, "WIDEST_EXPERTS", EXPERTS * MLP_WIDTH - 1)
    model = edited(tokenizer, covariance="sampled")
    with pytest.raises(ValueError, match=r"256 dimensions together.*covariance='identity'"):
        model.edit(FACTS[0])
    model.edit_config.target_layer = None  # and before a layer is chosen, where all layers are such
    with (
        mock.patch.object(model.get_base_model(), "forward", side_effect=AssertionError("ran")),
        pytest.raises(ValueError, match="256 dimensions together"),
    ):
        model.select_layer()
    model.edit_config.target_layer = 1
    model.edit_config.covariance = "identity"
    model.edit(FACTS[0])


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe", "gpt_oss", "jamba"])  # Jamba: every other layer is dense
def test_edits_of_several_layers_stack_save_load_join_merge_and_go(kind, tokenizer, tmp_path):
    original = zoo_model(kind)
    model = edited(tokenizer, copy.deepcopy(original))
    base = logits(original)
    for layer in (2, 1, 0):
        model.edit_config.layer = model.edit_config.target_layer = layer
        model.edit(FACTS[0], name=f"layer {layer}")
    after = logits(model)
    assert (after - base).abs().max() > 0.02 * base.abs().max()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)), after)
    loaded = EditModel.from_pretrained(copy.deepcopy(original), tmp_path, tokenizer=tokenizer)
    assert torch.equal(logits(loaded), after)
    for name, edit in model.edits.items():
        for path, delta in edit.deltas.items():
            back = loaded.edits[name].deltas[path]
            assert (torch.equal(back.A, delta.A), torch.equal(back.B, delta.B)) == (True, True)
            assert back.experts == delta.experts
    with model.adapters.merged() as plain:
        torch.testing.assert_close(logits(plain), after)
    assert torch.equal(logits(model), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.add_weighted_adapter(list(model.edits), [1.0] * 3, "all")
    model.set_adapter("all")
    torch.testing.assert_close(logits(model), after)
    model.delete_adapter("all")
    model.set_adapter(list(model.edits))
    written = EditModel.from_pretrained(copy.deepcopy(original), tmp_path, tokenizer=tokenizer).merge_and_unload()
    torch.testing.assert_close(logits(written), after)
    for name in list(model.edits):
        model.delete_adapter(name)
    assert torch.equal(logits(model), base)
    assert type(model.get_base_model()) is type(original)


def test_edits_of_experts_are_combined_by_cat_alone(tokenizer):
    model = edited(tokenizer)
    for fact in FACTS:
        model.edit(fact)
    with pytest.raises(ValueError, match="'svd': use 'cat'"):
        model.add_weighted_adapter(list(model.edits), [0.5, 0.5], "mean", combination_type="svd")
    assert list(model.peft_config) == ["edit_1", "edit_2"]


def test_factors_that_are_not_of_all_experts_alike_are_refused(tokenizer, tmp_path):
    model = edited(tokenizer)
    model.edit(FACTS[0])
    model.save_pretrained(tmp_path)
    name = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    change_tensors(tmp_path / "adapter_model.safetensors", lambda tensors: tensors[name][0, 0].add_(1))
    resign(tmp_path)
    with pytest.raises(EditFolderError, match="differs between experts"):
        EditModel.from_pretrained(tiny_model("mixtral"), tmp_path, tokenizer=tokenizer)


def test_a_delta_of_other_experts_does_not_fit(tokenizer):
    edit = edited(tokenizer).edit(FACTS[0])
    (path,), (delta,) = edit.deltas, edit.deltas.values()
    check_fits(tiny_model("mixtral"), path, delta)
    with pytest.raises(ValueError, match=r"experts of shape \(2, 32, 128\), but in this model it has \(4, 32, 64\)"):
        check_fits(tiny_model("mixtral"), path, replace(delta, experts=2))
    with pytest.raises(ValueError, match="has no such module"):
        check_fits(tiny_model("llama"), path, delta)


@pytest.mark.parametrize("selector", ["selectivity", "key_response", "causal_tracing", "lga"])
def test_layers_of_different_widths_are_compared(selector, tokenizer):
    facts = [
        replace(fact, paraphrases=(f"They say that {fact.text}",), neighborhood=(f"Berlin is {fact.text[-3:]}",))
        for fact in FACTS
    ]
    config = {"layer": selector, "proxy": facts, "covariance": "sampled", "covariance_tokens": 100}
    model = edited(tokenizer, zoo_model("jamba"), **config)
    model.select_layer()
    assert all(score is not None for score in model.layer_selection.scores)


def test_the_sweep_edits_experts_beside_their_weights(tokenizer, tmp_path):
    model = edited(tokenizer)
    base = logits(model)
    facts = [replace(FACTS[0], locality=(("Paris is a", "city"),))]
    store = CellStore(tmp_path / "cells.jsonl")
    cells = sweep(model.lm, facts, CONFIG, store, SweepOptions(methods=["r-rome"]))
    assert torch.equal(logits(model), base)
    model.edit(facts[0])
    scores = model.evaluate(facts).edited["token_match"].scores
    (outcome,) = cells["r-rome", 1].outcomes
    assert outcome.matches.rewrite == pytest.approx(scores.rewrite)
    with pytest.raises(ValueError, match="'lora'"):
        sweep(model.lm, facts, CONFIG, store, SweepOptions(methods=["lora"]))


def test_the_card_tells_only_of_programs_that_load_experts(tokenizer, tmp_path):
    model = edited(tokenizer)
    model.edit(FACTS[0])
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "neither vLLM nor llama.cpp loads such an adapter" in card
    assert "LoRARequest" not in card
    assert "--gguf" not in card
    original = tiny_model("mixtral")
    original.load_adapter(tmp_path)
    assert torch.equal(logits(original), logits(model))


def test_the_audit_knows_experts(tokenizer):
    model = edited(tokenizer)
    model.edit(FACTS[0])
    (found,) = audit(model)
    assert all("is not answered" in warning for warning in found.warnings)  # nothing is told about the changes
    path = "model.layers.1.mlp.experts.down_proj"
    whole = fused_parameter(model.get_base_model(), path).norm().item()
    assert found.modules[0].norm == pytest.approx(model.edits["edit_1"].deltas[path].norm / whole)
    assert expert_matrices(model.get_base_model(), path).shape == (EXPERTS, WIDTH, MLP_WIDTH)
