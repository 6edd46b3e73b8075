"""What every editor must do, whatever its maths: change the answer, keep the weights, save, load, repeat itself."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.config import REGULARIZERS
from goldenedit.editing import keys
from goldenedit.editing.prepared import prepare_facts
from goldenedit.editing.training import answer_gradients
from goldenedit.editors import EDITORS, GradientProblem, KeyStatistics, TrainingOptions, TrainingProblem, editor
from goldenedit.editors.finetune import LowRankChange
from goldenedit.editors.moments import RunningMoments
from goldenedit.editors.ultraedit import UltraEditOptions, ultraedit
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.storage.card import render_card
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model
from plugins import restore_registries

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")

FACTS = [
    EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "German"),
]
MORE = [EditRequest("Berlin is in the city of", "Berlin", "London")]
# Steps that move a tiny model; the defaults are for pretrained ones.
SPECIAL = {
    "ft-l": {"finetune_lr": 0.25, "finetune_epsilon": 0.25},
    "ft-m": {"finetune_lr": 0.05},
    "lora": {"finetune_lr": 0.25},
    "locft": {"finetune_lr": 0.05},
    "crispedit": {"finetune_lr": 0.25, "covariance": "sampled", "covariance_tokens": 500, "crispedit_share": 0.5},
    "ultraedit": {"ultraedit_lr": 3.0},
    "alphaedit": {"covariance": "sampled", "covariance_tokens": 500, "null_space_threshold": 5.0},
}
PUBLISHED = {"phrasings": "none", "kept_questions": 0, "optimizer": "adam", "flat_directions": False}
methods = pytest.mark.parametrize("method", EDITORS.names())


def config(method: str, **options) -> EditConfig:
    fast = {"layer": 1, "steps": 8, "contexts": 2, "context_length": 3, "covariance": "identity", "contrast": 2}
    fast["weight_decay"] = 0.02  # values of tiny models are short: with the default the decay would outweigh all else
    return EditConfig(method, **fast | SPECIAL.get(method, {}) | options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(30)[None]).logits


@methods
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_batch_makes_its_answers_likelier_and_leaves_the_weights_alone(method, name, tokenizer):
    base = tiny_model(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    unedited = logits(base)
    model = get_edit_model(base, config(method), tokenizer)
    made = model.edit(FACTS)
    gain = [math.log(fact.probability_after / fact.probability_before) for fact in made.facts]
    assert sum(gain) > 0.1  # facts of a random model get in each other's way: together they gain
    with model.disable_adapter():
        assert torch.equal(logits(model), unedited)
    assert (logits(model) - unedited).abs().max() > 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.unload().state_dict().items())


@methods
def test_the_same_edit_has_the_same_bytes_twice(method, tokenizer, tmp_path):
    contents = []
    for run in ("one", "two"):
        model = get_edit_model(tiny_model("llama"), config(method), tokenizer)
        model.edit(FACTS)
        model.save_pretrained(tmp_path / run)
        contents.append((tmp_path / run / "adapter_model.safetensors").read_bytes())
    assert contents[0] == contents[1]


@methods
def test_a_sequence_that_was_stopped_and_loaded_goes_on_as_one_that_was_not(method, tokenizer, tmp_path):
    model = get_edit_model(tiny_model("llama"), config(method), tokenizer)
    model.edit(FACTS)
    model.save_pretrained(tmp_path / "half")
    model.edit(MORE)

    resumed = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "half", tokenizer=tokenizer)
    resumed.edit(MORE)
    for path, delta in model.edits["edit_2"].deltas.items():
        other = resumed.edits["edit_2"].deltas[path]
        torch.testing.assert_close(other.dense(), delta.dense(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["alphaedit", "ultraedit"])
def test_an_editor_s_memory_is_saved_and_joined_and_goes_with_its_edit(method, tokenizer, tmp_path):
    model = get_edit_model(tiny_model("llama"), config(method), tokenizer)
    model.edit(FACTS)
    model.edit(MORE)
    model.save_pretrained(tmp_path / "edit")
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    for name, edit in model.edits.items():
        assert edit.state
        assert loaded.edits[name].state.keys() == edit.state.keys()
        for key, value in edit.state.items():
            assert torch.equal(loaded.edits[name].state[key], value)
    (columns,) = {sum(edit.state[key].shape[1] for edit in model.edits.values()) for key in model.edits["edit_1"].state}
    model.add_weighted_adapter(["edit_1", "edit_2"], [1.0, 1.0], "both")
    assert all(value.shape[1] == columns for value in model.edits["both"].state.values())


DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def many_edits(tokenizer):
    """Edits of several editors whose ranks add up to more than the 21 that pay at a matrix of 32 x 64."""
    model = get_edit_model(tiny_model("llama"), config("memit"), tokenizer)
    for index, method in enumerate(("memit", "emmet", "ft-m", "lora")):
        model.edit_config = config(method, dense_tolerance=0.1)
        subjects = [f"Berlin {index}{number}" for number in range(12)]
        model.edit([EditRequest("{} is in the city of", subject, "Rome") for subject in subjects])
    return model


def test_edits_of_different_editors_stack_and_fuse_into_a_rank_that_pays(many_edits, caplog):
    model, names = many_edits, list(many_edits.edits)
    parts = sum(edit.deltas[DOWN].dense() for edit in model.edits.values())
    assert sum(edit.rank for edit in model.edits.values()) > 21
    with caplog.at_level(logging.WARNING, "goldenedit"):
        model.add_weighted_adapter(names, [1.0] * len(names), "fused")
    assert "'fused' is cut to rank 21" in caplog.text
    fused = model.edits["fused"]
    assert fused.rank == fused.deltas[DOWN].paying_rank == 21
    assert len(fused.facts) == 48
    left = torch.linalg.svdvals(parts)[21:].norm()
    error = (fused.deltas[DOWN].dense() - parts).norm()
    assert error == pytest.approx(left.item(), rel=1e-2)
    sizes = sum(model.edits[name].deltas[DOWN].norm for name in names)
    assert error <= fused.relative_error * sizes * 1.01
    assert model.active_adapters == names


def test_a_stack_whose_rank_does_not_pay_is_saved_and_loaded_exactly_and_told(many_edits, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "goldenedit"):
        many_edits.save_pretrained(tmp_path)
    assert "Above 21, factors are larger than" in caplog.text
    parts = sum(edit.deltas[DOWN].dense() for edit in many_edits.edits.values())
    for name in (None, "one"):
        loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path, name, tokenizer)
        found = sum(edit.deltas[DOWN].dense() for edit in loaded.edits.values())
        torch.testing.assert_close(found, parts, rtol=1e-4, atol=1e-6)


def test_a_difference_of_edits_has_an_error_that_means_something(many_edits):
    """FT's update is stored within a tolerance: taken from itself nothing is left, and the error is still a share."""
    many_edits.add_weighted_adapter(["edit_3", "edit_3"], [1.0, -1.0], "nothing")
    nothing = many_edits.edits["nothing"]
    assert 0 < many_edits.edits["edit_3"].relative_error == pytest.approx(nothing.relative_error, abs=1e-3)
    assert nothing.deltas[DOWN].dense().abs().max() < 1e-5


