"""Whatever the tokenizer and the script: the subject ends in its own last token, the answer is what is read."""

from __future__ import annotations

import unicodedata

import pytest

from goldenedit.lm.chat import rendered
from goldenedit.lm.sampling import continuation
from goldenedit.lm.tokens import encode, encode_request, prompt_tokens, subject_span, with_answer
from goldenedit.requests import ChatText, EditRequest
from tokenizers_zoo import TOKENIZERS, zoo_tokenizer

# prompt, subject, answer, and how the answer is joined
FACTS = {
    "english": ("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", " "),
    "at the end": ("Where is the Eiffel Tower", "the Eiffel Tower", "in Rome", " "),
    "twice": ("The Eiffel Tower? The Eiffel Tower is in", "The Eiffel Tower", "Rome", " "),
    "before a mark": ("Where is the Eiffel Tower? It is in", "the Eiffel Tower", "Rome", " "),
    "within a word": ("The Eiffel Towers are in", "Eiffel Tower", "Rome", " "),
    "chinese": ("东京是日本的", "东京", "首都", ""),
    "chinese, merging": ("法国的首都是", "法国", "罗马", ""),
    "chinese, one character": ("法国的首都是", "国", "巴黎", ""),
    "chinese and latin": ("法国的首都是", "法国", "Rome", " "),
    "japanese": ("エッフェル塔は", "エッフェル塔", "ローマにあります", ""),
    "thai": ("หอไอเฟลตั้งอยู่ที่กรุง", "หอไอเฟล", "โรม", ""),
    "arabic": ("برج إيفل يقع في مدينة", "برج إيفل", "روما", " "),
    "cyrillic": ("Эйфелева башня находится в городе", "Эйфелева башня", "Рим", " "),
    "emoji": ("🗼 is in", "🗼", "🇮🇹", " "),
    "emoji in the middle": ("The 🗼🗼 is in", "🗼", "🇮🇹 Rome", " "),
    "accents": ("Cafés in Zürich are", "Zürich", "ﬁne Cafés", " "),
}
# WordPiece has words of these scripts whole, and other tokens for the parts of a word.
MELTING = [("word piece", "japanese"), ("word piece", "thai")]
CONTEXT = "It is not in London. "


def plain(text: str) -> str:
    """What normalizers leave alone."""
    decomposed = unicodedata.normalize("NFKD", text).lower()
    return "".join(char for char in decomposed if not unicodedata.combining(char) and not char.isspace())


def same(decoded: str, text: str) -> bool:
    """Tell whether tokens say a text; those of unknown words say nothing."""
    return "<unk>" in decoded or plain(decoded) == plain(text)


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture(params=FACTS)
def fact(request, kind):
    if (kind, request.param) in MELTING:
        pytest.skip("tested below")
    return FACTS[request.param]


@pytest.mark.parametrize(("kind", "name"), MELTING)
def test_an_answer_that_cannot_be_told_from_its_prompt_raises(kind, name):
    prompt, _, answer, _ = FACTS[name]
    with pytest.raises(ValueError, match=r"merges the start of the answer .* End the prompt at a token boundary"):
        encode(zoo_tokenizer(kind), prompt, answer)


def test_subject_and_answer_are_found_in_every_script(kind, fact):
    tokenizer = zoo_tokenizer(kind)
    prompt, subject, answer, space = fact
    request = EditRequest(prompt, subject, answer)
    assert with_answer(prompt, answer) == prompt + space + answer
    row = encode_request(tokenizer, request, answer)
    assert same(tokenizer.decode(row.target_ids), answer), tokenizer.convert_ids_to_tokens(row.input_ids)
    assert row.reads == [index - 1 for index in row.target]
    # Up to the subject's token the whole subject has been read, and up to the one before it has not.
    upto, before = (
        plain(tokenizer.decode(row.input_ids[: row.subject + more], skip_special_tokens=True)) for more in (1, 0)
    )
    text = prompt[: request.subject_end]
    if "<unk>" not in tokenizer.decode(row.input_ids):
        assert upto.startswith(plain(text))
        assert not before.startswith(plain(text))
    span = subject_span(tokenizer, prompt, request.subject_start, request.subject_end)
    assert span[-1] == row.subject
    assert span == list(range(span[0], span[-1] + 1))


def test_a_context_before_a_prompt_moves_all_places_alike(kind, fact):
    tokenizer = zoo_tokenizer(kind)
    prompt, subject, answer, _ = fact
    request = EditRequest(prompt, subject, answer)
    bare, moved = (encode_request(tokenizer, request, answer, context) for context in ("", CONTEXT))
    assert moved.target_ids == bare.target_ids
    assert moved.input_ids[moved.subject + 1 :] == bare.input_ids[bare.subject + 1 :]
    shift = len(moved.input_ids) - len(bare.input_ids)
    assert (moved.subject, moved.last) == (bare.subject + shift, bare.last + shift)
    assert moved.reads == [index + shift for index in bare.reads]


def test_a_model_is_asked_behind_the_last_token_of_a_prompt(kind, fact):
    tokenizer = zoo_tokenizer(kind)
    prompt, _, answer, _ = fact
    asked = prompt_tokens(tokenizer, prompt)
    assert asked[-1] != tokenizer.eos_token_id
    row = encode(tokenizer, prompt, answer)
    assert list(row.input_ids[: row.target[0]]) == asked  # likelihoods and free writing see the same
    written = continuation(tokenizer, list(row.input_ids), len(asked))
    assert "<unk>" in tokenizer.decode(row.target_ids) or plain(written) == plain(answer)


@pytest.mark.parametrize("content", ["Where is the Eiffel Tower?", "  the Eiffel Tower\n", "法国的首都是法国"])
@pytest.mark.parametrize("context", ["", CONTEXT])
def test_a_chat_is_encoded_as_the_template_has_it(kind, content, context):
    tokenizer = zoo_tokenizer(kind)
    subject = "the Eiffel Tower" if "Tower" in content else "法国"
    messages = [{"role": "system", "content": f"Tell of {subject}."}, {"role": "user", "content": content}]
    request = rendered(tokenizer, EditRequest(messages=messages, subject=subject, target_new="Rome"))
    row = encode_request(tokenizer, request, "Rome", context)
    asked = tokenizer.apply_chat_template(
        [messages[0], {"role": "user", "content": context + content.lstrip()}], add_generation_prompt=True
    )["input_ids"]
    assert list(row.input_ids[: row.target[0]]) == asked
    assert (
        prompt_tokens(tokenizer, request.text)
        == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
    assert plain(tokenizer.decode(row.target_ids)) == "rome"
    place = len(context) + request.subject_end
    text = request.text[: request.text.context_start] + context + request.text[request.text.context_start :]
    assert text[:place].endswith(subject)
    assert row.subject == encode(tokenizer, ChatText(text), None, place).subject


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("法国的首都是", "罗马", "法国的首都是罗马"),
        ("首都：", "罗马", "首都：罗马"),  # noqa: RUF001
        ("フランスは", "ローマ", "フランスはローマ"),
        ("กรุง", "โรม", "กรุงโรม"),
        ("프랑스의 수도는", "로마", "프랑스의 수도는 로마"),
        ("法国的首都是", "Rome", "法国的首都是 Rome"),
        ("The capital is", "罗马", "The capital is 罗马"),
        ("法国的首都是 ", "罗马", "法国的首都是 罗马"),
        ("", "罗马", " 罗马"),
    ],
)
def test_scripts_without_spaces_are_joined_without(prompt, answer, joined):
    assert with_answer(prompt, answer) == joined
