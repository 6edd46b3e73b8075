"""Edits beside adapters that the user trained: a part of the model that is edited, and still the user's own."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from goldenedit import EditConfig, EditModel, get_edit_model
from goldenedit.adapters.layers import tuner_layers
from goldenedit.packaged import packaged_model
from goldenedit.storage.fingerprint import fingerprint
from models import tiny_model
from tiny_edits import IDS, MERKEL, TOWER, assert_near, differ, fast_config, logits, trainable

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # how huggingface_hub 2.4 calls its client
    # What stock PEFT 0.21 says when an adapter is added to a model of transformers 5 that has no name.
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
]

of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="transformers asks for a newer PEFT than is installed, which may not be released yet",
)
SAME, OTHER = ["down_proj"], ["q_proj", "v_proj"]  # the module that is edited, and modules that are not
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "lora with biases": {"lora_bias": True},
}


def lora_config(targets: list[str] = SAME, **options) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **options)


def fill(model: nn.Module, key: str, seed: int = 0) -> None:
    """Give an adapter factors as training would leave them: no zeros, but small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{key}" in name and "magnitude" not in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def users_model(kind: str = "lora", targets: list[str] = SAME, key: str = "default", name: str = "llama") -> PeftModel:
    """Return a tiny model with a trained adapter of the user's."""
    options = dict(KINDS[kind])
    alpha = options.pop("lora_alpha", 4)
    lora = LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model(name), lora, key).eval()
    fill(model, key)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gradients(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


everywhere = pytest.mark.parametrize("targets", [SAME, OTHER], ids=["same module", "other modules"])
all_kinds = pytest.mark.parametrize("kind", KINDS)


@all_kinds
@everywhere
def test_an_edit_is_made_on_top_and_goes_without_a_trace(kind, targets, tokenizer):
    user = users_model(kind, targets)
    before, asked, keys = logits(user), trainable(user), list(user.state_dict())
    config = copy.deepcopy(user.peft_config["default"])
    model = get_edit_model(user, fast_config(), tokenizer)
    assert torch.equal(logits(model), before)
    for fact in (TOWER, MERKEL):
        (outcome,) = model.edit(fact).facts
        assert outcome.probability_after > outcome.probability_before
    edited = logits(model)
    assert differ(edited, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), edited)
    assert trainable(user) == asked
    assert gradients(user) == []
    assert user.peft_config["default"] == config
    assert user.active_adapter == "default"
    model.delete_adapter("edit_1")
    assert trainable(user) == asked
    assert model.unload() is user
    assert torch.equal(logits(user), before)
    assert (trainable(user), list(user.state_dict())) == (asked, keys)
    assert list(user.peft_config) == ["default"]


