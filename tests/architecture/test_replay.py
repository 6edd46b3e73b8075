"""A replay gives the logits of a whole forward, leaves nothing behind, and falls back where it cannot."""

from __future__ import annotations

import logging
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPTJPreTrainedModel

from goldenedit.architecture import read_architecture, replay
from goldenedit.architecture.hooks import adding
from goldenedit.architecture.replay import Batch, Replayer, capture, may_pack
from models import NUM_LAYERS, TINY_CONFIGS, VOCAB_SIZE, WIDTH, tiny_model
from zoo import zoo_model

# Its sliding window of 8 is shorter than the rows, so its cache has forgotten what the suffix needs.
LAYERS_ONLY = {"gemma3"}
PADDED = {"bloom"}  # they do not attend by torch's function
if not GPTJPreTrainedModel._supports_sdpa:  # before transformers 5.24
    PADDED.add("gptj")

every_architecture = pytest.mark.parametrize("name", TINY_CONFIGS)
every_layer = pytest.mark.parametrize("start", range(NUM_LAYERS))
WAYS = ("packed", "suffix", "layers", "whole")


def ways(name: str) -> tuple[str, ...]:
    """Return the ways that an architecture allows for rows that fit into its window."""
    return WAYS[1:] if name in PADDED else WAYS


every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def batch() -> Batch:
    """Rows of unequal length, padded on the right; subjects at the start, in the middle and at the end."""
    lengths = torch.tensor([12, 7, 9, 12])
    ids = torch.randint(3, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < lengths[:, None]).long()
    subject = torch.tensor([3, 0, 8, 11])
    return Batch(ids * mask, mask, subject, torch.tensor([0, 0, 1, 2, 3]), torch.tensor([5, 11, 6, 8, 11]))


def short(batch: Batch) -> Batch:
    """Return rows that fit into Gemma's sliding window."""
    kept = batch.input_ids[:, :4]
    return Batch(kept, torch.ones_like(kept), torch.tensor([3, 0, 2, 1]), torch.arange(4), torch.full((4,), 3))


def prepared(model: nn.Module, start: int, batch: Batch):
    architecture = read_architecture(model)
    captured = capture(model, architecture, start, batch, {})
    return captured, Replayer(model, architecture, start), architecture.down_projection(model, start)


def use(replayer: Replayer, way: str) -> None:
    while replayer.way != way:
        replayer._ways.pop(0)


def traces(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    ]


@every_architecture
@every_layer
def test_check_keeps_the_fastest_way_that_the_architecture_allows(name, start, batch):
    captured, replayer, _ = prepared(tiny_model(name), start, batch)
    replayer.check(captured)
    assert replayer.way == ("layers" if name in LAYERS_ONLY else ways(name)[0])


@every_layer
def test_rows_shorter_than_a_sliding_window_are_packed(start, batch):
    captured, replayer, _ = prepared(tiny_model("gemma3"), start, short(batch))
    replayer.check(captured)
    assert replayer.way == "packed"


@every_layer
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_cannot_be_packed_replays_by_suffix(start, implementation, batch, monkeypatch):
    """Attention that is not torch's is known by its name, or by not being seen."""
    model = tiny_model("llama")
    captured, replayer, _ = prepared(model, start, batch)
    model.set_attn_implementation("eager")
    monkeypatch.setattr(replay, "may_pack", lambda _: implementation == "sdpa")
    replayer.check(captured)
    assert replayer.way == "suffix"


@every_architecture
@every_layer
@torch.no_grad()
def test_edited_logits_of_every_way_equal_those_of_a_whole_forward(name, start, batch):
    model = tiny_model(name)
    batch = short(batch) if name in LAYERS_ONLY else batch
    captured, replayer, module = prepared(model, start, batch)
    vectors = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    with adding({module: (batch.flat_subject, vectors)}):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = logits[batch.read_rows, batch.read_positions]
    largest = expected.abs().max()
    assert (expected - captured.logits).abs().max() > 1e-2 * largest  # the addition was seen
    for way in ways(name):
        use(replayer, way)
        with adding({module: (replayer.subjects(batch), vectors)}):
            replayed = replayer(captured)
        assert (replayed - expected).abs().max() <= 1e-4 * largest, way


@every_layer
@torch.no_grad()
def test_edited_logits_with_a_sliding_window_equal_those_of_a_whole_forward(start, batch):
    model = tiny_model("gemma3")
    captured, replayer, module = prepared(model, start, batch)
    replayer.check(captured)
    vectors = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    with adding({module: (batch.flat_subject, vectors)}):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    with adding({module: (replayer.subjects(batch), vectors)}):
        replayed = replayer(captured)
    torch.testing.assert_close(replayed, logits[batch.read_rows, batch.read_positions], rtol=1e-4, atol=1e-4)


