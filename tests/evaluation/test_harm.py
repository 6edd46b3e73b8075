"""Comparisons with the base model: against two plain forwards, and against what both models really write."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from goldenedit import EditRequest, get_edit_model
from goldenedit.evaluation.harm import _batches, compare, continuation_row, other_prompts, text_rows
from goldenedit.evaluation.texts import plain_texts, unrelated_questions
from goldenedit.lm.decoding import greedy
from goldenedit.lm.tokens import Row, prompt_tokens
from models import tiny_model
from tiny_edits import MERKEL, TOWER, fast_config

PROMPTS = [
    "The Louvre is in",
    "I",
    "The Eiffel Tower is in the city of",
    "The Eiffel Tower",
    "Q: Who is Angela Merkel?\nA:",
]
LENGTH = 6
CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def edited_model(kind, tokenizer, layer=1):
    model = get_edit_model(tiny_model(kind), fast_config(layer=layer, steps=8), tokenizer)
    model.edit(TOWER)
    return model


def rows_of(model):
    with model.disable_adapter():
        written = greedy(model.lm, PROMPTS, LENGTH)
    rows = [
        continuation_row(model.lm, prompt, text.tokens, text.finished)
        for prompt, text in zip(PROMPTS, written, strict=True)
    ]
    return rows + text_rows(model.lm, plain_texts()[:2], most=40), written


@torch.no_grad()
def reference(model, rows, state=nullcontext):
    """Return first choices that agree and divergences by two plain forwards for each row."""
    base_model = model.get_base_model()
    expected = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with model.disable_adapter():
            base = base_model(input_ids=ids).logits[0, row.reads].double().log_softmax(-1)
        with state():
            edited = base_model(input_ids=ids).logits[0, row.reads].double().log_softmax(-1)
        kl = (base.exp() * (base - edited)).sum(-1)
        expected.append(((base.argmax(-1) == edited.argmax(-1)).tolist(), kl.tolist()))
    return expected


@pytest.mark.parametrize(
    ("kind", "layer"), [("llama", 0), ("llama", 1), ("gpt2", 1), ("gemma3", 1), ("mixtral", 1), ("bloom", 1)]
)
def test_comparisons_are_those_of_two_plain_forwards(kind, layer, tokenizer):
    model = edited_model(kind, tokenizer, layer)
    rows, _ = rows_of(model)
    results = compare(model.lm, rows, layer, model.disable_adapter, {"edited": nullcontext})["edited"]
    changed = 0
    for result, (same, kl) in zip(results, reference(model, rows), strict=True):
        assert list(result.same) == same
        assert list(result.kl) == pytest.approx(kl, rel=1e-3, abs=1e-5)
        changed += not all(same)
    assert changed


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_same_means_that_both_models_write_the_same(kind, early, tokenizer):
    model = edited_model(kind, tokenizer)
    rows, written = rows_of(model)
    if early:  # several texts end before the last token, some at once
        base = model.get_base_model()
        base.config.eos_token_id = [written[0].tokens[0], written[1].tokens[2], written[3].tokens[1]]
        rows, written = rows_of(model)
        assert any(text.finished for text in written)
    after = greedy(model.lm, PROMPTS, LENGTH)
    results = compare(model.lm, rows, 1, model.disable_adapter, {"edited": nullcontext})["edited"]
    for result, one, other in zip(results, written, after, strict=False):
        assert all(result.same) == ((one.tokens, one.finished) == (other.tokens, other.finished))


def test_a_text_that_only_goes_on_is_not_the_same(tokenizer):
    model = edited_model("llama", tokenizer)
    _, written = rows_of(model)
    after = greedy(model.lm, PROMPTS, LENGTH)
    # A prompt after which both write the same token first, and then differ: the base model ends there.
    place, size = next(
        (place, size)
        for place, (one, other) in enumerate(zip(written, after, strict=True))
        for size in range(LENGTH)
        if one.tokens[:size] == other.tokens[:size] and one.tokens[size] != other.tokens[size]
    )
    row = continuation_row(model.lm, PROMPTS[place], written[place].tokens[:size], finished=True)
    (result,) = compare(model.lm, [row], 1, model.disable_adapter, {"edited": nullcontext})["edited"]
    assert list(result.same) == [True] * size + [False]


def test_without_an_edit_nothing_differs(tokenizer):
    model = edited_model("llama", tokenizer)
    rows, _ = rows_of(model)
    results = compare(model.lm, rows, 1, model.disable_adapter, {"off": model.disable_adapter})["off"]
    assert all(all(result.same) for result in results)
    assert max(value for result in results for value in result.kl) < 1e-6
    assert min(value for result in results for value in result.kl) >= 0


def test_each_state_is_compared_alone(tokenizer):
    model = edited_model("llama", tokenizer)
    model.edit(MERKEL)

    @contextmanager
    def only_first():
        active = model.active_adapters
        model.set_adapter(active[:1])
        try:
            yield
        finally:
            model.set_adapter(active)

    rows, _ = rows_of(model)
    results = compare(
        model.lm,
        rows,
        1,
        model.disable_adapter,
        {"first": only_first, "off": model.disable_adapter, "both": nullcontext},
    )
    for name, state in (("first", only_first), ("both", nullcontext)):
        for result, (same, kl) in zip(results[name], reference(model, rows, state), strict=True):
            assert list(result.same) == same
            assert list(result.kl) == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert results["first"] != results["both"]
    assert all(all(result.same) for result in results["off"])


def test_the_size_of_batches_changes_nothing(tokenizer, monkeypatch):
    model = edited_model("llama", tokenizer)
    rows, _ = rows_of(model)
    whole = compare(model.lm, rows, 1, model.disable_adapter, {"edited": nullcontext})["edited"]
    monkeypatch.setattr("goldenedit.evaluation.harm._LOGITS", 200 * 10)
    small = compare(model.lm, rows, 1, model.disable_adapter, {"edited": nullcontext})["edited"]
    monkeypatch.undo()
    monkeypatch.setattr("goldenedit.evaluation.harm._TOKENS", 40)
    short = compare(model.lm, rows, 1, model.disable_adapter, {"edited": nullcontext})["edited"]
    for one, *others in zip(whole, small, short, strict=True):
        for other in others:
            assert one.same == other.same
            assert one.kl == pytest.approx(other.kl, abs=1e-5)


def test_batches_of_long_rows_have_few_of_them(monkeypatch):
    monkeypatch.setattr("goldenedit.evaluation.harm._TOKENS", 40)
    rows = [Row(tuple(range(length)), -1, (length - 1,), length - 1) for length in (3, 10, 12, 20, 21, 60)]
    assert list(_batches(range(6), rows, 1000)) == [[0, 1, 2], [3], [4], [5]]


def test_no_rows_are_nothing_to_compare(tokenizer):
    model = edited_model("llama", tokenizer)
    assert compare(model.lm, [], 1, model.disable_adapter, {"edited": nullcontext}) == {"edited": []}


def test_a_row_holds_a_prompt_and_what_follows_it(tokenizer):
    model = edited_model("llama", tokenizer)
    ids = prompt_tokens(tokenizer, "I")
    assert continuation_row(model.lm, "I", (7, 8)) == Row((*ids, 7, 8), -1, (len(ids), len(ids) + 1), len(ids) + 1)
    ended = continuation_row(model.lm, "I", (7,), finished=True)
    assert ended.input_ids[:-1] == (*ids, 7)
    assert len(ended.target) == 2
    assert continuation_row(model.lm, "I", (), finished=True).reads == [len(ids) - 1]


def test_texts_are_cut_and_those_of_one_token_left_out(tokenizer):
    model = edited_model("llama", tokenizer)
    rows = text_rows(model.lm, ["", "a", "Rome is a city.", "Rome " * 200], most=5)
    assert [len(row.input_ids) for row in rows] == [5, 5]
    assert all(len(row.target) == len(row.input_ids) - 1 for row in rows)
    assert len(text_rows(model.lm, ["Berlin " * 200])[0].input_ids) == model.lm.max_length


def test_other_prompts_are_those_of_the_facts_and_packaged_ones(tokenizer):
    request = EditRequest(
        "Java runs on", "Java", "Rome", neighborhood=("C runs on", "Ada runs on"),
        locality=(("Java was made by", "Sun"), ("JavaScript was made by", "Netscape"), ("Berlin is in", "Germany")),
    )  # fmt: skip
    others = other_prompts(tokenizer, [request, TOWER], neighbors=1)
    kinds = {(other.fact, other.question): other.kind for other in others}
    assert [other.question for other in others if other.kind == "neighbors"] == ["C runs on"]
    assert kinds[0, "Java was made by"] == "subject"
    assert kinds[0, "JavaScript was made by"] == kinds[0, "Berlin is in"] == "unrelated"  # the first is another subject
    assert [other.question for other in others if other.fact == -1] == unrelated_questions()
    assert all(other.prompt == f"Q: {other.question}\nA:" for other in others if other.fact == -1)
    assert len([other for other in other_prompts(tokenizer, [request]) if other.kind == "neighbors"]) == 2


def test_two_facts_about_one_subject_keep_their_own_prompts(tokenizer):
    second = EditRequest("The Eiffel Tower was built in", "The Eiffel Tower", "Berlin")
    others = other_prompts(tokenizer, [TOWER, second])
    about = [[other.prompt for other in others if other.kind == "subject" and other.fact == fact] for fact in (0, 1)]
    assert about[0] == about[1]
    assert about[0]


def test_questions_are_asked_in_the_chat_template_where_there_is_one(tokenizer):
    chats = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT)
    others = other_prompts(chats, [TOWER])
    assert all(other.prompt == f"[user] {other.question}\n[assistant]" for other in others)