def test_a_sum_takes_no_arguments_of_other_combinations(many_edits):
    before = logits(many_edits)
    with pytest.raises(TypeError, match="svd_rank"):
        many_edits.add_weighted_adapter(["edit_1"], [1.0], "new", svd_rank=1)
    assert list(many_edits.edits) == many_edits.active_adapters
    assert torch.equal(logits(many_edits), before)


@pytest.mark.parametrize("reads", [(), ("covariance",), ("output_gradients",), ("covariance", "output_gradients")])
def test_an_editor_that_trains_gets_the_statistics_of_the_unedited_model_that_it_reads(
    reads, tokenizer, monkeypatch, tmp_path
):
    restore_registries(monkeypatch)
    posed = []

    @editor("watching", options=TrainingOptions, learns="training", reads=reads)
    def watching(problem: TrainingProblem) -> LowRankChange:
        posed.append(problem)
        return LowRankChange(problem.d_in, problem.d_out, 2, problem.generator)

    options = {"covariance": "sampled", "covariance_tokens": 200, "finetune_lr": 0.25}
    model = get_edit_model(tiny_model("llama"), config("watching", **options), tokenizer)
    model.edit(FACTS)
    model.edit_config.seed = 1  # so that the text is sampled again, while an edit is active
    model.edit(MORE)

    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    unedited = LanguageModel(tiny_model("llama"), tokenizer)
    problem = posed[-1]
    if "covariance" in reads:
        expected = unedited.statistics(model.edit_config, [1])[1].second_moment
        torch.testing.assert_close(problem.statistics.second_moment, expected)
    else:
        with pytest.raises(ValueError, match="does not declare that it reads key statistics"):
            problem.statistics.solve(torch.randn(problem.d_in, 1))
    if "output_gradients" in reads:
        expected = unedited.output_gradients(model.edit_config, [1])[1]
        torch.testing.assert_close(problem.output_gradients, expected)
    else:
        assert problem.output_gradients is None


