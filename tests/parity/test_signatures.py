"""Both backends offer the same functions: names, order, signatures, docstrings."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

MODULES = ["weighting", "losses"]


def public(package, module_name):
    """Name -> object, in the order of definition, of what the module itself defines."""
    module = importlib.import_module(f"{package}.{module_name}")
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("module", MODULES)
def test_same_names_in_the_same_order(module):
    names = list(public("wmtp_jax", module))
    assert names
    assert list(public("wmtp_torch", module)) == names


@pytest.mark.parametrize("module", MODULES)
def test_same_signatures(module):
    mirror = public("wmtp_torch", module)
    for name, value in public("wmtp_jax", module).items():
        # As written: `Array` is each backend's own array, and annotations are strings.
        assert str(inspect.signature(mirror[name])) == str(inspect.signature(value)), name


@pytest.mark.parametrize("module", MODULES)
def test_same_docstrings(module):
    mirror = public("wmtp_torch", module)
    for name, value in public("wmtp_jax", module).items():
        assert inspect.getdoc(value), name
        assert inspect.getdoc(mirror[name]) == inspect.getdoc(value), name


@pytest.mark.parametrize("package", ["wmtp_jax", "wmtp_torch"])
def test_weighting_docstrings_say_what_a_reader_needs(package):
    """The module's head says what holds for all functions: arrays by their names, `scope`, errors. Each says the rest."""
    head = importlib.import_module(f"{package}.weighting").__doc__
    for name, value in public(package, "weighting").items():
        doc = inspect.getdoc(value)
        for parameter in inspect.signature(value).parameters:
            explained = re.search(rf"^  (\w+, )*{parameter}(, \w+)*: ", doc, re.MULTILINE)
            assert explained or f"`{parameter}`" in head, f"{name}: {parameter} is not explained"


def test_weighting_takes_arrays_by_position_and_hyperparameters_by_name():
    for name, value in public("wmtp_jax", "weighting").items():
        for parameter in inspect.signature(value).parameters.values():
            is_array = parameter.annotation == "Array"
            assert is_array == (parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD), f"{name}: {parameter}"


def test_weighting_offers_the_contract():
    assert list(public("wmtp_jax", "weighting")) == [
        "align_to_heads",
        "excess_loss",
        "value_change",
        "td_error",
        "generalized_advantage",
        "token_advantage",
        "group_advantage",
        "logit_gradient_norm",
        "uniform",
        "softmax_over_heads",
        "exponential",
        "top_fraction",
        "confidence",
        "focal",
        "entropy",
        "head_decay",
        "combine",
        "permute",
        "normalize",
        "effective_sample_fraction",
        "weight_entropy",
    ]
