"""Where the subject of a fact is: strip, `{}`, whole words, and what is told of a doubtful place."""

# ruff: noqa: RUF001  # Chinese has its own punctuation

from __future__ import annotations

import json
import logging

import pytest

from goldenedit import EditRequest
from goldenedit.subjects import find_subject, nearest_text, replace_subject, respelled_subject, subject_places


def marked(request: EditRequest) -> str:
    """Return the text of a request with brackets around its subject."""
    text, start, end = request.text, request.subject_start, request.subject_end
    assert text[start:end] == request.subject
    return f"{text[:start]}[{text[start:end]}]{text[end:]}"


@pytest.mark.parametrize("space", [" ", "\t", "\n", "\u00a0", " \r\n", "\u3000"])
def test_white_space_around_the_subject_is_no_part_of_it(space):
    for subject in (f"Angora goat{space}", f"{space}Angora goat", f"{space}Angora goat{space}"):
        for prompt in ("What is Angora goat named after?", "What is {} named after?"):
            request = EditRequest(prompt, subject, "Rome")
            assert request.subject == "Angora goat"
            assert marked(request) == "What is [Angora goat] named after?"
    with pytest.raises(ValueError, match="subject must be a non-empty string"):
        EditRequest("What is", space, "Rome")


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The Creator of {} is", "C", "The Creator of [C] is"),
        ("The capital of {} is", "capital", "The capital of [capital] is"),
        ("{} can open", "pen", "[pen] can open"),
        ("{} is unlike Rome", "Rome", "[Rome] is unlike Rome"),
        ("{} prints {}", "Rust", "[Rust] prints {}"),
        ("The sign {} means", "a{}b", "The sign [a{}b] means"),
        ("The sign a{}b means", "a{}b", "The sign [a{}b] means"),
        ("{} is not a{}b", "a{}b", "[a{}b] is not a{}b"),
        ("In Python {} is", "{}", "In Python [{}] is"),
    ],
)
def test_braces_are_always_the_place_of_the_subject_and_are_filled_once(prompt, subject, expected):
    request = EditRequest(prompt, subject, "new")
    assert marked(request) == expected
    assert request.doubt is None
    again = EditRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert (again, marked(again)) == (request, expected)
    assert EditRequest.from_dict(request.to_dict() | {"subject": subject}).to_dict() == request.to_dict()


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("Java, unlike JavaScript, was created by", "Java", "[Java], unlike JavaScript, was created by"),
        ("JavaScript is not Java", "Java", "JavaScript is not [Java]"),
        ("A pen can open", "pen", "A [pen] can open"),
        ("Rome's Romeo", "Rome", "[Rome]'s Romeo"),
        ("Rome\u2019s Romeo", "Rome", "[Rome]\u2019s Romeo"),
        ("La capitale de l'Italie, Italien", "Italie", "La capitale de l'[Italie], Italien"),
        ("(Rome) and Romeo", "Rome", "([Rome]) and Romeo"),
        ("C, unlike C++ and C#, was made by", "C", "[C], unlike C++ and C#, was made by"),
        ("C++ is newer than C", "C++", "[C++] is newer than C"),
        ("GPT is older than GPT2 and GPT_x", "GPT", "[GPT] is older than GPT2 and GPT_x"),
        ("Cafe, not Cafe\u0301", "Cafe", "[Cafe], not Cafe\u0301"),
        ("Zu\u0308rich, not Zu", "Zu", "Zu\u0308rich, not [Zu]"),
        ("Boeing 747, not 7470", "747", "Boeing [747], not 7470"),
        ("东京塔在东京的中心", "东京塔", "[东京塔]在东京的中心"),
        ("在Java中，JavaScript是", "Java", "在[Java]中，JavaScript是"),
        ("한국의 수도, 남한국", "한국", "[한국]의 수도, 남한국"),
        ("ประเทศไทยมีเมืองหลวง", "ไทย", "ประเทศ[ไทย]มีเมืองหลวง"),
    ],
)
def test_whole_words_come_before_parts_of_words(text, subject, expected):
    request = EditRequest(text, subject, "new")
    assert marked(request) == expected
    assert request.doubt is None


@pytest.mark.parametrize(
    ("text", "subject", "taken", "why"),
    [
        ("Rome? No, in Rome one speaks", "Rome", "Rome? No, in [Rome] one speaks", "occurs 2 times in"),
        ("open the door and openly", "pen", "open the door and o[pen]ly", "occurs 2 times in"),
        ("The opening is", "pen", "The o[pen]ing is", "is only part of a longer word in"),
        ("东京塔在东京的中心", "东京", "东京塔在[东京]的中心", "occurs 2 times in"),
    ],
)
def test_of_places_that_are_as_good_the_last_is_taken_and_the_doubt_is_told(text, subject, taken, why):
    request = EditRequest(text, subject, "new")
    assert marked(request) == taken
    for part in (repr(subject), why, repr(text), f"'{taken}'", "write {} in its place"):
        assert part in request.doubt


