"""EditModel on tiny models: what an edit does, undoes, stacks, saves and leaves alone."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from goldenedit import EditModel, EditRequest, get_edit_model
from goldenedit.adapters.layers import tuner_layers
from goldenedit.cache import cache_dir
from goldenedit.editing import prepared as prepared_module
from goldenedit.editing.values import SubjectRows
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm.tokens import encode
from goldenedit.storage.folder import EditedFact, is_edit_name, write_edit_folder
from goldenedit.storage.reading import read_edit_folder
from models import NUM_LAYERS, TINY_CONFIGS, tiny_model
from tiny_edits import MERKEL, TOWER
from tiny_edits import fast_config as config

# What stock PEFT 0.21 calls and says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

CHAT = EditRequest(messages=[{"role": "user", "content": "Where is Paris?"}], subject="Paris", target_new="Rome")
LONG = EditRequest("Paris " * 200 + "is in", "Paris", "Rome")
FACTS = [TOWER, MERKEL]
PROMPTS = [TOWER.text, "Berlin is a city.", "The quick brown fox"]
DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture
def base():
    return tiny_model("llama")


@pytest.fixture
def edit_model(base, tokenizer):
    return get_edit_model(base, config(), tokenizer)


@pytest.fixture
def two_edits(edit_model):
    edit_model.edit(TOWER)
    edit_model.edit(MERKEL, name="merkel")
    return edit_model


@pytest.fixture
def logits(tokenizer):
    """A function that runs a model on a few prompts."""

    @torch.no_grad()
    def run(model: nn.Module) -> torch.Tensor:
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return output[batch["attention_mask"].bool()].float()

    return run


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that logits agree, relative to the largest of them."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether logits differ by more than rounding."""
    return bool((one - other).abs().max() > 1e-3 * one.abs().max())


