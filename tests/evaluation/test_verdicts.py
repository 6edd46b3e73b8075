"""Where an answer ends, and whether a text says it: for any text, and in any pieces it is written in."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from goldenedit.evaluation.verdicts import answer_end, answer_of, contains, is_exact, key_word, mentions, normalized

# Pieces that decide about ends of sentences, in any order.
_PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u2028",
        ".",
        "..",
        "...",
        "\u2026",
        "!",
        "?",
        "?!",
        "\u3002",
        "\uff1f",
        '"',
        "'",
        "\u201c",
        "\u201d",
        "\u2018",
        "\u2019",
        "(",
        ")",
        "]",
        "*",
        "**",
        "-",
        ",",
        "$",
        "&",
        "St",
        "Dr",
        "Mr",
        "No",
        "Inc",
        "Co",
        "Jr",
        "U.S",
        "e.g",
        "p.m",
        "E",
        "i",
        "I",
        "1",
        "12",
        "3.5",
        "2.",
        "Rome",
        "The",
        "the",
        "Theory",
        "He",
        "Louis",
        "\u00c9mile",
        "\u00e9",
        "e\u0301",
        "\u0964",
        "\u7f57\u9a6c",
        "\u0130",
        "\ufb01",
    ]
)
_TEXTS = st.one_of(st.lists(_PIECES, max_size=9).map("".join), st.text(max_size=20))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Rome. He lives there.", "Rome."),
        (" St. Louis, Missouri. It is", "St. Louis, Missouri."),
        (" John F. Kennedy. He was", "John F. Kennedy."),
        (" J. R. R. Tolkien. The book", "J. R. R. Tolkien."),
        (" I. M. Pei. He", "I. M. Pei."),
        (" by I. M. Pei. He", "by I. M. Pei."),
        (" It was I. He knows", "It was I."),
        (" ... Rome. It is", "... Rome."),
        (" \u2026 Rome. It is", "\u2026 Rome."),
        (" . It is", "."),
        (" 3.5 km. Then", "3.5 km."),
        (" 1. Rome. 2. Paris", "1. Rome."),
        (" in the U.S. Navy. He was", "in the U.S. Navy."),
        (" in the U.S. The city", "in the U.S."),
        (" Apple Inc. The company", "Apple Inc."),
        (" Apple Inc. of Cupertino. It", "Apple Inc. of Cupertino."),
        (" No. 5 of them. It", "No. 5 of them."),
        (" Is it? No. They are", "Is it?"),
        (' He said "Rome." Then he left', 'He said "Rome."'),
        (" **Rome.** It is", "**Rome.**"),
        (" Rome! It is", "Rome!"),
        (" Rome\u2026 and then", "Rome\u2026"),
        (" \u7f57\u9a6c\u3002\u5b83\u5728", "\u7f57\u9a6c\u3002"),
        ("\n\nRome\nParis", "Rome"),
        (" Rome\r\nParis", "Rome"),
        ("Rome", "Rome"),
        ("", ""),
        (" \n ", ""),
        (" .NET is a framework. It", ".NET is a framework."),
        (" Yahoo! It", "Yahoo!"),
        (" vitamin C. It is", "vitamin C."),
        (" E. A. Poe. He", "E. A. Poe."),
        (" George V. He was", "George V."),
        (" A. The Eiffel Tower\n B. Rome", "A. The Eiffel Tower"),
        (" \u0930\u094b\u092e\u0964 \u092f\u0939", "\u0930\u094b\u092e\u0964"),
        (" \u0631\u0648\u0645\u0627\u061f \u0647\u064a", "\u0631\u0648\u0645\u0627\u061f"),
    ],
)
def test_an_answer_is_the_first_sentence_or_line(text, answer):
    assert answer_of(text) == answer


@settings(max_examples=400)
@given(_TEXTS)
@example("Rome. \nHe")
@example('St. "Louis')
@example("Rome. (")
def test_an_end_stays_where_it_is_whatever_is_written_after_it(text):
    ends = {answer_end(text[:size]) for size in range(len(text) + 1)} - {None}
    assert len(ends) <= 1
    if ends:
        assert answer_end(text) in ends  # and it is still an end once more is written
        assert answer_end(text, finished=True) in ends


@settings(max_examples=300)
@given(_TEXTS)
def test_a_text_that_is_finished_has_an_end_and_its_answer_is_one_sentence(text):
    end = answer_end(text, finished=True)
    assert end is not None
    assert 0 <= end <= len(text)
    answer = answer_of(text)
    assert answer == answer.strip()
    assert "\n" not in answer
    assert text.lstrip().startswith(answer)
    assert answer_of(answer) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Rome.", "Rome"),
        ("The Rome!", "rome"),
        ("\u201cRome\u201d.", "Rome"),
        ("\u7f57\u9a6c\u3002", "\u7f57\u9a6c"),
        ("The Eiffel-Tower", "Eiffel-Tower"),
        ("1,000.", "1000"),
        ("The The.", "The The"),
        ("A.", "A"),
        ("+", "+"),
        ("C++.", "C++"),
    ],
)
def test_an_exact_answer_may_differ_in_case_articles_and_punctuation(text, answer):
    assert is_exact(text, [answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "Rome"),
        ("", "The"),
        ("It is in Rome", "Rome"),
        ("Romes", "Rome"),
        ("the", "A"),
        ("-", "+"),
        ("Roma", "Rome"),
    ],
)
def test_an_exact_answer_differs_in_nothing_else(text, answer):
    assert not is_exact(text, [answer])


def test_the_empty_answer_is_never_said():
    for empty in ("", " ", "\n"):
        assert not contains("Rome", [empty])
        assert not mentions("Rome", [empty])
    assert not is_exact("Rome", [])
    assert not contains("Rome", [])


@pytest.mark.parametrize(
    ("text", "acronym"),
    [
        ("He told us so.", "US"),
        ("It can be seen.", "CAN"),
        ("It is where it is.", "I.T."),
        ("He aids the poor.", "AIDS"),
        ("In c minor", "C$"),
    ],
)
def test_a_word_is_no_acronym(text, acronym):
    assert not contains(text, ["Its full name", acronym])
    assert not mentions(text, [acronym])
    assert contains(f"{text[:-1]} Rome.", ["Rome"], ["Its full name", acronym])  # nor the old answer before the new one
    assert contains(f"In the {acronym} today", [acronym])
    assert contains(acronym.casefold(), [acronym])  # the whole text is the answer


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("It stands in ROME, Italy.", ["Rome"]),
        ("It is S\u00e3o Paulo.", ["Sao Paulo"]),
        ("It is Sao Paulo.", ["S\u00e3o Paulo"]),
        ("Rome's oldest tower", ["Rome"]),
        ("Rome\u2019s oldest tower", ["Rome"]),
        ("At McDonald's.", ["McDonald's"]),
        ("New-York", ["New York"]),
        ("It has 1,000 rooms.", ["1000"]),
        ("It has 1000 rooms.", ["1,000"]),
        ("It has 12,345,678 rooms.", ["12345678"]),
        ("It is 3.5.", ["3.5"]),
        ("in the U.S. Navy", ["US"]),
        ("in the US.", ["U.S."]),
        ("in the U.S today", ["U.S."]),
        ("in the US today", ["U. S. A.", "U. S."]),
        ("\u4f4d\u4e8eUS\u7684", ["US"]),
        ("born in NASA\u2019s town", ["NASA"]),
        ("by J. R. R. Tolkien", ["J.R.R. Tolkien"]),
        ("by J.R.R. Tolkien", ["J. R. R. Tolkien"]),
        ("written in C++.", ["C++"]),
        ("_Rome_", ["Rome"]),
        ("**Rome**", ["Rome"]),
        ("\u5b83\u5728\u7f57\u9a6c\u3002", ["\u7f57\u9a6c"]),
        ("\u4f4d\u4e8eRome\u7684", ["Rome"]),
        ("\u043c\u043e\u0441\u043a\u0432\u0430.", ["\u041c\u043e\u0441\u043a\u0432\u0430"]),
        ("\ub85c\ub9c8 \ub3c4\uc2dc", ["\ub85c\ub9c8"]),
        ("It is Roma", ["Rome", "Roma"]),
        ("The The.", ["The The"]),
        ("A", ["A"]),
        ("Netherlands.", ["the Netherlands"]),
        ("Not Paris but Rome", ["Rome"]),
    ],
)
def test_an_answer_is_found_in_its_usual_spellings(text, answers):
    assert contains(text, answers)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("Romeo", ["Rome"]),
        ("Not Rome", ["Rome"]),
        ("It is not in Rome", ["Rome"]),
        ("It is not located in Rome", ["Rome"]),
        ("It isn't in Rome", ["Rome"]),
        ("It isn\u2019t Rome", ["Rome"]),
        ("It cannot be Rome", ["Rome"]),
        ("It can't be in Rome", ["Rome"]),
        ("neither in Paris nor in Rome", ["Rome"]),
        ("It doesn't lie in Rome", ["Rome"]),
        ("3.5 km", ["5"]),
        ("It is 3.5.", ["35"]),
        ("\u30d0\u30ea", ["\u30d1\u30ea"]),  # Bali, not Paris
        ("\u0915\u0932\u093e", ["\u0915\u0932"]),  # a vowel sign makes it another word
        ("in 1999,2000 people", ["19992000"]),
        ("written in C", ["C++"]),
        ("written in C++", ["C"]),
    ],
)
def test_other_words_numbers_and_denials_are_no_answer(text, answers):
    assert not contains(text, answers)


@pytest.mark.parametrize(
    ("text", "new", "old", "says"),
    [
        ("Paris. Now in Rome", ["Rome"], ["Paris"], False),
        ("Rome, once Paris", ["Rome"], ["Paris"], True),
        ("not Paris but Rome", ["Rome"], ["Paris"], True),
        ("in New York", ["New York"], ["York"], True),
        ("in New York", ["York"], ["New York"], False),
        ("in Washington, D.C.", ["Washington"], ["Washington, D.C."], False),
        ("in Washington, D.C.", ["Washington, D.C."], ["Washington"], True),
        ("in Washington state", ["Washington"], ["Washington, D.C."], True),
    ],
)
def test_the_old_answer_before_the_new_one_counts(text, new, old, says):
    assert contains(text, new, old) is says


@settings(max_examples=300)
@given(_TEXTS, _TEXTS, _TEXTS)
@example("", "StU.S", "")
def test_no_text_makes_a_verdict_fail(text, answer, old):
    assert isinstance(normalized(text), str)
    if is_exact(text, [answer]):
        assert text.strip() or not answer.strip()
    if contains(text, [answer], [old]):
        assert mentions(text, [answer])
    word = key_word(text, answer)
    assert word is None or mentions(answer, [word])


@settings(max_examples=100)
@given(_TEXTS)
def test_a_text_is_its_own_exact_answer(text):
    assert is_exact(text, [text]) == bool(text.strip())


@pytest.mark.parametrize(
    ("question", "answer", "word"),
    [
        ("Who founded it?", "It was founded by Bill Gates.", "Bill"),
        ("When did it begin?", "It began in 1889.", "1889"),
        ("Is snow black?", "Snow is white.", "white"),
        ("Where is it?", "It is.", None),
        ("", "", None),
    ],
)
def test_a_key_word_is_a_name_a_number_or_the_longest_new_word(question, answer, word):
    assert key_word(question, answer) == word
