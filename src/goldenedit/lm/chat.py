"""Conversations as the model reads them: the one place that puts requests through a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from goldenedit.requests import ChatText, EditRequest, Message
from goldenedit.subjects import filled_messages, message_place

_MARK = "\ue000"  # of Unicode's private use area: no text has it


def rendered(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> EditRequest:
    """Return a request whose prompts are the texts that the model reads; one without messages is that already.

    The messages become the tokenizer's chat template over them with the generation prompt, as `ChatText`. Paraphrases
    and all other prompts become questions of a user behind the system messages that the conversation begins with.

    Raises:
        ValueError: The tokenizer has no chat template, or it does not take these messages as they are.
    """
    messages = request.messages
    if messages is None:
        return request
    begun = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))

    def ask(question: str) -> ChatText:
        return ChatText(_apply(tokenizer, [*messages[:begun], {"role": "user", "content": question}]), prompt.joint)

    prompt = _prompt(tokenizer, messages, request.subject)
    return replace(
        request,
        prompt=prompt,
        messages=None,
        paraphrases=tuple(map(ask, request.paraphrases)),
        neighborhood=tuple(map(ask, request.neighborhood)),
        generation=tuple(map(ask, request.generation)),
        portability=tuple((ask(question), answer) for question, answer in request.portability),
        locality=tuple((ask(question), answer) for question, answer in request.locality),
    )


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], subject: str) -> ChatText:
    """Return the text of a conversation, with the places of the subject and of the message that it stands in."""
    found = message_place(messages, subject)
    assert found is not None  # an EditRequest has its subject in a message
    last, start = found[0], found[1].start
    messages = filled_messages(messages, subject)
    text = _apply(tokenizer, messages)
    content = messages[last]["content"]
    begin = min(start, len(content) - len(content.lstrip()))  # many templates drop the space around a message
    pieces = (content[:begin], content[begin:start], content[start:])
    marked = [*messages[:last], {**messages[last], "content": _MARK.join(pieces)}, *messages[last + 1 :]]
    parts = _apply(tokenizer, marked).split(_MARK)
    if len(parts) != len(pieces) or "".join(parts) != text or not parts[-1].startswith(subject):
        raise ValueError(
            f"The chat template of {type(tokenizer).__name__} does not leave the message {content!r} as it is, so the "
            "subject's place cannot be told: give the text that the model reads as prompt=."
        )
    subject_start, context_start = len(parts[0] + parts[1]), len(parts[0])
    return ChatText(text, _joint(tokenizer, messages, text), subject_start, context_start)


def _joint(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> str:
    """Return the space that some templates write between the generation prompt and the assistant's answer."""
    answered = _apply(tokenizer, [*messages, {"role": "assistant", "content": _MARK}], generation_prompt=False)
    return " " if answered.startswith(f"{text} {_MARK}") else ""


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = True) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template to make a prompt of messages: set "
            "tokenizer.chat_template, load the tokenizer of the chat model, or give prompt= instead of messages=."
        )
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=generation_prompt, tokenize=False)
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"The chat template of {type(tokenizer).__name__} refuses messages of {roles}: {error}. Change their roles."
        ) from error
