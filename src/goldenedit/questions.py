"""The English question that an open statement answers: "The Louvre is in" becomes "What is the Louvre in?"."""

from __future__ import annotations

import re

_AUXILIARIES = frozenset(
    ["is", "are", "was", "were", "has", "have", "had", "can", "could", "will", "would", "did", "does", "do"]
)
_THE_KIND = re.compile(r"(?P<rest>.*?)\s*\bthe (?P<kind>(?:[a-z-]+ )?[a-z-]+) (?:of|called|named)$")
_IN_THE_KIND = re.compile(r"(?P<rest>.*\b(?:in|on|at|from|to)) the (?P<kind>(?:[a-z-]+ )?[a-z-]+)$")
_PASSIVE = re.compile(r"(?:is|are|was|were) (?:\w+ly )?\w+(?:ed|en|wn|ne|de|ung|it|ught|lt|pt|ft|un) by$")
_PERSONS = re.compile(
    r"\b(?:founder|author|writer|director|creator|developer|designer|architect|composer|inventor|discoverer|owner|"
    r"president|minister|chairperson|chairman|chief|ceo|head(?! office)|coach|captain|leader|mayor|governor|king|queen|"
    r"monarch|spouse|wife|husband|father|mother(?! tongue)|child|son|daughter|sibling|brother|sister|manager|editor|"
    r"artist|performer|"
    r"singer|producer|chancellor|secretary|speaker|commander|successor|predecessor|champion|winner)s?\b",
    re.IGNORECASE,
)
_LEFT = re.compile(r"^(?:the|an?|one|it|he|she|they|that|there)\b", re.IGNORECASE)
_IRREGULAR = {"has": "have", "does": "do", "goes": "go"}
_NOT_VERBS = frozenset(
    [
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "to",
        "with",
        "the",
        "a",
        "an",
        "and",
        "or",
        "as",
        "his",
        "her",
        "its",
        "their",
    ]
)


def question_from(prompt: str, subject_start: int, subject_end: int) -> str | None:
    """Return the question that a prompt answers, or None where English gives no simple rule for it.

    Args:
        prompt: The text before the answer.
        subject_start: Index of the first character of the subject.
        subject_end: Index of the first character after the subject.

    Example:
        ```python
        >>> question_from("The Louvre is located in the city of", 0, 10)
        'Which city is the Louvre located in?'
        >>> question_from("The capital of France is", 15, 21)
        'What is the capital of France?'
        >>> question_from("Boston was founded by", 0, 6)
        'Who was Boston founded by?'
        ```
    """
    before, subject = prompt[:subject_start], prompt[subject_start:subject_end]
    after = prompt[subject_end:].rstrip()
    words = after.split()
    if not words or not before.isascii() or not after.isascii() or "\n" in prompt or after[-1] in "?.!:;,":
        return None
    words = words[:-1] if words[-1] in ("a", "an") and len(words) > 1 else words  # "is a" asks "what is"
    if before.strip():
        return _of_property(before, subject, words)
    return _of_subject(re.sub(r"^The (?=[A-Z])", "the ", subject), words)


def _of_property(before: str, subject: str, words: list[str]) -> str | None:
    """Return the question of "The capital of France is" and of "The headquarters of X is located in"."""
    if not _LEFT.match(before.strip()) or "," in before or "." in before:
        return None
    verbs = [index for index, word in enumerate(words) if word in _AUXILIARIES]
    if not verbs:
        return None
    verb = verbs[-1] if verbs[-1] == len(words) - 1 else verbs[0]  # "The team which X is a member of is"
    space = "" if words[0].startswith("'") else " "
    named = f"{before[0].lower()}{before[1:]}{subject}{space}{' '.join(words[:verb])}".rstrip()
    rest = " ".join(words[verb + 1 :])
    person = bool(_PERSONS.search(before)) and not rest and " name" not in before
    return _asked(named, words[verb], rest, person)


def _of_subject(subject: str, words: list[str]) -> str | None:
    """Return the question of "X was founded by" and of "X plays the position of"."""
    verb, rest = words[0], " ".join(words[1:])
    if verb in _AUXILIARIES:
        return _asked(subject, verb, rest, person=bool(_PASSIVE.fullmatch(f"{verb} {rest}")))
    if verb.startswith("'"):  # "France's capital is"
        auxiliary = next((index for index, word in enumerate(words) if word in _AUXILIARIES), None)
        if auxiliary is None:
            return None
        named = f"{subject}{' '.join(words[:auxiliary])}"
        rest = " ".join(words[auxiliary + 1 :])
        return _asked(named, words[auxiliary], rest, person=bool(_PERSONS.search(named)) and not rest)
    if not verb.isalpha() or not verb.islower() or verb in _NOT_VERBS:
        return None
    if verb.endswith("ed"):  # the stem needs a dictionary
        stem = _PAST.get(verb)
        return None if stem is None else _asked(subject, "did", f"{stem} {rest}".strip())
    if verb.endswith("s") and not verb.endswith("ss"):
        return _asked(subject, "does", f"{_stem(verb)} {rest}".strip())
    return None


_PAST = {
    "died": "die", "lived": "live", "worked": "work", "played": "play", "studied": "study", "graduated": "graduate",
    "founded": "found", "invented": "invent", "created": "create", "developed": "develop", "discovered": "discover",
    "married": "marry", "attended": "attend", "received": "receive", "originated": "originate", "joined": "join",
    "directed": "direct", "composed": "compose", "designed": "design", "opened": "open", "started": "start",
    "premiered": "premiere", "debuted": "debut", "occurred": "occur", "happened": "happen", "used": "use",
}  # fmt: skip


def _stem(verb: str) -> str:
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb.endswith("ies") and len(verb) > 4:
        return f"{verb[:-3]}y"
    return verb[:-2] if verb.endswith(("ches", "shes", "sses", "xes", "zzes")) else verb[:-1]


def _asked(named: str, verb: str, rest: str, person: bool = False) -> str:
    """Return a question about something, from the verb and what stands between it and the answer."""
    kind = _THE_KIND.fullmatch(rest) or _IN_THE_KIND.fullmatch(rest)
    if kind is not None:
        return " ".join(f"Which {kind['kind']} {verb} {named} {kind['rest']}".split()) + "?"
    return " ".join(f"{'Who' if person else 'What'} {verb} {named} {rest}".split()) + "?"