@pytest.mark.parametrize("method", ["ft-l", "ft-m", "locft", "crispedit"])
def test_training_does_the_same_to_weights_of_another_size(method, tokenizer):
    """Ten times smaller weights under ten times larger keys are the same model, and stay so."""
    found = []
    for size in (1.0, 0.1):
        base = tiny_model("llama")
        with torch.no_grad():
            base.model.layers[1].mlp.down_proj.weight *= size
            base.model.layers[1].mlp.up_proj.weight /= size
        model = get_edit_model(base, config(method, **SPECIAL[method] | {"finetune_steps": 6}), tokenizer)
        before = logits(model)
        model.edit(FACTS[0])
        found.append(logits(model) - before)
    one, other = found
    assert one.norm() > 0.1
    assert (one - other).norm() < 0.05 * one.norm()


def test_lora_is_the_lora_of_peft(tokenizer):
    """The factors are those that PEFT's own layer learns from the same start, with the same loss and optimizer."""
    fact, options = FACTS[0], SPECIAL["lora"]
    made = get_edit_model(tiny_model("llama"), config("lora", **options, finetune_steps=6), tokenizer).edit(fact)
    ((path, delta),) = made.deltas.items()

    base = tiny_model("llama")
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=[path], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    A, B = (module["default"].weight for module in (base.get_submodule(path).lora_A, base.get_submodule(path).lora_B))
    with torch.no_grad():
        A.copy_(LowRankChange(A.shape[1], B.shape[0], 8, torch.Generator().manual_seed(0)).A)
    weight_size = base.get_submodule(path).base_layer.weight.square().mean().sqrt().item()
    optimizer = torch.optim.Adam([A, B], lr=options["finetune_lr"] * weight_size)
    row = encode(tokenizer, fact.text, fact.target_new)
    ids = torch.tensor([row.input_ids])
    labels = torch.full_like(ids, -100)
    labels[0, list(row.target)] = ids[0, list(row.target)]
    for _ in range(6):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    torch.testing.assert_close(delta.dense(), (B @ A).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_ultraedit_takes_its_constants_in_the_units_that_are_asked_for(relative, tokenizer):
    options = {"layer": [0, 1], "relative_constants": relative, "ultraedit_lr": None}
    model = get_edit_model(tiny_model("llama"), config("ultraedit", **options), tokenizer)
    found = answer_gradients(model.lm, FACTS, [0, 1])
    moments = RunningMoments.of(torch.cat([torch.cat([found[layer][0], found[layer][2]], 1) for layer in (0, 1)]))
    made = model.edit(FACTS)
    for layer, (inputs, outputs, gradients) in found.items():
        lr, ridge = 1e-6, 1.0
        if relative:
            step = outputs.norm(dim=1).mean()  # the length of a step whose features are all of size one
            lr = step / (inputs.shape[1] * gradients.shape[1] ** 0.5)
            ridge = 0.1 * inputs.square().sum(1).mean()
        resolved = UltraEditOptions(ultraedit_lr=float(lr), ultraedit_ridge=float(ridge))
        expected = ultraedit(GradientProblem(inputs, outputs, gradients, moments, resolved)).dense()
        actual = made.deltas[model.architecture.down_projections[layer]].dense()
        assert (actual - expected).norm() <= 1e-3 * expected.norm()


def test_pmet_without_an_attention_is_refused_before_anything_runs(tokenizer):
    model = get_edit_model(
        tiny_model("mamba"), config("pmet", target_modules="backbone.layers.{}.mixer.x_proj"), tokenizer
    )
    model.architecture.attention_outputs.clear()
    ran = []
    model.get_base_model().register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="No attention output projection was found"):
        model.edit(FACTS)
    assert ran == []


