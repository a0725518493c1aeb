"""What kind of thing in a Python program each token of a model is part of, by Python's own tokenizer."""

from __future__ import annotations

import io
import keyword
import token
import tokenize
from collections.abc import Sequence

import numpy as np

KINDS = ("keyword", "name", "number", "string", "operator", "indentation", "comment", "space", "other")
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_STRINGS = {tokenize.STRING} | {
    getattr(tokenize, name) for name in dir(tokenize) if name.startswith(("FSTRING_", "TSTRING_")) and name.isupper()
}


def byte_kinds(source: str) -> np.ndarray:
    """The kind of every byte of the UTF-8 of `source`, uint8 `[bytes]`, an index into `KINDS`.

    White space at the beginning of a line, within brackets too, is indentation, and all else between Python's tokens is
    space. What does not parse, from where Python's tokenizer gives up, is `other`.
    """
    lines = source.splitlines(keepends=True) if "\f" not in source else io.StringIO(source, newline="").readlines()
    starts = np.concatenate([[0], np.cumsum([len(line) for line in lines], dtype=np.int64)])
    kinds = np.full(len(source), _NUMBER["other"], np.uint8)

    def place(row: int, column: int) -> int:
        return min(int(starts[min(row - 1, len(lines))]) + column, len(source))

    end = 0
    try:
        for found in tokenize.generate_tokens(iter(lines).__next__):
            begin, after = place(*found.start), place(*found.end)
            kind = _kind_of(found)
            if kind is None or after < begin:
                continue
            kinds[end:begin] = _NUMBER["space"]
            kinds[begin:after] = _NUMBER[kind]
            end = max(end, after)
        kinds[end:] = _NUMBER["space"]
    except (tokenize.TokenError, SyntaxError):
        pass
    for line, start in zip(lines, starts, strict=False):
        width = len(line) - len(line.lstrip(" \t"))
        part = kinds[start : start + width]
        part[part == _NUMBER["space"]] = _NUMBER["indentation"]
    sizes = np.fromiter((len(character.encode()) for character in source), np.int64, len(source))
    return np.repeat(kinds, sizes)


def token_kinds(pieces: Sequence[bytes], kinds: np.ndarray) -> np.ndarray:
    """The kind of every token, uint8 `[tokens]`, from `byte_kinds` of their text.

    A token is what its first byte that is neither space nor indentation is; of white space alone, what its last byte is.
    A token without bytes (a special one) is `other`.

    Args:
      pieces: the bytes of each token; one more space than the text has may come first (SentencePiece).
      kinds: of the bytes of the text.
    """
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ends, total = np.cumsum(sizes), int(sizes.sum())
    out = np.full(len(pieces), _NUMBER["other"], np.uint8)
    if not total:
        return out
    absent = np.full(max(total - len(kinds), 0), _NUMBER["other"], np.uint8)
    of_bytes = np.concatenate([absent, kinds])[:total]
    solid = ~np.isin(of_bytes, (_NUMBER["space"], _NUMBER["indentation"]))
    solid[: len(absent)] = False
    spelled = sizes > 0
    first = np.minimum.reduceat(np.where(solid, np.arange(total), total), (ends - sizes)[spelled])
    out[spelled] = of_bytes[np.where(first < total, first, ends[spelled] - 1)]
    return out


def _kind_of(found: tokenize.TokenInfo) -> str | None:
    match found.type:
        case token.NAME:
            return "keyword" if keyword.iskeyword(found.string) else "name"
        case token.NUMBER:
            return "number"
        case token.OP:
            return "operator"
        case token.INDENT:
            return "indentation"
        case token.NEWLINE | token.NL:
            return "space"
        case tokenize.COMMENT:
            return "comment"
    if found.type in _STRINGS:
        return "string"
    return "other" if found.type == token.ERRORTOKEN and found.string.strip() else None
