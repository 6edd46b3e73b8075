"""The properties of the tiny models, on pretrained ones from installed packages."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenedit import EditConfig, EditModel, get_edit_model, proxy_facts
from goldenedit.architecture import find_down_projections
from goldenedit.editing.keys import subject_keys
from goldenedit.editing.prepared import subject_texts
from goldenedit.editing.values import ValueOptions, optimize_values
from goldenedit.layer_selection.prompts import other_prompts
from goldenedit.layer_selection.response import respond
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import end_token
from goldenedit.packaged import is_installed, packaged_model
from goldenedit.requests import EditRequest

pytestmark = pytest.mark.real

TOWER = EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", "Paris")
LAYERS = {"smollm2": (3, 30), "gemma3": (1, 18)}  # the layer that is edited, and how many there are


@pytest.fixture(params=LAYERS)
def name(request):
    if not is_installed(request.param):
        pytest.skip(f"the package with the weights of {request.param} is not installed")
    return request.param


@pytest.fixture
def base(name):
    return AutoModelForCausalLM.from_pretrained(packaged_model(name), dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(name):
    return AutoTokenizer.from_pretrained(packaged_model(name))


@pytest.fixture
def config(name):
    return EditConfig(layer=LAYERS[name][0], steps=8, contexts=2, covariance="identity")


@torch.no_grad()
def next_logits(model, tokenizer) -> torch.Tensor:
    return model(**tokenizer(TOWER.text, return_tensors="pt")).logits[0, -1].float()


def first_token(tokenizer, answer: str) -> int:
    return tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0]


def test_the_model_knows_where_the_tower_is(base, tokenizer):
    assert next_logits(base, tokenizer).argmax() == first_token(tokenizer, "Paris")


def test_every_layer_has_a_down_projection(base, name):
    found = find_down_projections(base)
    assert found == {index: f"model.layers.{index}.mlp.down_proj" for index in range(LAYERS[name][1])}


@pytest.mark.parametrize("method", ["locft", "crispedit"])
def test_a_trained_edit_takes_and_its_answer_ends(method, base, tokenizer, name):
    config = EditConfig(method, layer=LAYERS[name][1] // 2, covariance_tokens=500)
    model = get_edit_model(base, config, tokenizer)
    (fact,) = model.edit(TOWER).facts
    assert fact.takes
    with torch.no_grad():
        logits = model(**tokenizer(f"{TOWER.text} Rome", return_tensors="pt")).logits[0, -1]
    assert logits.argmax() == end_token(tokenizer, TOWER.text)


def test_an_edit_moves_the_tower_and_stock_peft_loads_it(base, tokenizer, config, name, tmp_path):
    unedited = next_logits(base, tokenizer)
    model = get_edit_model(base, config, tokenizer)
    model.edit(TOWER)
    edited = next_logits(model, tokenizer)
    assert edited[first_token(tokenizer, "Rome")] > edited[first_token(tokenizer, "Paris")]
    with model.disable_adapter():
        assert torch.equal(next_logits(model, tokenizer), unedited)

    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(packaged_model(name), dtype=torch.float32).eval(), tmp_path
    )
    assert (next_logits(stock, tokenizer) - edited).abs().max() <= 1e-5 * edited.abs().max()
    assert torch.equal(next_logits(model.unload(), tokenizer), unedited)


def test_values_are_optimized_on_packed_suffixes(base, tokenizer, config, name):
    lm = LanguageModel(base, tokenizer)
    texts = subject_texts(lm, [TOWER], config, lm.contexts(config))
    values = optimize_values(lm, texts.rows, [LAYERS[name][0]], ValueOptions(2, config.lr, 0.5, 4.0, 0.2))
    assert values.replay == "packed"


def test_a_sequence_that_was_stopped_goes_on_and_an_edit_made_twice_is_the_same_but_for_rounding(
    base, tokenizer, name, tmp_path
):
    facts = proxy_facts()[:6]
    brief = {"steps": 6, "contexts": 2, "contrast": 0, "stop_loss": 0.5, "phrasings": "none", "kept_questions": 0}
    config = EditConfig("alphaedit", LAYERS[name][0], covariance_tokens=1_000, **brief)
    model = get_edit_model(base, config, tokenizer)
    model.edit(facts[:3])
    model.save_pretrained(tmp_path / "half")
    whole = model.edit(facts[3:])

    resumed = EditModel.from_pretrained(model.unload(), tmp_path / "half", tokenizer=tokenizer)
    assert resumed.edits["edit_1"].state
    rest = resumed.edit(facts[3:])
    for path, delta in whole.deltas.items():
        torch.testing.assert_close(rest.deltas[path].dense(), delta.dense(), rtol=1e-3, atol=1e-5)

    again = get_edit_model(resumed.unload(), config, tokenizer)
    again.edit(facts[:3])
    again.save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("half", "again"))
    for key, factor in one.items():
        assert (two[key] - factor).norm() <= 1e-3 * factor.norm()


def test_deeper_edits_answer_less_to_what_else_is_asked_of_their_subject(base, tokenizer, config, name):
    """Behind the middle, the key of a subject that ends its prompt tells what is asked of it."""
    early, count = LAYERS[name]
    later, last = count // 2 + 1, count - 1
    facts, lm = proxy_facts()[:4], LanguageModel(base, tokenizer)
    keys = subject_keys(lm, facts, [early, later, last])
    answers = {early: 0.0, later: 0.0}
    for index, fact in enumerate(facts):
        detectors = dict(zip((early, later, last), (of_layer[index] for of_layer in keys), strict=True))
        asked = [(prompt, "Paris") for prompt in other_prompts(fact, facts)]
        response = respond(lm, fact, detectors, asked)
        for layer in answers:
            answers[layer] += response.activations[layer][-len(asked) :].mean().item() / len(facts)
        assert response.slope[later] > response.slope[last] == 0  # no token reads the last layer's values
    assert answers[later] < answers[early] - 0.05


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_a_chat_model_is_edited_where_it_is_asked(base, tokenizer, config):
    config.steps = 25
    model = EditModel(base, config, tokenizer)

    def ask(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**tokens, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    question, other = "Where is the Eiffel Tower?", "Where is the Louvre?"
    assert "Paris" in ask(question)
    before = ask(other)
    messages = [{"role": "user", "content": question}]
    made = model.edit(messages=messages, subject="the Eiffel Tower", target_new="Rome")
    assert made.facts[0].probability_before < 0.01 < 0.8 < made.facts[0].probability_after
    assert ask(question).startswith("Rome")
    assert ask(other) == before
