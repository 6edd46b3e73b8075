"""Wherever the weights are kept and however the model runs, an edit is the same."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from goldenedit import EditConfig, EditModel, EditRequest, devices, get_edit_model
from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import evaluating
from goldenedit.audit import audit
from goldenedit.devices import execution_device, input_device, onloaded_parameter, return_free_memory
from goldenedit.editing.rows import subject_rows
from goldenedit.editing.values import KeptRow, ValueOptions, optimize_values
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.storage.fingerprint import fingerprint, weight_hashes
from models import NUM_LAYERS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

TOWER = EditRequest(
    "The Eiffel Tower is in the city of",
    "The Eiffel Tower",
    "Rome",
    "Paris",
    paraphrases=("One finds The Eiffel Tower in",),
    neighborhood=("Berlin is in the city of",),
)
MERKEL = EditRequest("Angela Merkel was born in", "Angela Merkel", "Berlin", "Hamburg")
SPECIAL = {"ft-m": {"finetune_lr": 0.05}, "ultraedit": {"ultraedit_lr": 3.0}, "r-rome": {"regularizer": "rect"}}


def config(**options) -> EditConfig:
    fast = {"layer": 1, "steps": 4, "contexts": 2, "context_length": 3, "covariance": "identity", "contrast": 2}
    return EditConfig(**fast | options)


def _mapped(name: str, folder, devices: Callable[[int], str]) -> PreTrainedModel:
    """Return a model that was loaded by a device map, its parts and layers on `devices` one after the other."""
    plain = tiny_model(name)
    plain.save_pretrained(folder / "model")
    layers = read_architecture(plain).layers
    body = layers.split(".")[0]
    parts = [f"{body}.{part}" for part, _ in plain.get_submodule(body).named_children()]
    parts.remove(layers)
    parts += [f"{layers}.{index}" for index in range(NUM_LAYERS)] + ["lm_head"]
    places = {part: devices(index) for index, part in enumerate(parts)}
    if plain.config.tie_word_embeddings:
        places["lm_head"] = places[parts[0]]  # as `device_map="auto"` has it
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offloaded"
    )


WAYS: dict[str, Callable] = {
    "cpu offload": lambda name, folder: cpu_offload(tiny_model(name), execution_device="cpu"),
    "disk offload": lambda name, folder: disk_offload(tiny_model(name), folder, execution_device="cpu"),
    "map to cpu and disk": partial(_mapped, devices=lambda index: ("cpu", "disk")[index % 2]),
    "map to disk": partial(_mapped, devices=lambda index: "disk"),
}
offloaded = pytest.mark.parametrize("way", WAYS)
tied_or_not = pytest.mark.parametrize("name", ["llama", "gpt2"])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 15)[None]).logits


def everything(model: PreTrainedModel, tokenizer, folder) -> dict:
    """Go through all that is done with an edit, and return what came of it."""
    own = config(layer="lga", proxy=[TOWER, MERKEL], covariance="sampled", covariance_tokens=300)
    edited = get_edit_model(model, own, tokenizer)
    found = {"fingerprint": edited.base_info.fingerprint, "scores": own.layer_scores}
    found["deltas"] = edited.edit(TOWER).deltas
    edited.edit(MERKEL)
    found["logits"] = logits(edited)
    found["evaluation"] = edited.evaluate().to_dict()
    found["audit"] = audit(edited)
    edited.save_pretrained(folder)
    loaded = EditModel.from_pretrained(edited.unload(), folder, tokenizer=tokenizer)
    found["loaded"] = logits(loaded)
    with loaded.disable_adapter():
        found["base"] = logits(loaded)
    found["merged"] = logits(loaded.merge_and_unload())
    return found


@tied_or_not
@offloaded
def test_every_phase_of_an_offloaded_model_is_that_of_one_in_memory(name, way, tokenizer, tmp_path, monkeypatch):
    results = []
    for part, model in (("memory", tiny_model(name)), ("offloaded", WAYS[way](name, tmp_path))):
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / part / "cache"))
        results.append(everything(model, tokenizer, tmp_path / part / "edit"))
    memory, found = results
    deltas, others = memory.pop("deltas"), found.pop("deltas")
    assert deltas.keys() == others.keys()
    for path, delta in deltas.items():
        assert torch.equal(others[path].dense(), delta.dense())
    for key, value in memory.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, key


@pytest.mark.parametrize("method", SPECIAL)
def test_offloaded_weights_serve_every_kind_of_editor(method, tokenizer, tmp_path):
    found = []
    for model in (tiny_model("llama"), WAYS["map to cpu and disk"]("llama", tmp_path)):
        edited = get_edit_model(model, config(method=method, **SPECIAL[method]), tokenizer)
        found.append([delta.dense() for delta in edited.edit([TOWER, MERKEL]).deltas.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("selector", ["auto", "selectivity", "causal_tracing", "sweep"])
def test_every_selector_scores_an_offloaded_model_as_one_in_memory(selector, tokenizer, tmp_path, monkeypatch):
    scores = []
    for part, model in (("memory", tiny_model("llama")), ("disk", WAYS["disk offload"]("llama", tmp_path / "weights"))):
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / part))
        own = config(layer=selector, proxy=[TOWER])
        get_edit_model(model, own, tokenizer)
        scores.append(own.layer_scores)
    assert scores[0] == scores[1]


@offloaded
def test_offloaded_weights_are_at_hand_and_stay_where_they_were(way, tmp_path):
    model, plain = WAYS[way]("gpt2", tmp_path), tiny_model("gpt2")
    before = {name: parameter.device for name, parameter in model.named_parameters()}
    assert weight_hashes(model) == weight_hashes(plain)
    for name, parameter in plain.named_parameters():
        assert torch.equal(onloaded_parameter(model, name), parameter)
    assert before.items() <= {name: parameter.device for name, parameter in model.named_parameters()}.items()
    assert input_device(model) == torch.device("cpu")


def test_weights_that_nobody_has_are_no_error(tmp_path):
    model = tiny_model("llama").to("meta")
    assert fingerprint(model) != fingerprint(tiny_model("llama"))
    assert execution_device(model) == torch.device("cpu")


def test_offloaded_weights_are_not_merged_for_a_moment(tokenizer, tmp_path):
    edited = get_edit_model(WAYS["disk offload"]("llama", tmp_path), config(), tokenizer)
    edited.edit(TOWER)
    with pytest.raises(ValueError, match="quantized or offloaded"), edited.adapters.merged():
        pass


# ------------------------------------------------------------------ how the model runs


def _compiled(model: PreTrainedModel) -> nn.Module:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: PreTrainedModel) -> nn.Module:
    model.compile(backend="eager")
    logits(model)  # compiled before any hook is there
    return model


def _checkpointed(model: PreTrainedModel) -> nn.Module:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # by transformers' version
    model.config.use_cache = False
    return model.train()


def _attending(model: PreTrainedModel, implementation: str) -> nn.Module:
    model.set_attn_implementation(implementation)
    return model


RUNS = {
    "compiled": _compiled,
    "compiled in place": _compiled_in_place,
    "gradient checkpointing": _checkpointed,
    "eager attention": partial(_attending, implementation="eager"),
    "sdpa attention": partial(_attending, implementation="sdpa"),
}


@pytest.mark.parametrize("run", RUNS)
def test_an_edit_is_the_same_however_the_model_runs(run, tokenizer, tmp_path, monkeypatch):
    found = []
    for part, prepare in (("plain", lambda model: model), (run, RUNS[run])):
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / part))
        own = config(layer="lga", layer_pattern="golden", proxy=[TOWER], covariance="sampled", covariance_tokens=300)
        edited = get_edit_model(prepare(tiny_model("llama")), own, tokenizer)
        *_, delta = edited.edit(TOWER).deltas.values()
        found.append((own.layer_scores, delta.dense(), logits(edited.eval())))
    (scores, delta, after), (own_scores, own_delta, own_after) = found
    assert own_scores == pytest.approx(scores, rel=1e-3)
    assert (own_delta - delta).abs().max() <= 1e-4 * delta.abs().max()
    # Rounding of another kernel for attention grows in the steps of the optimization, on some processors more.
    assert (own_after - after).abs().max() <= 1e-3 * after.abs().max()


def test_compiled_code_sees_edits_come_and_go(tokenizer):
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    base = logits(compiled)
    edited = get_edit_model(compiled, config(), tokenizer)
    edited.edit(TOWER)
    assert torch.equal(logits(compiled), logits(model))
    assert (logits(compiled) - base).abs().max() > 1e-3
    with edited.disable_adapter():
        assert torch.equal(logits(compiled), base)
    edited.unload()
    assert torch.equal(logits(compiled), base)


def test_phases_run_uncompiled_and_the_model_is_compiled_again_behind_them():
    calls = []

    def backend(graph, inputs):
        calls.append("compiled")
        return graph.forward

    model = tiny_model("llama")
    model.compile(backend=backend)
    with evaluating(model):
        logits(model)
    assert calls == []
    logits(model)
    assert calls


# ------------------------------------------------------------------ where tensors are


class Transfers(TorchDispatchMode):
    """Counts what would wait for an accelerator or copy from it: `.item()`, and copies that name a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.found += 1
        return func(*args, **kwargs or {})


