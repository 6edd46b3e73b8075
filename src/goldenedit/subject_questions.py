"""Packaged questions about the rest of a subject, by kind of subject: what an edit of one fact should leave as it is.

They are texts to train on. None is one of the questions of `goldenedit.evaluation.harm`, which judge the rest of a
subject.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest

ANY = "any"
# What a subject of each kind is, and lists of such names that a subject would continue.
_STATEMENTS = {
    "person": ("a person", "a famous man", "a woman"),
    "organization": ("a company", "an organization"),
    "place": ("a city", "a country", "a region"),
    "building_or_site": ("a building", "a monument"),
    "work": ("a book", "a film", "a song"),
    "product": ("a product", "a device", "software"),
    "group": ("a band", "a team"),
    "species_or_thing": ("an animal", "a plant", "a substance"),
    "language": ("a language",),
    "event": ("an event",),
}
_LISTS = {
    "person": ("People: John Smith, Anna Kowalski,", "Singers, actors and politicians: Maria Lopez, Peter Brown,"),
    "organization": ("Companies: General Motors, Bayer,", "Organizations: Oxfam, Yale University,"),
    "place": ("Cities: Boston, Madrid,", "Countries: France, Ghana,", "Regions: Tuscany, Ohio,"),
    "building_or_site": ("Buildings: Big Ben, Chrysler Building,", "Monuments: Angkor Wat, Versailles Palace,"),
    "work": (
        "Books: Moby Dick, Emma,",
        "Films: Casablanca, The Matrix,",
        "Songs: Yesterday, Imagine,",
        "Games: Tetris, Minecraft,",
    ),
    "product": (
        "Devices: Walkman, Game Boy,",
        "Computer programs: Firefox, Linux,",
        "Vehicles: Honda Civic, Airbus A380,",
    ),
    "group": ("Bands: Queen, Pink Floyd,", "Sports teams: Juventus, New York Yankees,"),
    "species_or_thing": ("Animals: Brown bear, Salmon,", "Plants: Oak, Tomato,", "Substances: Iron, Water,"),
    "language": ("Languages: Dutch, Korean,",),
    "event": ("Events: The Olympic Games, Live Aid,", "Wars: Vietnam War, Battle of Hastings,"),
}
_NEUTRAL = ("It", "X")  # subjects of no kind
# Further names, of subjects that a fact is not about.
_NAMES = {
    "person": "Margaret Holloway, Akira Tanaka, Fiona O'Brien, Samuel Okafor, Elena Petrova, Hugh Laurie, "
    "Taylor Swift, Pablo Neruda, Ingrid Bergman, Bill Gates",
    "organization": "Northgate Industries, Google, Toyota, Oxford University, Nokia, Siemens, BBC, IKEA",
    "place": "Harlow Valley, Paris, Chicago, Brazil, Kenya, Milan, Texas",
    "building_or_site": "Eiffel Tower, Harlow Cathedral, White House, Mount Fuji, Central Park",
    "work": "Harry Potter, The Great Gatsby, Star Wars, Hamlet, Friends, Game of Thrones",
    "product": "iPhone, Windows, Boeing 747, PlayStation, Photoshop",
    "group": "The Beatles, Real Madrid, Chicago Bulls, Metallica, Ajax Amsterdam",
    "species_or_thing": "Tiger, Gold, Wheat, Penicillin, Honey bee",
    "language": "Spanish, Hindi, Finnish, Swahili, Latin",
    "event": "World War I, The French Revolution, Woodstock, The Super Bowl",
}
# What a user says about a subject without asking for one of its properties.
_OPEN = (
    "Tell me something about {}.",
    "Write a short paragraph about {}.",
    "Who or what is {}?",
    "Give me three facts about {}.",
    "Summarize what you know about {}.",
    "Introduce {} to a child.",
    "Why is {} important?",
    "Write a headline about {}.",
    "What would you say about {}?",
    "Explain what {} is.",
)
KINDS = (*_STATEMENTS, ANY)
_MARGIN = 1.0  # nats by which the likeliest kind must be ahead of the next

# Words that any question or prompt may have.
_FILLERS = """
    a an the of in on at to by from with for as into about after before during and or not that this these those it its
    he his him she her they their them i you your we our who whom whose what which how where when why there one some
    is are was were be been being am do does did done has have had can could will would should may might must
    name named called known most many much more main people person thing first usually mostly also often good best