def weights(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of every parameter and buffer, by the name it has without PEFT."""
    return {
        name.replace(".base_layer", ""): tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if ".lora_" not in name
    }


def traces(model: nn.Module) -> dict[str, list[str]]:
    """Return what a failed edit could leave behind: modules, hooks, forwards on instances, modes."""
    return {
        "modules": [f"{name}: {type(module).__name__}, {module.training}" for name, module in model.named_modules()],
        "hooks": [
            name
            for name, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        ],
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
    }


# ---------------------------------------------------------------------- the core property, on every architecture


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("covariance", ["identity", "sampled"])  # without neurons of its own, and with
def test_an_edit_is_the_change_of_weights_that_it_says_it_is(name, covariance, tokenizer, logits):
    base = tiny_model(name)
    by_hand = copy.deepcopy(base)
    before, unedited = weights(base), logits(base)
    model = get_edit_model(base, config(contrast=4, covariance=covariance, steps=8, phrasings="none"), tokenizer)
    made = model.edit(TOWER)

    (fact,) = made.facts
    # In models of width 32 no neuron tells the subject from all other tokens.
    assert covariance == "sampled" or fact.probability_after > fact.probability_before
    assert weights(model.get_base_model()) == before
    for path, delta in made.deltas.items():
        weight = by_hand.get_submodule(path).weight
        dense = delta.dense()
        weight.data += dense.T if name == "gpt2" else dense
    assert_near(logits(model), logits(by_hand), 1e-4)
    assert differ(logits(model), unedited)
    with model.disable_adapter():
        assert torch.equal(logits(model), unedited)
    assert_near(logits(model), logits(by_hand), 1e-4)
    assert torch.equal(logits(model.unload()), unedited)
    assert weights(model.model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_merging_keeps_the_edited_logits(name, tokenizer, logits):
    model = get_edit_model(tiny_model(name), config(), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    edited = logits(model)
    fingerprint = model.base_info.fingerprint
    plain = model.merge_and_unload()
    assert not tuner_layers(plain)
    assert_near(logits(plain), edited, 1e-4)
    assert model.edits == {}
    assert model.active_adapters == []
    assert model.base_info.fingerprint != fingerprint


@pytest.mark.parametrize("method", ["rome", "r-rome"])
@pytest.mark.parametrize("facts", [[TOWER], FACTS], ids=["one", "batch"])
def test_every_new_answer_becomes_more_probable(base, tokenizer, method, facts):
    made = get_edit_model(base, config(method=method, steps=10), tokenizer).edit(facts)
    assert [fact.request for fact in made.facts] == facts
    assert all(fact.probability_after > fact.probability_before for fact in made.facts)
    assert made.rank == len(facts)


def test_the_probabilities_are_those_of_the_model(edit_model, tokenizer):
    answer = tokenizer(f" {TOWER.target_new}")["input_ids"]
    ids = torch.tensor([tokenizer(TOWER.text)["input_ids"] + answer])

    def probability() -> float:
        with torch.no_grad():
            log_probs = edit_model(input_ids=ids).logits[0].log_softmax(-1)
        places = torch.arange(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
        return log_probs[places, torch.tensor(answer)].mean().exp().item()

    before = probability()
    (fact,) = edit_model.edit(TOWER).facts
    assert fact.probability_before == pytest.approx(before, rel=1e-3)
    assert fact.probability_after == pytest.approx(probability(), rel=1e-3)


def test_the_three_ways_to_ask_for_an_edit_are_one(tokenizer):
    asked = [(TOWER.text, TOWER.subject, TOWER.target_new, TOWER.target_true), (TOWER,), ([TOWER, TOWER],)]
    edits = [get_edit_model(tiny_model("llama"), config(), tokenizer).edit(*call) for call in asked]
    for made in edits[1:]:
        assert made.facts == edits[0].facts
        assert torch.equal(made.deltas[DOWN.format(1)].dense(), edits[0].deltas[DOWN.format(1)].dense())


def test_several_layers_are_edited_together(base, tokenizer, logits):
    by_hand = copy.deepcopy(base)
    model = get_edit_model(base, config(layer=[1, 0], steps=8), tokenizer)
    made = model.edit(TOWER)
    assert sorted(made.deltas) == [DOWN.format(0), DOWN.format(1)]
    assert made.facts[0].probability_after > made.facts[0].probability_before
    for path, delta in made.deltas.items():
        assert delta.dense().norm() > 0
        by_hand.get_submodule(path).weight.data += delta.dense()
    assert_near(logits(model), logits(by_hand), 1e-4)


def test_a_model_in_bfloat16_is_edited(tokenizer, logits):
    model = get_edit_model(tiny_model("llama").bfloat16(), config(steps=8), tokenizer)
    made = model.edit(TOWER)
    assert made.facts[0].probability_after > made.facts[0].probability_before
    assert logits(model).isfinite().all()
    assert model.dtype == torch.bfloat16


def test_editing_leaves_the_random_state_and_the_modes_alone(base, tokenizer):
    base.train()
    base.model.layers[0].eval()
    modes = {name: module.training for name, module in base.named_modules()}
    state = torch.get_rng_state()
    model = get_edit_model(base, config(), tokenizer)
    model.edit(TOWER)
    assert torch.equal(torch.get_rng_state(), state)
    model.unload()
    assert {name: module.training for name, module in base.named_modules()} == modes


@pytest.mark.parametrize("gradients", [True, False])
def test_a_frozen_model_is_edited_whether_gradients_are_on_or_off(base, tokenizer, gradients):
    base.requires_grad_(False)
    model = get_edit_model(base, config(), tokenizer)
    with torch.set_grad_enabled(gradients):
        made = model.edit(TOWER)
    assert made.facts[0].probability_after > made.facts[0].probability_before


def test_a_copy_of_an_edited_model_is_its_own(edit_model, logits):
    edit_model.edit(TOWER)
    twin = copy.deepcopy(edit_model)
    edited = logits(edit_model)
    twin.delete_adapter("edit_1")
    assert torch.equal(logits(edit_model), edited)
    assert differ(logits(twin), edited)


def test_an_edit_in_a_disabled_context_is_on_only_behind_it(edit_model, logits):
    edit_model.edit(TOWER)
    with edit_model.disable_adapter():
        edit_model.edit(MERKEL)
        assert torch.equal(logits(edit_model), logits(tiny_model("llama")))
    assert edit_model.active_adapters == ["edit_1", "edit_2"]
    assert differ(logits(edit_model), logits(tiny_model("llama")))


def test_nothing_asks_for_gradients_after_an_edit(two_edits):
    two_edits.add_weighted_adapter(["edit_1", "merkel"], [1.0, 1.0], "both")
    two_edits.set_adapter(["both"])
    assert not any(parameter.requires_grad for parameter in two_edits.parameters())


def test_everything_else_is_the_models_own(edit_model, tokenizer):
    edit_model.edit(TOWER)
    ids = tokenizer("The", return_tensors="pt")["input_ids"]
    tokens = edit_model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, ids.shape[1] + 3)
    assert edit_model.config.model_type == "llama"
    with pytest.raises(AttributeError, match="magic"):
        _ = edit_model.magic


# ---------------------------------------------------------------------- PEFT's verbs


def test_edits_stack_and_switch_on_and_off(two_edits, logits):
    assert two_edits.active_adapters == ["edit_1", "merkel"]
    both = logits(two_edits)
    found = {}
    for name in ("edit_1", "merkel"):
        two_edits.set_adapter(name)
        assert two_edits.active_adapters == [name]
        found[name] = logits(two_edits)
        assert differ(found[name], both)
    assert differ(found["edit_1"], found["merkel"])
    two_edits.set_adapter(["merkel", "edit_1"])
    assert_near(logits(two_edits), both, 1e-5)


def test_no_edit_may_be_switched_on(two_edits, logits):
    two_edits.set_adapter([])
    assert two_edits.active_adapters == []
    assert torch.equal(logits(two_edits), logits(tiny_model("llama")))
    assert torch.equal(logits(two_edits.merge_and_unload()), logits(tiny_model("llama")))


def test_disabling_in_a_disabled_context_does_not_switch_edits_on(two_edits, logits):
    with two_edits.disable_adapter():
        with two_edits.disable_adapter():
            pass
        assert torch.equal(logits(two_edits), logits(tiny_model("llama")))


def test_the_second_edit_is_made_beside_the_active_ones(edit_model, logits):
    edit_model.edit(TOWER)
    edit_model.set_adapter([])
    edit_model.edit(MERKEL)
    assert edit_model.active_adapters == ["edit_2"]


COLOR = EditRequest("The color of The Eiffel Tower is", "The Eiffel Tower", "fox")
NEAR = EditRequest("I live near The Eiffel Tower", "The Eiffel Tower", "city", "work")  # a tiny model can learn it


def test_facts_of_one_subject_in_one_call_are_one_adapter_of_rank_one(edit_model):
    edit = edit_model.edit([TOWER, COLOR])
    assert {delta.rank for delta in edit.deltas.values()} == {1}
    assert [fact.request for fact in edit.facts] == [TOWER, COLOR]
    assert edit_model.edit([MERKEL, replace(COLOR, target_new="dog")], name="two").deltas.popitem()[1].rank == 2


@pytest.fixture
def taking(base, tokenizer) -> EditModel:
    """A model that an edit gives another answer, which takes a head with larger logits."""
    base.lm_head.weight.data *= 4
    return get_edit_model(base, config(layer=0, steps=40, clamp=50.0, phrasings="none"), tokenizer)


@pytest.fixture
def taught(monkeypatch) -> list[SubjectRows]:
    """The rows of all subjects whose values are optimized."""
    rows: list[SubjectRows] = []
    plain = prepared_module.optimize_values

    def keeping(lm, subjects, *others):
        rows.extend(subjects)
        return plain(lm, subjects, *others)

    monkeypatch.setattr(prepared_module, "optimize_values", keeping)
    return rows


@pytest.mark.parametrize(
    ("later", "facts"),
    [
        (COLOR, 2),  # the earlier fact is taught again
        (replace(NEAR, target_new="Berlin"), 1),  # it is replaced
        (replace(NEAR, target_new="work", target_true="city"), 1),  # the opposite
        (MERKEL, 1),
    ],
    ids=["another fact", "the same prompt", "the opposite", "another subject"],
)
def test_a_later_edit_takes_earlier_facts_of_its_subject_up_and_leaves_no_trace_once_deleted(
    taking, logits, taught, later, facts
):
    base = logits(taking)
    assert taking.edit(NEAR).facts[0].takes
    before = logits(taking)
    assert [len(subject.answers) for subject in taught] == [1]
    edit = taking.edit(later, name="later")
    assert [len(subject.answers) for subject in taught[1:]] == [facts]
    assert [fact.request for fact in edit.facts] == [later]
    assert {delta.rank for delta in edit.deltas.values()} == {1}
    assert differ(logits(taking), before)
    taking.delete_adapter("later")
    assert torch.equal(logits(taking), before)
    taking.delete_adapter("edit_1")
    assert torch.equal(logits(taking), base)


def test_a_fact_of_an_edit_that_is_off_or_deleted_is_not_taken_up(taking, taught):
    assert taking.edit(NEAR).facts[0].takes
    taking.set_adapter([])
    taking.edit(COLOR, name="color")
    taking.delete_adapter("edit_1")
    taking.delete_adapter("color")
    taking.edit(COLOR, name="again")
    assert [len(subject.answers) for subject in taught] == [1, 1, 1]


def test_an_edit_that_was_deleted_and_is_made_again_is_the_same(edit_model, logits):
    first = edit_model.edit(TOWER)
    before = logits(edit_model)
    edit_model.delete_adapter(first.name)
    edit_model.edit(TOWER)
    assert torch.equal(logits(edit_model), before)


def test_several_prompts_of_a_call_are_one_request(tokenizer, logits):
    prompts = [TOWER.text, "One finds The Eiffel Tower in"]
    one, other = (get_edit_model(tiny_model("llama"), config(), tokenizer) for _ in range(2))
    first = one.edit(prompts, subject=TOWER.subject, target_new="Rome")
    second = other.edit(EditRequest(subject=TOWER.subject, target_new="Rome", prompts=prompts))
    assert [fact.request for fact in first.facts] == [fact.request for fact in second.facts]
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("deleted", ["edit_1", "merkel"])
def test_deleting_an_edit_leaves_the_other(two_edits, logits, deleted):
    (kept,) = {"edit_1", "merkel"} - {deleted}
    two_edits.set_adapter(kept)
    alone = logits(two_edits)
    two_edits.set_adapter(["edit_1", "merkel"])
    two_edits.delete_adapter(deleted)
    assert list(two_edits.edits) == two_edits.active_adapters == list(two_edits.peft_config) == [kept]
    assert_near(logits(two_edits), alone, 1e-6)
    two_edits.delete_adapter(kept)
    assert two_edits.edits == {}
    assert torch.equal(logits(two_edits), logits(tiny_model("llama")))
    assert not tuner_layers(two_edits.get_base_model())


def test_deleting_an_edit_leaves_one_that_is_off(two_edits, logits):
    two_edits.set_adapter("merkel")
    two_edits.delete_adapter("merkel")
    assert two_edits.active_adapters == []
    assert torch.equal(logits(two_edits), logits(tiny_model("llama")))


def test_a_concatenation_is_the_stack(two_edits, logits):
    both = logits(two_edits)
    two_edits.add_weighted_adapter(["edit_1", "merkel"], [1.0, 1.0], "both")
    assert two_edits.active_adapters == ["edit_1", "merkel"]
    two_edits.set_adapter("both")
    assert_near(logits(two_edits), both, 1e-5)
    assert [fact.request for fact in two_edits.edits["both"].facts] == FACTS


def test_weights_scale_edits(two_edits, logits, tmp_path):
    two_edits.add_weighted_adapter(["edit_1", "merkel"], [0.5, -2.0], "mixed")
    path = DOWN.format(1)
    parts = [two_edits.edits[name].deltas[path].dense() for name in ("edit_1", "merkel")]
    torch.testing.assert_close(two_edits.edits["mixed"].deltas[path].dense(), 0.5 * parts[0] - 2.0 * parts[1])
    two_edits.set_adapter("mixed")
    two_edits.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer=two_edits.tokenizer)
    assert_near(logits(loaded), logits(two_edits), 1e-5)


def test_edits_are_numbered_where_they_have_no_name(edit_model):
    assert [edit_model.edit(TOWER).name, edit_model.edit(MERKEL).name] == ["edit_1", "edit_2"]
    edit_model.delete_adapter("edit_1")
    assert edit_model.edit(TOWER).name == "edit_1"


@pytest.mark.parametrize("name", [" ", " a", "a ", "", "a/b", "..", ".a", "a..b", "a\nb", 'a"b'])
def test_a_name_that_cannot_name_an_edit_is_refused_beside_one_that_can(edit_model, name):
    with pytest.raises(ValueError, match=r"cannot name an edit: it (is|begins|contains)") as error:
        edit_model.edit(TOWER, name=name)
    assert edit_model.edits == {}
    assert is_edit_name(re.search("as in '(.*)'", str(error.value))[1])


@pytest.mark.parametrize("name", ["2024 update", "update", "keys", "training", "v1.0", "lora", "0", "mlp", "weight"])
def test_an_edit_of_any_name_goes_through_every_verb_and_stock_peft(edit_model, tokenizer, logits, tmp_path, name):
    base = logits(edit_model)
    edit_model.edit(MERKEL, name="other")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter name")  # PEFT's, of names that are a part of its own
        edit_model.edit(TOWER, name=name)
    assert edit_model.active_adapters == list(edit_model.peft_config) == ["other", name]
    both = logits(edit_model)
    edit_model.set_adapter(name)
    alone = logits(edit_model)
    edit_model.add_weighted_adapter([name, "other"], [1.0, 1.0], f"{name} sum")
    edit_model.add_weighted_adapter([name, "other"], [1.0, 1.0], f"{name}.svd", "svd", svd_rank=2)
    for of_both in ([name, "other"], f"{name} sum", f"{name}.svd"):
        edit_model.set_adapter(of_both)
        assert_near(logits(edit_model), both, 1e-4)
    edit_model.set_adapter(name)
    edit_model.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer=tokenizer)
    assert loaded.active_adapters == [name]
    assert_near(logits(loaded), alone, 1e-5)
    assert_near(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), alone, 1e-5)
    edit_model.delete_adapter(name)
    assert edit_model.active_adapters == []
    assert_near(logits(edit_model), base, 0)
    loaded.load_adapter(tmp_path, "items")
    assert loaded.active_adapters == [name]
    assert_near(logits(loaded.merge_and_unload()), alone, 1e-5)


def test_a_name_that_is_taken_is_refused(two_edits):
    with pytest.raises(ValueError, match="'merkel' already"):
        two_edits.edit(TOWER, name="merkel")
    with pytest.raises(ValueError, match="'merkel' already"):
        two_edits.add_weighted_adapter(["edit_1"], [1.0], "merkel")
    assert two_edits.active_adapters == ["edit_1", "merkel"]


@pytest.mark.parametrize("edited", [False, True])
def test_an_unknown_name_is_refused_by_every_verb(edit_model, tmp_path, edited):
    if edited:
        edit_model.edit(TOWER)
    before = edit_model.active_adapters
    for call in (
        lambda: edit_model.set_adapter("nobody"),
        lambda: edit_model.set_adapter([*before, "nobody"]),
        lambda: edit_model.delete_adapter("nobody"),
        lambda: edit_model.add_weighted_adapter(["nobody"], [1.0], "new"),
        lambda: edit_model.save_pretrained(tmp_path / "edit", selected_adapters=["nobody"]),
    ):
        with pytest.raises(ValueError, match="no edit 'nobody'"):
            call()
    assert edit_model.active_adapters == before
    assert not (tmp_path / "edit").exists()


@pytest.mark.parametrize(("names", "factors"), [(["edit_1"], []), ([], [])])
def test_every_edit_of_a_combination_needs_a_weight(two_edits, names, factors):
    with pytest.raises(ValueError, match="one weight for each edit"):
        two_edits.add_weighted_adapter(names, factors, "new")


def test_a_combination_that_peft_does_not_know_leaves_all_as_it_was(two_edits, logits):
    before = logits(two_edits)
    with pytest.raises(ValueError, match="magic"):
        two_edits.add_weighted_adapter(["edit_1", "merkel"], [1.0, 1.0], "new", combination_type="magic")
    assert list(two_edits.peft_config) == list(two_edits.edits) == ["edit_1", "merkel"]
    assert torch.equal(logits(two_edits), before)
    two_edits.add_weighted_adapter(["edit_1", "merkel"], [1.0, 1.0], "new")


# ---------------------------------------------------------------------- saving and loading


def test_saved_edits_come_back_with_their_names_and_logits(two_edits, tokenizer, logits, tmp_path):
    two_edits.save_pretrained(tmp_path / "edit")
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    assert loaded.active_adapters == list(loaded.edits) == ["edit_1", "merkel"]
    assert_near(logits(loaded), logits(two_edits), 1e-6)
    for name, made in two_edits.edits.items():
        assert loaded.edits[name].facts == made.facts
        loaded.set_adapter(name)
        two_edits.set_adapter(name)
        assert_near(logits(loaded), logits(two_edits), 1e-6)
    assert loaded.edit_config == two_edits.edit_config


def test_a_conv1d_model_comes_back_too(tokenizer, logits, tmp_path):
    model = get_edit_model(tiny_model("gpt2"), config(layer=[0, 1]), tokenizer)
    model.edit(FACTS)
    model.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(tiny_model("gpt2"), tmp_path, tokenizer=tokenizer)
    assert_near(logits(loaded), logits(model), 1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_a_folder_may_be_loaded_as_one_edit(two_edits, tokenizer, logits, tmp_path):
    two_edits.save_pretrained(tmp_path / "edit")
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", "both", tokenizer)
    assert list(loaded.edits) == ["both"]
    assert [fact.request for fact in loaded.edits["both"].facts] == FACTS
    assert_near(logits(loaded), logits(two_edits), 1e-6)
    loaded.save_pretrained(tmp_path / "again")
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "again", tokenizer=tokenizer)
    assert_near(logits(again), logits(two_edits), 1e-6)


def test_a_loaded_adapter_is_off_until_it_is_switched_on(edit_model, tokenizer, logits, tmp_path):
    edit_model.edit(TOWER)
    edit_model.save_pretrained(tmp_path)
    other = get_edit_model(tiny_model("llama"), config(), tokenizer)
    other.load_adapter(tmp_path)
    assert other.active_adapters == []
    assert torch.equal(logits(other), logits(tiny_model("llama")))
    other.set_adapter("edit_1")
    assert_near(logits(other), logits(edit_model), 1e-6)
    with pytest.raises(ValueError, match="'edit_1' already"):
        other.load_adapter(tmp_path)
    other.load_adapter(tmp_path, adapter_name="second")
    assert other.active_adapters == ["edit_1"]
    assert list(other.edits) == ["edit_1", "second"]


def test_a_loaded_model_can_be_edited_on(two_edits, tokenizer, tmp_path):
    two_edits.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer=tokenizer)
    assert loaded.edit("Berlin is a", "Berlin", "lazy dog").name == "edit_2"
    assert loaded.active_adapters == ["edit_1", "merkel", "edit_2"]


def test_what_was_measured_of_an_edit_goes_with_it(edit_model):
    edit_model.edit(TOWER)
    edit_model.evaluate()
    edit_model.unload()
    edit_model.edit(MERKEL)
    assert edit_model._content(["edit_1"]).evaluation is None


def test_every_edit_remembers_how_it_was_made(edit_model, tokenizer, tmp_path):
    other = get_edit_model(tiny_model("llama"), config(method="memit", layer=0), tokenizer)
    other.edit(MERKEL, name="merkel")
    other.save_pretrained(tmp_path / "memit")
    edit_model.edit(TOWER)
    edit_model.load_adapter(tmp_path / "memit")
    edit_model.set_adapter(["edit_1", "merkel"])
    edit_model.save_pretrained(tmp_path / "both")
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "both", tokenizer=tokenizer)
    assert [(edit.config.method, edit.config.target_layers) for edit in again.edits.values()] == [
        ("gated", [1]),
        ("memit", [0]),
    ]
    assert "2 facts changed by gated, memit at layers 0, 1" in (tmp_path / "both" / "README.md").read_text()
    assert again.merge_and_unload().config.golden_layers == [0, 1]


def test_who_made_an_edit_stays_when_it_is_loaded_and_saved(edit_model, tokenizer, tmp_path):
    edit_model.edit(TOWER)
    content = edit_model._content(["edit_1"])
    named = replace(content.base_model, name_or_path="org/base", revision="a" * 40)
    made = [replace(content.edits[0], versions={"goldenedit": "0.0.1"})]
    write_edit_folder(tmp_path / "edit", replace(content, base_model=named, edits=made), "")
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    again.save_pretrained(tmp_path / "again")
    found = read_edit_folder(tmp_path / "again")
    assert (found.base_model, found.versions) == (named, {"goldenedit": "0.0.1"})
    again.edit(MERKEL)  # not made by those versions
    assert again.edits["edit_2"].versions["goldenedit"] != "0.0.1"
    assert again._content(["edit_1", "edit_2"]).versions["goldenedit"].startswith("0.0.1, ")


def test_figures_of_other_weights_are_not_taken_over(edit_model, tokenizer, tmp_path):
    edit_model.edit(TOWER)
    edit_model.evaluate()
    edit_model.save_pretrained(tmp_path)
    other = tiny_model("llama", seed=1)
    again = EditModel.from_pretrained(other, tmp_path, tokenizer=tokenizer, ignore_fingerprint=True)
    assert again._content(["edit_1"]).evaluation is None


def test_weights_that_are_elsewhere_are_not_merged(edit_model):
    edit_model.edit(TOWER)
    base = edit_model.get_base_model()
    module = base.get_submodule("model.layers.1.mlp.down_proj")
    module.base_layer.weight = nn.Parameter(module.base_layer.weight.to("meta"))
    with pytest.raises(ValueError, match="quantized or offloaded"), edit_model.adapters.merged():
        pass
    assert base.get_submodule("model.layers.1.mlp.down_proj") is module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_merged_model_is_the_edited_one_and_leaves_no_trace(name, dtype, tokenizer, logits):
    model = get_edit_model(tiny_model(name).to(dtype), config(), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    edited, before = logits(model), weights(model)
    with model.adapters.merged() as plain:
        assert not tuner_layers(plain)
        assert_near(logits(plain), edited, 1e-5 if dtype == torch.float32 else 3e-2)
    assert weights(model) == before
    assert torch.equal(logits(model), edited)


def test_only_the_chosen_edits_are_saved(two_edits, tokenizer, tmp_path, caplog):
    two_edits.save_pretrained(tmp_path / "one", selected_adapters=["edit_1"])
    two_edits.set_adapter("merkel")
    two_edits.save_pretrained(tmp_path / "two")
    assert "edit_1" in caplog.text
    for folder, name in (("one", "edit_1"), ("two", "merkel")):
        loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / folder, tokenizer=tokenizer)
        assert list(loaded.edits) == [name]


def test_nothing_to_save_is_an_error_that_makes_no_folder(edit_model, tmp_path):
    with pytest.raises(ValueError, match="no active edit"):
        edit_model.save_pretrained(tmp_path / "edit")
    assert not (tmp_path / "edit").exists()


def test_a_custom_proxy_set_is_remembered_when_a_loaded_edit_is_saved_again(base, tokenizer, tmp_path):
    model = get_edit_model(base, config(layer="lga", proxy=FACTS), tokenizer)
    model.edit(TOWER)
    model.save_pretrained(tmp_path / "first")
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "first", tokenizer=tokenizer)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "edit_config.json").read_text()) for name in ("first", "second"))
    assert second["proxy_hash"] == first["proxy_hash"]


def test_an_edit_is_saved_though_its_proxy_file_is_gone(base, tokenizer, tmp_path):
    proxy = tmp_path / "proxy.json"
    proxy.write_text(json.dumps([fact.to_dict() for fact in FACTS]))
    model = get_edit_model(base, config(layer="lga", proxy=str(proxy)), tokenizer)
    model.edit(TOWER)
    proxy.unlink()
    model.save_pretrained(tmp_path / "edit")
    assert (tmp_path / "edit").is_dir()


def test_the_same_edit_of_the_same_model_is_the_same_bytes(tokenizer, tmp_path):
    saved = []
    for name in ("one", "two"):
        model = get_edit_model(tiny_model("llama"), config(layer=[1, 2]), tokenizer)
        torch.rand(3)  # whatever else draws in between
        model.edit(FACTS)
        model.save_pretrained(tmp_path / name)
        saved.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert saved[0] == saved[1]


STOCK = """
import sys
import warnings
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    ids = torch.load(folder / "ids.pt")
    with torch.no_grad():
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "edit")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        base.load_adapter(str(folder / "edit"))
        torch.save([stock(**ids).logits, base(**ids).logits], folder / "logits.pt")
