"""Other wordings of a fact, from the packaged list of properties."""

import doctest
import re

import pytest

from goldenedit import rephrasing
from goldenedit.questions import question_from
from goldenedit.rephrasing import Property, Rephrasings, expanded, properties, rephrased, without

SUBJECT = "Velmora"
ANSWERS = {"any": "Zorvath", "time": "1950", "language": "French"}
# What a rephrasing of one property may ask for besides it: the same with less said about the kind of answer.
BROADER = {
    ("citizenship", "country"),
    ("year of birth", "date of birth"),
    ("year of death", "date of death"),
    ("language spoken", "language"),
    ("language of a text", "language"),
    ("language of a text", "original language"),
    ("place of origin", "origin"),
    ("founding city", "city of origin"),
    ("place of event", "date of event"),
    ("student of", "teacher"),
    ("city of birth", "place of birth"),
    ("city of death", "place of death"),
    ("city of residence", "place of residence"),
    ("city of origin", "origin"),
    ("founding city", "founding place"),
    ("headquarters", "base"),
    ("headquarters city", "base"),
    ("chief executive", "leader"),
}


def about(text: str, subject: str, answer: str | None = None) -> Rephrasings | None:
    start = text.rindex(subject)
    return rephrased(text, start, start + len(subject), answer)


def relation(text: str, answer: str | None = None) -> str | None:
    """Return the property that a text with `{}` asks for."""
    start = text.index("{}")
    found = rephrased(text.replace("{}", SUBJECT), start, start + len(SUBJECT), answer)
    return None if found is None else found.relation


def texts_of(entry: Property) -> list[str]:
    return [text for pattern in entry.patterns for text in expanded(pattern)]


def test_each_property_has_some_questions_and_some_statements():
    names = [entry.relation for entry in properties()]
    assert len(names) > 300
    assert len(set(names)) == len(names)
    for entry in properties():
        assert 5 <= len(entry.questions) <= 6, entry.relation
        assert len(entry.statements) == 5, entry.relation
        assert entry.answer in ANSWERS, entry.relation


@pytest.mark.parametrize("entry", properties(), ids=lambda entry: entry.relation)
def test_an_entry_has_the_subject_once_in_each_text_and_repeats_none(entry):
    for text in (*texts_of(entry), *entry.questions, *entry.statements):
        assert text.count("{}") == 1, text
        assert text.isascii(), text
        assert text == " ".join(text.split()), text
    assert all(re.fullmatch(r"[A-Z][^?.]*\?", question) for question in entry.questions)
    assert all(statement[0] in "{ABCDEFGHIJKLMNOPQRSTUVWXYZ" for statement in entry.statements)
    assert not any(statement.endswith((".", "?", ":", "{}", " a", " an")) for statement in entry.statements)
    assert len({*entry.questions, *entry.statements}) == len(entry.questions) + len(entry.statements)


@pytest.mark.parametrize("entry", properties(), ids=lambda entry: entry.relation)
def test_each_pattern_is_recognized_as_its_own_property_and_says_what_it_does_not_say_itself(entry):
    for template in texts_of(entry):
        start = template.index("{}")
        text = template.replace("{}", SUBJECT)
        found = rephrased(text, start, start + len(SUBJECT), ANSWERS[entry.answer])
        assert found is not None, template
        assert found.relation == entry.relation, template
        rest = [*found.questions, *found.statements]
        assert len(found.questions) >= 2, template
        assert found.statements, template
        assert text not in rest
        assert question_from(text, start, start + len(SUBJECT)) not in rest


@pytest.mark.parametrize("entry", properties(), ids=lambda entry: entry.relation)
def test_a_rephrasing_asks_for_no_other_property(entry):
    for template in (*entry.questions, *entry.statements):
        found = relation(template, ANSWERS[entry.answer])
        assert found in (None, entry.relation) or (entry.relation, found) in BROADER, template


