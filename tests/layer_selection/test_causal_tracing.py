"""Causal tracing against plain loops, one noise draw and one layer at a time."""

from __future__ import annotations

import pytest
import torch

from goldenedit.architecture import read_architecture
from goldenedit.layer_selection import causal_tracing_scores
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode, subject_span
from goldenedit.requests import EditRequest
from models import NUM_LAYERS, WIDTH, tiny_model

FACTS = [
    EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "the language of Germany"),
]


@torch.no_grad()
def plain_scores(model, tokenizer, facts, draws):
    """Run whole hidden states through the layers by hand, with the noise that the generator gives."""
    embeddings = model.get_input_embeddings()
    layers = read_architecture(model)
    rows = [encode(tokenizer, fact.text, fact.target_true, fact.subject_end) for fact in facts]
    spans = [subject_span(tokenizer, fact.text, fact.subject_start, fact.subject_end) for fact in facts]
    tokens = [row.input_ids[index] for row, span in zip(rows, spans, strict=True) for index in span]
    deviation = 3 * embeddings(torch.tensor(tokens)).std()
    generator = torch.Generator().manual_seed(0)
    scores = torch.zeros(NUM_LAYERS)
    for row, span in zip(rows, spans, strict=True):
        ids = torch.tensor([row.input_ids])

        def probability(ids=ids, row=row):
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            found = [log_probs[position - 1, row.input_ids[position]] for position in row.target]
            return torch.stack(found).mean().exp()

        clean = model(input_ids=ids, output_hidden_states=True).hidden_states
        noise = torch.randn(draws, len(span), WIDTH, generator=generator) * deviation
        for draw in noise:

            def corrupt(module, args, output, draw=draw, span=span):
                return output.index_put((torch.tensor(0), torch.tensor(span)), output[0, span] + draw)

            handle = embeddings.register_forward_hook(corrupt)
            corrupted = probability()
            for layer in range(NUM_LAYERS - 1):  # the last of hidden_states is behind the final norm

                def restore(module, args, output, layer=layer, clean=clean, row=row):
                    hidden = (output[0] if isinstance(output, tuple) else output).clone()
                    hidden[0, row.subject] = clean[layer + 1][0, row.subject]
                    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

                inner = layers.layer(model, layer).register_forward_hook(restore)
                scores[layer] += (probability() - corrupted) / draws
                inner.remove()
            handle.remove()
    return scores / len(facts)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma3"])
def test_effects_are_those_of_plain_loops(name, tokenizer):
    model = tiny_model(name)
    found = causal_tracing_scores(LanguageModel(model, tokenizer), FACTS, draws=2)
    assert found.shape == (NUM_LAYERS,)
    expected = plain_scores(model, tokenizer, FACTS, 2)[:-1].double()
    torch.testing.assert_close(found[:-1], expected, rtol=1e-3, atol=1e-7)


def test_the_last_state_of_a_subject_that_ends_the_prompt_brings_all_back(tokenizer):
    """The answer's first token is read there: with the clean state in place nothing of the noise is left."""
    model = tiny_model("llama")
    fact = EditRequest("A city is Paris", "Paris", "London", "Rome")
    row = encode(tokenizer, fact.text, fact.target_true, fact.subject_end)
    assert len(row.target) == 1
    scores = causal_tracing_scores(LanguageModel(model, tokenizer), [fact], draws=1)
    with torch.no_grad():
        clean = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.target[0] - 1].softmax(-1)
    rest = scores[-1] - clean[row.target_ids[0]].double()
    assert rest <= 0  # less the probability that noise leaves
    assert scores[-1].abs() > 0


def test_the_same_seed_gives_the_same_scores_and_no_hook_is_left(tokenizer):
    model = tiny_model("llama")
    architecture = read_architecture(model)
    lm = LanguageModel(model, tokenizer, architecture)
    first, again = (causal_tracing_scores(lm, FACTS, draws=2) for _ in range(2))
    other = causal_tracing_scores(lm, FACTS, draws=2, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_facts_raise(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="got no facts"):
        causal_tracing_scores(LanguageModel(model, tokenizer), [])