assert not any(name.split(".")[0] == "goldenedit" for name in sys.modules)
"""


def test_stock_peft_and_transformers_load_saved_edits_without_this_library(tokenizer, tmp_path):
    batch = {"input_ids": tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]}
    edited = {}
    for name in ("llama", "gpt2"):
        base = tiny_model(name)
        base.save_pretrained(tmp_path / name / "base")
        model = get_edit_model(base, config(layer=[0, 1]), tokenizer)
        model.edit(TOWER)
        model.edit(MERKEL)
        model.save_pretrained(tmp_path / name / "edit")
        torch.save(batch, tmp_path / name / "ids.pt")
        with torch.no_grad():
            edited[name] = model(**batch).logits
    folders = [str(tmp_path / name) for name in edited]
    output = subprocess.run([sys.executable, "-c", STOCK, *folders], capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    assert "missing" not in output.stderr.lower()
    for name, expected in edited.items():
        for found in torch.load(tmp_path / name / "logits.pt"):
            assert_near(found, expected, 1e-5)


def test_edits_of_another_base_model_are_refused_by_both_names(edit_model, tokenizer, logits, tmp_path):
    edit_model.edit(TOWER)
    edit_model.save_pretrained(tmp_path)
    other = tiny_model("llama", seed=1)
    before = traces(other), logits(other)
    with pytest.raises(ValueError, match=r"made on .* but this model is .*ignore_fingerprint=True") as error:
        EditModel.from_pretrained(other, tmp_path, tokenizer=tokenizer)
    made_on = edit_model.base_info
    assert made_on.fingerprint in str(error.value)
    assert made_on.name_or_path in str(error.value)
    assert traces(other) == before[0]
    assert torch.equal(logits(other), before[1])
    loaded = EditModel.from_pretrained(other, tmp_path, tokenizer=tokenizer, ignore_fingerprint=True)
    assert differ(logits(loaded), before[1])


@pytest.mark.parametrize(("made_in", "loaded_in"), [*permutations((torch.float32, torch.float16, torch.bfloat16), 2)])
def test_an_edit_made_in_one_precision_loads_on_the_same_checkpoint_in_another(made_in, loaded_in, tokenizer, tmp_path):
    def wrapped(dtype, seed=0):
        return EditModel(tiny_model("llama", seed=seed).to(dtype), config(), tokenizer)

    model = wrapped(made_in)
    model.edit(TOWER)
    model.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(tiny_model("llama").to(loaded_in), tmp_path, tokenizer=tokenizer)
    assert loaded.edits.keys() == model.edits.keys()
    assert loaded.base_info == wrapped(loaded_in).base_info  # and not that of the precision it was made in
    with pytest.raises(ValueError, match="ignore_fingerprint=True"):
        wrapped(loaded_in, seed=1).load_adapter(tmp_path)


def test_edits_of_another_shape_are_refused_whatever_is_ignored(edit_model, tokenizer, tmp_path):
    edit_model.edit(TOWER)
    edit_model.save_pretrained(tmp_path)
    for name, message in (("gpt2", "has no such module"), ("bloom", "has no such module")):
        with pytest.raises(ValueError, match=message):
            EditModel.from_pretrained(tiny_model(name), tmp_path, tokenizer=tokenizer, ignore_fingerprint=True)
    wider = tiny_model("llama")
    wider.model.layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False)
    for projection in ("gate_proj", "up_proj"):
        setattr(wider.model.layers[1].mlp, projection, nn.Linear(32, 48, bias=False))
    with pytest.raises(ValueError, match=r"\(32, 64\).*\(32, 48\)"):
        EditModel.from_pretrained(wider, tmp_path, tokenizer=tokenizer, ignore_fingerprint=True)
    assert not tuner_layers(wider)


def test_a_damaged_folder_leaves_the_model_as_it_was(two_edits, logits, tmp_path):
    two_edits.save_pretrained(tmp_path)
    (tmp_path / "edits.json").write_text("[]")
    before = logits(two_edits)
    with pytest.raises(ValueError, match="digest differs"):
        two_edits.load_adapter(tmp_path, adapter_name="third")
    assert list(two_edits.edits) == ["edit_1", "merkel"]
    assert torch.equal(logits(two_edits), before)


# ---------------------------------------------------------------------- all or nothing


@contextmanager
def unchanged(model: EditModel, logits):
    """Assert that what runs inside leaves no trace in the model."""
    base = model.get_base_model()
    before = (logits(model), traces(base), weights(base), model.active_adapters, list(model.edits))
    yield
    assert model.get_base_model() is base
    found = (logits(model), traces(base), weights(base), model.active_adapters, list(model.edits))
    assert torch.equal(found[0], before[0])
    assert found[1:] == before[1:]
    assert found[1]["hooks"] == []
    assert list(model.peft_config) == list(model.edits)


def prepared(tokenizer, edited: bool) -> EditModel:
    """Return a model before its first edit, or with two edits of which one is on."""
    model = get_edit_model(tiny_model("llama"), config(layer=[0, 1]), tokenizer)
    if edited:
        model.edit(TOWER)
        model.edit(MERKEL, name="merkel")
        model.set_adapter("merkel")
    return model


both = pytest.mark.parametrize("edited", [False, True], ids=["first edit", "third edit"])


@both
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (CHAT, "no chat template"),
        (EditRequest(TOWER.prompt, TOWER.subject, "Berlin"), "contradict"),
        (LONG, "tokens"),
    ],
    ids=["a chat without a template", "a contradiction", "too long"],
)
def test_a_request_that_cannot_be_served_leaves_no_trace(tokenizer, logits, edited, bad, message):
    model = prepared(tokenizer, edited)
    with unchanged(model, logits), pytest.raises(ValueError, match=message):
        model.edit([MERKEL, TOWER, bad])


def test_no_request_at_all_is_refused(edit_model):
    for arguments in (([],), ("A prompt",), ("A prompt", "prompt"), (TOWER, "The Eiffel Tower")):
        with pytest.raises(ValueError, match=r"edit\(\)"):
            edit_model.edit(*arguments)


@pytest.mark.parametrize(
    "contexts",
    [
        1,
        2,
    ],
)
def test_weights_that_are_not_numbers_are_refused_and_leave_no_trace(base, tokenizer, contexts):
    model = get_edit_model(base, config(contexts=contexts), tokenizer)
    base.lm_head.weight.data[5, 5] = torch.nan
    before = traces(base)
    with pytest.raises(ValueError, match="not finite"):
        model.edit(TOWER)
    assert traces(base) == before
    assert model.edits == {}
    assert model.active_adapters == []


class Interruption:
    """A hook that interrupts at its n-th call, as Ctrl-C would, and counts its calls; 0 for never."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0

    def __call__(self, module: nn.Module, *args: object) -> None:
        if isinstance(module, nn.ModuleList):  # made by every forward that takes a slice of its layers
            return
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