@every_way
@torch.no_grad()
def test_additions_at_later_layers_are_seen_too(way, batch):
    model = tiny_model("llama")
    captured, replayer, first = prepared(model, 0, batch)
    use(replayer, way)
    later = model.model.layers[2].mlp.down_proj
    one, two = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    with adding({first: (batch.flat_subject, one), later: (batch.flat_subject, two)}):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    tokens = replayer.subjects(batch)
    with adding({first: (tokens, one), later: (tokens, two)}):
        replayed = replayer(captured)
    torch.testing.assert_close(replayed, logits[batch.read_rows, batch.read_positions], rtol=1e-4, atol=1e-4)


@every_architecture
def test_gradient_of_the_addition_equals_that_of_a_whole_forward(name, batch):
    model = tiny_model(name).requires_grad_(False)
    batch = short(batch) if name in LAYERS_ONLY else batch
    captured, replayer, module = prepared(model, 1, batch)
    gradients = {}
    for way in ways(name):
        use(replayer, way)
        vectors = torch.zeros(4, WIDTH, requires_grad=True)
        with adding({module: (replayer.subjects(batch), vectors)}):
            loss = replayer(captured).log_softmax(-1)[:, 7].sum()
        (gradients[way],) = torch.autograd.grad(loss, vectors)
    for gradient in gradients.values():
        assert (gradient - gradients["whole"]).norm() <= 1e-4 * gradient.norm()
        assert gradient.norm() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@every_way
@torch.no_grad()
def test_a_capture_of_some_rows_replays_as_they_did_among_the_others(name, way, batch):
    captured, replayer, _ = prepared(tiny_model(name), 1, batch)
    use(replayer, way)
    some = captured.select(torch.tensor([2, 0]))
    assert some.batch.read_rows.tolist() == [1, 1, 0]
    torch.testing.assert_close(some.logits, captured.logits[[0, 1, 3]])
    torch.testing.assert_close(replayer(some), some.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_some_rows_are_captured_of_a_model_with_several_streams(batch):
    captured, replayer, _ = prepared(zoo_model("gemma3n_text"), 1, batch)
    use(replayer, "layers")
    some = captured.select(torch.tensor([2, 0]))
    assert captured.hidden.ndim == 4
    torch.testing.assert_close(replayer(some), captured.logits[[0, 1, 3]], rtol=1e-4, atol=1e-4)


@every_architecture
@torch.no_grad()
def test_captured_logits_are_the_model_s_own(name, batch):
    model = tiny_model(name)
    captured, _, _ = prepared(model, 1, batch)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(captured.logits, logits[batch.read_rows, batch.read_positions])


@every_architecture
def test_replay_leaves_no_trace(name, batch):
    model = tiny_model(name)
    captured, replayer, _ = prepared(model, 2, batch)
    replayer.check(captured)
    replayer(captured)
    assert traces(model) == []


@every_way
def test_replay_leaves_no_trace_after_an_exception(way, batch):
    model = tiny_model("llama")
    captured, replayer, module = prepared(model, 2, batch)
    use(replayer, way)

    def fail(*_):
        raise KeyError("from a hook")

    handle = module.register_forward_hook(fail)
    with pytest.raises(KeyError, match="from a hook"):
        replayer(captured)
    handle.remove()
    assert traces(model) == []


def test_a_forward_put_on_the_instance_by_others_stays(batch):
    model = tiny_model("llama")
    captured, replayer, _ = prepared(model, 2, batch)
    layer = model.model.layers[0]
    own = MethodType(type(layer).forward, layer)
    layer.forward = own
    replayer(captured)
    assert layer.__dict__["forward"] is own


def test_a_model_that_cannot_be_replayed_falls_back_to_whole_with_a_warning(batch, caplog):
    model = tiny_model("llama")
    calls = []

    def drift(module, args):
        calls.append(None)
        return (args[0] + 0.5 * len(calls) * torch.arange(WIDTH), *args[1:])

    architecture = read_architecture(model)  # which would find a model that drifts not to be causal
    model.model.layers[1].register_forward_pre_hook(drift)
    captured, replayer = capture(model, architecture, 0, batch, {}), Replayer(model, architecture, 0)
    with caplog.at_level(logging.WARNING, logger="goldenedit"):
        replayer.check(captured)
    assert replayer.way == "whole"
    (record,) = caplog.records
    assert "LlamaForCausalLM" in record.getMessage()
    assert "all layers run at every step" in record.getMessage()
    assert "they differ by" in record.getMessage()


def test_a_slower_replay_than_expected_is_told_once(batch, caplog, monkeypatch):
    model = tiny_model("llama")
    architecture = read_architecture(model)
    captured = capture(model, architecture, 1, batch, {})
    model.set_attn_implementation("eager")
    monkeypatch.setattr(replay, "may_pack", lambda _: True)  # as of a model that says it attends by torch's function
    with caplog.at_level(logging.WARNING, logger="goldenedit"):
        for _ in range(3):  # as with each group of facts
            replayer = Replayer(model, architecture, 1)
            replayer.check(captured)
            assert replayer.way == "suffix"
    (record,) = caplog.records
    assert "texts are padded to one length" in record.getMessage()
    assert "Layer 1 does not use scaled_dot_product_attention" in record.getMessage()


@pytest.mark.parametrize("name", sorted(PADDED))
def test_a_model_that_cannot_be_packed_is_no_reason_to_warn(name, batch, caplog):
    captured, replayer, _ = prepared(tiny_model(name), 1, batch)
    with caplog.at_level(logging.WARNING, logger="goldenedit"):
        replayer.check(captured)
    assert replayer.way == "suffix"
    assert not caplog.records


def test_without_transformers_name_for_the_attention_packing_is_tried(batch, monkeypatch):
    model = tiny_model("llama")
    captured, replayer, _ = prepared(model, 1, batch)
    monkeypatch.setattr(model, "config", SimpleNamespace())
    with pytest.raises(AttributeError):
        _ = model.config._attn_implementation
    assert may_pack(model)
    monkeypatch.undo()
    replayer.check(captured)
    assert replayer.way == "packed"


def test_a_check_hands_on_the_logits_of_what_it_was_given(batch):
    captured, replayer, module = prepared(tiny_model("llama").requires_grad_(False), 1, batch)
    vectors = torch.zeros(4, WIDTH, requires_grad=True)

    def replayed() -> torch.Tensor:
        with adding({module: (replayer.subjects(batch), vectors)}):
            return replayer(captured)

    for way in WAYS:
        use(replayer, way)
        logits = replayer.check(captured, replayed)
        torch.testing.assert_close(logits.detach(), captured.logits, rtol=1e-4, atol=1e-4)
        assert torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), vectors)[0].norm() > 0