def test_values_of_another_editor_are_refused(tokenizer):
    model = get_edit_model(tiny_model("llama"), config("memit"), tokenizer)
    prepared = prepare_facts(model.lm, FACTS, model.edit_config, [""])
    with pytest.raises(ValueError, match="not optimized for the editor 'pmet'"):
        prepared.changes(config("pmet"), {1: KeyStatistics(None)})


def test_alphaedit_without_statistics_is_refused():
    with pytest.raises(ValueError, match="covariance"):
        config("alphaedit", covariance="identity")


# What each of these editors makes of constants, as the papers have it: AlphaEdit's null space stands for other text.
@pytest.mark.parametrize(
    ("method", "reads"),
    [
        ("rome", {"ridge", "contrast"}),
        ("r-rome", {"ridge", "contrast", "anchor"}),
        ("memit", {"ridge", "contrast", "anchor"}),
        ("emmet", {"ridge", "contrast", "anchor"}),
        ("alphaedit", {"anchor"}),
        ("null-space", set()),
    ],
)
def test_constants_that_an_editor_does_not_read_cost_nothing_and_are_not_listed(
    method, reads, tokenizer, monkeypatch, tmp_path
):
    counts, plain = [], keys.contrast_keys
    monkeypatch.setattr(keys, "contrast_keys", lambda *given: counts.append(given[3]) or plain(*given))
    options = {"covariance": "sampled", "covariance_tokens": 500}
    model = get_edit_model(tiny_model("llama"), config(method, **options), tokenizer)
    (delta,) = model.edit(FACTS).deltas.values()
    assert any(counts) == ("contrast" in reads)

    for name, changes in {
        "contrast": {"contrast": 0},
        "ridge": {"ridge": 0.9},
        "anchor": {"anchor_bare_prompt": False},
    }.items():
        other = get_edit_model(tiny_model("llama"), config(method, **options, **changes), tokenizer)
        (changed,) = other.edit(FACTS).deltas.values()
        assert torch.equal(changed.dense(), delta.dense()) == (name not in reads)

    model.save_pretrained(tmp_path)
    card = render_card(read_edit_folder(tmp_path))
    assert bool(re.search(r"\bcontrast \d", card)) == bool(re.search("contrast_weight", card)) == ("contrast" in reads)
    assert bool(re.search(r"(?<!_)ridge \d", card)) == ("ridge" in reads)
    assert ("anchor_bare_prompt" in card) == ("anchor" in reads)


@pytest.mark.parametrize(("method", "is_told"), [("memit", True), ("alphaedit", False)])
def test_raising_the_ridge_is_advised_where_it_does_something(method, is_told, tokenizer):
    model = get_edit_model(tiny_model("llama"), config(method), tokenizer)
    prepared = prepare_facts(model.lm, FACTS, model.edit_config, [""])
    wrong = replace(prepared, values=replace(prepared.values, delta=prepared.values.delta * math.inf))
    with pytest.raises(ValueError, match="is not finite") as raised:
        wrong.changes(model.edit_config, model.lm.statistics(model.edit_config, [1]))
    assert ("ridge" in str(raised.value)) == is_told