@pytest.mark.parametrize(
    ("text", "property_name"),
    [
        ("{} is a citizen of", "citizenship"),
        ("The country of citizenship of {} is", "citizenship"),
        ("Which nationality is {}?", "citizenship"),
        ("{} was born in the city of", "city of birth"),
        ("{}'s birthplace is", "place of birth"),
        ("The name of the capital city of {} is", "capital"),
        ("What is the capital of {}?", "capital"),
        ("{} is the capital of", "capital of"),
        ("The headquarters of {} is located in the city of", "headquarters city"),
        ("{} is headquartered in", "headquarters"),
        ("{} was founded by", "founder"),
        ("The CEO of {} is", "chief executive"),
        ("The Chief Executive Officer of {} is", "chief executive"),
        ("{} was created in the country of", "country of origin"),
        ("{} plays the position of", "position played"),
        ("{} is associated with the sport of", "sport"),
        ("The name of the current head of the {} government is", "head of government"),
        ("The author of {} is", "author"),
        ("Who wrote {}?", "author"),
        ("{}, developed by", "developer"),
        ("The native language of {} is", "native language"),
        ("In {}, the language spoken is", "language spoken in a place"),
        ("{} is married to", "spouse"),
        ("The mother of {} is whom?", "mother"),
        ("{} is located in the continent of", "located in continent"),
        ("The star {} is part of what constellation?", "constellation"),
        ("Which was the record label for {}?", "record label"),
        ("What is the twin city of {}? It is", "twin city"),
        ("{} was named after", "named after"),
        ("{}'s phone number is", "phone number"),
        ("The opening year of {} is", "opening year"),
        ("The price of {} is", "price"),
        ("{} is best known for making", "product"),
        ("Which product is {} known for?", "product"),
        ("Who leads {}?", "leader"),
        ("{} is run by", "leader"),
        ("{} is based in", "base"),
        ("In which city is {} based?", "headquarters city"),
        ("Who was {} founded by?", "founder"),
        ("{} was killed by", "cause of death"),
        ("Who stars in {}?", "cast member"),
        ("{} has a population of", "population"),
        ("The national dish of {} is", "national dish"),
        ("What does {} eat?", "diet"),
        # near misses
        ("The author of {}'s sister is", None),
        ("{} was born in 1950 to", None),
        ("{} is located in the heart of", None),
        ("{} is a citizen of the world because", None),
        ("{} is the author of", None),
        ("The capital of the country next to {} is", None),
        ("The capital of {} was founded by", None),
        ("The former capital of {} is", None),
        ("The name of {} is", None),
        ("The name of {} comes from", None),
        ("The author of {} is a", None),
        ("The author of {} was born in", None),
        ("{} is not a citizen of", None),
        ("{} used to be a citizen of", None),
        ("{}'s mother was born in", None),
        ("{} is known as", None),
        ("{} runs on", None),
        ("{} is inspired by", None),
        ("Who directs {}?", None),
        ("{}'s mother tongue is unlike", None),
        ("{} was written by hand in", None),
        ("{} died in the arms of", None),
        ("{} plays", None),
        ("{} is affiliated with", None),
        ("{} and his wife live in", None),
        ("Unlike {}, the capital of France is", None),
        ("Who is {}?", None),
        ("{} is", None),
        ("What is the capital of {} known for?", None),
        ("What is the capital of {}? It is not", None),
        ("The first president of {} was", None),
        ("The president of {} in 1990 was", None),
        ("The spouse of the president of {} is", None),
        ("{} follows", None),
        ("{}, from", None),
        ("La capitale de {} est", None),
    ],
)
def test_a_text_is_recognized_only_where_it_asks_for_a_listed_property(text, property_name):
    assert relation(text, "Zorvath") == property_name


def test_a_part_of_a_name_is_no_subject():
    assert about("The capital of South Africa is", "Africa") is None
    assert about("New York City's mayor is", "New York") is None
    assert about("The author of Hamlets is", "Hamlet") is None


@pytest.mark.parametrize(
    ("text", "answer", "property_name"),
    [
        ("{} was founded in", "Boston", "founding place"),
        ("{} was founded in", "1901", "founding year"),
        ("{} was founded in", "the 19th century", "founding year"),
        ("{} was founded in", "the 1990s", "founding year"),
        ("{} was founded in", None, None),
        ("{} was born in", "Ulm", "place of birth"),
        ("{} was born in", "1879", "year of birth"),
        ("{} was born on", "14 March 1879", "date of birth"),
        ("{} was born in", None, None),
        ("{} was born in the city of", None, "city of birth"),
        ("{} was written in", "Latin", "language of a text"),
        ("{} was written in", "1605", "year of writing"),
        ("{} was written in", "Madrid", None),
        ("{} opened in", "Madrid", None),
        ("{} opened in", "1999", "opening year"),
        ("{} premiered on", "NBC", "original network"),
        ("{} premiered on", "May 4, 1999", "release date"),
        ("The date of birth of {} is", "a Monday", "date of birth"),
        ("{} is set in", "Madrid", "setting"),
        ("{} is set in", "1605", "time of setting"),
        ("{} is set in", None, None),
        ("{} is followed by", "1984", None),
        ("The sequel of {} is", "1984", "sequel"),
    ],
)
def test_the_answer_tells_what_a_text_asks_for_where_it_leaves_that_open(text, answer, property_name):
    assert relation(text, answer) == property_name


