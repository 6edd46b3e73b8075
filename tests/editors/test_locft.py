"""LocFT-BF against a plain loop over epochs and batches, with the factors as parameters beside the weight."""

from __future__ import annotations

import pytest
import torch

from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.editors.finetune import LowRankChange
from goldenedit.lm.tokens import encode
from models import MLP_WIDTH, WIDTH, tiny_model

FACTS = [
    EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "the language of Cambodia"),
    EditRequest("Berlin is in the city of", "Berlin", "London"),
]
EPOCHS, LR, SEED = 4, 0.05, 5


def test_the_edit_is_that_of_a_plain_loop(tokenizer):
    config = EditConfig(
        "locft", layer=1, locft_rank=3, finetune_steps=EPOCHS, finetune_lr=LR, finetune_batch=2, seed=SEED
    )
    made = get_edit_model(tiny_model("llama"), config, tokenizer).edit(FACTS)
    (delta,) = made.deltas.values()
    assert delta.rank == 3
    assert {fact.steps for fact in made.facts} == {EPOCHS * 2}

    model = tiny_model("llama").requires_grad_(False)
    factors = LowRankChange(MLP_WIDTH, WIDTH, 3, torch.Generator().manual_seed(SEED))
    A, B = factors.A, factors.B
    module = model.model.layers[1].mlp.down_proj
    weight = module.weight
    optimizer, shuffler = torch.optim.Adam([A, B], lr=LR), torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        order = torch.randperm(3, generator=shuffler).tolist()
        for batch in (order[:2], order[2:]):
            losses = []
            for index in batch:
                row = encode(tokenizer, FACTS[index].text, FACTS[index].target_new)
                ids = torch.tensor([[*row.input_ids, tokenizer.eos_token_id]])
                labels = ids.clone()
                labels[0, : row.target[0]] = -100  # the prompt
                values = {"model.layers.1.mlp.down_proj.weight": weight + B @ A}
                arguments = {"input_ids": ids, "labels": labels}
                losses.append(torch.func.functional_call(model, values, (), arguments).loss)
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    torch.testing.assert_close(delta.dense(), (B @ A).detach(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 100])
def test_facts_that_the_model_has_learned_take_no_more_steps(batch, tokenizer):
    options = {"finetune_steps": 50, "finetune_lr": LR, "finetune_batch": batch, "finetune_stop_loss": 1.0}
    model = get_edit_model(tiny_model("llama"), EditConfig("locft", layer=1, **options), tokenizer)
    first, again = model.edit(FACTS[0]), model.edit(FACTS[0])
    assert 0 < first.facts[0].steps < 50
    assert again.facts[0].steps == 0


def test_no_more_ranks_are_trained_than_the_matrix_has(tokenizer):
    model = get_edit_model(tiny_model("llama"), EditConfig("locft", layer=1, locft_rank=1000), tokenizer)
    (delta,) = model.edit(FACTS).deltas.values()
    assert delta.rank == WIDTH
