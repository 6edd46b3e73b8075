"""Three prompts of an evaluation that show what an edit does. A model card has them in full."""

from __future__ import annotations

from collections.abc import Sequence

from goldenedit.evaluation.report import Text

_SPOKEN = ("chat", "question", "second_turn", "rephrase")  # forms that people use, the most usual first
_UNCHANGED = ("subject", "neighbors", "unrelated")  # kinds of other prompts, those that an edit changes most first


def examples(texts: Sequence[Text]) -> list[Text]:
    """Return up to three texts that stand for all others.

    - The first fact as it was edited.
    - The second fact as people ask for it: in a chat, else as a question. With one fact, it is the first.
    - Another prompt, whose answer should have stayed but reads differently after the edit: a question about an edited
      subject if there is one, else a neighbor, else an unrelated prompt. If none does, one that stayed as it was.

    Example:
        ```python
        >>> [text.kind for text in examples(model.evaluate().texts)]
        ['completion', 'chat', 'subject']
        ```
    """
    own = [text for text in texts if text.answers]
    edited = own[:1]
    asked = [text for text in own if text.fact == 1] or own
    spoken = [text for form in _SPOKEN for text in asked if text.kind == form and text not in edited]
    # A changed text may still read the same: other tokens spell it, or only one of the models ends it there.
    others = [text for kind in _UNCHANGED for text in texts if text.kind == kind and not text.answers]
    changed = [text for text in others if text.edited != text.base] or others
    return [*edited, *spoken[:1], *changed[:1]]