def on_forward(model: EditModel, hook: Interruption):
    return model.get_base_model().model.layers[2].register_forward_hook(hook)


def on_adding(model: EditModel, hook: Interruption):
    return nn.modules.module.register_module_module_registration_hook(hook)


@functools.cache
def uninterrupted(tokenizer, edited: bool, register) -> tuple[int, list[EditedFact]]:
    """Return how often a hook is called in an edit that is not interrupted, and what comes of the edit."""
    counter = Interruption(0)
    model = prepared(tokenizer, edited)
    handle = register(model, counter)
    facts = model.edit(FACTS, name="later").facts
    handle.remove()
    return counter.calls, facts


def assert_interrupted_without_a_trace(tokenizer, logits, edited, register, share: float) -> None:
    """Interrupt an edit at a share of all the calls that a hook sees in one that is not interrupted."""
    calls, wanted = uninterrupted(tokenizer, edited, register)
    model = prepared(tokenizer, edited)
    with unchanged(model, logits):
        handle = register(model, Interruption(1 + round(share * (calls - 1))))
        try:
            with pytest.raises(KeyboardInterrupt):
                model.edit(FACTS)
        finally:
            handle.remove()
    assert model.edit(FACTS, name="later").facts == wanted


@both
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_an_interrupted_forward_leaves_no_trace(tokenizer, logits, edited, share):
    assert_interrupted_without_a_trace(tokenizer, logits, edited, on_forward, share)


