"""Greedy texts in batches are, token for token, those of `generate` for each prompt alone."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from goldenedit import get_edit_model
from goldenedit.evaluation.seen import has_ended
from goldenedit.lm import LanguageModel, decoding
from goldenedit.lm.decoding import greedy
from goldenedit.lm.tokens import prompt_tokens
from models import EXPERTS_CONFIGS, TINY_CONFIGS, UNSUPPORTED_CONFIGS, tiny_model
from tiny_edits import MERKEL, TOWER, fast_config
from zoo import zoo_model

_BEGINNING = "The quick brown fox jumps over the lazy dog. "
PROMPTS = [
    "The",
    "Rome is a",
    _BEGINNING + "Paris is",
    "The Eiffel Tower is located in the city of",
    _BEGINNING + "The mother tongue of Angela Merkel",
    "I",
    _BEGINNING + "Rome",
    "Berlin",
    _BEGINNING + "The company is in",
    "Rome is a",
]
KINDS = [
    *("llama", "gpt2", "opt", "bloom", "falcon", "gemma3", "mixtral", "mamba"),
    *("qwen3_next", "falcon_h1", "rwkv", "gpt_oss", "mpt", "jamba"),
]
LENGTH = 8


def model_of(kind):
    known = TINY_CONFIGS | EXPERTS_CONFIGS | UNSUPPORTED_CONFIGS
    return tiny_model(kind) if kind in known else zoo_model(kind)


def ending_early(model, tokenizer):
    """Make a token that some of the prompts' continuations contain an end of text as well."""
    tokens = greedy(LanguageModel(model, tokenizer), PROMPTS[1:2], LENGTH)[0].tokens
    model.config.eos_token_id = model.generation_config.eos_token_id = [1, tokens[2]]


