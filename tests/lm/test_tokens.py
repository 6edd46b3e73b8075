"""From texts to tokens: where the subject ends and the answer begins."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from goldenedit.lm.tokens import (
    Row,
    context_length,
    encode,
    encode_request,
    pad,
    padding_id,
    prompt_tokens,
    target_ids,
    with_answer,
)
from goldenedit.requests import Answer, ChatText, EditRequest
from models import tiny_tokenizer


class SlowTokenizer(PreTrainedTokenizer):
    """The same tokens as those of a fast tokenizer, without offsets."""

    def __init__(self, fast, **kwargs):
        self.fast = fast
        super().__init__(unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.fast)

    def get_vocab(self):
        return self.fast.get_vocab()

    def _tokenize(self, text, **kwargs):
        return self.fast.tokenize(text)

    def _convert_token_to_id(self, token):
        return self.fast.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, index):
        return self.fast.convert_ids_to_tokens(index)

    def convert_tokens_to_string(self, tokens):
        return self.fast.convert_tokens_to_string(tokens)


@pytest.fixture
def slow(tokenizer):
    return SlowTokenizer(tokenizer)


@pytest.fixture
def framed(tokenizer):
    """The tokenizer of the other tests, with a special token before and behind every text."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", copy.eos_token_id)]
    )
    return copy


def tokens(tokenizer, row: Row) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(row.input_ids))


@pytest.mark.parametrize(
    ("prefix", "prompt", "subject", "last", "count"),
    [
        ("", "The Eiffel Tower is in the city of", "The Eiffel Tower", "ĠTower", 3),
        ("", "The city of Rome", "Rome", "ĠRome", 4),
        ("", "Rome is Rome is a city", "Rome", "ĠRome", 3),
        ("", "In {} is", "the city of Berlin", "ĠBerlin", 6),
        ("You and I. ", "The Eiffel Tower is in", "The Eiffel Tower", "ĠTower", 8),
        ("Rome is a city. ", "Rome is in", "Rome", "ĠRome", 6),
    ],
)
def test_subject_is_its_last_token_at_its_last_place(tokenizer, prefix, prompt, subject, last, count):
    request = EditRequest(prompt, subject, "London")
    row = encode(tokenizer, prefix + request.text, "London", len(prefix) + request.subject_end)
    assert tokens(tokenizer, row)[row.subject] == last
    assert "".join(tokens(tokenizer, row)[: row.subject + 1]).replace("Ġ", " ").endswith(subject)
    before = (prefix + request.text)[: len(prefix) + request.subject_end]
    assert row.subject == len(tokenizer(before).input_ids) - 1


def test_the_token_that_holds_the_end_of_the_subject_is_taken_even_if_it_goes_on(tokenizer):
    row = encode(tokenizer, "The Eiffel Tower", subject_end=len("The Eiff"))
    assert tokens(tokenizer, row)[row.subject] == "ĠEiffel"


def test_target_is_all_of_the_answer_and_reads_are_the_positions_before(tokenizer):
    row = encode(tokenizer, "The Eiffel Tower is in", "the city of Rome", len("The Eiffel Tower"))
    assert [tokens(tokenizer, row)[index] for index in row.target] == ["Ġthe", "Ġcity", "Ġof", "ĠRome"]
    assert row.reads == [index - 1 for index in row.target]
    assert tokenizer.decode(row.target_ids) == " the city of Rome"
    assert tokenizer.decode(row.input_ids) == "The Eiffel Tower is in the city of Rome"


def test_a_row_without_an_answer_reads_its_last_position(tokenizer):
    row = encode(tokenizer, "Angela Merkel is a", subject_end=len("Angela Merkel"))
    assert row.target == ()
    assert row.reads == [len(row.input_ids) - 1]


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("in", "Rome", "in Rome"),
        ("in ", "Rome", "in Rome"),
        ("in", " Rome", "in Rome"),
        ("in\n", "Rome", "in\nRome"),
        ("in", "\nRome", "in\nRome"),
    ],
)
def test_prompt_and_answer_are_joined_by_one_space(prompt, answer, joined):
    assert with_answer(prompt, answer) == joined


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("The city of $", "5", "The city of $5"),
        ('They say "', "Rome", 'They say "Rome'),
        ("Rome is", ", a city", "Rome is, a city"),
        ("in", Answer("Rome"), "inRome"),
        ("in", Answer("Rome", "\n"), "in\nRome"),
        ('They say "', Answer("Rome", " "), 'They say " Rome'),
        (ChatText("bot:"), "Rome", "bot:Rome"),
        (ChatText("bot:", " "), "Rome", "bot: Rome"),
        (ChatText("bot:", " "), " Rome", "bot: Rome"),
        (ChatText("bot:"), " Rome", "bot: Rome"),
        (ChatText("bot:", " "), Answer("Rome"), "bot:Rome"),
    ],
)
def test_prompt_and_answer_are_joined_as_people_write_and_as_they_say_themselves(prompt, answer, joined):
    assert with_answer(prompt, answer) == joined
    assert isinstance(with_answer(prompt, answer), ChatText) == isinstance(prompt, ChatText)


