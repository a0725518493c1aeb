"""A model read, written in one of the formats, verified, and only then given its name; see `wmtp_jax.export.__main__`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.checkpoint.parameters import check_shapes, read_parameters
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.errors import UserError, check_room, disk_errors
from wmtp_jax.export.head_tensors import (
    check_mimo,
    deepseek_layers,
    described_heads,
    medusa_heads,
    mimo_tensors,
)
from wmtp_jax.export.meta_writer import META_FILE, check_meta, meta_tensors, write_checkpoint
from wmtp_jax.export.transformers_writer import config_of, family_of, generation_config_of, trunk_tensors
from wmtp_jax.export.whole import Lazy, Whole
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.pretrained.gathering import gather
from wmtp_jax.pretrained.locating import is_published
from wmtp_jax.pretrained.safetensors_file import write_file
from wmtp_jax.pretrained.transformers_format import DESCRIPTION_FILE, HEADS_FILE
from wmtp_jax.run.inputs import check_vocabulary, describe_base, end_tokens, tokenizer_of
from wmtp_jax.settings import ModelSettings
from wmtp_jax.storage import s3
from wmtp_jax.storage.cache import cache_directory
from wmtp_jax.storage.files import sync
from wmtp_jax.tokenizer.sentencepiece import find_model
from wmtp_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

WEIGHTS_FILE = "model.safetensors"
FORMATS = ("hf", "hf-mtp", "medusa", "mimo", "meta")
_SHIPPED = Path(__file__).parent / "shipped"
_SAMPLE_ROWS, _SAMPLE_LENGTH = 2, 24


def export(
    checkpoint: str | Path, *, to: str, output: str | Path, say: Callable[[str], None] = lambda line: None
) -> Path | str:
    """Writes a model in a published format, verifies what was written, and only then gives it its name.

    Args:
      checkpoint: a run directory, a checkpoint of either backend, or published weights.
      to: one of `FORMATS`.
      output: the directory to make; it may be there if it is empty; or `s3://BUCKET/PREFIX`, with nothing below it.
      say: takes lines about what happens.

    Returns:
      `output`.

    Raises:
      UserError: whatever the user can put right, and an export that does not give the model's logits; nothing is left behind.
    """
    begun = time.monotonic()
    remote = s3.join(output) if s3.is_remote(output) else ""
    if "://" in str(output) and not remote:
        raise UserError(f"--output={output}: must be a directory, or s3://BUCKET/PREFIX")
    if to not in FORMATS:
        raise UserError(f"--to={to}: must be {' | '.join(FORMATS)}")
    if remote:
        # Made and checked in the cache, then brought there.
        output, setting = cache_directory() / "exports" / remote.rpartition("/")[2], "XDG_CACHE_HOME"
        is_there = bool(s3.patiently(lambda: s3.listing(remote) or s3.stat(remote)))
    else:
        output, setting = Path(output).expanduser().absolute(), "--output"
        is_there = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if is_there:
        raise UserError(f"--output={remote or output}: is there already; remove it, or name another directory")
    _check_verifiers()
    # Imported late: what can be refused without jax is refused at once.
    from wmtp_jax.export import verification

    whole, tokenizer = load_whole(checkpoint)
    family = refuse_unexpressed(whole, to)
    count = sum(array.size for array in whole.named.values())
    s = whole.settings
    heads = f"{s.num_heads} {s.head_kind} heads" if s.num_heads > 1 else "one head"
    say(f"{whole.path}: {family}, {heads}, {count:,} parameters")
    if tokenizer is None:
        say(f"{whole.path}: no tokenizer comes with these weights, so none is written")
    with disk_errors(output.parent, setting=setting):
        output.parent.mkdir(parents=True, exist_ok=True)
        check_room(output.parent, 4 * count, setting=setting)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            files = write(whole, family, to, partial, tokenizer)
            tokens = sample_tokens(s, tokenizer)
            said = verification.check_tensors(partial, files)
            said += verification.check(partial, to, tokens, own_logits(whole, tokens), tokenizer)
            _sync(partial)
            if remote:
                _upload(partial, remote)
            else:
                os.rename(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for line in said:
        say(line)
    say(f"done in {time.monotonic() - begun:.1f} s: {remote or output}")
    return remote or output


# ---- what is exported ----------------------------------------------------------------------------------------------


def load_whole(path: str | Path) -> tuple[Whole, Tokenizer | None]:
    """The model of a checkpoint (adapters merged, value head left out) or of published weights, and its tokenizer."""
    if is_published(path):
        base = open_pretrained(path)
        tokenizer = _published_tokenizer(base.path)
        if tokenizer is not None:
            check_vocabulary(base, tokenizer, key=f"--checkpoint={path}")
        settings, origin = base.settings, describe_base(base)
        heads = {"num_heads": settings.num_heads, "head_kind": settings.head_kind}
        shapes = {name: leaf.shape for name, leaf in _abstract(settings).items()}
        named = dict(gather(base, shapes, **heads))
        where = base.path
    else:
        where = find_checkpoint(path)
        named, metadata = read_parameters(where)
        settings, origin = ModelSettings(**metadata["model"]), metadata.get("pretrained") or {}
        if not Path(tokenizer_of(path)).is_dir():
            raise UserError(f"{tokenizer_of(path)}: no such directory; the tokenizer of the run belongs there")
        tokenizer = load_tokenizer(tokenizer_of(path))
        if "bos" not in metadata.get("config", {"data": {"bos": ""}})["data"]:  # made before any text was begun with a token
            tokenizer = tokenizer.with_begin("never", key=str(where))
    named = {name: array for name, array in named.items() if not name.startswith("value_head.")}
    check_shapes(named, _abstract(settings), where)
    settings = dataclasses.replace(settings, compute_dtype="float32", remat="none")
    ends = end_tokens(origin, settings.vocabulary_size)
    if tokenizer is None:
        return Whole(where, settings, named, origin, end_tokens=ends), None
    end, begin = tokenizer.end_of_text_id, tokenizer.special_token_id("bos_token")
    ends = tuple(dict.fromkeys([*ends, end]))
    return Whole(where, settings, named, origin, end_of_text=end, begin_of_text=begin, end_tokens=ends), tokenizer


def refuse_unexpressed(whole: Whole, to: str) -> str:
    """The architecture that the model is, after refusing what the format can't express.

    Raises:
      UserError: names it.
    """
    family = "llama" if to == "meta" else family_of(whole)
    match to:
        case "hf-mtp":
            deepseek_layers(whole, family)
        case "medusa":
            medusa_heads(whole)
        case "mimo":
            check_mimo(whole, family)
        case "meta":
            check_meta(whole)
    return family


def sample_tokens(settings: ModelSettings, tokenizer: Tokenizer | None) -> np.ndarray:
    """Token ids `[B, S]` that an export is verified on: text, or random ids where there is no tokenizer."""
    length = min(_SAMPLE_LENGTH, settings.max_positions) if settings.positions == "learned" else _SAMPLE_LENGTH
    shape = _SAMPLE_ROWS, max(length, 1)
    if tokenizer is not None:
        return tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))[: shape[0] * shape[1]].reshape(shape)
    return np.random.default_rng(0).integers(0, settings.vocabulary_size, shape).astype(np.int32)


def own_logits(whole: Whole, tokens: np.ndarray) -> np.ndarray:
    """Every head's logits `[B, S, H, V]` by our own model."""
    from wmtp_jax.model import abstract_parameters, merge, nest

    definition, _ = abstract_parameters(whole.settings)
    return np.asarray(merge(definition, nest(whole.named)).logits(tokens))