@pytest.mark.parametrize(
    ("edited", "share"),
    [
        (False, 0.0),
        (False, 0.1),
        (False, 0.5),
        (False, 1.0),
        *((True, share) for share in (0.0, 0.3, 0.7, 1.0)),
    ],
)
def test_an_interrupted_adding_of_the_adapter_leaves_no_trace(tokenizer, logits, edited, share):
    assert_interrupted_without_a_trace(tokenizer, logits, edited, on_adding, share)


def test_a_failed_edit_of_another_layer_leaves_no_trace(tokenizer, logits):
    model = prepared(tokenizer, edited=True)
    model.edit_config.target_layer = 2
    base = model.get_base_model()

    def interrupt(*args: object) -> None:
        if "edit_2" in model.peft_config:
            raise KeyboardInterrupt

    with unchanged(model, logits):
        handle = base.lm_head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.edit(TOWER)
        handle.remove()


def test_a_failed_batch_keeps_the_edits_before_it(two_edits, logits):
    with unchanged(two_edits, logits), pytest.raises(ValueError, match="tokens"):
        two_edits.edit([TOWER, LONG])
    two_edits.edit(TOWER)


# ---------------------------------------------------------------------- layers


def test_lga_fills_the_layer_and_its_scores_and_keeps_them(base, tokenizer):
    options = config(layer="lga", layer_pattern="golden", proxy=FACTS)
    first = get_edit_model(base, options, tokenizer).edit_config
    assert len(first.layer_scores) == NUM_LAYERS
    assert first.target_layer in range(NUM_LAYERS)
    (path,) = (cache_dir() / "layer_scores").iterdir()
    assert json.loads(path.read_text())["scores"] == first.layer_scores
    path.write_text(json.dumps({**json.loads(path.read_text()), "scores": [0.0, 2.0, 1.0]}))
    wider = replace(options, tukey_kappa=9, target_layer=None)
    second = get_edit_model(tiny_model("llama"), wider, tokenizer).edit_config
    assert (second.layer_scores, second.target_layer) == ([0.0, 2.0, 1.0], 1)