@pytest.mark.parametrize("context", ["", 'I say " and ', "I say (", "'"])
def test_a_context_does_not_change_how_the_answer_joins(tokenizer, context):
    for prompt in ('The city is "', "The city is"):
        request = EditRequest(prompt, "city", "Rome")
        row = encode_request(tokenizer, request, request.target_new, context)
        assert tokenizer.decode(row.target_ids) == (" Rome" if prompt.endswith("is") else "Rome")


def test_an_answer_keeps_its_mark_in_copies_and_between_processes():
    for made in (copy.deepcopy(Answer("Rome", " ")), pickle.loads(pickle.dumps(Answer("Rome", " ")))):
        assert (made, made.joint) == ("Rome", " ")


@pytest.mark.parametrize(("prompt", "answer"), [("He is in", "Rome"), ("He is in", " Rome"), ("He is in ", "Rome")])
def test_where_the_space_stands_does_not_change_the_row(tokenizer, prompt, answer):
    assert encode(tokenizer, prompt, answer, 2) == encode(tokenizer, "He is in", "Rome", 2)


def test_special_tokens_are_neither_subject_nor_target(tokenizer, framed):
    plain, row = (encode(each, "The Eiffel Tower is in", "Rome", 16) for each in (tokenizer, framed))
    assert row.input_ids == (1, *plain.input_ids, 1)
    assert row.subject == plain.subject + 1
    assert row.target == tuple(index + 1 for index in plain.target)


def test_a_row_without_an_answer_reads_its_last_word_and_not_the_end_of_the_text(framed):
    row = encode(framed, "Angela Merkel is a", subject_end=len("Angela Merkel"))
    assert tokens(framed, row)[row.reads[0]] == "Ġa"


def test_an_answer_without_tokens_raises(tokenizer):
    with pytest.raises(ValueError, match="The answer '' has no tokens after 'Paris '"):
        encode(tokenizer, "Paris ", "", 5)


def test_a_row_that_is_too_long_raises_with_both_lengths(tokenizer):
    text = "The Eiffel Tower is in"
    assert len(encode(tokenizer, text, "Rome", 16, max_length=6).input_ids) == 6
    with pytest.raises(ValueError, match=r"have 6 tokens, but the model takes 5\. Shorten"):
        encode(tokenizer, text, "Rome", 16, max_length=5)
    with pytest.raises(ValueError, match="the model takes 5") as error:
        encode(tokenizer, "Rome " * 1000, "Rome", 16, max_length=5)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("prompt", "answer"), [("The Eiff", "el Tower"), ("Th", "e Tower"), ("The Ei", "ffel Tower")])
def test_an_answer_that_would_melt_into_its_prompt_has_tokens_of_its_own(tokenizer, monkeypatch, prompt, answer):
    monkeypatch.setattr("goldenedit.lm.tokens.with_answer", lambda prompt, answer: prompt + answer)
    row = encode(tokenizer, prompt, answer, len(prompt))
    asked = tokenizer(prompt).input_ids
    assert list(row.input_ids[: row.target[0]]) == asked
    assert (row.subject, row.reads[0]) == (len(asked) - 1, len(asked) - 1)
    assert tokenizer.decode(row.target_ids) == answer


def test_an_answer_at_the_very_start_raises(tokenizer):
    with pytest.raises(ValueError, match="merges the start of the answer 'Rome' with the end of the prompt ''"):
        encode(tokenizer, "", "Rome")


def test_a_subject_without_a_token_raises(tokenizer):
    with pytest.raises(ValueError, match="no token for the end of the subject in 'Paris is in'"):
        encode(tokenizer, "Paris is in", None, subject_end=40)


words = st.sampled_from(["The", "Eiffel", "Tower", "is", "in", "Rome,", "you", "and", "I", "xyz", "Q7"])


@given(before=st.lists(words, max_size=4), subject=st.lists(words, min_size=1, max_size=3), after=st.lists(words))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tokenizer_without_offsets_gives_the_same_row(tokenizer, slow, before, subject, after):
    assert not slow.is_fast
    prompt = " ".join([*before, *subject, *after])
    end = len(" ".join([*before, *subject]))
    assert encode(slow, prompt, "the city", end) == encode(tokenizer, prompt, "the city", end)


@pytest.mark.parametrize("context", ["", "You and I. "])
def test_bytes_without_offsets_are_counted(context):
    row = encode(ByT5Tokenizer(), context + "The Eiffel Tower is in", "Rome", len(context + "The Eiffel Tower"))
    assert row.subject == len(context + "The Eiffel Tower") - 1
    assert row.target[0] == len(context + "The Eiffel Tower is in")
    assert len(row.input_ids) == len(context + "The Eiffel Tower is in Rome") + 1  # the end of the text


@pytest.mark.parametrize("answer", ["Rome", "für alle"])
def test_the_end_of_the_text_is_not_part_of_the_answer_without_offsets(answer):
    row = encode(ByT5Tokenizer(), "The Eiffel Tower is in", answer, len("The Eiffel Tower"))
    assert len(row.target) == len(f" {answer}".encode())


