"""What people write between a prompt and its answer."""

# ruff: noqa: RUF001  # Chinese has its own punctuation

from __future__ import annotations

import pytest

from goldenedit.writing import joint_of

TIED = [
    # Whitespace is there already.
    *[("in ", "Rome"), ("in\n", "Rome"), ("in\t", "Rome"), ("in\u00a0", "Rome"), ("in\u3000", "Rome")],
    *[("in", " Rome"), ("in", "\nRome"), ("in", "\u00a0Rome"), ("in ", " Rome")],
    # Behind opening brackets and quotes.
    *[("The city (", "Rome"), ("a[", "0"), ("{", "x"), ('He said "', "Rome"), ("They call it '", "Rome")],
    *[("It's called '", "Rome"), ("in the '90s a band was '", "Blur"), ("He said \u201c", "Rome")],
    *[("in \u2018", "Rome"), ("Il dit \u00ab", "Rome"), ("hei\u00dft \u201e", "Rom"), ("hei\u00dft \u00bb", "Rom")],
    *[('"A" and "', "B"), ("Use `", "print"), ("¿", "Dónde"), ("The answer is **", "Rome")],
    # Behind a currency sign, where a number follows.
    *[("A Tesla car costs $", "5"), ("costs US$", "1,000"), ("£", ".50"), ("€", "-3"), ("a debt of $", "\u22125")],
    # Behind signs that tie words together.
    *[("and/", "or"), ("C:\\", "Windows"), ("Jean-", "Paul"), ("1939\u2013", "1945"), ("Rome\u2014", "Paris")],
    *[
        ("it is -", "5"),
        ("ann@", "mail.org"),
        ("number #", "1"),
        ("snake_", "case"),
        ("self.__", "dict__"),
        ("x=", "5"),
    ],
    *[("La capitale de l'", "Italie"), ("qu\u2019", "il"), ("Sean O'", "Brien")],
    # Inside a number, an address, or an HTML element.
    *[("The value of pi is 3.", "14"), ("costs $3.", "50"), ("The address is 192.168.", "1.1"), ("is -1,234.", "5")],
    *[("has 1,", "000 seats"), ("has 12,345,", "678"), ("At 10:", "30"), ("at 9:", "05 in the morning")],
    *[("visit www.", "google.com"), ("WWW.", "x.org"), ("<b>", "Rome"), ('is <a href="x">', "Rome"), ("Rome", "</b>")],
    # A straight quote behind a digit closes if one is open.
    *[('The 12" single is "', "Blue"), ('He said "Route 66', '" loudly'), ('"A" is 5" and "B', '" is')],
    # Before closing punctuation.
    *[("Rome", mark) for mark in (".", ",", "!", "?", ":", ";", ")", "]", "}", "…", ", the city", ". It", "%")],
    *[("25", "% of it"), ("Rome", "'s capital"), ("Rome", "\u2019s"), ("they", "'re"), ("do", "n't")],
    *[('He said "yes', '" loudly'), ("\u201cRome", "\u201d is"), ("\u201eRom", "\u201c ist"), ("\u00abRome", "\u00bb")],
    ("e", "\u0301t"),
    # In scripts without spaces.
    *[("首都是", "罗马"), ("首都は", "ローマ"), ("ประเทศ", "ไทย"), ("法国的首都是“", "罗马"), ("首都是", "“罗马”")],
    *[
        ("他说：“你好”", "然后"),
        ("答案：", "42"),
        ("ローマは「", "永遠"),
        ("城市（", "Rome"),
        ("首都是", "，"),
        ("他说:“", "好"),
    ],
]
SPACED = [
    *[("in", "Rome"), ("in the city of", "Rome"), ("is", "5"), ("Answer:", "Rome"), ("In 1990,", "Rome"), ("Mr.", "X")],
    # Behind what closes.
    *[("The city (Rome)", "is"), ('He said "Hi"', "and"), ("\u2018Rome\u2019", "is"), ("\u201cRome\u201d", "is")],
    *[
        ("\u201eBerlin\u201c", "ist"),
        ("\u00bbRom\u00ab", "ist"),
        ("\u00abRome\u00bb", "est"),
        ("**Q**", "A"),
        ("`x`", "is"),
    ],
    *[("the dogs'", "owner"), ("the \u201890s band\u2019", "x"), ("\u201cit\u2019s Rome\u201d", "is")],
    # An inch mark is no quote.
    *[
        ('The 12" single is', '"Blue"'),
        ('A 5" disk is made by', '"Sony"'),
        ('The disk is 5"', "wide"),
        ('5" x 7"', "x"),
    ],
    *[('He said "Route 66"', "loudly"), ('The "Apollo 11" and', '"Rome"')],
    # Numbers that end, lists and times of other kinds.
    *[
        ("In 1990,", "300 men"),
        ("It was in 1990.", "5 men"),
        ("1, 2, 3,", "4"),
        ("100, 200,", "300"),
        ("1.", "5 apples"),
    ],
    *[("On May 12,", "1990"), ("The ratio is 3:", "1000"), ("At 10:", "Rome"), ("Question 12:", "42")],
    *[("Q1:", "42"), ("Answer 3:", "4"), ("1.", "5 apples"), ('The disk is 5"', "wide")],
    *[("awww.", "Rome"), ("List<String>", "is"), ("a > b and c >", "d"), ("</b>", "is"), ("1 <2>", "3"), ("->", "x")],
    # Signs that stand alone, or end a word.
    *[("Rome -", "Paris"), ("Rome \u2014", "Paris"), ("x =", "5"), ("C#", "was"), ("It costs $", "five dollars")],
    ("The capital of France is ____", "Paris"),
    # Answers whose first sign opens, or is a part of a name.
    *[("is", '"Rome"'), ("is", "(Rome)"), ("is", "\u201cRome\u201d"), ("hei\u00dft", "\u00bbRom\u00ab")],
    *[("made", ".NET"), ("is", ".5"), ("is", "-5"), ("write", "%d"), ("is", "$5"), ("in", "/etc"), ("is", "#1")],
    *[("in", "'s-Hertogenbosch"), ("physicist", "'t Hooft"), ("is", "not"), ("said", "'yes'")],
    # Where a script without spaces meets another.
    *[("首都是", "Rome"), ("A:", "巴黎"), ("한국의 수도는", "서울"), ("the word Rome", "罗马")],
]


@pytest.mark.parametrize(("prompt", "answer"), TIED)
def test_nothing_stands_where_people_write_no_space(prompt, answer):
    assert joint_of(prompt, answer) == ""


@pytest.mark.parametrize(("prompt", "answer"), SPACED)
def test_a_space_stands_between_words(prompt, answer):
    assert joint_of(prompt, answer) == " "