def test_ultraedit_refuses_a_first_batch_of_one_token(tokenizer):
    model = get_edit_model(tiny_model("llama"), config("ultraedit"), tokenizer)
    with pytest.raises(ValueError, match="at least 2"):
        model.edit("The Eiffel Tower is in the city of", subject="The Eiffel Tower", target_new="a")
    assert model.active_adapters == []


def test_a_pattern_of_layers_needs_the_scores_it_is_about():
    with pytest.raises(ValueError, match="layer_pattern"):
        config("memit", layer_pattern="window")


def test_memory_is_that_of_the_active_edits(tokenizer):
    """A combination carries its parts' memory: while it stands for them they must not count twice."""
    model = get_edit_model(tiny_model("llama"), config("alphaedit"), tokenizer)
    model.edit(FACTS)
    twin = get_edit_model(tiny_model("llama"), config("alphaedit"), tokenizer)
    twin.edit(FACTS)
    model.add_weighted_adapter(["edit_1"], [1.0], "same")
    one, other = (each.edit(MORE) for each in (model, twin))
    for path, delta in one.deltas.items():
        torch.testing.assert_close(delta.dense(), other.deltas[path].dense(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", ["r-rome", "memit", "ft-m"])
def test_a_regularizer_changes_the_update_and_tells_what_storing_it_costs(regularizer, method, tokenizer):
    if regularizer == "nas" and method == "ft-m":
        pytest.skip("this regularizer is of editors that insert values")
    changes = {}
    for name in (None, regularizer):
        model = get_edit_model(tiny_model("llama"), config(method, regularizer=name, clamp=40.0), tokenizer)
        made = model.edit(FACTS)
        changes[name] = next(iter(made.deltas.values())).dense()
        assert made.relative_error <= model.edit_config.dense_tolerance
    assert changes[regularizer].norm() <= changes[None].norm() * (1 + 1e-3)
    if regularizer == "rect":
        kept = (changes[regularizer].abs() > 0.02 * changes[None].abs().max()).float().mean()
        assert kept < 0.45


def test_a_dense_update_is_stored_within_its_tolerance(tokenizer, tmp_path):
    model = get_edit_model(tiny_model("llama"), config("ft-m", dense_tolerance=0.2), tokenizer)
    exact = get_edit_model(tiny_model("llama"), config("ft-m", dense_tolerance=0.0), tokenizer)
    cut, whole = (each.edit(FACTS) for each in (model, exact))
    ((path, delta),) = cut.deltas.items()
    assert delta.rank < whole.deltas[path].rank
    wanted = whole.deltas[path].dense()
    assert (delta.dense() - wanted).norm() / wanted.norm() == pytest.approx(cut.relative_error, rel=1e-2)
    assert 0 < cut.relative_error <= 0.2
    model.save_pretrained(tmp_path / "edit")
    loaded = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    assert loaded.edits["edit_1"].relative_error == pytest.approx(cut.relative_error)


def test_a_batch_that_harms_plain_text_is_undone_and_the_figures_told(tokenizer):
    model = get_edit_model(tiny_model("llama"), config("r-rome", max_perplexity_ratio=1e6, **PUBLISHED), tokenizer)
    model.edit(FACTS[0])
    model.edit_config.max_perplexity_ratio = 1.0 + 1e-9
    model.edit_config.clamp, model.edit_config.lr = 1000.0, 50.0
    before = logits(model)
    with pytest.raises(ValueError, match=r"perplexity on plain statements is [0-9.]+, against [0-9.]+ for the base"):
        model.edit(MORE)
    assert model.active_adapters == list(model.edits) == ["edit_1"]
    assert torch.equal(logits(model), before)