"""
_NO_CONTENT = frozenset(_FILLERS.split())
_ENDING = re.compile("(?<=..)(?:ships?|ings?|[eo]rs?|e[ds]|s|e)$")
_STEM = 4  # letters of a word that tell it from others, whatever its ending


@dataclass(frozen=True)
class SubjectQuestion:
    """A property of a subject, as a question and as a prompt that the answer continues; `{}` stands for the subject.

    Attributes:
        kind: The kind of subject, one of `KINDS`.
        relation: The property.
        question: A question of a user.
        prompt: The same as the beginning of a sentence.
        words: Other words that ask for the property, or for one that tells it.
    """

    kind: str
    relation: str
    question: str
    prompt: str
    words: tuple[str, ...] = ()

    def about(self, subject: str) -> tuple[str, str]:
        """Return the question and the prompt about a subject.

        Example:
            ```python
            >>> questions_about("organization")[0].about("The Red Cross")
            ('Who founded the Red Cross?', 'The Red Cross was founded by')
            ```
        """
        inside = re.sub(r"^The (?=[A-Z])", "the ", subject)
        question, prompt = (
            text.replace("{}", subject if text.startswith("{}") else inside) for text in (self.question, self.prompt)
        )
        return question, prompt


def questions_about(kind: str) -> list[SubjectQuestion]:
    """Return the packaged questions about subjects of a kind; those of `"any"` fit every subject.

    Raises:
        ValueError: There is no such kind.

    Example:
        ```python
        >>> questions_about("place")[0].prompt
        '{} is part of the country of'
        ```
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of subject {kind!r}. The kinds are {list(KINDS)}.")
    return [entry for entry in _entries() if entry.kind == kind]


