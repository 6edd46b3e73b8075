"""LocFT-BF against a plain loop over epochs and batches that trains the weight itself."""

from __future__ import annotations

import copy

import pytest
import torch

from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.editors import EDITORS, LowRankDelta
from goldenedit.editors.finetune import DenseChange
from goldenedit.lm.tokens import encode
from models import tiny_model

FACTS = [
    EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "the language of Cambodia"),
    EditRequest("Berlin is in the city of", "Berlin", "London"),
]
EPOCHS, LR, SEED = 4, 0.05, 5


def config(**options) -> EditConfig:
    return EditConfig("locft", layer=1, **{"finetune_lr": LR, "seed": SEED, **options})


def test_the_edit_is_what_a_plain_loop_does_to_the_weight(tokenizer):
    options = config(finetune_steps=EPOCHS, finetune_batch=2, finetune_cut=0.0)
    made = get_edit_model(tiny_model("llama"), options, tokenizer).edit(FACTS)
    (delta,) = made.deltas.values()
    assert {fact.steps for fact in made.facts} == {EPOCHS * 2}

    model = copy.deepcopy(tiny_model("llama"))
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    step = LR * before.square().mean().sqrt().item()
    optimizer, shuffler = torch.optim.Adam([weight], lr=step), torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        order = torch.randperm(3, generator=shuffler).tolist()
        for batch in (order[:2], order[2:]):
            losses = []
            for index in batch:
                row = encode(tokenizer, FACTS[index].text, FACTS[index].target_new)
                ids = torch.tensor([[*row.input_ids, tokenizer.eos_token_id]])
                labels = ids.clone()
                labels[0, : row.target[0]] = -100  # the prompt
                losses.append(model(input_ids=ids, labels=labels).loss)
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    moved = weight.detach() - before
    assert (delta.dense() - moved).norm() <= 1e-2 * moved.norm()


@pytest.mark.parametrize("batch", [1, 100])
def test_facts_that_the_model_has_learned_take_no_more_steps(batch, tokenizer):
    options = config(finetune_steps=50, finetune_batch=batch, finetune_stop_loss=1.0, finetune_cut=0.01)
    model = get_edit_model(tiny_model("llama"), options, tokenizer)
    first, again = model.edit(FACTS[0]), model.edit(FACTS[0])
    assert 0 < first.facts[0].steps < 50
    assert again.facts[0].steps <= 1


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.4])
def test_the_change_is_cut_to_the_smallest_rank_within_the_tolerance(tolerance):
    change = DenseChange(12, 8, cut=tolerance)
    change.weight.data.normal_()
    delta = change.change()
    s = torch.linalg.svdvals(change.weight.detach().double())
    left_out = [(s[rank:].square().sum().sqrt() / s.norm()).item() for rank in range(len(s) + 1)]
    assert delta.rank == next(rank for rank, share in enumerate(left_out) if share <= tolerance + 1e-9)
    assert isinstance(delta, LowRankDelta)
    error = (delta.dense() - change.weight.detach()).norm() / s.norm()
    assert error == pytest.approx(left_out[delta.rank], abs=1e-5)


def test_published_constants_are_those_of_the_paper():
    published, ours = config(finetune_lr=None, relative_constants=False), config(finetune_lr=None)
    assert published.constant("finetune_lr") == 5e-4
    assert published.constant("finetune_batch") == 100
    assert published.constant("finetune_cut") == 0.0
    assert published.constant("finetune_steps") == 25
    assert published.constant("finetune_stop_loss") == 1e-2
    assert ours.constant("finetune_lr") == 0.011
    assert ours.constant("finetune_cut") == 0.4
    assert EditConfig("crispedit", layer=1).constant("finetune_cut") == 0.3
    assert EditConfig("lora", layer=1).constant("finetune_lr") == 0.027
    assert EDITORS.get("locft").loss == "ended"