def generated(model, tokenizer, prompts=PROMPTS, length=LENGTH):
    """Return what transformers writes after each prompt alone, without the end of a text."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    use_cache = model.config.model_type not in ("jamba", "bamba")  # without attention layers, theirs does not work
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt_tokens(tokenizer, prompt)])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=length,
            use_cache=use_cache,
        )[0, ids.shape[1] :].tolist()
        rows.append((tuple(token for token in written if token not in ends), bool(written and written[-1] in ends)))
    return rows


def written_by(model, tokenizer, prompts=PROMPTS, **options):
    options = {"max_new_tokens": LENGTH} | options
    return [(text.tokens, text.finished) for text in greedy(LanguageModel(model, tokenizer), prompts, **options)]


def watched(model, change=None, refuse=lambda arguments: False):
    """Record the arguments of each forward, and change logits `(1, B, V)` by the number of pads of each row."""
    calls = []
    forward = model.forward

    def run(input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **options):
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}
        calls.append(arguments)
        if refuse(arguments):
            raise ValueError("no cache")
        output = forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **options,
        )
        if change is not None and attention_mask is not None:
            output.logits = change(output.logits, (attention_mask == 0).sum(1))
        return output

    run.__signature__ = inspect.signature(forward)  # which names the cache
    model.forward = run
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_batched_texts_are_those_of_generate_one_by_one(kind, tokenizer):
    model = model_of(kind)
    ending_early(model, tokenizer)
    expected = generated(model, tokenizer)
    assert written_by(model, tokenizer) == expected
    assert written_by(model, tokenizer, batch_size=3) == expected
    assert any(finished for _, finished in expected)
    assert not all(finished for _, finished in expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma3"])
def test_active_edits_take_effect(kind, tokenizer):
    model = get_edit_model(tiny_model(kind), fast_config(steps=8), tokenizer)
    base = written_by(model.get_base_model(), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL)
    expected = generated(model.get_base_model(), tokenizer)  # the adapters are in it
    texts = greedy(model.lm, PROMPTS, LENGTH)
    assert [(text.tokens, text.finished) for text in texts] == expected
    assert expected != base
    with model.disable_adapter():
        assert written_by(model.get_base_model(), tokenizer) == base


def test_a_shared_beginning_runs_once(tokenizer):
    model = tiny_model("llama")
    expected = generated(model, tokenizer)
    calls = watched(model)
    assert written_by(model, tokenizer) == expected
    shared = len(prompt_tokens(tokenizer, _BEGINNING.rstrip()))
    assert calls[0]["input_ids"].shape == (1, shared)
    assert all(call["input_ids"].shape[1] < shared for call in calls[1:] if len(call["input_ids"]) > 1)


def test_a_beginning_is_not_shared_where_it_leaves_the_window_of_the_text_model(tokenizer, monkeypatch):
    model = tiny_model("llama")
    text_config = SimpleNamespace(sliding_window=8)  # as in models of texts and images
    monkeypatch.setattr(type(model.config), "get_text_config", lambda *_, **__: text_config)
    calls = watched(model)
    written_by(model, tokenizer)
    assert all(len(call["input_ids"]) > 1 for call in calls[:1])


def test_batches_of_long_prompts_have_few_of_them(tokenizer, monkeypatch):
    model = tiny_model("llama")
    expected = written_by(model, tokenizer)
    monkeypatch.setattr(decoding, "_TOKENS", 64)
    monkeypatch.setattr(decoding, "_SHARING", 100)
    calls = watched(model)
    assert written_by(model, tokenizer) == expected
    assert all(call["attention_mask"].numel() <= 64 for call in calls if len(call["input_ids"]) > 1)
    assert any(len(call["input_ids"]) > 1 for call in calls)


def test_batches_are_planned_once_however_many_there_are(tokenizer, monkeypatch):
    model = tiny_model("llama")
    expected = generated(model, tokenizer)
    plans = []
    groups_of = decoding._sharing

    def counted(rows):
        plans.append(len(rows))
        return groups_of(rows)

    monkeypatch.setattr(decoding, "_sharing", counted)
    assert written_by(model, tokenizer, batch_size=2) == expected
    assert plans == [len(PROMPTS)]


def test_rows_are_dropped_from_a_cache_on_other_devices_than_the_tokens():
    devices = []

    class SpreadCache(DynamicCache):
        def batch_select_indices(self, indices):
            devices.append(indices.device.type)  # tensors on any device take indices on the CPU

    rows = [decoding._Row(0, [3, 4], new=[5]), decoding._Row(1, [3, 4], new=[6])]
    batch = decoding._Batch(SimpleNamespace(device="meta", padding_id=0), rows, 0)
    batch.past = SpreadCache()
    batch.keep([1])
    assert devices == ["cpu"]
    assert len(batch._tokens) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "qwen3_next", "bamba"])
def test_a_model_that_refuses_a_cache_writes_the_same(kind, tokenizer):
    model = model_of(kind)
    ending_early(model, tokenizer)
    expected = generated(model, tokenizer)
    calls = watched(model, refuse=lambda arguments: bool(arguments["use_cache"]))
    assert written_by(model, tokenizer) == expected
    assert sum(bool(call["use_cache"]) for call in calls) <= 2  # tried, and not again


def test_a_cache_that_fails_to_drop_rows_leaves_them_right(tokenizer, monkeypatch):
    model = tiny_model("llama")
    ending_early(model, tokenizer)
    expected = generated(model, tokenizer)

    def fail(cache, indices):
        raise RuntimeError("no rows can be dropped")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", fail)
    assert written_by(model, tokenizer) == expected


def test_a_model_that_reads_padding_gets_rows_of_one_length(tokenizer):
    model = tiny_model("llama")
    expected = generated(model, tokenizer)

    def shifted(logits, pads):
        return logits + pads[None, :, None] * torch.arange(logits.shape[-1])

    calls = watched(model, change=shifted)
    assert written_by(model, tokenizer) == expected
    padded = [call["attention_mask"] is not None and not call["attention_mask"].all() for call in calls]
    assert any(padded[:6])  # both ways of batching were tried
    assert not any(padded[6:])


def test_little_padding_does_not_hide_what_much_padding_does(tokenizer):
    model = tiny_model("llama")
    prompts = ["Rome is", "Rome is a", "Berlin", TOWER.text, "The", _BEGINNING + _BEGINNING]
    prompts.sort(key=lambda prompt: len(prompt_tokens(tokenizer, prompt)))
    expected = generated(model, tokenizer, prompts)

    def slightly_wrong(logits, pads):
        wrong = torch.zeros(logits.shape[-1])
        wrong[5] = 1e-4 * logits.abs().max()
        return logits + pads[None, :, None] ** 4 * wrong

    watched(model, change=slightly_wrong)
    assert written_by(model, tokenizer, prompts, batch_size=2) == expected


def test_a_model_with_no_numbers_for_padded_rows_runs_them_without_padding(tokenizer):
    model = tiny_model("llama")
    expected = generated(model, tokenizer)
    watched(model, change=lambda logits, pads: logits.masked_fill((pads > 0)[None, :, None], torch.nan))
    assert written_by(model, tokenizer) == expected


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_logits_that_are_no_numbers_are_an_error(prompts, tokenizer):
    model = tiny_model("llama")
    watched(model, change=lambda logits, pads: logits * torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        written_by(model, tokenizer, prompts)


@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [
        (["The", "Berlin " * 130], 8, "the model takes 128 with the answer. Shorten the prompt"),
        (["The", " Rome" * 128], 8, "has 128 tokens"),
        (["The"], 0, "at least 1, got 0"),
        (["The", ""], 8, "has no tokens"),
    ],
)
def test_bad_input_is_an_error_before_anything_runs(prompts, length, message, tokenizer):
    model = tiny_model("llama")
    calls = watched(model)
    with pytest.raises(ValueError, match=message):
        written_by(model, tokenizer, prompts, max_new_tokens=length)
    assert calls == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_text_ends_where_the_context_does(kind, tokenizer):
    model = tiny_model(kind)
    prompts = [" Rome" * 125, "The", " Rome" * 127]
    ids = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    assert (len(ids[0]), len(ids[2])) == (125, 127)
    texts = written_by(model, tokenizer, prompts)
    assert [len(tokens) for tokens, _ in texts] == [3, LENGTH, 1]
    for prompt, text in zip(prompts, texts, strict=True):
        assert [text] == generated(model, tokenizer, [prompt], len(text[0]))


def test_no_prompts_have_no_texts(tokenizer):
    assert greedy(LanguageModel(tiny_model("llama"), tokenizer), []) == []


def test_a_text_ends_where_the_caller_says_so(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    whole = greedy(lm, PROMPTS, LENGTH)
    texts = greedy(lm, PROMPTS, LENGTH, ends=lambda text: len(text) >= 3)
    for text, other in zip(texts, whole, strict=True):
        decoded = [tokenizer.decode(other.tokens[:size]) for size in range(1, LENGTH + 1)]
        size = next((size for size, part in enumerate(decoded, 1) if len(part) >= 3), LENGTH)
        assert text.tokens == other.tokens[:size]
        assert not text.finished


def test_a_text_with_its_prompt_is_what_the_tokens_say(tokenizer):
    model = tiny_model("llama")
    for prompt, text in zip(PROMPTS, greedy(LanguageModel(model, tokenizer), PROMPTS, LENGTH), strict=True):
        ids = [*prompt_tokens(tokenizer, prompt), *text.tokens]
        assert prompt + text.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_an_end_is_not_decided_on_half_a_character():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=inner)
    written = " 5 No. \u00e9tages. Then"
    script = of_bytes(written)["input_ids"]
    model = tiny_model("llama")
    model.resize_token_embeddings(256)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    start = len(of_bytes("It has")["input_ids"])
    forward = model.forward

    def run(input_ids=None, attention_mask=None, position_ids=None, **options):
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., script[int(attention_mask.sum()) - start]] = 1.0
        return output

    model.forward = run
    seen = []

    def ends(text):
        seen.append(text)
        return has_ended(text)

    (text,) = greedy(LanguageModel(model, of_bytes), ["It has"], 40, ends)
    assert not any("\ufffd" in part for part in seen)
    assert all(written.startswith(part) for part in seen)
    assert written.startswith(text.text)


def test_modes_and_gradients_are_as_before(tokenizer):
    model = tiny_model("gpt2")
    expected = written_by(model, tokenizer)
    model.train()
    asking = [parameter.requires_grad for parameter in model.parameters()]
    assert written_by(model, tokenizer) == expected
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert torch.is_grad_enabled()


def test_rows_that_run_in_models_of_their_own_give_what_each_model_gives_alone(tokenizer):
    model = tiny_model("llama")
    module = model.model.layers[1].mlp.down_proj
    changes = [torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    prompts = ["The Eiffel Tower is in", "I live near Berlin", "The"]

    def changed(rows):
        def add(module, args, output):
            return output + torch.stack([args[0][place] @ changes[row].T for place, row in enumerate(rows)])

        return removed(module.register_forward_hook(add))

    together = written_by(model, tokenizer, prompts, within=changed)
    for row, prompt in enumerate(prompts):
        with changed([row]):
            assert together[row] == written_by(model, tokenizer, [prompt])[0]


@contextmanager
def removed(handle):
    yield
    handle.remove()
