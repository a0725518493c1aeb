"""Choosing tokens by the reference alone (`weighting.score`), in both backends, against literal float64 loops; and what is read
of the reference, from its own logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as arbiter
import torch
from test_training import SETTINGS, B, H, S, V, make_batch, start, torch_batch, torch_model

import wmtp_jax.train_step as in_jax
import wmtp_torch.train_step as in_torch
from wmtp_jax.model import initial_parameters, nest
from wmtp_jax.settings import Weighting
from wmtp_jax.update import Objective

BOTH = ("reference_loss", "reference_entropy")


def lowest(values, mask, fraction, scope):
    """Of every scope's n valid entries those that are kept: the `ceil(fraction n)` lowest, of equals the first."""
    kept = set()
    for indices in scopes(mask, scope):
        count = -(-round(fraction * 1000) * len(indices) // 1000)
        kept |= set(sorted(indices, key=lambda i: (float(values[i]), i))[:count])
    return kept


def scopes(mask, scope):
    groups: dict[tuple, list] = {}
    for b, s, k in zip(*np.nonzero(mask), strict=True):
        key = {"batch": (), "head": (k,), "sequence": (b,), "position": (b, s)}[scope]
        groups.setdefault(key, []).append((int(b), int(s), int(k)))
    return list(groups.values())


def expected_weights(kept, mask, scope):
    """Mean one in every scope over what is kept; 1 where nothing is."""
    weights = np.zeros(mask.shape)
    for indices in scopes(mask, scope):
        here = [i for i in indices if i in kept]
        for i in here or indices:
            weights[i] = len(indices) / len(here or indices)
    return weights


def weights_of(settings, loss, entropy, mask):
    """Of both backends: the model's own losses are not read, and NaN there would show."""
    found = []
    for module, array in ((in_jax, jnp.asarray), (in_torch, torch.from_numpy)):
        nan = array(np.full(mask.shape, np.nan, np.float32))
        statistics = in_jax.TokenStatistics(nan, nan, nan)
        entries = {"reference_loss": array(loss), "reference_entropy": array(entropy)}
        found.append(np.asarray(module.token_weights(settings, statistics, array(mask), **entries)))
    return found


def scores(seed, decimals):
    """Losses and entropies of `[2, 8, 3]`, in steps of `10^-decimals`, so that many are equal, and a mask with NaN behind it."""
    random = np.random.default_rng(seed)
    loss, entropy = random.gamma(2, 1.5, (2, 2, 8, 3)).round(decimals).astype(np.float32)
    mask = random.random((2, 8, 3)) < 0.8
    loss[~mask], entropy[~mask] = np.nan, -np.inf
    return loss, entropy, mask


@pytest.mark.parametrize("decimals", [0, 5], ids=["ties", "distinct"])
@pytest.mark.parametrize(("fraction", "scope"), [(0.7, "head"), (0.6, "batch"), (0.5, "sequence"), (0.15, "sequence")])
def test_the_lowest_are_kept_by_loss_by_entropy_and_by_both(fraction, scope, decimals):
    loss, entropy, mask = scores(round(10 * fraction), decimals)
    by = {name: lowest(values, mask, fraction, scope) for name, values in zip(BOTH, (loss, entropy), strict=True)}
    by["reference_both"] = by["reference_loss"] & by["reference_entropy"]
    for name, kept in by.items():
        expected = expected_weights(kept, mask, scope)
        for got in weights_of(Weighting("rho1-tokenskip", score=name, fraction=fraction, scope=scope), loss, entropy, mask):
            np.testing.assert_allclose(got, expected, rtol=2e-6, err_msg=name)
    assert by["reference_both"] < by["reference_loss"]


def test_choices_that_share_no_token_weigh_all_alike():
    loss, _, mask = scores(0, 5)
    settings = Weighting("rho1-tokenskip", score="reference_both", fraction=0.4, scope="batch")
    for got in weights_of(settings, loss, -loss, mask):
        np.testing.assert_array_equal(got, mask)


def test_another_form_weighs_by_the_same_scores():
    loss, entropy, mask = scores(3, 5)
    for name, values in zip(BOTH, (loss, entropy), strict=True):
        settings = Weighting("rho1-weighted", score=name, temperature=0.8)
        options = {"temperature": 0.8, "low": 0.1, "high": 3.0, "scope": "head"}
        for got in weights_of(settings, loss, entropy, mask):
            np.testing.assert_allclose(got, arbiter.exponential(-values, mask, **options), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("alignment", ["next_token", "same_prefix"])
def test_what_is_read_of_the_reference_is_of_the_distribution_that_predicts_the_target(alignment):
    """Literal loops over the reference's own logits, and the same from columns that were stored by token."""
    heads = H if alignment == "same_prefix" else 1
    batch, named = make_batch(0), start(7, num_heads=heads)
    objective = Objective(Weighting("rho1-tokenskip", score="reference_both"), alignment)
    definition, _ = initial_parameters(dataclasses.replace(SETTINGS, num_heads=heads), 0)
    model = in_jax.merge(definition, nest(named))
    logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = {name: np.zeros((B, S, H)) for name in BOTH}
    for b, s, k in zip(*np.nonzero(batch["mask"]), strict=True):
        row = log_p[b, s + k, 0] if alignment == "next_token" else log_p[b, s, k]
        expected["reference_loss"][b, s, k] = -row[batch["tokens"][b, s + 1 + k]]
        expected["reference_entropy"][b, s, k] = -sum(np.exp(row[v]) * row[v] for v in range(V))
    found = [
        in_jax.reference_entries(in_jax.Reference(definition, nest(named)), batch, objective),
        in_torch.reference_entries(torch_model(named, heads), torch_batch(batch), objective),
    ]
    if alignment == "next_token":
        columns = {name: np.zeros((B, S), np.float32) for name in BOTH}
        for name in BOTH:
            columns[name][:, 1:] = expected[name][:, :-1, 0]
        found.append(in_jax.reference_entries(None, batch | columns, objective))
        found.append(in_torch.reference_entries(None, torch_batch(batch | columns), objective))
    for entries in found:
        assert entries.keys() == expected.keys()
        for name, values in expected.items():
            got = np.where(batch["mask"], np.asarray(entries[name]), 0)
            np.testing.assert_allclose(got, values, atol=2e-5, err_msg=name)
    # What the score does not read is not given.
    objective = Objective(Weighting("rho1-tokenskip"), alignment)
    assert in_torch.reference_entries(torch_model(named, heads), torch_batch(batch), objective).keys() == {BOTH[0]}
