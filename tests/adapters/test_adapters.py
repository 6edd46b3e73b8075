"""Edits as adapters: by module and by parameter, of several EditModels around one base, under every verb of PEFT."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conformance_checks import FACTS
from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.adapters import REFUSED_VERBS as REFUSED
from goldenedit.adapters import layers as peft_layers
from goldenedit.adapters.layers import tuner_layers
from goldenedit.adapters.ownership import name_of
from models import tiny_model
from tiny_edits import IDS, MERKEL, TOWER, assert_near, differ, fast_config, logits, trainable
from zoo import zoo_model

# What stock PEFT 0.21 says when an adapter is added to a model of transformers 5 that has no name.
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

# ---------------------------------------------------------------------- PEFT takes names of modules for those that
# fused experts had: weights are named instead


@pytest.fixture
def edited(tokenizer) -> EditModel:
    """A mixture of experts with edits of a dense layer, of a shared expert, and of both, which differ in width."""
    config = EditConfig(layer=0, covariance="identity", contexts=2, context_length=3, steps=2)
    model = EditModel(zoo_model("deepseek_v2"), config, tokenizer)
    model.edit(FACTS[0])
    model.edit_config.target_layer = 2
    model.edit(FACTS[1])
    model.edit_config.target_layer = [0, 2]
    model.edit_config.method = "memit"
    model.edit("Rome is a", "Rome", "quick brown fox")
    return model


def test_edits_of_different_layers_stack(edited):
    modules = {name: sorted(edit.deltas) for name, edit in edited.edits.items()}
    assert modules == {
        "edit_1": ["model.layers.0.mlp.down_proj"],
        "edit_2": ["model.layers.2.mlp.shared_experts.down_proj"],
        "edit_3": ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.shared_experts.down_proj"],
    }
    for name, edit in edited.edits.items():
        assert set(edited.peft_config[name].target_parameters) == {f"{path}.weight" for path in edit.deltas}
    written = zoo_model("deepseek_v2")
    before = logits(written)
    for edit in edited.edits.values():
        for path, delta in edit.deltas.items():
            written.get_submodule(path).weight.data += delta.dense()
    torch.testing.assert_close(logits(edited), logits(written), rtol=1e-4, atol=1e-4)
    with edited.disable_adapter():
        assert torch.equal(logits(edited), before)


def test_they_are_loaded_by_goldenedit_and_by_peft(edited, tmp_path, tokenizer):
    edited.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(zoo_model("deepseek_v2"), tmp_path, tokenizer=tokenizer)
    assert list(loaded.edits) == list(edited.edits)
    assert all(edit.by_parameter for edit in loaded.edits.values())
    torch.testing.assert_close(logits(loaded), logits(edited), rtol=1e-4, atol=1e-4)
    stock = PeftModel.from_pretrained(zoo_model("deepseek_v2"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(edited), rtol=1e-4, atol=1e-4)


def test_one_of_them_is_deleted_and_the_rest_merged(edited):
    edited.delete_adapter("edit_2")
    after = logits(edited)
    torch.testing.assert_close(logits(edited.merge_and_unload()), after, rtol=1e-4, atol=1e-4)


def test_the_last_one_leaves_a_plain_model(edited):
    for name in list(edited.edits):
        edited.delete_adapter(name)
    assert torch.equal(logits(edited), logits(zoo_model("deepseek_v2")))
    assert not any("lora" in name for name, _ in edited.get_base_model().named_parameters())


@pytest.mark.skipif("laguna" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, reason="this transformers is older")
def test_what_peft_has_no_place_for_is_refused_and_leaves_no_trace(tokenizer):
    base = zoo_model("laguna")
    before = copy.deepcopy(base.state_dict())
    model = EditModel(base, EditConfig(layer=1, covariance="identity", contexts=1, steps=1), tokenizer)
    with pytest.raises(ValueError, match="renames weights as transformers does"):
        model.edit(FACTS[0])
    assert model.edits == {}
    after = model.get_base_model().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # by module, and by parameter
def test_an_adapter_added_beside_others_leaves_their_factors_where_they_are(kind, tokenizer):
    config = EditConfig(layer=1, covariance="identity", contexts=1, steps=1)
    model = EditModel(zoo_model(kind), config, tokenizer)
    for fact in (*FACTS, EditRequest("Rome is a", "Rome", "quick brown fox")):
        before = {name: factors(model, name) for name in model.edits}
        edit = model.edit(fact)
        assert list(tuner_layer(model).lora_A) == list(model.edits)
        for name, kept in before.items():
            assert all(one is other for one, other in zip(factors(model, name), kept, strict=True))
        (delta,) = edit.deltas.values()
        for factor, stored in zip(factors(model, edit.name), delta.stored(), strict=True):
            assert torch.equal(factor, stored)
    assert tuner_layer(model).active_adapters == list(model.edits)


def tuner_layer(model: EditModel) -> LoraLayer:
    (found,) = (module for module in model.get_base_model().modules() if isinstance(module, LoraLayer))
    return found


def factors(model: EditModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = tuner_layer(model)
    return layer.lora_A[name].weight, layer.lora_B[name].weight


# ---------------------------------------------------------------------- several EditModels around one base


@pytest.fixture
def base():
    return tiny_model("llama")


def test_two_models_around_one_base_do_not_know_of_each_other(base, tokenizer, tmp_path):
    plain = logits(base)
    alone = {}
    for fact, config in ((TOWER, fast_config()), (MERKEL, fast_config(method="memit", layer=0))):
        only = get_edit_model(tiny_model("llama"), config, tokenizer)
        only.edit(fact)
        alone[fact.subject] = logits(only)
    one = get_edit_model(base, fast_config(), tokenizer)
    two = get_edit_model(base, fast_config(method="memit", layer=0), tokenizer)
    assert one.edit(TOWER).name == two.edit(MERKEL).name == "edit_1"
    for _ in range(2):
        assert torch.equal(logits(one), alone[TOWER.subject])
        assert torch.equal(logits(two), alone[MERKEL.subject])
    for model in (one, two):
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert list(model.edits) == list(model.peft_config) == ["edit_1"]
    one.save_pretrained(tmp_path)
    loaded = EditModel.from_pretrained(base, tmp_path, tokenizer=tokenizer)  # a third one
    assert torch.equal(logits(loaded), alone[TOWER.subject])
    assert torch.equal(logits(two), alone[MERKEL.subject])
    assert one.unload() is base
    assert torch.equal(logits(two), alone[MERKEL.subject])
    assert torch.equal(logits(one), plain)
    loaded.delete_adapter("edit_1")
    assert torch.equal(logits(two), alone[MERKEL.subject])
    assert two.edit(TOWER).name == "edit_2"
    two.unload()
    assert torch.equal(logits(base), plain)
    assert not tuner_layers(base)


def test_a_merge_takes_no_edit_of_another_model(base, tokenizer):
    one, two = (get_edit_model(base, fast_config(layer=layer), tokenizer) for layer in (0, 1))
    one.edit(TOWER)
    two.edit(MERKEL)
    edited, other = logits(one), logits(two)
    with pytest.raises(ValueError, match=r"Another EditModel has edits in this model \('edit_1'\)"):
        one.merge_and_unload()
    assert torch.equal(logits(one), edited)
    assert torch.equal(logits(two), other)
    two.unload()
    assert_near(logits(one.merge_and_unload()), edited)
    assert not tuner_layers(base)


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload", "delete_adapter"])
def test_edits_that_someone_else_took_out_are_told(verb, base, tokenizer):
    user = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    getattr(user, verb)(*(["edit_1"] if verb == "delete_adapter" else []))
    for call in (lambda: logits(model), lambda: model.edit(MERKEL), model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'edit_1'\] are no longer in the model.*unload\(\)") as error:
            call()
    if verb == "delete_adapter":
        assert "deleted them. Call unload()" in str(error.value)
    else:  # after a merge, unload() leaves the edits in the weights
        assert "the weights hold the edits: load the base model again" in str(error.value)
    model.unload()
    assert model.edits == {}
    if verb != "merge_and_unload":
        assert torch.equal(logits(model), logits(tiny_model("llama")))
    model.edit(MERKEL)


def test_every_key_of_an_edit_is_its_name_again(base, tokenizer):
    names = ["edit_1", "v1.20", "l", "update"]  # PEFT's keys of the last three are not their names
    models = [EditModel(base, fast_config(steps=1, contexts=1), tokenizer) for _ in range(3)]
    for model in models:
        for name in names:
            model.edit(TOWER, name=name)
    keys = list(base.peft_config)
    assert len(keys) == len(models) * len(names)
    assert [name_of(key) for key in keys] == len(models) * names


def test_an_edit_is_made_of_the_model_without_the_edits_of_another_wrapper(base, tokenizer):
    alone = get_edit_model(tiny_model("llama"), fast_config(), tokenizer).edit(TOWER)
    get_edit_model(base, fast_config(), tokenizer)
    one = get_edit_model(base, fast_config(layer=0), tokenizer)
    one.edit(MERKEL)
    two = get_edit_model(base, fast_config(), tokenizer)
    edit = two.edit(TOWER)
    assert edit.facts == alone.facts
    assert edit.beside == ()
    for path, delta in edit.deltas.items():
        assert torch.equal(delta.dense(), alone.deltas[path].dense())


@pytest.mark.parametrize("users", [False, True], ids=["a plain model", "a PeftModel"])
def test_a_function_that_wraps_edits_and_returns_works_in_a_loop(base, users, tokenizer):
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if users else base
    before = logits(model)
    names = [name for name, _ in base.named_modules()]

    def edited(fact: EditRequest) -> torch.Tensor:
        wrapped = get_edit_model(model, fast_config(steps=1, contexts=1), tokenizer)
        assert torch.equal(logits(wrapped), before)
        assert wrapped.edit(fact).name == "edit_1"
        return logits(wrapped)

    answers = [edited(fact) for fact in (TOWER, MERKEL) * 10]
    assert all(torch.equal(answer, answers[index % 2]) for index, answer in enumerate(answers))
    assert len(base.peft_config) == 1 + users
    last = get_edit_model(model, fast_config(), tokenizer)
    assert torch.equal(logits(last), before)
    assert [name for name, _ in base.named_modules()] == names
    assert last.unload() is model


def test_a_lost_wrapper_leaves_what_was_trainable(base, tokenizer):
    base.model.embed_tokens.weight.requires_grad_(False)
    asked = trainable(base)
    get_edit_model(base, fast_config(), tokenizer).edit(TOWER)
    EditModel(base, fast_config(), tokenizer)
    assert trainable(base) == asked


def test_a_copy_owns_its_edits_and_a_copy_of_the_base_none(base, tokenizer):
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    twin = copy.deepcopy(model)
    copied = copy.deepcopy(model.get_base_model())
    del model
    beside = get_edit_model(twin.get_base_model(), fast_config(), tokenizer)
    assert torch.equal(logits(beside), logits(tiny_model("llama")))
    assert torch.equal(logits(twin), edited)
    assert torch.equal(logits(copied), edited)
    assert torch.equal(logits(get_edit_model(copied, fast_config(), tokenizer)), logits(tiny_model("llama")))
    assert not tuner_layers(copied)


def test_a_model_with_edits_can_be_pickled(base, tokenizer, tmp_path):
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    torch.save(model.get_base_model(), tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 ties its embeddings
def test_a_pickled_edit_model_owns_its_edits(name, tokenizer):
    model = get_edit_model(tiny_model(name), fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(loaded), edited)
    beside = get_edit_model(loaded.get_base_model(), fast_config(), tokenizer)
    assert torch.equal(logits(beside), logits(tiny_model(name)))
    assert torch.equal(logits(loaded), edited)
    assert_near(logits(loaded.merge_and_unload()), edited)


def test_edit_models_pickled_together_own_their_edits(base, tokenizer):
    models = [get_edit_model(base, fast_config(layer=layer), tokenizer) for layer in (0, 1)]
    for model, fact in zip(models, (TOWER, MERKEL), strict=True):
        model.edit(fact)
    edited = [logits(model) for model in models]
    one, two = pickle.loads(pickle.dumps(models))
    assert one.get_base_model() is two.get_base_model()
    for _ in range(2):
        assert torch.equal(logits(one), edited[0])
        assert torch.equal(logits(two), edited[1])
    two.unload()
    assert_near(logits(one.merge_and_unload()), edited[0])


def test_a_model_pickled_without_the_other_edit_model_has_only_its_own_edits(base, tokenizer):
    one, two = (get_edit_model(base, fast_config(layer=layer), tokenizer) for layer in (0, 1))
    one.edit(TOWER)
    two.edit(MERKEL)
    edited = logits(one)
    loaded = pickle.loads(pickle.dumps(one))
    assert_near(logits(loaded.merge_and_unload()), edited)
    assert trainable(loaded.model) == trainable(tiny_model("llama"))


def test_the_peft_model_of_a_lost_wrapper_can_be_wrapped(base, tokenizer):
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    inner = model.model
    assert isinstance(inner, PeftModel)
    del model
    again = get_edit_model(inner, fast_config(), tokenizer)
    assert torch.equal(logits(again), logits(tiny_model("llama")))
    assert again.edit(MERKEL).name == "edit_1"
    assert torch.equal(logits(again.unload()), logits(tiny_model("llama")))


# ---------------------------------------------------------------------- what asks for gradients


@pytest.mark.parametrize("call", ["disable_adapter", "evaluate", "set_adapter", "select_layer", "combine"])
def test_no_edit_ever_asks_for_gradients(call, base, tokenizer):
    model = get_edit_model(base, fast_config(layer="lga", proxy=[TOWER, MERKEL]), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    if call == "disable_adapter":
        with model.disable_adapter():
            assert not model(input_ids=IDS).logits.requires_grad
    elif call == "evaluate":
        model.evaluate()
    elif call == "set_adapter":
        model.set_adapter(["edit_2", "edit_1"])
    elif call == "select_layer":
        model.select_layer()
    else:
        model.add_weighted_adapter(["edit_1", "edit_2"], [1.0, 1.0], "both", "linear")
    assert trainable(model) == set()
    output = model(input_ids=IDS).logits
    assert output.grad_fn is None
    assert not output.requires_grad


@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "layers.1"), ("",)], ids=["nothing", "a part", "all"])
@pytest.mark.parametrize("ending", ["unload", "merge", "delete", "failed edit", "from_pretrained"])
def test_what_was_trainable_is_trainable_again(ending, frozen, base, tokenizer, tmp_path, monkeypatch):
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    asked = trainable(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    if ending == "failed edit":
        monkeypatch.setattr("goldenedit.editing.calls.likelihoods", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.edit(TOWER)
        assert trainable(base) == asked
        return
    model.edit(TOWER)
    model.edit(MERKEL)
    if ending == "unload":
        model.unload()
    elif ending == "merge":
        model.merge_and_unload()
    elif ending == "delete":
        model.delete_adapter("edit_1")
        model.delete_adapter("edit_2")
    else:
        model.save_pretrained(tmp_path)
        model.unload()
        EditModel.from_pretrained(base, tmp_path, tokenizer=tokenizer).unload()
    assert trainable(base) == asked
    parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]
    if parameters:  # and they can be trained
        base(input_ids=IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("ending", ["unload", "merge", "delete"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_was_trainable_is_so_again_behind_the_last_of_two_models(order, ending, base, tokenizer):
    asked = trainable(base)
    models = [get_edit_model(base, fast_config(), tokenizer) for _ in range(2)]
    for model in models:
        model.edit(TOWER)
    for index in order:
        if ending == "unload":
            models[index].unload()
        elif ending == "delete":
            models[index].delete_adapter("edit_1")
        elif index == order[0]:
            models[index].unload()
        else:
            models[index].merge_and_unload()
    assert trainable(base) == asked


# ---------------------------------------------------------------------- PEFT's and transformers' verbs

# Looked at one by one: they read, or say nothing of edits.
HARMLESS = {
    "active_peft_config",
    "base_model_torch_dtype",
    "get_adapter_state_dict",
    "get_layer_status",
    "get_model_config",
    "get_model_status",
    "get_nb_trainable_parameters",
    "get_prompt",
    "get_prompt_embedding_to_save",
    "has_active_enabled_adapter",
    "modules_to_save",
    "prefix",
    "prepare_inputs_for_generation",
    "prepare_model_for_gradient_checkpointing",
    "print_trainable_parameters",
    "subtract_mutated_init",
    "supports_lora_conversion",
    "target_module_mapping",
    "tuner_layer_cls",
    "uses_shared_state",
}
VERBS = {
    name
    for kind in (PeftModelForCausalLM, LoraModel, PeftAdapterMixin)
    for name in dir(kind)
    if not name.startswith("_") and name not in dir(torch.nn.Module)
}


def is_owned(name: str) -> bool:
    return any(name in vars(kind) for kind in EditModel.__mro__ if kind is not torch.nn.Module)


def test_every_verb_is_owned_or_refused_or_known_to_be_harmless():
    decided = {name for name in VERBS if is_owned(name)} | REFUSED.keys() | HARMLESS
    assert VERBS - decided == set()
    assert {"uses_shared_state"} >= HARMLESS - VERBS  # PEFT 0.20 lacks it
    assert not any(is_owned(name) for name in HARMLESS | REFUSED.keys())
    assert not HARMLESS & REFUSED.keys()


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_verb_names_what_to_call_instead(name, edited, base, tokenizer):
    model = get_edit_model(base, fast_config(), tokenizer)
    if edited:
        model.edit(TOWER)
    with pytest.raises(AttributeError, match=f"An EditModel has no {name}.*: ") as error:
        getattr(model, name)
    instead = re.findall(r"(\w+)\(", str(error.value))[1:]
    assert all(hasattr(model, verb) for verb in instead)


CALLS = {
    "get_adapter_state_dict": None,  # reads adapters that transformers loaded
    "get_model_config": "the base",
    "prepare_inputs_for_generation": (IDS,),
    "prepare_model_for_gradient_checkpointing": "the base",
    "tuner_layer_cls": None,
    "prefix": None,
    "target_module_mapping": None,
    "get_prompt": None,
    "get_prompt_embedding_to_save": None,
    "subtract_mutated_init": None,
}


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_verb_that_is_passed_through_leaves_edits_and_base_alone(name, base, tokenizer):
    plain = logits(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    verb, arguments = getattr(model, name, None), CALLS.get(name, ())
    if callable(verb) and arguments is not None:
        verb(*([base] if arguments == "the base" else arguments))
    assert torch.equal(logits(model), edited)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain)


def test_disabled_layers_come_back_and_a_new_edit_is_on(base, tokenizer):
    plain = logits(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    first = logits(model)
    model.disable_adapter_layers()
    assert torch.equal(logits(model), plain)
    assert model.active_adapters == []
    model.enable_adapter_layers()
    assert torch.equal(logits(model), first)
    model.enable_adapter_layers()  # PEFT's may be called twice, too
    assert torch.equal(logits(model), first)
    model.disable_adapter_layers()
    model.disable_adapter_layers()
    model.edit(MERKEL)
    assert model.active_adapters == ["edit_2"]
    assert differ(logits(model), plain)
    model.enable_adapter_layers()
    assert model.active_adapters == ["edit_1", "edit_2"]
    model.disable_adapter_layers()
    model.delete_adapter("edit_1")
    model.enable_adapter_layers()
    assert model.active_adapters == ["edit_2"]
    assert torch.equal(logits(model.unload()), plain)


# ---------------------------------------------------------------------- what an error or an interrupt leaves


def test_an_error_on_the_way_into_a_disabled_context_leaves_edits_on(base, tokenizer):
    model = get_edit_model(base, fast_config(), tokenizer)
    plain = logits(model)
    model.edit(TOWER)
    model.model.delete_adapter("edit_1")
    with pytest.raises(ValueError, match="There is no edit 'edit_1'"), model.disable_adapter():
        pass
    model.unload()
    model.edit(TOWER)
    assert differ(logits(model), plain)


def test_an_interrupt_on_the_way_into_a_disabled_context_leaves_edits_on(base, tokenizer, monkeypatch):
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    with monkeypatch.context() as patched:
        patched.setattr("goldenedit.adapters.layers.switch", interrupting_once(peft_layers.switch))
        with pytest.raises(KeyboardInterrupt), model.disable_adapter():
            pass
    assert torch.equal(logits(model), edited)


def interrupting_once(function):
    """Return a function that raises KeyboardInterrupt after its work, at its first call only."""
    calls = []

    def interrupted(*args, **kwargs):
        outcome = function(*args, **kwargs)
        calls.append(outcome)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return outcome

    return interrupted


def test_a_combination_that_fails_in_peft_leaves_no_trace(base, tokenizer):
    plain, asked = logits(base), trainable(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    edited = logits(model)
    with pytest.raises(RuntimeError, match="driver"):
        model.add_weighted_adapter(["edit_1", "edit_2"], [1.0, 1.0], "both", "svd", svd_driver="foo")
    assert list(model.peft_config) == ["edit_1", "edit_2"]
    assert torch.equal(logits(model), edited)
    model.add_weighted_adapter(["edit_1", "edit_2"], [1.0, 1.0], "both", "svd")
    assert model.unload() is base
    assert not tuner_layers(base)
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), plain)
    assert trainable(base) == asked


@pytest.mark.parametrize("users", [False, True], ids=["a plain model", "a PeftModel"])
def test_an_interrupt_while_peft_wraps_the_model_leaves_it_trainable(users, base, tokenizer, monkeypatch):
    user = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if users else base
    plain, asked = logits(base), trainable(base)
    model = get_edit_model(user, fast_config(), tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(LoraModel, "inject_adapter", interrupting_once(LoraModel.inject_adapter))
        with pytest.raises(KeyboardInterrupt):
            model.edit(TOWER)
    assert trainable(base) == asked
    model.edit(TOWER)
    assert model.unload() is user
    assert torch.equal(logits(base), plain)
    assert trainable(base) == asked