@pytest.mark.parametrize(
    "content",
    [
        b"{not JSON",
        b"{}",
        b"[]",
        b"\xff\xfe",
    ],
)
def test_a_damaged_cache_file_is_computed_again(base, tokenizer, content):
    options = config(layer="lga", proxy=FACTS)
    scores = get_edit_model(base, options, tokenizer).edit_config.layer_scores
    (path,) = (cache_dir() / "layer_scores").iterdir()
    path.write_bytes(content)
    again = get_edit_model(tiny_model("llama"), config(layer="lga", proxy=FACTS), tokenizer).edit_config
    assert again.layer_scores == scores
    assert json.loads(path.read_text())["scores"] == scores


@pytest.mark.parametrize("selector", ["selectivity", "causal_tracing"])
def test_other_selectors_fill_the_layer_of_their_largest_score(selector, base, tokenizer):
    facts = [replace(fact, paraphrases=(fact.text,), neighborhood=("Berlin is in",)) for fact in FACTS]
    golden = config(layer=selector, layer_pattern="golden", proxy=facts)
    first = get_edit_model(base, golden, tokenizer).edit_config
    assert len(first.layer_scores) == NUM_LAYERS
    assert first.target_layer == max(range(NUM_LAYERS), key=first.layer_scores.__getitem__)
    best = get_edit_model(base, config(layer=selector, proxy=facts, layer_pattern="best", pattern_layers=2), tokenizer)
    assert first.target_layer in best.edit_config.target_layer


