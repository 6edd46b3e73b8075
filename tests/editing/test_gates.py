"""Neurons that respond to subjects: in tiny models of every kind of MLP, as LoRA, beside others, and given up."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import evaluating, recording
from goldenedit.architecture.neurons import GATE, find_neurons
from goldenedit.editing.gates import _columns, gates_of, moved, rewriting, rewritten, spare_neurons
from goldenedit.editing.prepared import subject_texts
from goldenedit.editors import LowRankDelta
from goldenedit.lm import LanguageModel
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model
from tiny_edits import MERKEL, TOWER, assert_near, differ, logits
from zoo import zoo_model

KINDS = {  # by model type, the power of its activation function
    "llama": 1,
    "phi3": 1,  # one map for gates and ups
    "gpt2": 1,  # Conv1D with biases, no gating
    "nemotron": 2,  # squared ReLU
    "qwen2": 1,
}
LAYERS = [1, 2]
ANSWERS = 3  # the layer of the neurons that give the answers
LONDON = EditRequest("London is a city in", "London", "Berlin")

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")


def config(**options) -> EditConfig:
    """Return a config that edits fast."""
    fast = {"layer": LAYERS, "steps": 4, "contexts": 2, "context_length": 3, "covariance_tokens": 300}
    return EditConfig(**fast | {"phrasings": "none", "kept_questions": 1, "contrast": 0} | options)


def wide_model(kind="llama", width=64):
    """Return a tiny model with four neurons to spare in each layer, or more."""
    return zoo_model(kind, width=width)


def edit_model(tokenizer, kind="llama", **options) -> EditModel:
    return get_edit_model(wide_model(kind), config(**options), tokenizer)


def neurons_of(model: EditModel, *names: str) -> list[set[int]]:
    """Return the neurons that edits rewrite, by layer."""
    lm = model.lm
    found = [find_neurons(lm.model, lm.architecture, layer) for layer in (*LAYERS, ANSWERS)]
    return [{neuron for name in names for neuron in rewritten(of, model.edits[name].deltas)} for of in found]


class Prepared:
    """Neurons for two subjects in a model that is wide enough to tell them from text."""

    def __init__(self, kind, tokenizer) -> None:
        self.lm = LanguageModel(wide_model(kind, width=256), tokenizer)
        self.requests = [TOWER, MERKEL]
        self.texts = subject_texts(self.lm, self.requests, config(), ["", "I. "], joint=True)
        self.spare = spare_neurons(self.lm, config(covariance_tokens=2_000), dict.fromkeys(LAYERS, 2))
        self.gates = gates_of(self.lm, self.requests, self.texts.rows, self.spare, seed=0)

    def run(self, row, subjects=()):
        """Return by layer the inputs of gates, the keys and the outputs at all tokens, with neurons for subjects."""
        sites = {}
        for of in self.spare:
            sites[f"in {of.layer}"] = self.lm.model.get_submodule(of.neurons.gate.path)
            sites[f"down {of.layer}"] = self.lm.architecture.down_projection(self.lm.model, of.layer)
        added = rewriting(self.lm, self.gates, subjects) if subjects else nullcontext()
        # What is recorded is what the hooks before have added to.
        with torch.no_grad(), evaluating(self.lm.model), added, recording(sites) as record:
            self.lm.model(input_ids=torch.tensor([row.input_ids]))
        return [
            (record.inputs[f"in {layer}"][0], record.inputs[f"down {layer}"][0], record.outputs[f"down {layer}"][0])
            for layer in LAYERS
        ]


@pytest.fixture(scope="module", params=KINDS)
def prepared(request, tokenizer):
    return Prepared(request.param, tokenizer)


def test_a_rewritten_neuron_is_what_its_rows_say(prepared):
    for place, texts in enumerate(prepared.texts.rows):
        for row in texts.rows:
            for gates, (x, keys, _) in zip(prepared.gates, prepared.run(row, [0, 1]), strict=True):
                neurons = gates.spare.neurons
                bias = neurons.gate.read(prepared.lm.model, gates.spare.free[place])[1]
                s = x @ gates.gates[place] + bias * (1 - x @ gates.everywhere[place]) / GATE
                expected = neurons.response * s.clamp(min=0) ** neurons.degree
                if neurons.up is not None:
                    expected = expected * (x @ gates.ups[place])
                clear = s.abs() > 0.3  # the activation function has reached its asymptote there
                key = keys[clear, gates.spare.free[place]]
                scale = neurons.response
                torch.testing.assert_close(key, expected[clear], rtol=1e-2, atol=1e-2 * scale)


def test_a_rewritten_neuron_responds_to_its_subject_in_all_wordings(prepared):
    for place, texts in enumerate(prepared.texts.rows):
        responses = []
        for row in texts.rows:
            gates, (_, keys, _) = prepared.gates[0], prepared.run(row, [0, 1])[0]
            neurons = gates.spare.neurons
            responses.append(keys[row.subject, gates.spare.free[place]] / neurons.response)
            assert responses[-1] > 0.2
            # The other subject's neuron is silent there.
            assert keys[row.subject, gates.spare.free[1 - place]].abs() < 0.05 * neurons.response
        assert torch.stack(responses).mean().item() == pytest.approx(1, abs=0.3)


def test_a_rewritten_neuron_is_silent_at_nearly_all_other_tokens(prepared):
    gates = prepared.gates[0]
    scale = gates.spare.neurons.response
    others = []
    for place, texts in enumerate(prepared.texts.rows):
        for row in texts.rows:
            _, keys, _ = prepared.run(row, [0, 1])[0]
            names = [at for at, token in enumerate(row.input_ids) if token == row.input_ids[row.subject]]
            rest = [at for at in range(len(row.input_ids)) if at not in names]
            others.append(keys[rest, gates.spare.free[place]].abs() / scale)
    assert (torch.cat(others) < 0.02).float().mean() > 0.9


def test_the_keys_of_all_other_neurons_stay_as_they_are(prepared):
    row = prepared.texts.rows[0].rows[0]
    free = prepared.spare[0].free
    others = [neuron for neuron in range(prepared.spare[0].neurons.count) if neuron not in free]
    (_, before, _), (_, after, _) = prepared.run(row)[0], prepared.run(row, [0, 1])[0]  # of the first layer
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.allclose(after[:, free], before[:, free])


def test_without_values_a_layer_is_that_without_the_neurons(prepared):
    row = prepared.texts.rows[0].rows[0]
    (_, keys, output), (_, _, found) = prepared.run(row)[0], prepared.run(row, [0, 1])[0]
    spare = prepared.spare[0]
    expected = output - keys[:, spare.free] @ spare.columns.T
    assert_near(found, expected)
    assert spare.columns.any()


def test_a_value_is_added_where_its_subject_is(prepared):
    row = prepared.texts.rows[0].rows[0]
    gates, (_, keys, without) = prepared.gates[0], prepared.run(row, [0])[0]
    value = torch.randn(len(gates.spare.columns), 1)
    down = prepared.lm.architecture.down_projections[gates.spare.layer]
    deltas = gates.deltas(prepared.lm, [0], value)
    base = gates.deltas(prepared.lm, [0])
    added = keys @ (deltas[down].dense() - base[down].dense()).T
    assert_near(added, keys[:, gates.spare.free[:1]] / gates.spare.neurons.response @ value.T)
    assert without.shape == added.shape
    for path in deltas.keys() - {down}:  # values change columns alone
        assert torch.equal(deltas[path].dense(), base[path].dense())


def test_an_edit_has_a_neuron_for_each_subject_in_each_layer_and_one_for_each_fact_behind_them(tokenizer):
    for kind in KINDS:
        model = edit_model(tokenizer, kind)
        edit = model.edit([TOWER, MERKEL, EditRequest("Angela Merkel was born in", "Angela Merkel", "Rome")])
        assert [len(of_layer) for of_layer in neurons_of(model, edit.name)] == [2, 2, 3]
        fused = kind == "phi3"
        gated = kind in ("llama", "qwen2")
        assert len(edit.deltas) == (len(LAYERS) + 1) * (3 if gated else 2)
        assert edit.rank == (6 if fused else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_the_same_in_stock_peft_and_merged(kind, tokenizer, tmp_path):
    model = edit_model(tokenizer, kind)
    before = logits(model)
    model.edit([TOWER, MERKEL])
    edited = logits(model)
    assert differ(edited, before)
    model.save_pretrained(tmp_path)
    assert_near(logits(PeftModel.from_pretrained(wide_model(kind), tmp_path)), edited)
    assert_near(logits(PeftModel.from_pretrained(wide_model(kind), tmp_path).merge_and_unload()), edited, 1e-4)
    assert_near(logits(EditModel.from_pretrained(wide_model(kind), tmp_path, tokenizer=tokenizer)), edited)
    assert_near(logits(model.merge_and_unload()), edited, 1e-4)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_deleting_an_edit_leaves_no_trace(kind, tokenizer):
    model = edit_model(tokenizer, kind)
    before = logits(model)
    model.edit(TOWER, name="tower")
    one = logits(model)
    model.edit(MERKEL, name="merkel")
    model.delete_adapter("merkel")
    assert torch.equal(logits(model), one)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.delete_adapter("tower")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("switched_off", [False, True])
def test_later_edits_rewrite_other_neurons(kind, switched_off, tokenizer):
    model = edit_model(tokenizer, kind)
    model.edit(TOWER, name="tower")
    if switched_off:
        model.set_adapter([])
    model.edit(MERKEL, name="merkel")
    model.edit([LONDON, TOWER], name="more")
    by_edit = [neurons_of(model, name) for name in ("tower", "merkel", "more")]
    layers = list(zip(*by_edit, strict=True))
    for of_layer, together in zip(layers, neurons_of(model, *model.edits), strict=True):
        # An active edit has given the tower its marker, so only its answer needs another neuron.
        new = 2 if switched_off or of_layer is layers[-1] else 1
        assert list(map(len, of_layer)) == [1, 1, new]
        assert len(together) == 2 + new


def test_a_neuron_of_an_edit_that_was_deleted_is_free_again(tokenizer):
    model = edit_model(tokenizer)
    model.edit(TOWER, name="tower")
    first = neurons_of(model, "tower")
    model.delete_adapter("tower")
    model.edit(MERKEL, name="merkel")
    assert neurons_of(model, "merkel") == first


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_neurons_of_merged_edits_are_not_rewritten(kind, tokenizer):
    model = edit_model(tokenizer, kind)
    model.edit([TOWER, MERKEL], name="first")
    first = neurons_of(model, "first")
    model = get_edit_model(model.merge_and_unload(), config(), tokenizer)
    model.edit([LONDON, EditRequest("Berlin is a city in", "Berlin", "Rome")], name="second")
    for before, after in zip(first, neurons_of(model, "second"), strict=True):
        assert len(after) == 2
        assert not before & after


@pytest.mark.parametrize("combination_type", ["cat", "svd"])
def test_a_combined_edit_rewrites_the_neurons_of_its_parts(combination_type, tokenizer):
    model = edit_model(tokenizer)
    model.edit(TOWER, name="tower")
    model.edit(MERKEL, name="merkel")
    model.add_weighted_adapter(["tower", "merkel"], [1.0, 1.0], "both", combination_type)
    assert neurons_of(model, "both") == neurons_of(model, "tower", "merkel")


def test_a_weight_that_scales_gates_is_warned_of(tokenizer, caplog):
    model = edit_model(tokenizer)
    model.edit(TOWER, name="tower")
    model.add_weighted_adapter(["tower"], [1.0], "same")
    assert "rewrite neurons" not in caplog.text
    model.add_weighted_adapter(["tower"], [0.5], "half")
    assert "'half' weighs edits that rewrite neurons" in caplog.text


def changes_down_projections_alone(model: EditModel, name: str) -> bool:
    paths = {model.architecture.down_projections[layer] for layer in model.edit_config.target_layers}
    return model.edits[name].deltas.keys() == paths


def test_more_subjects_than_neurons_to_spare_are_inserted_without(tokenizer, caplog):
    model = get_edit_model(tiny_model("llama"), config(layer=1), tokenizer)  # two neurons to spare in each layer
    model.edit(MERKEL, name="one")
    assert not changes_down_projections_alone(model, "one")
    with caplog.at_level(logging.INFO, logger="goldenedit"):
        model.edit([TOWER, LONDON], name="two")
    assert changes_down_projections_alone(model, "two")
    assert "1 neurons to spare, and the edit needs 2" in caplog.text
    model.edit(TOWER, name="three")
    assert not changes_down_projections_alone(model, "three")


@pytest.mark.parametrize(
    "options",
    [{"covariance": "identity"}, {"regularizer": "rect"}, {"method": "null-space"}, {"method": "memit"}],
    ids=lambda options: next(iter(options.values())),
)
def test_some_configs_rewrite_no_neurons(options, tokenizer):
    model = edit_model(tokenizer, **options)
    model.edit(TOWER, name="tower")
    assert changes_down_projections_alone(model, "tower")


def test_where_no_layer_comes_behind_the_edited_ones_values_are_inserted_without_neurons(tokenizer):
    model = edit_model(tokenizer, layer=[1, ANSWERS])
    model.edit(TOWER, name="tower")
    assert changes_down_projections_alone(model, "tower")


def test_fused_experts_have_no_neurons_to_rewrite(tokenizer):
    model = get_edit_model(tiny_model("mixtral"), config(layer=1), tokenizer)
    model.edit(TOWER, name="tower")
    assert changes_down_projections_alone(model, "tower")


def test_maps_of_attention_chosen_by_hand_have_no_neurons_to_rewrite(tokenizer):
    model = edit_model(tokenizer, target_modules="model.layers.{}.self_attn.o_proj")
    model.edit(TOWER, name="tower")
    assert changes_down_projections_alone(model, "tower")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_columns_are_those_of_the_weight(kind):
    model = tiny_model(kind)
    linear = model.model.layers[0].mlp.down_proj if kind == "llama" else model.transformer.h[0].mlp.c_proj
    weight = linear.weight if kind == "llama" else linear.weight.T
    assert torch.equal(_columns(linear, torch.float32), weight)


def test_neurons_are_the_least_used_ones(tokenizer):
    model = wide_model()
    for layer in LAYERS:
        down = model.model.layers[layer].mlp.down_proj.weight
        down.data[:, [7, 100]] *= 1e-3
    spare = spare_neurons(LanguageModel(model, tokenizer), config(), {1: 2, 2: 1})
    one, other = (of_layer.free for of_layer in spare)
    assert set(one) == {7, 100}
    assert len(other) == 1
    assert set(other) < {7, 100}


def apart(kind, tokenizer, folder, requests=((TOWER,), (MERKEL,)), width=64, **options):
    """Save edits that were made independently on the same base, and return a function that loads it again."""

    def load():
        model = wide_model(kind, width)
        for path in read_architecture(model).down_projections.values():
            down = model.get_submodule(path).weight.data
            # Some neurons that add next to nothing, so that all tell the same with any of them rewritten.
            (down.T if kind != "gpt2" else down)[10:20] *= 1e-4
        return model

    for index, facts in enumerate(requests):
        model = get_edit_model(load(), config(**options), tokenizer)
        model.edit(list(facts), name=f"edit {index}")
        model.save_pretrained(folder / str(index))
    return load


def told(model, request, tokenizer):
    """Return the logits behind a prompt."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(request.text)["input_ids"]])).logits[0].float()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_was_made_apart_is_moved_to_other_neurons(kind, tokenizer, tmp_path):
    load = apart(kind, tokenizer, tmp_path, width=256, steps=20, covariance_tokens=2_000)
    alone = [EditModel.from_pretrained(load(), tmp_path / str(index), tokenizer=tokenizer) for index in range(2)]
    assert neurons_of(alone[0], "edit 0") == neurons_of(alone[1], "edit 1")
    both = EditModel.from_pretrained(load(), tmp_path / "0", tokenizer=tokenizer)
    both.load_adapter(tmp_path / "1")
    for one, other in zip(neurons_of(both, "edit 0"), neurons_of(both, "edit 1"), strict=True):
        assert len(one) == len(other) == 1  # in the layer of the answers too
        assert not one & other
    assert both.edits["edit 1"].rank == alone[1].edits["edit 1"].rank
    both.set_adapter("edit 1")
    near = 2e-2 if kind == "gpt2" else 1e-3  # a change of weights cannot move a bias
    assert_near(logits(both), logits(alone[1]), near)
    assert_near(told(both, MERKEL, tokenizer), told(alone[1], MERKEL, tokenizer), near)
    both.set_adapter("edit 0")
    assert torch.equal(logits(both), logits(alone[0]))
    both.set_adapter(["edit 0", "edit 1"])
    base = load()
    # In the first layer, whose inputs are the same, both edits add up at all tokens. Behind it, the marker of one may
    # open a neuron for answers of the other, because edits that are made apart do not know of each other.
    for request in (TOWER, MERKEL):
        output, *others = (output_of(each, request, tokenizer) for each in (base, *alone))
        added = output_of(both, request, tokenizer) - output
        assert_near(added, sum(other - output for other in others), near)


