"""Conversations as the model reads them. Only this module applies chat templates to requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from goldenedit.requests import ChatText, EditRequest, Message
from goldenedit.subjects import filled_messages, message_place

_MARK = "\ue000"  # from Unicode's private use area: ordinary texts do not contain it


def rendered(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> EditRequest:
    """Return a request whose prompts are the texts that the model reads. A request without messages is returned as is.

    The tokenizer's chat template turns the messages into one `ChatText`, which ends with the generation prompt.
    Paraphrases and all other prompts become questions of a user, after the system messages that begin the conversation.

    Raises:
        ValueError: The tokenizer has no chat template, or its template changes or refuses these messages.
    """
    messages = request.messages
    if messages is None:
        return request
    roles = [message["role"] for message in messages]
    num_system = next((index for index, role in enumerate(roles) if role != "system"), len(roles))

    def ask(question: str) -> ChatText:
        conversation: list[Message] = [*messages[:num_system], {"role": "user", "content": question}]
        return ChatText(_apply(tokenizer, conversation), prompt.joint)

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


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> ChatText:
    """Return a conversation as the model reads it before it answers.

    Raises:
        ValueError: The tokenizer has no chat template, or its template refuses these messages.
    """
    return ChatText(_apply(tokenizer, messages))


def end_token(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the token that ends an answer to a prompt: that of a turn in a chat, else the end of a text.

    Raises:
        ValueError: The tokenizer has no such token.
    """
    if isinstance(prompt, ChatText):
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        after = _apply(tokenizer, messages, generation_prompt=False).partition(_MARK)[2].lstrip()
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no token that ends an answer, which this editor trains. Set "
            "tokenizer.eos_token, or use another editor (EditConfig.method)."
        )
    return int(tokenizer.eos_token_id)


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], subject: str) -> ChatText:
    """Return the text of a conversation, with the positions of the subject and of the message that names it."""
    place = message_place(messages, subject)
    assert place is not None  # EditRequest checks that a message names the subject
    number, start = place[0], place[1].start
    messages = filled_messages(messages, subject)
    text = _apply(tokenizer, messages)
    content = messages[number]["content"]
    indent = min(start, len(content) - len(content.lstrip()))  # many templates strip the space around a message
    pieces = (content[:indent], content[indent:start], content[start:])
    marked = [*messages[:number], {**messages[number], "content": _MARK.join(pieces)}, *messages[number + 1 :]]
    rendered_pieces = _apply(tokenizer, marked).split(_MARK)
    if (
        len(rendered_pieces) != len(pieces)
        or "".join(rendered_pieces) != text
        or not rendered_pieces[-1].startswith(subject)
    ):
        raise ValueError(
            f"The chat template of {type(tokenizer).__name__} changes the message {content!r}, so the position of the "
            "subject is unknown. Pass the text that the model reads as prompt=."
        )
    context_start = len(rendered_pieces[0])
    subject_start = context_start + len(rendered_pieces[1])
    return ChatText(text, *_around_answer(tokenizer, messages, text, subject_start, context_start))


def _around_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, subject_start: int, context_start: int
) -> tuple[str, int, int, str]:
    """Return what the template writes before an answer, a space or nothing, and the special token it writes after it.

    The positions are passed through, in the order of the fields of `ChatText`.
    """
    answered = _apply(tokenizer, [*messages, {"role": "assistant", "content": _MARK}], generation_prompt=False)
    joint = " " if answered.startswith(f"{text} {_MARK}") else ""
    behind = answered.rpartition(_MARK)[2].lstrip()
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return joint, subject_start, context_start, next((token for token in special if behind.startswith(token)), "")


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = True) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template, which messages need. Set tokenizer.chat_template, load "
            "the tokenizer of the chat model, or pass prompt= instead of messages=."
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