def other_questions(
    kind: str, request: EditRequest | Sequence[EditRequest], count: int, seed: int = 0
) -> list[SubjectQuestion]:
    """Return questions about other properties of a fact's subject, each about another one.

    Those of its kind come before those that fit every subject. A question is left out if it shares a word with the
    fact's prompt, question or relation, apart from the subject and words like "is": it may ask for what is edited.

    Args:
        kind: The kind of subject, one of `KINDS`.
        request: The fact as the user wrote it, or all edited facts about the subject.
        count: Number of questions. There are fewer if fewer are left.
        seed: Seed of the choice.

    Raises:
        ValueError: There is no such kind, or `count` is negative.

    Example:
        ```python
        >>> fact = EditRequest("The capital of Peru is", "Peru", "Cusco")
        >>> [question.relation for question in other_questions("place", fact, 3)]
        ['time zone', 'economy', 'currency']
        ```
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}.")
    requests = [request] if isinstance(request, EditRequest) else list(request)
    edited = {stem for fact in requests for stem in _edited_stems(fact)}
    generator = random.Random(seed)
    chosen: dict[str, SubjectQuestion] = {}
    asked: set[str] = set()  # properties that may be edited
    for of_kind in dict.fromkeys((kind, ANY)):
        entries = questions_about(of_kind)
        generator.shuffle(entries)
        for entry in entries:
            if not edited.isdisjoint(_stems((entry.relation, entry.question, entry.prompt, *entry.words))):
                asked.add(entry.relation)
            chosen.setdefault(entry.relation, entry)
    return [entry for relation, entry in chosen.items() if relation not in asked][:count]


def open_requests(subject: str) -> list[str]:
    """Return what a user says about a subject without asking for one of its properties."""
    return [text.replace("{}", subject) for text in _OPEN]


def names_like(kind: str, subject: str, count: int, seed: int = 0) -> list[str]:
    """Return names of other subjects of a kind; of all kinds for `"any"`.

    Args:
        kind: The kind of subject, one of `KINDS`.
        subject: The subject. Names that it contains, or that contain it, are left out.
        count: Number of names. There are fewer if fewer are known.
        seed: Seed of the choice.

    Example:
        ```python
        >>> names_like("language", "French", 2)
        ['Hindi', 'Latin']
        ```
    """
    kinds = _NAMES if kind == ANY else (kind,)
    listed = [text.split(":")[1] for of_kind in kinds for text in _LISTS[of_kind]]
    listed += [_NAMES[of_kind] for of_kind in kinds]
    names = [name.strip() for text in listed for name in text.split(",") if name.strip()]
    known = subject.casefold()
    others = [name for name in names if name.casefold() not in known and known not in name.casefold()]
    random.Random(seed).shuffle(others)
    return others[:count]


def is_about(texts: Iterable[str], requests: Sequence[EditRequest]) -> bool:
    """Return whether texts about a property share a word with facts: they may ask for what is edited."""
    return not {stem for fact in requests for stem in _edited_stems(fact)}.isdisjoint(_stems(texts))


def kind_of(lm: LanguageModel, subjects: Sequence[str]) -> list[str]:
    """Return the kind of each subject, as far as the model knows it from the name; `"any"` where two kinds are close.

    The score of a kind is how much likelier "{subject} is a city" is than the same of names like "It", plus how likely
    the subject is as the next item of a list of such names. Each is the mean over a few words for the kind.

    Args:
        lm: The model, with its edits off.
        subjects: Names of subjects.
    """
    if not subjects:
        return []
    named = list(dict.fromkeys((*subjects, *_NEUTRAL)))
    statements = [(name, answer) for name in named for kind in _STATEMENTS for answer in _statements(kind)]
    lists = [(heading, name) for name in dict.fromkeys(subjects) for kind in _LISTS for heading in _LISTS[kind]]
    found = likelihoods(lm, [*statements, *lists])
    logs = {
        pair: -likelihood.nll * len(likelihood.choices)
        for pair, likelihood in zip([*statements, *lists], found, strict=True)
    }

    def score(subject: str, kind: str) -> float:
        gains = [
            logs[subject, answer] - sum(logs[name, answer] for name in _NEUTRAL) / len(_NEUTRAL)
            for answer in _statements(kind)
        ]
        return _log_mean(gains) + _log_mean([logs[heading, subject] for heading in _LISTS[kind]])

    kinds = []
    for subject in subjects:
        scores = {kind: score(subject, kind) for kind in _STATEMENTS}
        best, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
        kinds.append(best if scores[best] - scores[second] >= _MARGIN else ANY)
    return kinds


def _statements(kind: str) -> list[str]:
    return [f"is {noun}" for noun in _STATEMENTS[kind]]


def _log_mean(logs: Sequence[float]) -> float:
    """Return the logarithm of the mean of values whose logarithms are given."""
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs) / len(logs))


def _edited_stems(request: EditRequest) -> set[str]:
    """Return the stems of the words that tell which property of the subject a fact is about."""
    texts = (request.shown, request.question or "", request.relation or "")
    return _stems(re.sub(re.escape(request.subject), " ", text, flags=re.IGNORECASE) for text in texts)


def _stems(texts: Iterable[str]) -> set[str]:
    """Return the stems of the words of texts, without those in `_NO_CONTENT`."""
    words = {word for text in texts for word in re.findall(r"[^\W\d_]+", text.casefold())}
    return {_stem(word) for word in words if len(word) > 1 and word not in _NO_CONTENT}


def _stem(word: str) -> str:
    """Return the beginning of a word. Different words may share one; then a question is left out that need not be."""
    return re.sub("y$", "i", _ENDING.sub("", word))[:_STEM]


@cache
def _entries() -> tuple[SubjectQuestion, ...]:
    text = (resources.files("goldenedit.data") / "subject_questions.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.split("\n") if line]
    return tuple(SubjectQuestion(**{**record, "words": tuple(record["words"])}) for record in records)
