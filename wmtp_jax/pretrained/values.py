"""Reading the settings that come with published weights: JSON objects, checked value by value."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError

_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def integer(given: dict[str, Any], key: str, where: Path, default: Any = _REQUIRED) -> int:
    """The whole number >= 1 at `key`; without a default the key must be there."""
    value = _get(given, key, where, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} = {value!r}: must be a whole number of at least 1")
    return value


def number(given: dict[str, Any], key: str, where: Path, default: Any = _REQUIRED) -> float:
    """The finite number > 0 at `key`; without a default the key must be there."""
    value = _get(given, key, where, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{where}: {key} = {value!r}: must be a number above 0")
    return float(value)


def flag(given: dict[str, Any], key: str, where: Path, default: bool) -> bool:
    """The truth value at `key`."""
    value = given.get(key, default)
    if type(value) is not bool:
        raise UserError(f"{where}: {key} = {value!r}: must be true or false")
    return value


def refuse(where: Path, key: str, value: object, why: str) -> UserError:
    """The error for a setting that this program does not reproduce exactly."""
    return UserError(f"{where}: {key} = {value!r} is not supported ({why}), and it is not approximated")


def _get(given: dict[str, Any], key: str, where: Path, default: Any) -> Any:
    value = given.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"{where}: {key} is missing")
    return value
