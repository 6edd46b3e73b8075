"""Texts that know what is put between a prompt and its answer."""

from __future__ import annotations


class ChatText(str):
    """A prompt rendered by a chat template. It includes the template's special tokens.

    Attributes:
        joint: What the template puts between the prompt and an answer: a space or nothing.
        subject_start: Index of the first character of the subject, -1 if the prompt has no subject.
        context_start: Index at which contexts are inserted: the start of the message that contains the subject.
        end: The special token that the template writes after an answer; empty if it writes none.
    """

    joint: str
    subject_start: int
    context_start: int
    end: str

    def __new__(
        cls, text: str, joint: str = "", subject_start: int = -1, context_start: int = -1, end: str = ""
    ) -> ChatText:
        """Create a rendered prompt; see the attributes."""
        prompt = super().__new__(cls, text)
        prompt.joint, prompt.subject_start, prompt.context_start, prompt.end = joint, subject_start, context_start, end
        return prompt


class Answer(str):
    """An answer that specifies what is put between a prompt and itself.

    Attributes:
        joint: Whitespace, or an empty string.
    """

    joint: str

    def __new__(cls, text: str, joint: str = "") -> Answer:
        """Create an answer; see the attribute."""
        answer = super().__new__(cls, text)
        answer.joint = joint
        return answer