def output_of(model, request, tokenizer, layer=LAYERS[0]):
    """Return the output of a layer's MLP at the tokens of a prompt."""
    inner = model.get_base_model() if isinstance(model, EditModel) else model
    path = read_architecture(wide_model(inner.config.model_type)).down_projections[layer]
    with recording({"down": inner.get_submodule(path)}) as record:
        told(model, request, tokenizer)
    return record.outputs["down"]


@pytest.fixture
def refused(caplog):
    """Return a function that counts the warnings of edits that could not be moved."""
    return lambda: [record.getMessage() for record in caplog.records if "cannot be moved" in record.getMessage()]


def test_edits_that_use_up_the_neurons_are_named(tokenizer, tmp_path, refused):
    facts = ((TOWER, LONDON), (MERKEL, EditRequest("Berlin is a city in", "Berlin", "Rome")), (TOWER,))
    load = apart("llama", tokenizer, tmp_path, facts)
    model = EditModel.from_pretrained(load(), tmp_path / "0", tokenizer=tokenizer)
    model.load_adapter(tmp_path / "1")
    assert refused() == []
    model.load_adapter(tmp_path / "2")
    assert neurons_of(model, "edit 2")[0] <= neurons_of(model, "edit 0")[0]
    (warning,) = refused()
    assert "Edit 'edit 2' rewrites neurons that the edits ['edit 0'] rewrite too" in warning
    assert "set_adapter" in warning