def test_a_model_without_a_cache_replays_by_layers(batch):
    model = tiny_model("llama")
    architecture = read_architecture(model)
    model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    captured = capture(model, architecture, 1, batch, {})
    assert captured.cache is None
    replayer = Replayer(model, architecture, 1)
    replayer.check(captured)
    assert replayer.way == "layers"


def test_the_subject_comes_first_in_a_suffix(batch):
    _, replayer, _ = prepared(tiny_model("llama"), 0, batch)
    assert replayer.subjects(batch).tolist() == [0, 9, 16, 17]  # behind suffixes of 9, 7, 1 and 1 tokens
    use(replayer, "suffix")
    assert replayer.subjects(batch).tolist() == [0, 9, 18, 27]
    use(replayer, "layers")
    assert replayer.subjects(batch).tolist() == [3, 12, 32, 47]


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma3"])
@torch.no_grad()
def test_positions_read_are_those_whose_logits_are_returned(name, batch):
    model = tiny_model(name)
    batch = short(batch) if name in LAYERS_ONLY else batch
    captured, replayer, _ = prepared(model, 1, batch)
    last = read_architecture(model).layer(model, NUM_LAYERS - 1)
    for way in ways(name):
        use(replayer, way)
        seen = []
        handle = last.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        replayer(captured)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        handle.remove()
        replayed, whole = (hidden.reshape(-1, WIDTH) for hidden in seen)
        found = replayed[replayer.reads(batch)]
        expected = whole.view(*batch.input_ids.shape, WIDTH)[batch.read_rows, batch.read_positions]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_positions_read_are_counted_in_the_tokens_that_a_way_runs(batch):
    _, replayer, _ = prepared(tiny_model("llama"), 0, batch)
    assert replayer.reads(batch).tolist() == [2, 8, 15, 16, 17]  # behind suffixes of 9, 7, 1 and 1 tokens
    use(replayer, "suffix")
    assert replayer.reads(batch).tolist() == [2, 8, 15, 18, 27]
    for way in ("layers", "whole"):
        use(replayer, way)
        assert replayer.reads(batch).tolist() == [5, 11, 18, 32, 47]