# ---- writing -------------------------------------------------------------------------------------------------------


def write(
    whole: Whole, family: str, to: str, directory: Path, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Lazy]]:
    """Writes all files of a format into a directory that is there; returns what the files of weights hold, by their names."""
    match to:
        case "hf":
            files = _write_plain(whole, family, directory, tokenizer)
            if whole.settings.num_heads > 1:
                tensors, description = described_heads(whole, family)
                write_file(directory / HEADS_FILE, tensors)
                _write_json(directory / DESCRIPTION_FILE, description)
                files[HEADS_FILE] = tensors
            return files
        case "hf-mtp":
            name = f"{family.capitalize()}MtpForCausalLM"
            depths = whole.settings.num_heads - 1
            changes = {
                "architectures": [name],
                "auto_map": {"AutoModelForCausalLM": f"modeling_wmtp_mtp.{name}"},
                "num_mtp_layers": depths,
                **({} if family == "llama" else {"mtp_layer_types": ["full_attention"] * depths}),
            }
            tensors = trunk_tensors(whole, family) | deepseek_layers(whole, family)
            _write_model(whole, config_of(whole, family) | changes, tensors, directory, tokenizer)
            shutil.copyfile(_SHIPPED / "modeling_wmtp_mtp.py", directory / "modeling_wmtp_mtp.py")
            return {WEIGHTS_FILE: tensors}
        case "medusa":
            tensors, config = medusa_heads(whole)
            write_file(directory / WEIGHTS_FILE, tensors)
            _write_json(directory / "config.json", config)
            (directory / "target").mkdir()
            target = _write_plain(whole, family, directory / "target", tokenizer)
            return {WEIGHTS_FILE: tensors, f"target/{WEIGHTS_FILE}": target[WEIGHTS_FILE]}
        case "mimo":
            changes = {
                "architectures": ["MiMoForCausalLM"],
                "model_type": "mimo",
                "auto_map": {
                    "AutoConfig": "configuration_mimo.MiMoConfig",
                    "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
                },
                "num_nextn_predict_layers": 1,
                "attention_bias": True,
                "tie_word_embeddings": False,
            }
            tensors = mimo_tensors(trunk_tensors(whole, family), whole)
            _write_model(whole, config_of(whole, "qwen2") | changes, tensors, directory, tokenizer)
            for name in ("configuration_mimo.py", "modeling_mimo.py"):
                shutil.copyfile(_SHIPPED / name, directory / name)
            return {WEIGHTS_FILE: tensors}
    tensors = meta_tensors(whole)
    write_checkpoint(whole, tensors, directory)
    if tokenizer is not None:
        tokenizer.save(directory)
    return {META_FILE: tensors}


