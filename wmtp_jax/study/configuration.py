"""A recipe with a study's overrides: read, checked, written as flags. The one module of a study that knows the tree of keys."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from wmtp_jax.checkpoint.parameters import FILE, read_metadata
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.config import freeze
from wmtp_jax.errors import UserError
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.pretrained.locating import is_published
from wmtp_jax.run.inputs import base_settings, open_base
from wmtp_jax.settings import Configuration, ModelSettings, flatten

# What says where a run lies, how often it tells and what it keeps, and changes no figure of it.
FREE_KEYS = ("checkpoint.", "tracking.", "data.cache_dir", "data.prefetch", "train.log_every")


def load_module(path: str, *, flag: str) -> ModuleType:
    """A Python file of the configuration, by its path.

    Raises:
      UserError: there is none, or it can't be run; names the flag or key that gave it.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag}={path}: no such file")
    name = "_".join(Path(path).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{flag}={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"{flag}={path}: {type(error).__name__}: {error}") from error
    return module


def read_recipe(recipe: str) -> ConfigDict:
    """The tree of `configs/NAME.py[:TARGET]`.

    Raises:
      UserError: there is no such recipe or target.
    """
    path, _, target = recipe.partition(":")
    module = load_module(path, flag="recipe")
    if not hasattr(module, "get_config"):
        raise UserError(f"recipe={path}: has no get_config")
    return module.get_config(target) if target else module.get_config()


def with_overrides(recipe: ConfigDict, overrides: Mapping[str, Any], *, owner: str) -> Configuration:
    """The configuration of a run.

    Args:
      recipe: its tree.
      overrides: dotted key, without `config.`, -> value.
      owner: what the message begins with: the arm that they belong to.

    Raises:
      UserError: a key that the tree does not have, or a value that it can't have.
    """
    changed = ConfigDict(recipe.to_dict())
    for key, value in overrides.items():
        if key not in known_keys():
            near = difflib.get_close_matches(key, known_keys(), 1)
            hint = f"; did you mean {near[0]}?" if near else " (wmtp_jax/settings.py lists them)"
            raise UserError(f"{owner}: config.{key}: no such key{hint}")
        *sections, leaf = key.split(".")
        section = changed
        for name in sections:
            section = section[name]
        with section.ignore_type():  # a wrong type is refused below, with what the key must be
            section[leaf] = value
    try:
        frozen = freeze(changed)
        frozen.check_experiment()
    except UserError as error:
        raise UserError(f"{owner}: {error}") from error
    return frozen


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every key of the configuration."""
    return tuple(key for key, _ in flatten(Configuration()))


def decisive(config: Configuration) -> dict[str, Any]:
    """The keys that decide a run's figures, the seed left out, as JSON values."""
    keys = flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    return {key: value for key, value in keys if not key.startswith(FREE_KEYS) and key != "train.seed"}


def plain(value: Any) -> Any:
    """A value of a key as JSON has it: tuples are lists."""
    return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def flags(overrides: Mapping[str, Any]) -> list[str]:
    """The overrides as flags of the trainer."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def metric_names(config: Configuration) -> tuple[str, ...]:
    """The metrics that an evaluation of such a run writes, without their prefix."""
    return ("bits_per_byte", "ce_mean", *(f"ce_head_{k}" for k in range(config.model.heads.count)))


def start_of(config: Configuration) -> str:
    """What a run's model starts from, in words."""
    if config.weighting.needs_values and config.critic.trunk:
        return config.critic.trunk
    if config.weighting.needs_values and config.critic.trunk_steps:
        return "a trunk of its own (critic.trunk_steps)"
    return config.pretrained.path or "random weights"


def is_weighted(config: Configuration) -> bool:
    """Whether it matters for a run which tokens its weights fall on, so that the same weights elsewhere are a control of it."""
    weighting = config.weighting
    uniform = weighting.algorithm in ("baseline-mtp", "random") or getattr(weighting, "strength", 1.0) == 0
    return not uniform and not weighting.permute


def model_of(config: Configuration, vocabulary_size: int) -> ModelSettings:
    """The model of a run: its configuration's, or that of the published weights that it starts from."""
    path = config.pretrained.path
    if path and not path.startswith("shared:") and is_published(path):
        base = open_base(config)
        assert base is not None
        return base_settings(base, config)
    return config.model.resolve(vocabulary_size, config.data.sequence_length)


def reference_model_of(config: Configuration, vocabulary_size: int) -> ModelSettings:
    """The model of a run's reference: of a run of its own, of another one, or published."""
    path = config.reference.path
    if not path:
        return config.reference.model.resolve(vocabulary_size, config.data.sequence_length)
    if is_published(path):
        return open_pretrained(path).settings
    return ModelSettings(**read_metadata(find_checkpoint(path) / FILE)["model"])
