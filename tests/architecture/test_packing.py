"""Attention of packed rows is that of each row alone, behind what is cached of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from goldenedit.architecture.packing import PackedAttention

HEADS, WIDTH = 4, 8


class Layer(nn.Module):
    """Attends as often as it is told to."""

    def __init__(self, times: int = 1, **options: object) -> None:
        super().__init__()
        self.times, self.options = times, options

    def forward(self, query, key, value):
        found = query
        for _ in range(self.times):
            found = functional.scaled_dot_product_attention(query, key, value, **self.options)
        return found


def attention(lengths, before, cached_heads=HEADS):
    """Return a packed attention with rows of these lengths, behind these many cached tokens, and its cache."""
    lengths, before = torch.tensor(lengths), torch.tensor(before)
    tokens = int((lengths + before).max())
    cache = [
        (torch.randn(len(lengths), cached_heads, tokens, WIDTH), torch.randn(len(lengths), cached_heads, tokens, WIDTH))
    ]
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    seen = torch.arange(int(before.max())) < before[:, None]
    return PackedAttention(cache, real, seen), cache[0]


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2], [4]])
@pytest.mark.parametrize("before", [[5, 0, 2], [0, 0, 0], [3, 3, 3]])
@pytest.mark.parametrize(("heads", "gqa"), [(HEADS, False), (2, False), (2, True)])
def test_packed_rows_attend_as_each_does_alone(lengths, before, heads, gqa):
    torch.manual_seed(0)
    before = before[: len(lengths)]
    packed, (keys, values) = attention(lengths, before, cached_heads=heads)
    # Models hand over as many heads of keys as of queries, or let torch share them.
    query = torch.randn(1, HEADS, sum(lengths), WIDTH, requires_grad=True)
    new = [torch.randn(1, heads if gqa else HEADS, sum(lengths), WIDTH, requires_grad=True) for _ in range(2)]
    layer = Layer(scale=0.7, enable_gqa=gqa)
    with packed.in_layers({0: layer}):
        found = layer(query, *new)
    expected, start = [], 0
    for row, (length, seen) in enumerate(zip(lengths, before, strict=True)):
        own = slice(start, start + length)
        start += length
        whole = [
            torch.cat([cached[row : row + 1, :, :seen], n[:, :: n.shape[1] // heads, own]], 2)
            if gqa
            else torch.cat([cached[row : row + 1, :, :seen].repeat_interleave(HEADS // heads, 1), n[:, :, own]], 2)
            for cached, n in zip((keys, values), new, strict=True)
        ]
        mask = torch.ones(length, seen + length, dtype=torch.bool).tril(seen)
        expected.append(
            functional.scaled_dot_product_attention(query[:, :, own], *whole, attn_mask=mask, scale=0.7, enable_gqa=gqa)
        )
    expected = torch.cat(expected, 2)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, [query, *new], slope),
        torch.autograd.grad(expected, [query, *new], slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("times", "message"),
    [(0, "Layer 0 does not use scaled_dot_product_attention"), (2, "A layer uses attention twice")],
)
def test_a_layer_must_attend_once(times, message):
    packed, _ = attention([2, 1], [1, 1])
    layer, given = Layer(times), torch.randn(3, 1, HEADS, 3, WIDTH)
    with pytest.raises(RuntimeError, match=message), packed.in_layers({0: layer}):
        layer(*given)


def test_attention_outside_the_layers_is_refused_and_left_alone_afterwards():
    packed, _ = attention([2, 1], [1, 1])
    given = torch.randn(3, 1, HEADS, 3, WIDTH)
    expected = functional.scaled_dot_product_attention(*given)
    with pytest.raises(RuntimeError, match="outside the layers"), packed.in_layers({0: Layer()}):
        functional.scaled_dot_product_attention(*given)
    assert torch.equal(functional.scaled_dot_product_attention(*given), expected)


@torch.no_grad()
def test_layers_may_be_on_several_devices():
    """The last layer's device must not be taken for that of the first when a replay is repeated."""
    packed, (keys, values) = attention([2, 1], [1, 1])
    packed._cache = [(keys, values), (keys.to("meta"), values.to("meta"))]
    layers, given = {0: Layer(), 1: Layer()}, torch.randn(3, 1, HEADS, 3, WIDTH)
    found = []
    for _ in range(2):
        with packed.in_layers(layers):
            found.append(layers[0](*given))
            layers[1](*given.to("meta"))
    assert torch.equal(*found)


def test_queries_of_another_form_are_refused():
    """Such as those that transformers folds where there is one token."""
    packed, _ = attention([2, 1], [1, 1])
    layer, given = Layer(), torch.randn(3, 1, HEADS, 2, WIDTH)
    with pytest.raises(RuntimeError, match="queries of an unexpected shape"), packed.in_layers({0: layer}):
        layer(*given)
