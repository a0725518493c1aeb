"""Which modules do without which libraries, in processes of their own with a finder that refuses to import them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT_JAX = [
    "wmtp_jax.cli", "wmtp_jax.compatible", "wmtp_jax.config", "wmtp_jax.experiment", "wmtp_jax.loop", "wmtp_jax.rewards",
    "wmtp_jax.stages", "wmtp_jax.stage", "wmtp_jax.stage_ends", "wmtp_jax.config_checks", "wmtp_jax.metrics_file",
    "wmtp_jax.parameters_file", "wmtp_jax.flops", "wmtp_jax.evaluation.metrics", "wmtp_jax.data.bigram",
    "wmtp_jax.data.build", "wmtp_jax.data.mutate", "wmtp_jax.data.judging", "wmtp_jax.data.problems",
    "wmtp_jax.data.tfds_builders", "wmtp_jax.schedule", "wmtp_jax.step_directories", "wmtp_jax.algorithms",
    "wmtp_jax.records", "wmtp_jax.checks", "wmtp_jax.origins", "wmtp_jax.trainable",
    "wmtp_jax.scores", "wmtp_jax.scoring", "wmtp_jax.score",
    "wmtp_jax.data.corpus", "wmtp_jax.data.pipeline",
    "wmtp_jax.data.targets", "wmtp_jax.data.tokenizer", "wmtp_jax.errors", "wmtp_jax.evaluation.pass_at_k",
    "wmtp_jax.evaluation.sandbox", "wmtp_jax.evaluation.tasks", "wmtp_jax.evaluation.results",
    "wmtp_jax.evaluation.coding", "wmtp_jax.evaluation.token_kinds", "wmtp_jax.evaluation.windows", "wmtp_jax.evaluate",
    "wmtp_jax.hub", "wmtp_jax.pretrained", "wmtp_jax.progress", "wmtp_jax.report.curves",
    "wmtp_jax.report.__main__", "wmtp_jax.report.content", "wmtp_jax.report.figures", "wmtp_jax.report.page",
    "wmtp_jax.run_directory", "wmtp_jax.settings", "wmtp_jax.summary", "wmtp_jax.tracking",
    "wmtp_torch.checkpoint", "wmtp_torch.losses", "wmtp_torch.main", "wmtp_torch.model",
    "wmtp_torch.optimizer", "wmtp_torch.train", "wmtp_torch.train_step", "wmtp_torch.weighting",
]  # fmt: skip
METHOD = ["wmtp_jax.model", "wmtp_jax.losses", "wmtp_jax.weighting", "wmtp_jax.train_step"]
BLOCK = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("refused: " + name)

sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & set({blocked!r}), loaded & set({blocked!r})
"""


def import_without(modules: list[str], blocked: list[str]) -> subprocess.CompletedProcess:
    code = BLOCK.format(modules=modules, blocked=blocked)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_shared_modules_and_the_torch_backend_do_without_jax():
    done = import_without(WITHOUT_JAX, ["jax", "jaxlib", "flax", "optax", "orbax"])
    assert done.returncode == 0, done.stderr


def test_the_method_needs_only_jax_flax_optax_and_numpy():
    blocked = ["absl_flags", "grain", "ml_collections", "mlflow", "tokenizers", "torch", "transformers"]
    done = import_without(METHOD, blocked)
    assert done.returncode == 0, done.stderr


def test_the_finder_refuses():
    assert "refused: jax" in import_without(["wmtp_jax.weighting"], ["jax"]).stderr
