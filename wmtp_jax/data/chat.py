"""Conversations to text, by the chat template that a tokenizer comes with."""

from __future__ import annotations

import functools
import itertools
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

        Targets are what the assistant has to write: its turns, without the header that a template puts where a reply is
        asked for, with the tokens that end them.

        Args:
          messages: a list of `{"role": ..., "content": ...}`.
          where: "FILE:LINE", for messages to the user.

        Raises:
          UserError: no conversation, no reply in it, or no template that can render it piece by piece.
        """
        messages = _checked(messages, where)
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not replies:
            raise UserError(f"{where}: no message of `messages` has the role 'assistant': there is nothing to learn")
        hidden, spelled = self._without_special_tokens(messages)
        pieces: list[tuple[str, bool]] = []
        text = ""
        for number in replies:
            for count, target in ((number, False), (number + 1, True)):
                longer = self._render(hidden[:count], where, reply_wanted=not target)
                text = _extend(pieces, text, longer, target, where)
        if replies[-1] + 1 < len(hidden):
            _extend(pieces, text, self._render(hidden, where, reply_wanted=False), False, where)
        if not any(target for _, target in pieces):
            raise UserError(f"{where}: the tokenizer's chat template writes nothing for the assistant's messages")
        return tuple(_revealed(pieces, spelled))

    @functools.cached_property
    def _apply(self) -> Callable[..., str] | None:
        if self._tokenizer is None:
            return None
        import transformers

        with tempfile.TemporaryDirectory() as directory:
            self._tokenizer.save(directory)
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        return functools.partial(tokenizer.apply_chat_template, tokenize=False) if tokenizer.chat_template else None  # pyrefly: ignore[missing-attribute]

    def _render(self, messages: list[Message], where: str, *, reply_wanted: bool) -> str:
        if not messages:
            return ""
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

    def _without_special_tokens(self, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
        """The messages with a private character for every special token that they spell, and what each stands for."""
        names = self._tokenizer.special_tokens if self._tokenizer else ()
        contents = "".join(str(message["content"]) for message in messages)
        found = sorted((name for name in names if name in contents), key=len, reverse=True)
        if not found:
            return messages, {}
        free = (chr(code) for code in itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
        stands_for = dict(zip((c for c in free if c not in contents), found, strict=False))
        character = {name: c for c, name in stands_for.items()}
        pattern = re.compile("|".join(map(re.escape, found)))
        hidden = [m | {"content": pattern.sub(lambda match: character[match[0]], str(m["content"]))} for m in messages]
        return hidden, stands_for


def _checked(messages: object, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: the field `messages` must be a list of objects with `role` and `content`")
    for number, message in enumerate(messages, start=1):
        strings = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not strings:
            raise UserError(
                f"{where}: message {number} of `messages` must be an object with the strings `role` and `content`"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError(f"{where}: message {number} of `messages` is an empty reply")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: message {number} holds half of a surrogate pair at character {error.start}"
            ) from error
    return messages


def _extend(pieces: list[tuple[str, bool]], text: str, longer: str, target: bool, where: str) -> str:
    if not longer.startswith(text):
        raise UserError(
            f"{where}: the tokenizer's chat template writes earlier messages in another way once more follow, so that the "
            "assistant's part can't be told apart; give single turns, or `prompt` and `completion`"
        )
    if len(longer) > len(text):
        pieces.append((longer[len(text) :], target))
    return longer


def _revealed(pieces: list[tuple[str, bool]], spelled: dict[str, str]) -> Iterator[Part]:
    """The pieces as parts, with what the messages spelled as parts of its own, which no template wrote."""
    pattern = re.compile("([" + "".join(spelled) + "])") if spelled else None
    for text, target in pieces:
        for piece in pattern.split(text) if pattern else (text,):
            if piece in spelled:
                yield Part(spelled[piece], target)
            elif piece:
                yield Part(piece, target, template=True)
