"""The recipes on the published 135M Llama, as a user runs them but for fewer and shorter steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = (
    "--config.data.sequence_length=128", "--config.train.steps=2", "--config.train.log_every=1", "--config.eval.batches=1",
    "--config.eval.token_rows=1", "--config.eval.completion_tokens=4", "--config.critic.steps=2", "--config.critic.eval_every=1",
    "--config.critic.allow_unexplained=True",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """HumanEval built from its package; tokens and scores in a cache that the four runs share."""
    home = tmp_path_factory.mktemp("recipes")
    environment = os.environ | {"TFDS_DATA_DIR": str(home / "tfds"), "XDG_CACHE_HOME": str(home / "cache")}
    _run(["-m", "wmtp_jax.data.build", "humaneval"], environment)
    return environment


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "fraction"),
    [
        ("smollm2_baseline_mtp", (1, 1)),
        ("smollm2_rho1_tokenskip", (0.69, 0.72)),  # 0.7 of each head's entries, rounded up
        ("smollm2_rho1_weighted", (0.2, 0.99)),
        ("smollm2_critic_wmtp", (0.2, 0.99)),
    ],
)
def test_a_recipe_trains_new_heads_on_the_frozen_published_model(recipe, fraction, environment, tmp_path):
    workdir = tmp_path / "run"
    _run(["-m", "wmtp_jax.main", f"--config=configs/{recipe}.py:local", f"--workdir={workdir}", *SHORT], environment)
    summary = json.loads((workdir / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    # Head 0 is the published model, which two updates of other heads leave as it is, to the bit; these learn.
    assert after["eval/ce_head_0"] == before["eval/ce_head_0"] < 2.5
    for head in (1, 2, 3):
        assert after[f"eval/ce_head_{head}"] < before[f"eval/ce_head_{head}"] - 0.05
    assert summary["skipped"] == 0
    assert fraction[0] <= after["train/effective_sample_fraction"] <= fraction[1]
    assert (workdir / "value").is_dir() == (recipe == "smollm2_critic_wmtp")
