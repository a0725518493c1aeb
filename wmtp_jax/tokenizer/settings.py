"""A published tokenizer as `transformers` reads it: the settings beside `tokenizer.json`, folded into it.

What stands in tokenizer_config.json, added_tokens.json, special_tokens_map.json and config.json may add tokens, and may name a
class that cuts text in its own way, whatever tokenizer.json says. Those rules are the library's, so the library applies them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from wmtp_jax.errors import UserError

Files = dict[str, bytes]

# Classes that take tokenizer.json as it is, and the kinds of models (config.json) for which `transformers` keeps to them: for
# others, as qwen2, it takes the models' own class instead.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_KEEP_TO_THEM = (None, "gpt2", "llama", "qwen3")
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
)
# Settings of a generic class that decide no token.
_INERT = frozenset(
    "add_bos_token add_eos_token backend chat_template clean_up_tokenization_spaces is_local local_files_only "
    "max_length model_input_names model_max_length name_or_path padding_side tokenizer_class truncation_side".split()
)


def folded(files: Files, where: str) -> Files:
    """The files of a tokenizer whose `tokenizer.json` says all, and whose `tokenizer_config.json` names the class that was read.

    Args:
      files: contents by name; without `tokenizer.json`, those that `transformers` makes one from.
      where: the directory or hub name, for messages.

    Raises:
      UserError: files that are damaged, that make no fast tokenizer, or that need code of their own.
    """
    for name in _JSON_FILES:
        for key in (given := json_object(files, name, where)):
            if key.endswith("_token") and not key.startswith("add_"):
                special_token(given, key, f"{where}: {name}")
    if "tokenizer.json" in files and _says_all(files, where):
        return files
    # Imported late: it takes seconds.
    import transformers
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    # Older files write a token as an object without its type, which the library no longer takes.
    config = {
        key: {"__type": "AddedToken", **value} if key.endswith("_token") and isinstance(value, dict) else value
        for key, value in json_object(files, "tokenizer_config.json", where).items()
    }
    reader: Any = transformers.AutoTokenizer
    name = config.get("tokenizer_class")
    if "auto_map" in config and (not isinstance(name, str) or tokenizer_class_from_name(name) is None):
        if "tokenizer.json" not in files:
            raise UserError(
                f"{where}: auto_map of tokenizer_config.json names code, which is not run; save the tokenizer as tokenizer.json"
            )
        reader = transformers.PreTrainedTokenizerFast
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in (files | {"tokenizer_config.json": to_json(config)}).items():
            (Path(scratch) / file).write_bytes(content)
        try:
            read = reader.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # neither library raises anything narrower, whatever is wrong with a file
            reason = " ".join(str(error).replace(scratch, where).split())
            raise UserError(f"{where}: transformers finds no tokenizer there: {reason}") from error
    if not isinstance(read, transformers.PreTrainedTokenizerFast):
        raise UserError(f"{where}: {type(read).__name__} of transformers has no tokenizer.json, which is needed")
    spec = json.loads(read.backend_tokenizer.to_str())
    invented = _invented(files, set(read.get_vocab()), where)
    while spec["added_tokens"] and spec["added_tokens"][-1]["content"] in invented:
        spec["added_tokens"].pop()
    own = {key: value for key, value in config.items() if key != "auto_map"}
    if name not in ((known := type(read).__name__), f"{known}Fast"):
        own["tokenizer_class"] = "PreTrainedTokenizerFast" if known == "TokenizersBackend" else known
    for key in ("bos_token", "eos_token"):
        token = getattr(read, key)
        if token not in {None, special_token(own, key, where)} | invented:
            own[key] = token
    return files | {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": to_json(own)}


def _invented(files: Files, tokens: set[str], where: str) -> set[str]:
    """The tokens that no file holds: a class names them, as GPT-2's the unknown token, or a setting names them alone. The library
    gives them ids past the vocabulary, for which models have no rows."""
    if "tokenizer.json" not in files:
        return set()
    held = set(tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]).get_vocab(with_added_tokens=True))
    config, legacy = (json_object(files, f"{name}.json", where) for name in ("tokenizer_config", "special_tokens_map"))
    for listed in ("additional_special_tokens", "extra_special_tokens"):
        held |= set(_contents(config.get(listed))) | set(_contents(legacy.get(listed)))
    held |= set(_contents(list((config.get("added_tokens_decoder") or {}).values())))
    return tokens - held - json_object(files, "added_tokens.json", where).keys()


def _says_all(files: Files, where: str) -> bool:
    """Whether `transformers` takes `tokenizer.json` as it is: a generic class, and no token beside it that it lacks."""
    config = json_object(files, "tokenizer_config.json", where)
    model = json_object(files, "config.json", where)
    if config.get("tokenizer_class") not in _GENERIC or model.get("model_type") not in _KEEP_TO_THEM:
        return False
    if "added_tokens.json" in files:
        return False
    added: dict[str, dict[str, Any]] = {}
    for token in json_object(files, "tokenizer.json", where).get("added_tokens") or []:
        added[str(token["id"])] = {key: value for key, value in token.items() if key != "id"}
    named = config | json_object(files, "special_tokens_map.json", where)
    return all(key in _INERT or _holds(key, value, added) for key, value in named.items())


def _holds(key: str, value: Any, added: dict[str, dict[str, Any]]) -> bool:
    """Whether tokenizer.json has the tokens that a setting names, as the setting has them."""
    if key == "added_tokens_decoder":
        return isinstance(value, dict) and all(added.get(index) == token for index, token in value.items())
    if key.endswith(("_token", "special_tokens")):
        special = {token["content"] for token in added.values() if token["special"]}
        return all(token in special for token in _contents(value))
    return False


def _contents(value: Any) -> Iterator[str]:
    """The spellings of one token, or of a list of them."""
    if isinstance(value, list):
        for item in value:
            yield from _contents(item)
    elif isinstance(value, dict):
        yield value.get("content", "")
    elif value is not None:
        yield value


def json_object(files: Files, name: str, where: str) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no such file.

    Raises:
      UserError: it holds something else.
    """
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name} must hold a JSON object")
    return found


def special_token(given: dict[str, Any], name: str, where: str) -> str | None:
    """What a tokenizer_config.json or a special_tokens_map.json names as `eos_token` and the like.

    Raises:
      UserError: it is no text.
    """
    token = given.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise UserError(f"{where}: {name} = {token!r}: must be a text")
    return token


def to_json(value: dict[str, Any]) -> bytes:
    """As the files of a tokenizer are written."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