def test_an_article_within_a_sentence_is_in_lower_case():
    found = about("The Louvre is located in the city of", "The Louvre")
    assert "In which city is the Louvre?" in found.questions
    assert "The Louvre lies in the city of" in found.statements
    found = about("The Netherlands uses the currency", "The Netherlands")
    assert "The Netherlands' currency is" in found.statements


def test_an_article_before_the_subject_stays():
    found = about("The capital of the United States is", "United States")
    assert "What is the United States' capital?" in found.questions
    assert "The United States has its capital in" in found.statements


def test_an_article_of_another_word_is_not_of_the_subject():
    found = about("The head of the United Kingdom government is", "United Kingdom")
    assert "Who leads the United Kingdom government?" in found.questions
    assert "The United Kingdom government is led by" in found.statements


def test_quotation_marks_stay_with_the_subject():
    found = about('Who is the author of "Hamlet"?', "Hamlet")
    assert 'Who wrote "Hamlet"?' in found.questions


def test_a_possessive_is_understood_and_made_with_and_without_a_last_s():
    assert "Who owns James?" in about("James' owner is", "James").questions
    assert "James' owner is" in about("James is owned by", "James").statements
    assert "Rex's owner is" in about("Rex is owned by", "Rex").statements
    assert "Who owns Rex?" in about("Rex\u2019s owner is", "Rex").questions


def test_a_lower_case_name_stays_so_at_the_start():
    assert "iPhone's manufacturer is" in about("iPhone is manufactured by", "iPhone").statements


def test_a_plural_subject_has_plural_verbs():
    found = about("The Alps are located in the country of", "The Alps")
    assert "In which country are the Alps?" in found.questions
    assert "Which country do the Alps lie in?" in found.questions
    found = about("Where are The Alps?", "The Alps")
    assert "The place where the Alps are situated is" in found.statements
    assert about("The names of the siblings of Ann are", "Ann").questions[0] == "Who is Ann's sibling?"


def test_a_fact_of_the_past_is_asked_for_in_the_past():
    found = about("Who was the mayor of Rome?", "Rome")
    assert "Who was Rome's mayor?" in found.questions
    assert "The person who was mayor of Rome was" in found.statements
    assert not any(re.search(r"\b(?:is|has|does|serves)\b", text) for text in (*found.questions, *found.statements))


@pytest.mark.parametrize("entry", properties(), ids=lambda entry: entry.relation)
def test_past_and_plural_leave_a_few_rephrasings(entry):
    for text in texts_of(entry):
        changed = re.sub(r"\bis \{\}", "were {}", text) if text.count("is {}") else text.replace("{} is", "{} were")
        start = changed.index("{}")
        found = rephrased(changed.replace("{}", "Twins"), start, start + len("Twins"), ANSWERS[entry.answer])
        assert found is not None, changed
        assert len(found.questions) >= 2, changed
        assert len(found.questions) + len(found.statements) >= 3, changed


def test_case_articles_and_spaces_do_not_matter():
    expected = about("The capital of Peru is", "Peru").relation
    for text in ("the Capital Of Peru is", "capital of Peru is", "THE CAPITAL OF Peru IS", "The  capital of  Peru is "):
        assert about(text, "Peru").relation == expected


def test_texts_of_more_lines_or_another_alphabet_are_unknown():
    assert about("Facts.\nThe capital of Peru is", "Peru") is None
    assert about("Столица Peru is", "Peru") is None
    assert about("The capital of Österreich is", "Österreich") is not None


def test_a_name_with_braces_is_filled_in_once():
    found = rephrased("The author of C{}D is", 14, 18)
    assert "Who wrote C{}D?" in found.questions


def test_without_leaves_out_what_another_text_says():
    found = about("Ann Lee is a citizen of", "Ann Lee")
    question, statement = found.questions[0], found.statements[0]
    evaluated = [question.upper().replace("?", " ?"), f"Some news of 2017. {statement}", "Where is the moon?"]
    left = without(found, evaluated)
    assert left.questions == found.questions[1:]
    assert left.statements == found.statements[1:]
    assert left.relation == found.relation
    assert without(found, []) == found
    assert without(found, [*found.questions, *found.statements]) == Rephrasings(found.relation, (), ())


def test_without_leaves_a_text_that_only_begins_like_another():
    found = Rephrasings("capital", ("Which city is the capital of Peru?",), ())
    assert without(found, ["Which city is the capital of Peru and Chile?", "capital of Peru"]) == found


def test_the_examples_of_the_docstrings_run():
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(rephrasing, globs=vars(rephrasing)):
        text = (test.docstring or "").replace("```python", "").replace("```", "")
        runner.run(doctest.DocTestParser().get_doctest(text, dict(test.globs), test.name, test.filename, test.lineno))
    assert runner.tries >= 6
    assert runner.failures == 0
