"""Passwords in addresses: what is shown, logged or written to a file has none.

An address reaches the library that opens it whole, in memory or through the environment of a child process. Everything else
goes through here: a configuration where it is written, tracked or printed, and every message that names an address.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

# As far as the last @ before the path: people leave an @ in a password unescaped.
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_NAMES = "password|passwd|pwd|secret|token|signature|credential|api_?key|access_?key"
_QUERY = re.compile(rf"([?&;][\w.-]*(?:{_NAMES})[\w.-]*=)[^&;#\s]*", re.IGNORECASE)


def redact(text: str) -> str:
    """`https://me:secret@host/path?token=abc -> https://***@host/path?token=***`; text without such things as it is."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def redacted(value: Any) -> Any:
    """`redact` of every text in nested dicts, lists and tuples; their types stay, other values are left alone."""
    match value:
        case str():
            return redact(value)
        case dict():
            return {key: redacted(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(redacted(item) for item in value)
    return value
