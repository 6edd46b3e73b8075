"""The question that an open statement answers."""

import pytest

from goldenedit.questions import question_from


def asked(statement: str, subject: str) -> str | None:
    start = statement.rindex(subject)
    return question_from(statement, start, start + len(subject))


@pytest.mark.parametrize(
    ("statement", "subject", "question"),
    [
        ("The Louvre is located in the city of", "The Louvre", "Which city is the Louvre located in?"),
        ("The Louvre is in", "The Louvre", "What is the Louvre in?"),
        ("Angela Merkel was born in the city of", "Angela Merkel", "Which city was Angela Merkel born in?"),
        ("Boston was founded by", "Boston", "Who was Boston founded by?"),
        ("Hamlet was written by", "Hamlet", "Who was Hamlet written by?"),
        ("Danny Drinkwater is a", "Danny Drinkwater", "What is Danny Drinkwater?"),
        ("Danny Drinkwater plays the position of", "Danny Drinkwater", "Which position does Danny Drinkwater play?"),
        ("Nokia has", "Nokia", "What has Nokia?"),
        ("Peru borders", "Peru", "What does Peru border?"),
        ("Ada Lovelace studies", "Ada Lovelace", "What does Ada Lovelace study?"),
        ("Ada Lovelace teaches", "Ada Lovelace", "What does Ada Lovelace teach?"),
        ("Ada Lovelace died in the city of", "Ada Lovelace", "Which city did Ada Lovelace die in?"),
        ("The capital of France is", "France", "What is the capital of France?"),
        ("The mother tongue of Angela Merkel is", "Angela Merkel", "What is the mother tongue of Angela Merkel?"),
        ("The founder of Nokia is", "Nokia", "Who is the founder of Nokia?"),
        ("The name of the founder of Nokia is", "Nokia", "What is the name of the founder of Nokia?"),
        ("The headquarters of Nokia is located in", "Nokia", "What is the headquarters of Nokia located in?"),
        ("The team which Danny is a member of is", "Danny", "What is the team which Danny is a member of?"),
        ("France's capital is", "France", "What is France's capital?"),
        ("France's president is", "France", "Who is France's president?"),
    ],
)
def test_a_statement_is_the_answer_to_a_question(statement, subject, question):
    assert asked(statement, subject) == question


@pytest.mark.parametrize(
    ("statement", "subject"),
    [
        ("It is known that Paris", "Paris"),  # nothing between subject and answer
        ("Paris, the capital of", "Paris"),
        ("Paris of", "Paris"),
        ("Where is Paris?", "Paris"),
        ("Q: Where is Paris?\nA: Paris is in", "Paris"),
        ("Paris is in:", "Paris"),
        ("Danny glorped", "Danny"),  # no stem without a dictionary
        ("In the year 1900, the mayor of Paris was", "Paris"),
        ("One finds Paris in", "Paris"),
        ("La capitale de la Hongrie, c'était Paris est", "Paris"),
        ("Die Hauptstadt von Österreich ist", "Österreich"),
    ],
)
def test_what_no_rule_fits_has_no_question(statement, subject):
    assert asked(statement, subject) is None


def test_the_subject_is_spelled_as_it_is_but_for_its_article():
    assert asked("The ABC of iOS is in", "The ABC of iOS") == "What is the ABC of iOS in?"
    assert asked("The the is in", "The the") == "What is The the in?"