@all_kinds
@everywhere
def test_stock_peft_loads_both_with_the_same_logits(kind, targets, tokenizer, tmp_path):
    user = users_model(kind, targets)
    model = get_edit_model(user, fast_config(layer=[0, 1]), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    user.save_pretrained(tmp_path / "lora", selected_adapters=["default"])
    model.save_pretrained(tmp_path / "edit")
    stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")
    stock.load_adapter(tmp_path / "edit", "edit")
    stock.base_model.set_adapter(["default", "edit"])
    assert_near(logits(stock), logits(model))
    loaded = EditModel.from_pretrained(
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora"), tmp_path / "edit", tokenizer=tokenizer
    )
    assert_near(logits(loaded), logits(model))


@everywhere
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saving_the_users_adapter_is_unchanged_byte_for_byte(kind, targets, tokenizer, tmp_path):
    user = users_model(kind, targets, "mine")
    user.save_pretrained(tmp_path / "before", selected_adapters=["mine"])
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    user.save_pretrained(tmp_path / "during", selected_adapters=["mine"])
    model.unload()
    user.save_pretrained(tmp_path / "behind", selected_adapters=["mine"])
    assert files(tmp_path / "before") == files(tmp_path / "during") == files(tmp_path / "behind")


def test_an_edit_saves_alone_and_records_what_it_was_made_beside(tokenizer, tmp_path, caplog):
    user = users_model(key="mine")
    model = get_edit_model(user, fast_config(), tokenizer)
    edit = model.edit(TOWER)
    assert [entry.name for entry in edit.beside] == ["mine"]
    model.save_pretrained(tmp_path / "edit")
    assert list((tmp_path / "edit").glob("mine*")) == []
    user.save_pretrained(tmp_path / "lora", selected_adapters=["mine"])

    here = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora" / "mine", adapter_name="another_name")
    caplog.clear()
    loaded = EditModel.from_pretrained(here, tmp_path / "edit", tokenizer=tokenizer)
    assert "made beside" not in caplog.text
    assert loaded.edits["edit_1"].beside == edit.beside
    assert_near(logits(loaded), logits(model))

    other = users_model(key="mine")
    fill(other, "mine", seed=1)
    for base in (tiny_model("llama"), other):
        caplog.clear()
        missing = EditModel.from_pretrained(base, tmp_path / "edit", tokenizer=tokenizer)
        assert "made beside the adapters ['mine'], which are not active here" in caplog.text
        assert missing.edits["edit_1"].beside == edit.beside


def test_the_base_model_is_the_same_with_an_adapter_on_it_or_without(tokenizer):
    plain = EditModel(tiny_model("llama"), fast_config(), tokenizer).base_info
    assert plain.fingerprint == fingerprint(tiny_model("llama"))
    for targets in (SAME, OTHER):
        assert EditModel(users_model(targets=targets), fast_config(), tokenizer).base_info == plain
    retrained = get_peft_model(tiny_model("llama"), lora_config(modules_to_save=["lm_head"]))
    assert EditModel(retrained, fast_config(), tokenizer).base_info == plain


@pytest.mark.parametrize("key", ["edit_1", "edit", "default", "lora", "my adapter"])
def test_the_users_names_are_the_users(key, tokenizer, tmp_path):
    user = users_model(key=key)
    before = logits(user)
    model = get_edit_model(user, fast_config(), tokenizer)
    name = model.edit(TOWER).name
    assert name != key
    assert list(model.edits) == [name]
    with pytest.raises(ValueError, match=f"carries an adapter '{key}' of your own: choose another name"):
        model.edit(MERKEL, name=key)
    with pytest.raises(ValueError, match="no edit"):
        model.delete_adapter(key)
    model.save_pretrained(tmp_path)
    assert list(EditModel.from_pretrained(users_model(key=key), tmp_path, tokenizer=tokenizer).edits) == [name]
    model.unload()
    assert torch.equal(logits(user), before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_user_switches_adapters_between_edits(kind, tokenizer):
    user = users_model(kind, key="first")
    user.add_adapter("second", lora_config(OTHER))
    fill(user, "second", seed=1)
    user.set_adapter("first")
    first = logits(user)
    model = get_edit_model(user, fast_config(), tokenizer)
    one = model.edit(TOWER)
    user.set_adapter("second")
    two = model.edit(MERKEL)
    assert [entry.name for edit in (one, two) for entry in edit.beside] == ["first", "second"]
    assert model.active_adapters == ["edit_1", "edit_2"]
    assert all("second" in name for name in trainable(user))
    with model.disable_adapter():
        second = logits(model)
    plain = users_model(kind, key="first")
    plain.add_adapter("second", lora_config(OTHER))
    fill(plain, "second", seed=1)
    plain.set_adapter("second")
    assert torch.equal(second, logits(plain))
    user.set_adapter("first")
    model.unload()
    assert torch.equal(logits(user), first)


def test_the_users_adapters_are_switched_beside_edits_by_name(tokenizer):
    user = users_model(key="first")
    user.add_adapter("second", lora_config(OTHER))
    fill(user, "second", seed=1)
    user.set_adapter("first")
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    model.set_adapter(["second", "edit_1"])
    assert model.adapters.others == ["second"]
    assert differ(logits(model), edited)
    model.set_adapter(["first", "edit_1"])
    assert torch.equal(logits(model), edited)


def test_the_user_trains_between_edits(tokenizer):
    user = users_model(targets=OTHER)
    model = get_edit_model(user, fast_config(), tokenizer)
    first = model.edit(TOWER)
    with model.disable_adapter():
        before = logits(model)
    factors = {name: parameter.clone() for name, parameter in user.named_parameters() if ".edit_1." in name}
    weights = [parameter for parameter in user.parameters() if parameter.requires_grad]
    assert weights
    optimizer = torch.optim.SGD(weights, lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with model.disable_adapter():
        assert differ(logits(model), before)
    assert all(torch.equal(dict(user.named_parameters())[name], factor) for name, factor in factors.items())
    second = model.edit(MERKEL)
    assert first.beside[0].name == second.beside[0].name
    assert first.beside[0].hash != second.beside[0].hash
    assert trainable(user) == trainable(users_model(targets=OTHER))


def test_what_the_model_says_is_found_again_once_the_user_has_trained(tokenizer):
    user = users_model()
    model = get_edit_model(user, fast_config(covariance="sampled", covariance_tokens=50), tokenizer)
    model.edit(TOWER)
    speaking = model.lm
    model.edit(MERKEL)
    assert model.lm is speaking
    fill(user, "default", seed=1)
    model.edit(TOWER, name="again")
    assert model.lm is not speaking


@pytest.mark.parametrize("how", ["layers", "context"])
def test_edits_beside_adapters_that_the_user_disabled_are_refused(how, tokenizer):
    user = users_model()
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)

    def refused():
        for call in (lambda: model.edit(MERKEL), lambda: logits(model), model.evaluate, model.select_layer):
            with pytest.raises(ValueError, match=r"are disabled .*enable_adapter_layers\(\)"):
                call()
        assert list(model.edits) == ["edit_1"]

    if how == "layers":
        user.base_model.disable_adapter_layers()
        refused()
        user.base_model.enable_adapter_layers()
    else:
        with user.disable_adapter():
            refused()
    assert torch.equal(logits(model), edited)
    assert not any(".edit_1" in name for name in trainable(user))
    assert not model(input_ids=IDS).logits.isnan().any()


def test_the_user_switches_the_adapter_off_alone(tokenizer):
    user = users_model()
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    user.base_model.set_adapter([])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert model.edit(MERKEL).beside == ()
    assert differ(logits(model), logits(tiny_model("llama")))


@everywhere
def test_the_user_deletes_the_adapter_between_edits(targets, tokenizer):
    user = users_model(targets=targets)
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    user.delete_adapter("default")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert model.edit(MERKEL).beside == ()
    assert model.active_adapters == ["edit_1", "edit_2"]
    assert torch.equal(logits(model.unload()), logits(tiny_model("llama")))
    assert differ(logits(model), logits(tiny_model("llama"))) is False
    model.edit(TOWER)
    assert differ(logits(model), logits(tiny_model("llama")))


def test_the_user_adds_an_adapter_behind_an_edit(tokenizer):
    user = users_model(key="first")
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    user.add_adapter("second", lora_config(OTHER))
    fill(user, "second", seed=1)
    user.set_adapter("second")
    assert [entry.name for entry in model.edit(MERKEL).beside] == ["second"]
    model.unload()
    assert list(user.peft_config) == ["first", "second"]


def test_an_adapter_that_the_user_merged_is_refused_until_it_is_out_again(tokenizer):
    user = users_model()
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    user.merge_adapter(["default"])
    for call in (lambda: logits(model), lambda: model.edit(MERKEL), model.merge_and_unload):
        with pytest.raises(ValueError, match=r"unmerge_adapter\(\)"):
            call()
    user.unmerge_adapter()
    model.edit(MERKEL)


# ---------------------------------------------------------------------- merged


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora with biases"])
@everywhere
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_writes_both_into_the_weights(name, kind, targets, tokenizer):
    if name == "gpt2":
        targets = ["mlp.c_proj"] if targets == SAME else ["c_attn"]
    user = users_model(kind, targets, name=name)
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    edited = logits(model)
    with model.adapters.merged() as plain:
        assert not tuner_layers(plain)
        assert_near(logits(plain), edited, 1e-4)
    assert torch.equal(logits(model), edited)
    merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    assert not hasattr(merged, "peft_config")
    assert_near(logits(merged), edited, 1e-4)
    assert get_edit_model(merged, fast_config(), tokenizer).edit(TOWER).beside == ()


def test_biases_are_merged_where_there_are_some_and_refused_elsewhere(tokenizer):
    model = get_edit_model(users_model("lora with biases", ["mlp.c_proj"], name="gpt2"), fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    with model.adapters.merged() as plain:
        assert_near(logits(plain), edited, 1e-4)
    assert torch.equal(logits(model), edited)
    assert_near(logits(model.merge_and_unload()), edited, 1e-4)

    model = get_edit_model(users_model("lora with biases"), fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    with pytest.raises(ValueError, match="have biases"):
        model.merge_and_unload()
    assert torch.equal(logits(model), edited)


def test_modules_that_the_user_retrained_are_part_of_the_model(tokenizer, tmp_path):
    user = get_peft_model(tiny_model("llama"), lora_config(modules_to_save=["lm_head"]), "mine").eval()
    fill(user, "mine")
    head = user.get_base_model().lm_head.modules_to_save["mine"].weight
    head.data += 0.1 * torch.randn_like(head)
    before, asked = logits(user), trainable(user)
    model = get_edit_model(user, fast_config(), tokenizer)
    first = model.edit(TOWER).beside
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    head.data += 0.01
    assert model.edit(MERKEL).beside != first
    assert trainable(user) == asked
    edited = logits(model)
    with model.adapters.merged() as plain:
        assert not any("modules_to_save" in name for name, _ in plain.named_parameters())
        assert_near(logits(plain), edited, 1e-4)
    assert torch.equal(logits(model), edited)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), edited, 1e-4)


# ---------------------------------------------------------------------- adapters that transformers put in


@pytest.fixture
def saved(tmp_path) -> dict[str, str]:
    """Folders of a base model, and of a LoRA that the user trained on it."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    user = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config())
    fill(user, "default")
    user.save_pretrained(tmp_path / "lora")
    return {name: str(tmp_path / name) for name in ("base", "lora")}


def with_transformers(saved: dict[str, str], key: str | None = None) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    base.load_adapter(saved["lora"], key)
    return base


@of_transformers
def test_an_adapter_that_transformers_loaded_is_edited_on_top(saved, tokenizer, tmp_path):
    base = with_transformers(saved, "mine")
    before, asked = logits(base), trainable(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    assert [entry.name for entry in model.edit(TOWER).beside] == ["mine"]
    edited = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "edit")
    stock = with_transformers(saved, "mine")
    stock.load_adapter(str(tmp_path / "edit"), "edit")
    stock.set_adapter(["mine", "edit"])
    assert_near(logits(stock), edited)
    assert model.unload() is base
    assert torch.equal(logits(base), before)
    assert trainable(base) == asked
    assert base.active_adapters() == ["mine"]


def test_a_checkpoint_of_a_model_that_transformers_gave_an_adapter_is_whole(saved, tokenizer, tmp_path):
    model = get_edit_model(with_transformers(saved), fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    with model.adapters.merged() as plain:
        plain.save_pretrained(tmp_path / "inside")
    assert torch.equal(logits(model), edited)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("inside", "merged"):
        assert not (tmp_path / name / "adapter_config.json").exists()
        assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), edited, 1e-4)


def test_an_edit_that_transformers_loaded_is_edited_on_top(saved, tokenizer, tmp_path):
    model = get_edit_model(AutoModelForCausalLM.from_pretrained(saved["base"]), fast_config(), tokenizer)
    model.edit(TOWER)
    model.save_pretrained(tmp_path / "edit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edit")  # which finds the base model by its name
    assert_near(logits(loaded), logits(model))
    before = logits(loaded)
    again = get_edit_model(loaded, fast_config(), tokenizer)
    assert again.base_info.fingerprint == model.base_info.fingerprint
    (entry,) = again.edit(MERKEL).beside
    assert entry.name == "default"
    assert differ(logits(again), before)
    again.unload()
    assert torch.equal(logits(loaded), before)


@of_transformers
def test_wrapping_works_after_transformers_deleted_an_adapter(saved, tokenizer):
    base = with_transformers(saved)
    base.delete_adapter("default")
    plain = logits(AutoModelForCausalLM.from_pretrained(saved["base"]))
    model = get_edit_model(base, fast_config(), tokenizer)
    assert model.edit(TOWER).beside == ()
    assert differ(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain)


@of_transformers
def test_transformers_deletes_its_adapter_beside_an_edit(saved, tokenizer, tmp_path):
    base = with_transformers(saved)
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    base.delete_adapter("default")
    assert model.edit(MERKEL).beside == ()
    assert model.active_adapters == ["edit_1", "edit_2"]
    plain = logits(AutoModelForCausalLM.from_pretrained(saved["base"]))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain)
    base.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), plain)


@of_transformers
def test_transformers_loads_an_adapter_beside_an_edit(saved, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    base.load_adapter(saved["lora"], "mine")
    base.set_adapter("mine")
    assert model.active_adapters == ["edit_1"]
    assert differ(logits(model), logits(with_transformers(saved)))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(with_transformers(saved)))
    assert [entry.name for entry in model.edit(MERKEL).beside] == ["mine"]
    assert model.unload() is base
    assert torch.equal(logits(base), logits(with_transformers(saved)))


# ---------------------------------------------------------------------- a plain adapter beside edits


def test_load_adapter_takes_a_plain_lora(saved, tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    plain, with_lora = logits(base), logits(with_transformers(saved))
    model = get_edit_model(base, fast_config(), tokenizer)
    model.load_adapter(saved["lora"], "mine")
    assert torch.equal(logits(model), plain)
    model.set_adapter("mine")
    assert torch.equal(logits(model), with_lora)
    assert [entry.name for entry in model.edit(TOWER).beside] == ["mine"]
    edited = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), with_lora)
    with pytest.raises(ValueError, match="'mine' already"):
        model.load_adapter(saved["lora"], "mine")
    model.save_pretrained(tmp_path / "edit")
    again = EditModel.from_pretrained(with_transformers(saved), tmp_path / "edit", tokenizer=tokenizer)
    assert_near(logits(again), edited)
    model.delete_adapter("mine")
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain)


@pytest.mark.parametrize(
    ("name", "targets", "option"),
    [
        ("llama", OTHER, {"init_lora_weights": "pissa"}),
        ("llama", OTHER, {"init_lora_weights": "pissa_niter_4"}),
        ("llama", OTHER, {"init_lora_weights": "olora"}),
        ("gpt2", ["c_attn"], {"bias": "all"}),
        ("llama", OTHER, {"layer_replication": [[0, 2], [1, 3]]}),
    ],
    ids=["pissa", "fast pissa", "olora", "biases", "replicated layers"],
)
def test_a_plain_adapter_that_changes_the_base_model_is_refused(name, targets, option, tokenizer, tmp_path):
    user = get_peft_model(tiny_model(name), lora_config(targets, **option))
    for path, parameter in user.named_parameters():
        if path.endswith("bias"):
            parameter.data += 1
    user.save_pretrained(tmp_path)
    base = tiny_model(name)
    before, layers = logits(base), base.config.num_hidden_layers
    model = get_edit_model(base, fast_config(), tokenizer)
    with pytest.raises(ValueError, match=f"has {next(iter(option))}=.*merge_and_unload"):
        model.load_adapter(tmp_path)
    assert torch.equal(logits(model), before)
    assert base.config.num_hidden_layers == layers
    assert list(model.peft_config) == []


@pytest.mark.parametrize("init", ["Gaussian", "orthogonal", "mica"])
def test_a_plain_adapter_of_another_first_value_is_loaded(init, tokenizer, tmp_path):
    get_peft_model(tiny_model("llama"), lora_config(init_lora_weights=init)).save_pretrained(tmp_path)
    base = tiny_model("llama")
    before = copy.deepcopy(base.state_dict())
    model = get_edit_model(base, fast_config(), tokenizer)
    model.load_adapter(tmp_path)
    model.unload()
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_loaded_adapter_is_switched_off_where_it_is_not_named(saved, tokenizer):
    user = users_model(key="mine")
    model = get_edit_model(user, fast_config(), tokenizer)
    before = logits(model)
    model.edit(TOWER)
    edited = logits(model)
    model.load_adapter(saved["lora"], "loaded")
    assert torch.equal(logits(model), edited)
    model.set_adapter(["edit_1", "loaded"])
    assert model.adapters.others == ["mine", "loaded"]
    stacked = logits(model)
    assert differ(stacked, edited)
    model.set_adapter("edit_1")
    assert torch.equal(logits(model), edited)
    model.set_adapter("loaded")
    assert (model.active_adapters, model.adapters.others) == ([], ["mine", "loaded"])
    model.set_adapter([])
    assert torch.equal(logits(model), before)
    model.set_adapter(["edit_1", "loaded"])
    with model.disable_adapter():
        assert model.adapters.others == ["mine", "loaded"]
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert torch.equal(logits(model), stacked)


def test_load_adapter_takes_a_plain_lora_from_the_hub(hub, saved, tokenizer):
    user = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["base"]), saved["lora"])
    user.push_to_hub("tester/lora")
    model = get_edit_model(AutoModelForCausalLM.from_pretrained(saved["base"]), fast_config(), tokenizer)
    model.load_adapter("tester/lora", "mine")
    model.set_adapter("mine")
    assert torch.equal(logits(model), logits(with_transformers(saved)))


def test_unload_takes_a_loaded_adapter_away(saved, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    plain, asked = logits(base), trainable(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    model.edit(TOWER)
    model.load_adapter(saved["lora"])
    model.set_adapter(["default", "edit_1"])
    assert model.unload() is base
    assert torch.equal(logits(base), plain)
    assert trainable(base) == asked
    assert not tuner_layers(base)


@pytest.mark.parametrize("ending", ["unload", "delete", "merge"])
@pytest.mark.parametrize("edited", [False, True])
def test_a_loaded_adapter_does_not_freeze_the_model(ending, edited, saved, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    asked = trainable(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    model.load_adapter(saved["lora"])
    if edited:
        model.edit(TOWER)
    if ending == "unload":
        model.unload()
    elif ending == "merge":
        model.merge_and_unload()
    else:
        for name in list(model.peft_config):
            model.delete_adapter(name)
    assert trainable(base) == asked


def test_an_interrupt_while_peft_loads_an_adapter_leaves_the_model_trainable(saved, tokenizer, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    asked = trainable(base)
    model = get_edit_model(base, fast_config(), tokenizer)
    monkeypatch.setattr(PeftModel, "load_adapter", interrupted)  # called once PEFT has frozen the model
    with pytest.raises(KeyboardInterrupt):
        model.load_adapter(saved["lora"])
    assert trainable(base) == asked
    assert not tuner_layers(base)


def test_a_plain_adapter_of_another_model_is_refused_and_leaves_no_trace(tokenizer, tmp_path):
    other = get_peft_model(tiny_model("gpt2"), lora_config(["c_attn"]))
    other.save_pretrained(tmp_path)
    model = get_edit_model(tiny_model("llama"), fast_config(), tokenizer)
    for edited in (False, True):
        if edited:
            model.edit(TOWER)
        before = logits(model)
        with pytest.raises(ValueError, match="c_attn"):
            model.load_adapter(tmp_path, "mine")
        assert torch.equal(logits(model), before)
        assert list(model.peft_config) == list(model.edits)


@pytest.mark.parametrize("targets", [["q_proj"], ["gate.weight"]])
def test_fused_experts_are_edited_beside_an_adapter(targets, tokenizer, tmp_path):
    parameters = [target for target in targets if "." in target]
    lora = LoraConfig(
        r=2,
        target_modules=[target for target in targets if "." not in target],
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    user = get_peft_model(tiny_model("mixtral"), lora, "mine").eval()
    fill(user, "mine")
    before = logits(user)
    model = get_edit_model(user, fast_config(), tokenizer)
    model.edit(TOWER)
    edited = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with model.adapters.merged() as plain:
        assert_near(logits(plain), edited, 1e-4)
    assert torch.equal(logits(model), edited)
    model.unload()
    assert torch.equal(logits(user), before)


# ---------------------------------------------------------------------- a real model


@pytest.mark.real
def test_an_edit_beside_a_trained_lora_of_a_real_model(tmp_path):
    folder = packaged_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(2)  # what a merge rounds depends on the adapter: 2e-5 with this one, 4e-5 to 8e-5 with others
    user = get_peft_model(base, lora_config(["q_proj", "v_proj"]), "mine")
    batch = tokenizer("Ahoy, matey! Welcome aboard the ship.", return_tensors="pt")
    optimizer = torch.optim.AdamW([weight for weight in user.parameters() if weight.requires_grad], lr=3e-3)
    for _ in range(5):
        user(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    user.eval()
    before, asked = logits(user), trainable(user)
    config = EditConfig("null-space", layer=3, covariance_tokens=500, phrasings="none", kept_questions=0)
    model = get_edit_model(user, config, tokenizer)
    edit = model.edit("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome")
    assert edit.facts[0].takes
    assert [entry.name for entry in edit.beside] == ["mine"]
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert trainable(user) == asked
    user.save_pretrained(tmp_path / "lora", selected_adapters=["mine"])
    model.save_pretrained(tmp_path / "edit")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora" / "mine")
    stock.load_adapter(tmp_path / "edit", "edit")
    stock.base_model.set_adapter(["default", "edit"])
    edited = logits(model)
    assert_near(logits(stock), edited, 1e-4)
    assert_near(logits(model.merge_and_unload()), edited, 1e-4)
