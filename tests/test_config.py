"""Every recipe loads and validates for every target, every key is read somewhere, every wrong value is refused by name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from wmtp_jax.config import TARGETS, defaults, freeze
from wmtp_jax.errors import UserError
from wmtp_jax.settings import ALGORITHMS, Configuration, Section
from wmtp_jax.update import Objective

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def check(config: ConfigDict) -> Configuration:
    """As the commands do it."""
    frozen = freeze(config)
    frozen.check_experiment()
    return frozen


def load_recipe(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path, target):
    config = load_recipe(path).get_config(target)
    check(config)
    assert config.is_locked


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_imports_only_the_configuration_and_gives_its_command(path):
    imports = re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
    assert set(imports) <= {"ml_collections", "wmtp_jax.config"}
    assert f"configs/{path.name}" in load_recipe(path).__doc__


def test_recipes_named_for_an_algorithm_use_it():
    named = {path.stem.replace("_", "-"): path for path in RECIPES if path.stem.replace("_", "-") in ALGORITHMS}
    assert {"baseline-mtp", "rho1-weighted", "rho1-tokenskip"} <= named.keys()
    for algorithm, path in named.items():
        assert load_recipe(path).get_config().weighting.algorithm == algorithm


SECTIONS = {kind.__name__: kind for kind in (*Section.__subclasses__(), Objective)}


def section_named(annotation: object) -> type | None:
    """`settings.Critic | None -> Critic`."""
    return SECTIONS.get(str(annotation).removesuffix(" | None").rpartition(".")[2])


@functools.cache
def sections_of(kind: type) -> dict[str, type]:
    """The sections in a section, by the name of their field."""
    return {f.name: section_named(f.type) for f in dataclasses.fields(kind) if section_named(f.type)}


def reads_of(function: ast.AST, known: dict[str, type]) -> set[tuple[str, str]]:
    """Which keys a function reads, as (section, key): of `config.train`, of a name that was given such a section, or of a
    parameter that is one by its annotation; `known` are the names that are sections from the start."""
    known = known | {"config": Configuration}
    found = set()

    def kind_of(node: ast.AST) -> type | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr == "config":
            return Configuration
        kind = kind_of(node.value)
        return sections_of(kind).get(node.attr) if kind else None

    nodes = list(ast.walk(function))
    for node in nodes:
        if isinstance(node, ast.arg) and node.annotation is not None:
            kind = section_named(ast.unparse(node.annotation))
            known |= {node.arg: kind} if kind else {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            tuples = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=True) if tuples else [(target, value)]
            known |= {t.id: kind_of(v) for t, v in pairs if isinstance(t, ast.Name) and kind_of(v)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (kind := kind_of(node.value)):
            found.add((kind.__name__, node.attr))
    return found


def test_every_key_is_read_somewhere():
    """Outside of the checks: by the code that acts on it, or by a property or a method of its section."""
    read = set()
    for path in (*(ROOT / "wmtp_jax").rglob("*.py"), *(ROOT / "wmtp_torch").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        if path == ROOT / "wmtp_jax" / "settings.py":
            for section in (node for node in nodes if isinstance(node, ast.ClassDef) and node.name in SECTIONS):
                for function in (part for part in section.body if isinstance(part, ast.FunctionDef)):
                    if function.name != "__post_init__" and "check" not in function.name:
                        read |= reads_of(function, {"self": SECTIONS[section.name]})
        else:
            for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
                read |= reads_of(function, {})
    declared = {(name, f.name) for name, kind in SECTIONS.items() for f in dataclasses.fields(kind)}
    assert not {f"{section}.{key}" for section, key in declared - read}


def test_unknown_target_is_refused():
    with pytest.raises(UserError, match="local, mps, gpu, vessl"):
        load_recipe(RECIPES[0]).get_config("laptop")


def changed(**changes) -> ConfigDict:
    config = defaults()
    with config.unlocked():
        for key, value in changes.items():
            *sections, leaf = key.split("__")
            section = config
            for name in sections:
                section = section[name]
            with section.ignore_type():
                section[leaf] = value
    return config


WRONG = {
    "data__bos": "sometimes",
    "weighting__algorithm": "rho2",
    "weighting__form": "exponential",  # baseline-mtp has no score
    "weighting__score": "loss",
    "weighting__score ": "reference_loss",  # baseline-mtp asks no reference
    "weighting__scope": "row",
    "weighting__fraction": 0.70005,
    "weighting__temperature": 0.0,
    "weighting__low": 5.0,
    "weighting__coefficients": (1.0,),
    "weighting__coefficients ": ("a", "b"),
    "weighting__coefficients  ": (-1.0, 2.0),
    "data__source_weights ": (float("inf"),),
    "train__seed ": 2**31,
    "weighting__members": ("entropy", "magic"),
    "model__width": 0,
    "model__kv_heads": 3,
    "model__activation": "relu",
    "model__heads__kind": "tree",
    "model__heads__count": 0,
    "model__compute_dtype": "float16",
    "data__sources": (),
    "data__source_weights": (1.0, 2.0),
    "data__validation_fraction": 0.0,
    "data__sequence_length": 4,
    "data__vocabulary_size": 256,
    "train__batch_size": 0,
    "train__accumulation": 3,
    "train__epochs": 1.0,  # and steps
    "train__steps": 0,  # and no epochs
    "train__log_every": 0,
    "train__profile": (3, 2),
    "train__profile ": (0, 2),
    "train__profile  ": (1,),
    "optimizer__name": "sgd",
    "optimizer__schedule": "step",
    "optimizer__learning_rate": -1.0,
    "optimizer__b2": 1.0,
    "eval__stop_metric": "train/loss",
    "eval__batches": 0,
    "checkpoint__best_metric": "eval/ce_head_9",
    "checkpoint__keep_last": 0,
    "checkpoint__wait_seconds": -1.0,
    "train__seed": "zero",
    "optimizer__clip_norm": float("nan"),
    "weighting__surprise": 1,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_by_name_in_one_line(key):
    with pytest.raises(UserError) as caught:
        check(changed(**{key.strip(): WRONG[key]}))
    message = str(caught.value)
    assert key.strip().replace("__", ".") in message and "\n" not in message


def test_scores_by_the_reference_alone_are_checked_against_the_other_keys():
    rho1 = {"reference__steps": 1, "weighting__algorithm": "rho1-weighted"}
    check(changed(weighting__score="reference_entropy", **rho1))
    check(changed(weighting__score="reference_both", weighting__form="top_fraction", **rho1))
    check(changed(weighting__score="reference_both", **rho1 | {"weighting__algorithm": "rho1-tokenskip"}))
    wrong = [
        ("score", {"weighting__score": "reference_both"}),  # of exponential
        ("score", {"weighting__score": "reference_both", "weighting__form": "softmax_over_heads"}),
        ("score", {"weighting__score": "reference_loss", "weighting__algorithm": "gradient"}),
        ("signed", {"weighting__score": "reference_loss", "weighting__signed": False}),
        ("threshold", {"weighting__score": "reference_entropy", "weighting__threshold": 0.5}),
    ]
    for key, changes in wrong:
        with pytest.raises(UserError, match=f"config.weighting.{key} = ") as caught:
            check(changed(**rho1 | changes))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("algorithm", [name for name, needs in ALGORITHMS.items() if needs == "reference"])
def test_an_algorithm_without_its_reference_is_refused(algorithm):
    with pytest.raises(UserError, match="reference.path"):
        check(changed(weighting__algorithm=algorithm))


def test_defaults_are_valid():
    check(defaults())