def _write_plain(whole: Whole, family: str, directory: Path, tokenizer: Tokenizer | None) -> dict[str, dict[str, Lazy]]:
    tensors = trunk_tensors(whole, family)
    _write_model(whole, config_of(whole, family), tensors, directory, tokenizer)
    return {WEIGHTS_FILE: tensors}


def _write_model(
    whole: Whole, config: dict[str, Any], tensors: dict[str, Lazy], directory: Path, tokenizer: Tokenizer | None
) -> None:
    write_file(directory / WEIGHTS_FILE, tensors)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_config_of(whole, config))
    if tokenizer is None:
        return
    tokenizer.save(directory)
    about = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "qwen2" and not about["tokenizer_class"].startswith("Qwen2Tokenizer"):
        # AutoTokenizer takes Qwen's own class for such a model, whatever tokenizer_config.json names, unless it names code.
        changes: dict[str, Any] = {"tokenizer_class": "TokenizersBackend"}
        changes["auto_map"] = {"AutoTokenizer": [None, "tokenization_wmtp.WmtpTokenizer"]}
        _write_json(directory / "tokenizer_config.json", about | changes)
        shutil.copyfile(_SHIPPED / "tokenization_wmtp.py", directory / "tokenization_wmtp.py")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- pieces of the above -------------------------------------------------------------------------------------------


def _abstract(settings: ModelSettings) -> dict[str, Any]:
    """The shapes of the model's parameters, by dotted name."""
    from wmtp_jax.model import abstract_parameters, flatten

    return flatten(abstract_parameters(settings)[1])


def _published_tokenizer(path: Path) -> Tokenizer | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    found = path.is_file() or find_model(path) or any((path / name).exists() for name in names)
    return load_tokenizer(path) if found else None


def _check_verifiers() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("an export is verified with torch, which is not installed: pip install 'wmtp[torch]'") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _upload(directory: Path, address: str) -> None:
    """Brings an export to object storage: last the files that make it one, and on a failure nothing."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    last = {name: path for name, path in files.items() if name in ("config.json", "params.json")}
    try:
        s3.upload(address, {name: path for name, path in files.items() if name not in last})
        s3.upload(address, last)
    except BaseException:
        s3.remove(address, files)
        raise


def _sync(directory: Path) -> None:
    """Through to the disk, so that a name never stands for files that are not there."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)