def test_lga_is_run_without_the_edits_that_are_on(base, tokenizer):
    model = get_edit_model(base, config(layer="lga", proxy=FACTS), tokenizer)
    scores = list(model.edit_config.layer_scores)
    model.edit(TOWER)
    (path,) = (cache_dir() / "layer_scores").iterdir()
    path.unlink()
    model.select_layer()
    assert model.edit_config.layer_scores == pytest.approx(scores, rel=1e-5)
    assert model.active_adapters == ["edit_1"]


def test_no_layer_is_published_for_a_model_without_a_name(base, tokenizer):
    with pytest.raises(ValueError, match="No layer is published"):
        get_edit_model(base, config(layer="published"), tokenizer)


@pytest.mark.parametrize("layer", [NUM_LAYERS, [0, 99]])
def test_a_layer_that_is_not_there_is_named(base, tokenizer, layer):
    with pytest.raises(ValueError, match=f"Layer {NUM_LAYERS if layer == NUM_LAYERS else 99} cannot be edited"):
        get_edit_model(base, config(layer=layer), tokenizer)


def test_down_projections_may_be_named_by_hand(base, tokenizer):
    model = get_edit_model(base, config(target_modules="model.layers.{}.self_attn.o_proj"), tokenizer)
    assert list(model.edit(TOWER).deltas) == ["model.layers.1.self_attn.o_proj"]


# ---------------------------------------------------------------------- what cannot be wrapped


def test_something_else_than_a_causal_lm_is_a_type_error(tokenizer):
    with pytest.raises(TypeError, match="Linear"):
        EditModel(nn.Linear(2, 2), config(), tokenizer)


def test_adapters_that_are_no_lora_are_refused_by_their_kind(base, tokenizer):
    wrapped = get_peft_model(base, IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match="adapters of the kind IA3"):
            EditModel(model, config(), tokenizer)


def test_a_merged_adapter_is_refused(base, tokenizer):
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        EditModel(wrapped, config(), tokenizer)


def test_a_model_without_a_tokenizer_asks_for_one(base):
    with pytest.raises(ValueError, match="tokenizer="):
        EditModel(base, config())


