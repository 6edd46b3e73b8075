"""Key response against margins, slopes and detectors that are found the plain way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from goldenedit.architecture import read_architecture
from goldenedit.architecture.hooks import recording
from goldenedit.config import EditConfig
from goldenedit.editing.keys import subject_keys
from goldenedit.editors import FactKeys, KeyStatistics, TrainingOptions, editor
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.layer_selection import key_response_scores
from goldenedit.layer_selection.detectors import detector
from goldenedit.layer_selection.key_response import score_of
from goldenedit.layer_selection.prompts import PROPERTIES, other_prompts
from goldenedit.layer_selection.response import MARGIN, OVERSHOOT, Response, respond
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import greedy_answer
from goldenedit.lm.tokens import encode
from goldenedit.requests import ChatText, EditRequest, proxy_facts
from models import MLP_WIDTH, NUM_LAYERS, TINY_CONFIGS, tiny_model
from plugins import restore_registries

FACT = EditRequest(
    "The Eiffel Tower is in the city of",
    "The Eiffel Tower",
    "Rome",
    "Paris",
    paraphrases=("One finds The Eiffel Tower in", "It stands in"),
    neighborhood=("The Louvre is in", "Berlin is in the city of", "London is in"),
)
KEPT = [(prompt, "Paris") for prompt in FACT.neighborhood]
SELECTIVE = EditConfig(layer=0, contrast=0)
CONTEXTS = ["", "Therefore. "]


def second_moment() -> torch.Tensor:
    X = torch.randn(200, MLP_WIDTH, generator=torch.Generator().manual_seed(0)).double()
    return X.T @ X / 200


class InContexts(LanguageModel):
    """A model whose contexts are given."""

    def __init__(self, model, tokenizer, contexts):
        super().__init__(model, tokenizer)
        self.given = contexts

    def contexts(self, config):
        return self.given


def scores(model, tokenizer, facts, config=SELECTIVE, statistics=None, contexts=CONTEXTS) -> torch.Tensor:
    statistics = {1: KeyStatistics(second_moment(), 0.1)} if statistics is None else statistics
    return key_response_scores(InContexts(model, tokenizer, contexts), facts, config, statistics)


@pytest.mark.parametrize("name", sorted(set(TINY_CONFIGS) - {"bloom"}))  # whose MLP has another width
def test_a_response_is_what_the_plain_way_finds(name, tokenizer):
    model = tiny_model(name).double()
    architecture = read_architecture(model)
    lm = LanguageModel(model, tokenizer, architecture)
    (key,) = subject_keys(lm, [FACT], [1])
    a = detector(FactKeys(key[0], key[0]), SELECTIVE, KeyStatistics(second_moment(), 0.1))
    found = respond(lm, FACT, {1: a}, KEPT)

    prompts = [FACT.text, *FACT.paraphrases, *FACT.neighborhood]
    pairs = [(prompt, answer) for prompt in prompts for answer in (FACT.target_new, FACT.target_true)]
    nll = torch.tensor([one.nll for one in likelihoods(lm, pairs)])
    torch.testing.assert_close(found.margins, nll[1::2] - nll[::2], rtol=1e-4, atol=1e-5)

    module = architecture.down_projection(model, 1)
    subject = encode(tokenizer, FACT.text, None, FACT.subject_end).subject
    keys, values = [], []
    for prompt in prompts:
        with recording({"it": module}) as record, torch.no_grad():
            model(input_ids=torch.tensor([encode(tokenizer, prompt).input_ids]))
        keys.append(record.inputs["it"].view(-1, MLP_WIDTH).float())
        values.append(record.outputs["it"].view(len(keys[-1]), -1))
    own = (keys[0][subject] @ a.float()).abs()
    others = [(of_prompt[1:] @ a.float()).abs().max() / own for of_prompt in keys[1:]]
    expected = torch.stack([torch.ones(()), *others]).clamp(max=1)
    torch.testing.assert_close(found.activations[1], expected, rtol=1e-4, atol=1e-5)
    expected = values[0][subject].norm() * gradient(model, tokenizer, module, subject).norm()
    assert found.slope[1] == pytest.approx(expected.item(), 1e-3)
    p = math.exp(-nll[0])
    assert found.certainty == pytest.approx(math.log(p / (1 - p)), 1e-4)


def gradient(model, tokenizer, module, subject: int) -> torch.Tensor:
    """The gradient of the margin at the edited prompt by the value, one answer after the other."""
    total = torch.zeros(())
    for sign, answer in ((1, FACT.target_new), (-1, FACT.target_true)):
        row = encode(tokenizer, FACT.text, answer)
        moved: list[torch.Tensor] = []

        def add(module, args, output, moved=moved):
            moved.append(torch.zeros(output.shape[-1], dtype=output.dtype, requires_grad=True))
            onto = torch.zeros_like(output.view(-1, output.shape[-1])).index_put(
                (torch.tensor([subject]),), moved[0][None]
            )
            return output + onto.view_as(output)

        handle = module.register_forward_hook(add)
        log_probs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        handle.remove()
        chosen = torch.stack([log_probs[position - 1, row.input_ids[position]] for position in row.target]).mean()
        total = total + sign * torch.autograd.grad(chosen, moved[0])[0]
    return total


@pytest.mark.parametrize(
    ("slope", "clamp", "expected"),
    [
        (100.0, 4.0, [MARGIN, -5 + (MARGIN + 4) / 2, -6.0]),  # as far as it must be, and no further
        (0.5, 1.0, [-4 + OVERSHOOT * 0.5, -5 + OVERSHOOT * 0.25, -6.0]),  # as far as the clamp lets it
        (0.0, 4.0, [-4.0, -5.0, -6.0]),  # the last layer's value is read by no token
    ],
)
def test_answers_are_pushed_by_what_they_share_with_the_edited_prompt(slope, clamp, expected):
    response = Response(torch.tensor([-4.0, -5.0, -6.0]), -3.0, {3: torch.tensor([1.0, 0.5, 0.0])}, {3: slope})
    torch.testing.assert_close(response.edited(3, EditConfig(clamp=clamp)), torch.tensor(expected))


@pytest.mark.parametrize(
    ("certainty", "slope", "expected"),
    [
        (-3.0, 100.0, 0.9),  # the optimization stops there
        (-3.0, 1.5 / OVERSHOOT, 1 / (1 + math.exp(1.5))),
        (-3.0, 0.0, 1 / (1 + math.exp(3.0))),
        (4.0, 100.0, 1 / (1 + math.exp(-4.0))),  # surer than that before
    ],
)
def test_the_new_answer_is_as_sure_as_the_layer_can_make_it(certainty, slope, expected):
    response = Response(torch.zeros(1), certainty, {0: torch.ones(1)}, {0: slope})
    config = EditConfig(clamp=1.0, stop_loss=-math.log(0.9))
    assert response.efficacy(0, config) == pytest.approx(expected)
    assert response.efficacy(0, replace(config, stop_loss=0.0)) >= response.efficacy(0, config) - 1e-9


def test_an_answer_that_is_there_is_not_pushed_away():
    response = Response(torch.tensor([MARGIN + 1]), 0.0, {0: torch.ones(1)}, {0: 5.0})
    assert response.edited(0, EditConfig()).item() == MARGIN + 1


def test_contrast_keys_contexts_and_other_editors_change_what_is_predicted(tokenizer):
    model = tiny_model("llama")
    statistics = dict.fromkeys(range(NUM_LAYERS), KeyStatistics(second_moment(), 0.1))

    def found(contexts=CONTEXTS, **options):
        config = EditConfig(**{"method": "r-rome", "layer": 0} | options)
        return scores(model, tokenizer, [FACT], config, statistics, contexts)

    plain = found(contrast=0)
    assert ((plain >= 0) & (plain <= 1)).all()
    assert not torch.equal(plain, found())
    assert not torch.equal(plain, found([""], contrast=0))
    assert not torch.equal(plain, found(contrast=0, method="alphaedit"))
    torch.testing.assert_close(plain, found(contrast=0, method="ft-l"), rtol=0, atol=0)
    torch.testing.assert_close(plain, found(contrast_weight=0.0), rtol=0, atol=0)


def test_an_editor_of_another_package_that_trains_is_taken_for_r_rome(tokenizer, monkeypatch):
    restore_registries(monkeypatch)
    editor("mine", options=TrainingOptions, learns="training")(lambda problem: None)
    model, plain = tiny_model("llama"), EditConfig("r-rome", layer=0)
    mine = EditConfig("mine", layer=0, options={"finetune_steps": 3})
    found, expected = (scores(model, tokenizer, [FACT], config) for config in (mine, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny_model("llama")
    found = scores(model, tokenizer, [FACT])
    assert found.isnan().tolist() == [index != 1 for index in range(NUM_LAYERS)]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_facts_lack_is_what_the_model_says(tokenizer):
    model = tiny_model("llama")
    own = greedy_answer(LanguageModel(model, tokenizer), FACT.text)
    bare = replace(FACT, target_true=None, neighborhood=(), locality=(("Paris is the", "fox"),))
    torch.testing.assert_close(
        scores(model, tokenizer, [bare]), scores(model, tokenizer, [replace(bare, target_true=own)]), equal_nan=True
    )


def test_facts_that_say_nothing_are_refused(tokenizer):
    chat = ChatText(FACT.text, subject_start=0, context_start=0)
    alone = replace(FACT, prompt=chat, paraphrases=(), neighborhood=())
    with pytest.raises(ValueError, match="No proxy fact has neighbors or locality"):
        scores(tiny_model("llama"), tokenizer, [alone])


def test_the_score_is_the_mean_of_what_four_datasets_measure():
    parts = {"efficacy": 1.0, "paraphrase": 0.5, "neighbors": 0.8, "locality": 0.4}
    counterfact, zsre, wiki = 3 / (1 + 2 + 1 / 0.8), 3 / (1 + 2 + 1 / 0.4), 2 / (1 + 1 / 0.4)
    assert score_of(parts) == pytest.approx((counterfact + zsre + 2 * wiki) / 4)
    del parts["neighbors"]
    assert score_of(parts) == pytest.approx((zsre + 2 * wiki) / 3)
    del parts["paraphrase"]
    assert score_of(parts) == pytest.approx(wiki)
    assert score_of({"efficacy": 1.0, "neighbors": 0.8}) == pytest.approx(2 / (1 + 1 / 0.8))


@pytest.mark.parametrize("kind", ["neighborhood", "locality"])
def test_an_edit_that_moves_what_must_stay_scores_less(kind, tokenizer):
    model = tiny_model("llama")

    def score(prompt: str) -> float:
        fact = replace(FACT, target_true="London, or in the city of Berlin", neighborhood=(), locality=(("A", "B"),))
        kept = (prompt,) if kind == "neighborhood" else ((prompt, "Berlin"),)
        return scores(model, tokenizer, [replace(fact, **{kind: kept})])[1].item()

    assert score("Berlin is a city in") > score(FACT.text)  # the edited prompt itself must stay


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_what_is_not_finite_is_told(where, tokenizer):
    model = tiny_model("llama")
    if where == "output":
        model.get_output_embeddings().weight.data[5] = float("inf")
    else:  # as half precision overflows on its way back
        module = read_architecture(model).layer(model, NUM_LAYERS - 1)
        module.register_full_backward_hook(lambda _, gradients, __: tuple(one * float("nan") for one in gradients))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        scores(model, tokenizer, [FACT])


def test_a_fact_whose_new_answer_the_model_gives_already_is_passed_by(tokenizer):
    model = tiny_model("llama")
    there = EditRequest(FACT.text, FACT.subject, greedy_answer(LanguageModel(model, tokenizer), FACT.text))
    torch.testing.assert_close(
        scores(model, tokenizer, [there, FACT]), scores(model, tokenizer, [FACT]), equal_nan=True
    )
    with pytest.raises(ValueError, match="the model gives the new answers already"):
        scores(model, tokenizer, [there])


def test_first_tokens_answer_to_a_subject_that_is_one(tokenizer):
    """Elsewhere they are left out: attention sinks, whose keys are like no other."""
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    for fact, expected in (
        (EditRequest("Paris is the capital of", "Paris", "Spain", "France"), 1.0),
        (EditRequest("It is Paris, the capital of", "Paris", "Spain", "France"), 0.0),
    ):
        (key,) = subject_keys(lm, [fact], [1])
        assert (encode(tokenizer, fact.text, None, fact.subject_end).subject == 0) == bool(expected)
        found = respond(lm, fact, {1: key[0]}, [("Paris", "France")])
        assert found.activations[1][1] == pytest.approx(expected)


def test_what_else_is_asked_of_a_subject():
    facts = proxy_facts()
    prompts = other_prompts(facts[0], facts)
    assert prompts == other_prompts(facts[0], facts)
    assert len(set(prompts)) == 5
    assert set(prompts) <= {f"The {one} of {facts[0].subject} is" for one in PROPERTIES}


def test_in_a_chat_it_is_what_other_facts_are_about():
    facts = [replace(fact, prompt=ChatText(fact.text), subject=fact.subject) for fact in proxy_facts()]
    prompts = other_prompts(facts[0], facts)
    assert len(set(prompts)) == 5
    assert all(facts[0].subject in prompt for prompt in prompts)
    own = {fact.text.replace(fact.subject, facts[0].subject) for fact in facts if fact.relation == facts[0].relation}
    assert not own & set(prompts)
    assert other_prompts(facts[0], facts[:1]) == []


def test_in_a_chat_of_another_fact_only_its_subject_is_replaced():
    fact = EditRequest(ChatText("Rome is in", " ", 0, 0), "Rome", "Spain", relation="a")
    other = EditRequest(ChatText("The opening of a pen is by", " ", 17, 0), "pen", "Ann", relation="b")
    (prompt,) = other_prompts(fact, [other])
    assert (prompt, prompt.joint) == ("The opening of a Rome is by", " ")