class ReplacingByT5Tokenizer(ByT5Tokenizer):
    """Decodes the first bytes of a character to a replacement character, as most byte-level tokenizers do."""

    def convert_tokens_to_string(self, tokens):
        return bytes(ord(token) for token in tokens if len(token) == 1).decode("utf-8", errors="replace")


@pytest.mark.parametrize("kind", [ByT5Tokenizer, ReplacingByT5Tokenizer])
def test_characters_of_several_bytes_without_offsets_are_counted(kind):
    row = encode(kind(), "Zürich öffnet", "für alle", len("Zürich"))
    assert row.subject == len("Zürich".encode()) - 1
    assert row.target[0] == len("Zürich öffnet".encode())


def test_a_subject_without_offsets_ends_with_the_last_byte_of_its_last_character():
    row = encode(ByT5Tokenizer(), "Montalé öffnet", "für alle", len("Montalé"))
    assert row.subject == len("Montalé".encode()) - 1


def test_a_subject_ends_with_its_last_byte_where_a_part_of_a_character_decodes_to_something():
    row = encode(ReplacingByT5Tokenizer(), "Montalé öffnet", "für alle", len("Montalé"))
    assert row.subject == len("Montalé".encode()) - 1


def test_a_tokenizer_that_neither_has_offsets_nor_decodes_raises(slow, monkeypatch):
    monkeypatch.setattr(slow, "convert_tokens_to_string", lambda tokens: "".join(tokens).upper())
    with pytest.raises(ValueError, match="Use a fast tokenizer"):
        encode(slow, "The Eiffel Tower", "Rome", 3)


def test_padding_is_on_the_right_and_reads_follow_row_by_row():
    rows = [Row((5, 6, 7), 0, (1, 2), 2), Row((8, 9, 10, 11), 2, (), 3), Row((12, 13), 0, (1,), 1)]
    batch = pad(rows, 99, "cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7, 99], [8, 9, 10, 11], [12, 13, 99, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.subject.tolist() == [0, 2, 0]
    assert batch.read_rows.tolist() == [0, 0, 1, 2]
    assert batch.read_positions.tolist() == [0, 1, 3, 0]
    assert target_ids(rows, "cpu").tolist() == [6, 7, 0, 13]
    assert batch.input_ids.dtype == target_ids(rows, "cpu").dtype == torch.long


@pytest.mark.parametrize(
    ("pad_id", "eos", "unk", "expected"), [(4, 5, 6, 4), (None, 5, 6, 5), (None, None, 6, 6), (None, None, None, 0)]
)
def test_padding_takes_the_first_token_that_there_is(pad_id, eos, unk, expected):
    assert padding_id(SimpleNamespace(pad_token_id=pad_id, eos_token_id=eos, unk_token_id=unk)) == expected


@pytest.mark.parametrize(
    ("config", "length"),
    [({"max_position_embeddings": 64}, 64), ({"max_position_embeddings": -1}, None), ({}, None)],
)
def test_context_length_is_what_the_config_says(config, length):
    assert context_length(SimpleNamespace(**config)) == length


@pytest.fixture
def beginning():
    """A tokenizer that begins each text with a token."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    begin = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


@pytest.mark.parametrize("context", ["", "Hello. "])
def test_a_text_that_begins_by_itself_gets_no_second_beginning(beginning, context):
    plain = EditRequest("Rome is in", "Rome", "Spain")
    rendered = EditRequest("<eos>Rome is in", "Rome", "Spain")
    assert beginning("<eos>Rome")["input_ids"][:2] == [beginning.eos_token_id] * 2
    assert encode(beginning, "<eos>Rome is in") == encode(beginning, "Rome is in")
    one, other = (encode_request(beginning, request, "Spain", context) for request in (plain, rendered))
    assert one == other
    assert prompt_tokens(beginning, "<eos>Rome is in") == prompt_tokens(beginning, "Rome is in")


@pytest.mark.parametrize("begin", ["<eos>", "user<pad>"])
def test_a_context_goes_before_the_words_of_a_user_in_a_prompt_that_is_a_whole_chat(beginning, begin):
    request = EditRequest(f"{begin}user\nRome is in<eos>", "Rome", "Spain")
    row = encode_request(beginning, request, "Spain", "Hello. ")
    assert beginning.decode(row.input_ids).endswith("user<unk>Hello. Rome is in<eos> Spain")  # it knows no line feed
    assert beginning.decode(row.input_ids[: row.subject + 1]).endswith("Hello. Rome")


def test_a_context_gives_way_where_a_request_fits_without_it(tokenizer):
    request = EditRequest("Rome is in", "Rome", "Spain")
    alone = encode_request(tokenizer, request, "Spain")
    for room in range(12):
        row = encode_request(tokenizer, request, "Spain", "a b c d e f. ", len(alone.input_ids) + room)
        assert len(row.input_ids) <= len(alone.input_ids) + room
        assert tokenizer.decode(row.input_ids).endswith("Rome is in Spain")
    with pytest.raises(ValueError, match=r"'Rome is in' and its answer have \d+ tokens"):
        encode_request(tokenizer, request, "Spain", "a b c d e f. ", len(alone.input_ids) - 1)