def test_the_tokenizer_is_found_where_the_model_was(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = EditModel(type(base).from_pretrained(tmp_path), config())
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()


# ---------------------------------------------------------------------- what is asked, in every form


@pytest.mark.parametrize("one", [TOWER.to_dict(), [TOWER.to_dict()], (TOWER.to_dict(),), [TOWER]], ids=type)
def test_records_are_edited_and_measured_as_the_requests_that_they_are(tokenizer, logits, one):
    expected, found = (get_edit_model(tiny_model("llama"), config(), tokenizer) for _ in range(2))
    expected.edit(TOWER)
    assert found.edit(one).facts[0].request == TOWER
    assert torch.equal(logits(found), logits(expected))
    assert found.evaluate(one) == expected.evaluate([TOWER])


@pytest.mark.parametrize("one", ["Paris is in", ["Paris is in"], [{"prompt": "Paris is in"}], [3]])
def test_what_is_no_request_is_named(edit_model, one):
    with pytest.raises(ValueError, match=r"'Paris is in'|'subject' is missing|got 3"):
        edit_model.evaluate(one)


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        *((layer, "r-rome") for layer in ("lga", "selectivity", "key_response", "causal_tracing", "sweep")),
        *((1, method) for method in ("memit", "pmet", "alphaedit", "ft-l", "lora", "crispedit", "ultraedit")),
    ],
)
def test_inside_inference_mode_all_is_as_outside(tokenizer, logits, monkeypatch, tmp_path, layer, method):
    fact = replace(TOWER, paraphrases=("You and The Eiffel Tower",), neighborhood=("Angela Merkel is in",))
    options = config(layer=layer, method=method, covariance="sampled", covariance_tokens=300, proxy=[fact])
    models = []
    for mode in (False, True):
        monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path / str(mode)))
        model = EditModel(tiny_model("llama"), copy.copy(options), tokenizer)
        with torch.inference_mode() if mode else torch.enable_grad():
            model.select_layer()
            model.edit(FACTS, name="facts")
            model.evaluate(FACTS)
            assert torch.is_inference_mode_enabled() == mode
        models.append(model)
    one, other = models
    assert one.edit_config == other.edit_config
    assert torch.equal(logits(one), logits(other))
    assert one.evaluate(FACTS) == other.evaluate(FACTS)
    assert not any(parameter.is_inference() for parameter in other.parameters())
    assert [fact.probability_after for fact in other.edit([MERKEL]).facts] == [
        fact.probability_after for fact in one.edit([MERKEL]).facts
    ]


def test_edits_loaded_combined_and_merged_inside_inference_mode_are_differentiated_through_outside(
    two_edits, tokenizer, tmp_path
):
    two_edits.save_pretrained(tmp_path)
    base = tiny_model("llama")
    with torch.inference_mode():
        loaded = EditModel.from_pretrained(base, tmp_path, tokenizer=tokenizer)
        loaded.add_weighted_adapter(["edit_1", "merkel"], [1.0, 1.0], "both")
    loaded.edit(TOWER, name="again")
    with torch.inference_mode():
        merged_model = loaded.merge_and_unload(safe_merge=True)
    assert not any(parameter.is_inference() for parameter in merged_model.parameters())
    EditModel(merged_model, config(), tokenizer).edit(TOWER)


def test_weights_that_no_gradient_passes_are_refused_with_the_remedy(base, tokenizer):
    with torch.inference_mode():
        made_inside = copy.deepcopy(base)
    with pytest.raises(ValueError, match="load it outside"):
        EditModel(made_inside, config(), tokenizer)


# ---------------------------------------------------------------------- where the subject is, and how the answer joins


def test_white_space_around_the_subject_edits_the_same_word(tokenizer, logits):
    expected, found = (get_edit_model(tiny_model("llama"), config(), tokenizer) for _ in range(2))
    expected.edit("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome")
    found.edit("The Eiffel Tower is in the city of", "The Eiffel Tower ", "Rome")
    assert torch.equal(logits(found), logits(expected))


def test_a_doubtful_place_of_the_subject_is_told_with_the_remedy_and_a_certain_one_is_not(edit_model, caplog):
    with caplog.at_level(logging.WARNING):
        edit_model.edit("Rome? No, in Rome one is", "Rome", "London")
        edit_model.edit("In London and London you are", "don", "Rome")
    told = doubts(caplog)
    assert len(told) == 2
    assert "'Rome' occurs 2 times in 'Rome? No, in Rome one is'" in told[0]
    assert "'Rome? No, in [Rome] one is'" in told[0]
    assert "write {} in its place" in told[0]
    caplog.clear()
    edit_model.edit("{}? No, in Rome you are", "Rome", "London")
    edit_model.edit(MERKEL)
    assert doubts(caplog) == []


def doubts(caplog):
    """Return the warnings about ambiguous subjects."""
    messages = (record.getMessage() for record in caplog.records)
    return [message for message in messages if "This occurrence is edited" in message]


def test_the_many_doubts_of_a_batch_are_counted(edit_model, caplog):
    facts = [EditRequest(f"Rome, in Rome {number} is", "Rome", "London") for number in range(8)]
    edit_model.edit(facts)
    assert len(doubts(caplog)) == 5
    assert any("subjects of 3 more requests" in record.getMessage() for record in caplog.records)


def test_an_edit_behind_an_opening_quote_is_of_the_word_without_a_space(edit_model, tokenizer):
    request = EditRequest('The Eiffel Tower is in the city of "', "The Eiffel Tower", "Rome")
    fact = edit_model.edit(request).facts[0]
    ids = tokenizer(request.text).input_ids
    answer = tokenizer("Rome").input_ids
    with torch.no_grad():
        scores = edit_model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(answer)[:, None]).mean().exp().item()
    assert fact.probability_after == pytest.approx(expected, rel=1e-4)


def test_an_answer_that_is_marked_as_joined_is_so_in_edit_evaluation_and_after_loading(edit_model, tokenizer, tmp_path):
    fact = EditRequest("The Eiffel Tower is in the", "The Eiffel Tower", "re", "Paris", ("You and I in the",), joint="")
    edited = edit_model.edit(fact).facts[0]
    evaluated = edit_model.evaluate([fact])
    pairs = [(prompt + "re", prompt) for prompt in (fact.text, *fact.paraphrases)]
    for text, prompt in pairs:
        (found,) = likelihoods(edit_model.lm, [(prompt, fact.target_new)])
        assert tokenizer.decode(encode(tokenizer, prompt, fact.target_new).input_ids) == text
        if prompt == fact.text:
            assert edited.probability_after == pytest.approx(math.exp(-found.nll), rel=1e-4)
    edit_model.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer=tokenizer)
    assert loaded.edits["edit_1"].facts[0].request == fact
    assert loaded.evaluate().to_dict()["edited"] == evaluated.to_dict()["edited"]