def test_steps_of_the_optimization_wait_for_the_device_a_fixed_number_of_times(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer, read_architecture(model))
    essence = KeptRow(encode(tokenizer, "Angela Merkel is a", None, len("Angela Merkel")), 0.0625)
    subjects = [subject_rows(lm, [fact], ["", "Well. "], kept=[essence]) for fact in (TOWER, MERKEL)]

    def transfers(steps: int) -> int:
        options = ValueOptions(steps, lr=0.1, weight_decay=0.5, clamp=4.0, stop_loss=0.0)
        with Transfers() as mode:
            optimize_values(lm, subjects, [1], options)
        return mode.found

    counts = [transfers(steps) for steps in (1, 2, 3, 4)]
    each = counts[1] - counts[0]
    assert counts == [counts[0] + step * each for step in range(4)]
    assert each <= 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_offloaded_model_needs_no_private_name_of_accelerate_or_transformers(name, tmp_path, monkeypatch):
    expected = fingerprint(tiny_model(name))
    model = disk_offload(tiny_model(name), tmp_path, execution_device="cpu")
    monkeypatch.setattr(devices, "_hooks", lambda module: [])
    monkeypatch.delattr(model, "all_tied_weights_keys")
    assert execution_device(model.get_input_embeddings()) == torch.device("cpu")
    assert fingerprint(model) == expected


def test_memory_is_returned_where_the_system_can_take_it(monkeypatch):
    return_free_memory()

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    return_free_memory()