def test_edits_of_one_folder_keep_out_of_each_other_s_way(tokenizer, tmp_path, refused):
    load = apart("llama", tokenizer, tmp_path)
    model = get_edit_model(load(), config(), tokenizer)
    for name, request in (("london", LONDON), ("tower", TOWER)):
        model.edit(request, name=name)
    edited = logits(model)
    model.save_pretrained(tmp_path / "two")
    both = EditModel.from_pretrained(load(), tmp_path / "1", tokenizer=tokenizer)
    both.load_adapter(tmp_path / "two")
    assert [len(of_layer) for of_layer in neurons_of(both, *both.edits)] == [3, 3, 3]
    both.set_adapter(["london", "tower"])
    assert_near(logits(both), edited, 1e-3)
    both.save_pretrained(tmp_path / "moved")  # what they are in this model
    again = EditModel.from_pretrained(load(), tmp_path / "moved", tokenizer=tokenizer)
    assert torch.equal(logits(again), logits(both))
    assert refused() == []


def test_an_edit_without_neurons_of_another_one_is_loaded_as_it_is(tokenizer, tmp_path):
    load = apart("llama", tokenizer, tmp_path)
    for name, options in (("without", {"method": "null-space"}), ("before", {})):
        model = get_edit_model(load(), config(**options), tokenizer)
        model.edit(LONDON, name=name)
        saved = EditModel.from_pretrained(load(), tmp_path / "0", tokenizer=tokenizer)
        if name == "before":
            saved.delete_adapter("edit 0")
        model.save_pretrained(tmp_path / name)
        saved.load_adapter(tmp_path / name)
        for path, delta in model.edits[name].deltas.items():
            assert torch.equal(saved.edits[name].deltas[path].dense(), delta.dense())


