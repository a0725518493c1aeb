"""Conversations to text, by the chat template that a tokenizer comes with."""

from __future__ import annotations

import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator

from wmtp_jax.errors import UserError
from wmtp_jax.tokenizer.tokenizer import Part, Tokenizer

Message = dict[str, object]


class Chat:
    """Renders conversations as `transformers` does, and says which pieces are the assistant's."""

    def __init__(self, tokenizer: Tokenizer | None):
        """Takes the tokenizer that the configuration names; None: it names none."""
        self._tokenizer = tokenizer

    def parts(self, messages: object, where: str) -> tuple[Part, ...]:
        """The pieces of a rendered conversation.

        Targets are the assistant's replies, each with what the template ends it with. What a template writes before a
        reply (a system prompt of its own, the header of the turn) is none.

        Args:
          messages: a list of `{"role": ..., "content": ...}`.
          where: "FILE:LINE", for messages to the user.

        Raises:
          UserError: no conversation, no reply in it, or no template that renders it.
        """
        messages = _checked(messages, where)
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not replies:
            raise UserError(f"{where}: no message of `messages` has the role 'assistant': there is nothing to learn")
        if not any(str(messages[number]["content"]).strip() for number in replies):
            raise UserError(f"{where}: every reply of `messages` is empty: there is nothing to learn")
        hidden, spelled, mark = self._without_special_tokens(messages)
        text = self._render(hidden, where)
        pieces: list[tuple[str, bool]] = []
        done = 0
        for number in replies:
            start, end = self._span(hidden, number, text, mark, where)
            start, end = max(start, done), max(end, done)
            start -= self._space_before(hidden[:number], text[done:start], text[:start], where)
            pieces += [(text[done:start], False), (text[start:end], True)]
            done = end
        pieces.append((text[done:], False))
        if not any(target and piece for piece, target in pieces):
            raise UserError(f"{where}: the tokenizer's chat template writes nothing for the assistant's messages")
        return tuple(_revealed(pieces, spelled))

    def _span(self, messages: list[Message], number: int, text: str, mark: str, where: str) -> tuple[int, int]:
        """Where a reply and its end stand in the rendered conversation; start = end where the template leaves it out.

        Few templates mark their replies. But a conversation that has a mark in the place of one reply is rendered alike
        before and after it.
        """
        marked = [*messages[:number], messages[number] | {"content": mark}]
        before, found, after = self._render(marked + messages[number + 1 :], where).partition(mark)
        if not found:
            return 0, 0
        start = _common_prefix(text, before)
        end = len(text) - _common_prefix(text[start:][::-1], after[::-1])
        # What ends a reply is written whether or not a message follows; the header of the next message is not.
        closing = after if len(marked) == len(messages) else self._render(marked, where).partition(mark)[2]
        end += self._common_end(text[end:], closing)
        return start, end

    def _space_before(self, messages: list[Message], gap: str, text: str, where: str) -> int:
        """How many characters before a reply are white space that the model has to write itself, as in "[/INST] reply".

        Args:
          messages: those before the reply.
          gap: what is rendered since the reply before it, or since the text's start.
          text: all that is rendered before it.
        """
        if not gap.strip():
            return len(gap)
        if messages and gap[-1].isspace():
            asked = self._render(messages, where, reply_wanted=True)
            if text.startswith(asked) and not text[len(asked) :].strip():
                return len(text) - len(asked)
        return 0

    def _common_end(self, left: str, right: str) -> int:
        """How many characters two texts begin with alike, without a part of a special token."""
        size = _common_prefix(left, right)
        for name in self._tokenizer.special_tokens if self._tokenizer else ():
            for text in (left, right):
                start = text.rfind(name, 0, size + len(name) - 1)
                if 0 <= start < size < start + len(name):
                    size = start
        return size

    @functools.cached_property
    def _apply(self) -> Callable[..., str] | None:
        if self._tokenizer is None:
            return None
        import transformers

        with tempfile.TemporaryDirectory() as directory:
            self._tokenizer.save(directory)
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        return functools.partial(tokenizer.apply_chat_template, tokenize=False) if tokenizer.chat_template else None  # pyrefly: ignore[missing-attribute]

    def _render(self, messages: list[Message], where: str, *, reply_wanted: bool = False) -> str:
        if self._apply is None:
            raise UserError(
                f"{where}: `messages` need a chat template; name a tokenizer that has one in config.data.tokenizer "
                "(the trained bpe has none), or give `prompt` and `completion`"
            )
        import jinja2

        try:
            return self._apply(messages, add_generation_prompt=reply_wanted)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: the tokenizer's chat template refuses these `messages`: {reason}") from error

    def _without_special_tokens(self, messages: list[Message]) -> tuple[list[Message], dict[str, str], str]:
        """The messages with a private character for every special token that they spell, what each stands for, and one
        that stands nowhere."""
        names = self._tokenizer.special_tokens if self._tokenizer else ()
        contents = "".join(str(message["content"]) for message in messages)
        spelled = sorted((name for name in names if name in contents), key=len, reverse=True)
        private = (chr(code) for code in itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
        free = (character for character in private if character not in contents)
        mark = next(free)
        if not spelled:
            return messages, {}, mark
        stands_for = dict(zip(free, spelled, strict=False))
        character = {name: c for c, name in stands_for.items()}
        pattern = re.compile("|".join(map(re.escape, spelled)))
        hidden = [m | {"content": pattern.sub(lambda match: character[match[0]], str(m["content"]))} for m in messages]
        return hidden, stands_for, mark


def _checked(messages: object, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: the field `messages` must be a list of objects with `role` and `content`")
    for number, message in enumerate(messages, start=1):
        strings = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not strings:
            raise UserError(
                f"{where}: message {number} of `messages` must be an object with the strings `role` and `content`"
            )
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: message {number} holds half of a surrogate pair at character {error.start}"
            ) from error
    return messages


def _common_prefix(left: str, right: str) -> int:
    """How many characters two texts begin with alike."""
    return len(right) if left.startswith(right) else len(os.path.commonprefix([left, right]))


def _revealed(pieces: list[tuple[str, bool]], spelled: dict[str, str]) -> Iterator[Part]:
    """The pieces as parts, with what the messages spelled as parts of its own, which no template wrote."""
    pattern = re.compile("([" + "".join(spelled) + "])") if spelled else None
    for text, target in pieces:
        for piece in pattern.split(text) if pattern else (text,):
            if piece in spelled:
                yield Part(spelled[piece], target)
            elif piece:
                yield Part(piece, target, template=True)
