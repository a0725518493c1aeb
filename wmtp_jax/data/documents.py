"""What a document is, and how an object of a JSONL file becomes one."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from wmtp_jax.data.chat import Chat
from wmtp_jax.errors import UserError
from wmtp_jax.tokenizer.tokenizer import Part

# Labels are stored in 32 bits.
_LARGEST_LABEL = 3e38
FIELDS = ("text", "prompt", "completion", "messages", "problem")


class Document(NamedTuple):
    """One text.

    Attributes:
      identity: decides whether it is held out: a file's name, a problem's, or "" where the text is all there is. Documents
        of equal identity that follow each other stay together.
      parts: consecutive pieces of `text`; () where all of it may be a target.
      label: whether it is right (bool), or how good (number); None where nobody says.
      side: "train" or "validation" where the source itself splits; "" leaves it to the identity.
    """

    identity: str
    text: str
    parts: tuple[Part, ...] = ()
    label: bool | float | None = None
    side: str = ""


def text_key(text: str) -> bytes:
    """What makes two texts the same: 16 bytes, whatever their line ends, white space at the ends of lines, and Unicode
    composition (NFC)."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    text = unicodedata.normalize("NFC", "\n".join(line.rstrip() for line in lines).rstrip())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def digest_of(document: Document) -> bytes:
    """What makes two documents the same to the byte: 16 bytes, of the text, its parts and the label."""
    facts = b""
    if document.parts or document.label is not None:
        sizes = [[len(part.text), part.target, part.template] for part in document.parts]
        facts = hashlib.blake2b(json.dumps([sizes, document.label]).encode(), digest_size=16).digest()
    return hashlib.blake2b(document.text.encode(), digest_size=16, salt=facts).digest()


def completion_document(
    identity: str, prompt: str, completion: str, *, label: bool | float | None = None, side: str = ""
) -> Document:
    """A prompt, whose tokens are no targets, and what should follow it; without a prompt, a plain text."""
    parts = (Part(prompt, False), Part(completion, True)) if prompt else ()
    return Document(identity, prompt + completion, parts, label, side)


def parse_lines(lines: Iterable[bytes], path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """The objects on lines of JSON, each after its place, "FILE:LINE"; empty lines are none.

    Raises:
      UserError: as `parse_line`.
    """
    for number, line in enumerate(lines, start=1):
        # Files that editors of Windows wrote begin with a byte-order mark, and so do the parts of what was joined of them.
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield f"{path}:{number}", parse_line(line, f"{path}:{number}")


def parse_line(line: bytes, where: str) -> dict:
    """The object on one line of JSON.

    Args:
      line: without or with its end.
      where: "FILE:LINE", for messages.

    Raises:
      UserError: no UTF-8, no JSON, or no object.
    """
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{where}: byte {error.start} of the line (0x{byte:02x}) is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested too deep
        raise UserError(f"{where}: not JSON that Python can read: {error}") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: the line is {json_type(entry)}, not an object")
    return entry


def document_of(entry: dict, where: str, *, label_field: str, chat: Chat) -> Document:
    """The document that an object holds: `text`, `prompt` and `completion`, or `messages`.

    `problem` is its identity where it is there. Otherwise documents with the same prompt have the same one, so that a
    prompt is never on both sides.

    Args:
      entry: with other fields as it likes.
      where: "FILE:LINE", for messages.
      label_field: the field that holds the label, if it is there.
      chat: renders `messages`.

    Raises:
      UserError: fields that make no document, an empty completion, a label that is no number.
    """
    forms = [
        form for form in (("text",), ("prompt", "completion"), ("messages",)) if any(name in entry for name in form)
    ]
    if not forms:
        have = ", ".join(map(repr, entry)) or "none"
        raise UserError(f"{where}: no field `text`, no `prompt` and `completion`, no `messages` (it has {have})")
    if len(forms) > 1:
        both = " and ".join(f"`{next(name for name in form if name in entry)}`" for form in forms[:2])
        raise UserError(f"{where}: has both {both}; leave one of them out")
    label = _label(entry, where, label_field)
    identity = string_field(entry, "problem", where) if "problem" in entry else ""
    if "text" in entry:
        return Document(identity, string_field(entry, "text", where), (), label)
    if "messages" in entry:
        parts = chat.parts(entry["messages"], where)
        before = "".join(part.text for part in parts[: [part.target for part in parts].index(True)])
        # What a template writes before the first message is the same for all conversations, and no prompt.
        asked = before if entry["messages"][0]["role"] != "assistant" else ""
        return Document(identity or _prompt_identity(asked), "".join(part.text for part in parts), parts, label)
    prompt, completion = string_field(entry, "prompt", where), string_field(entry, "completion", where)
    if not completion.strip():
        raise UserError(f"{where}: the field `completion` is empty: a prompt alone teaches nothing")
    return completion_document(identity or _prompt_identity(prompt), prompt, completion, label=label)


def string_field(entry: dict, name: str, where: str) -> str:
    """A field that has to be a string.

    Raises:
      UserError: it is missing, something else, or can't be written as UTF-8.
    """
    if name not in entry:
        raise UserError(f"{where}: the object has no field `{name}` (it has {', '.join(map(repr, entry))})")
    value = entry[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: the field `{name}` is {json_type(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `{name}` holds half of a surrogate pair at character {error.start}") from error
    return value


def json_type(value: object) -> str:
    """What JSON calls a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _label(entry: dict, where: str, field: str) -> bool | float | None:
    if field not in entry:
        return None
    value = entry[field]
    if isinstance(value, bool):
        return value
    if not isinstance(value, (int, float)):
        raise UserError(f"{where}: the label `{field}` is {json_type(value)}: must be true, false or a number")
    if not abs(value) <= _LARGEST_LABEL:  # NaN too; an integer may be too large for a float
        shown = value if isinstance(value, float) else f"an integer of {len(str(abs(value)))} digits"
        raise UserError(f"{where}: the label `{field}` is {shown}: must be a finite number of at most 3e38")
    return float(value)


def _prompt_identity(prompt: str) -> str:
    return "prompt " + hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest() if prompt else ""
