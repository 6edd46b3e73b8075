"""The cache of keys and values goes by the name that the installed transformers has for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from goldenedit.architecture.caching import cache_argument, cache_of
from models import tiny_model


class Newer(nn.Module):
    def forward(self, input_ids, cache=None):
        return SimpleNamespace(cache=cache)


class Older(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return SimpleNamespace(past_key_values=past_key_values)


@pytest.mark.parametrize("kind", [Newer, Older])
def test_a_model_gets_and_returns_its_cache_by_its_own_name(kind):
    model, cache = kind(), object()
    assert cache_of(model(None, **cache_argument(model, cache))) is cache


def test_a_cache_of_recurrent_states_alone_is_not_used():
    recurrent, attention = SimpleNamespace(states=0), SimpleNamespace(keys=0, values=0)
    assert cache_of(SimpleNamespace(cache=SimpleNamespace(layers=[recurrent]))) is None
    hybrid = SimpleNamespace(layers=[recurrent, attention])
    assert cache_of(SimpleNamespace(cache=hybrid)) is hybrid


def test_an_output_without_a_cache_has_none():
    assert cache_of(SimpleNamespace(logits=None)) is None
    assert cache_of(Newer()(None)) is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_goes_on_from_a_cache_as_without_one_and_no_warning_is_shown(name, recwarn):
    model, ids = tiny_model(name), torch.arange(6)[None]
    with torch.no_grad():
        past = cache_of(model(input_ids=ids[:, :4], use_cache=True))
        end = model(input_ids=ids[:, 4:], **cache_argument(model, past), use_cache=True).logits
        torch.testing.assert_close(end, model(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=1e-5)
    assert [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)] == []