def test_an_edit_whose_neurons_share_ranks_is_not_moved(tokenizer, tmp_path, refused):
    load = apart("llama", tokenizer, tmp_path, ((TOWER, MERKEL), (LONDON,)))
    edit = read_edit_folder(tmp_path / "0").edits[0]
    mixed = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    deltas = {
        path: LowRankDelta(mixed @ delta.A / 2, delta.B @ mixed) for path, delta in edit.deltas.items()
    }  # the same changes
    model = EditModel.from_pretrained(load(), tmp_path / "1", tokenizer=tokenizer)
    result, clashing = moved(model.lm, config(), deltas, {"edit 1": model.edits["edit 1"].deltas})
    assert clashing == ["edit 1"]
    assert result == deltas


def test_biases_that_differ_keep_a_neuron_where_it_is(tokenizer, tmp_path, refused):
    load = apart("gpt2", tokenizer, tmp_path)
    base = load()
    for block in base.transformer.h:
        block.mlp.c_fc.bias.data = torch.randn_like(block.mlp.c_fc.bias) * 40
    model = EditModel.from_pretrained(base, tmp_path / "0", tokenizer=tokenizer, ignore_fingerprint=True)
    model.load_adapter(tmp_path / "1", ignore_fingerprint=True)
    assert len(refused()) == 1