def test_texts_that_are_no_templates_keep_their_braces():
    assert find_subject("{} is in", "Rome") is None
    assert find_subject("{} is Rome", "Rome").start == 6


def test_places_that_overlap_are_all_found_and_replaced_once():
    assert subject_places("ana-ana anana", "ana") == [0, 4]
    assert subject_places("xanana", "ana") == [1, 3]
    assert replace_subject("xanana", "ana", "-") == "x-na"
    assert replace_subject("Romeo sees Rome in Rome", "Rome", "Paris") == "Romeo sees Paris in Paris"
    assert replace_subject("nothing", "Rome", "Paris") == "nothing"


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("where is the eiffel tower?", "The Eiffel Tower", "where is [the eiffel tower]?"),
        ("Where is the Eiffel Tower?", "eiffel tower", "Where is the [Eiffel Tower]?"),
        ("Eiffel Tower is in", "The Eiffel Tower", "[Eiffel Tower] is in"),
        ("Beyonce sang", "Beyonc\u00e9", "[Beyonce] sang"),
        ("Beyonce\u0301 sang", "Beyonc\u00e9", "[Beyonce\u0301] sang"),
        ("Beyonc\u00e9 sang", "Beyonce\u0301", "[Beyonc\u00e9] sang"),
        ("C\u00f4te d\u2019Ivoire is in", "Cote d'Ivoire", "[C\u00f4te d\u2019Ivoire] is in"),
        ("The  Eiffel\u00a0 Tower is in", "The Eiffel Tower", "[The  Eiffel\u00a0 Tower] is in"),
        ("Eiffel Tower is in", "The  Eiffel  Tower", "[Eiffel Tower] is in"),
        ("Who is Obama married to?", "Obama's", "Who is [Obama] married to?"),
        ("Who is Obama\u2019s wife?", "obama\u2019s", "Who is [Obama\u2019s] wife?"),
        ("Who is Obama's wife?", "The Obama", "Who is [Obama]'s wife?"),
        ("The stra\u00dfe is in", "STRASSE", "The [stra\u00dfe] is in"),
        (
            "F.C. K\u00f8benhavn\u2013Brondby was",
            "K\u00f8benhavn-Br\u00f6ndby",
            "F.C. [K\u00f8benhavn\u2013Brondby] was",
        ),
    ],
)
def test_a_subject_that_is_spelled_otherwise_at_one_place_is_taken_from_there(text, subject, expected, caplog):
    caplog.set_level(logging.INFO, "goldenedit")
    request = EditRequest(text, subject, "new")
    assert marked(request) == expected
    assert f"The subject {subject!r} is spelled {request.subject!r}" in caplog.text
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("The eiffel tower and the EIFFEL TOWER", "Eiffel Tower"),  # which one?
        ("who directed it?", "It"),  # another word
        ("Who wrote Tommy?", "The Who"),
        ("The openings are", "PENIN"),  # part of a word
        ("Where is it?", "The Eiffel Tower"),
    ],
)
def test_a_subject_whose_place_is_not_certain_is_refused(text, subject):
    with pytest.raises(ValueError, match=rf"The subject '{subject}' is not in the prompt '"):
        EditRequest(text, subject, "new")
    assert respelled_subject([text], subject) is None


def test_an_error_tells_the_text_that_is_most_like_the_subject():
    with pytest.raises(ValueError, match=r"The nearest text there is 'Eifel Tower'\. Spell it as there, or put"):
        EditRequest("Where is the Eifel Tower, in Paris?", "Eiffel Tower", "new")
    assert nearest_text(["In which city is Museum of Louvre?"], "Louvre Museum") is None
    assert nearest_text(["nothing", "The Louvres are"], "Louvre") == "Louvres"


def test_the_subject_of_a_chat_is_taken_from_the_one_message_that_spells_it():
    messages = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Where is the louvre?"}]
    assert EditRequest(messages=messages, subject="The Louvre", target_new="Rome").subject == "the louvre"
    twice = [*messages[1:], {"role": "assistant", "content": "The LOUVRE?"}, {"role": "user", "content": "Yes."}]
    with pytest.raises(ValueError, match="'The Louvre' is in none of the messages"):
        EditRequest(messages=twice, subject="The Louvre", target_new="Rome")


def test_a_single_word_is_the_subject_without_its_article_only_if_it_is_spelled_alike():
    assert respelled_subject(["Which band recorded The Weight?"], "The Band") is None
    assert respelled_subject(["Which label did Beatles found?"], "The Beatles") == "Beatles"
    assert respelled_subject(["Where is the rolling stones from?"], "The Rolling Stones") == "the rolling stones"
