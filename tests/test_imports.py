"""Which modules do without which libraries, in processes of their own with a finder that refuses to import them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT_JAX = [
    "wmtp_jax.algorithms",
    "wmtp_jax.checkpoint.parameters",
    "wmtp_jax.checkpoint.run_directory",
    "wmtp_jax.checks",
    "wmtp_jax.cli",
    "wmtp_jax.config",
    "wmtp_jax.config_checks",
    "wmtp_jax.data.bigram",
    "wmtp_jax.data.build",
    "wmtp_jax.data.corpus",
    "wmtp_jax.data.mutate",
    "wmtp_jax.data.pipeline",
    "wmtp_jax.data.problems",
    "wmtp_jax.data.targets",
    "wmtp_jax.data.tfds_builders",
    "wmtp_jax.errors",
    "wmtp_jax.evaluate",
    "wmtp_jax.evaluation.coding",
    "wmtp_jax.evaluation.judging",
    "wmtp_jax.evaluation.metrics",
    "wmtp_jax.evaluation.pass_at_k",
    "wmtp_jax.evaluation.results",
    "wmtp_jax.sandbox.sandbox",
    "wmtp_jax.evaluation.tasks",
    "wmtp_jax.evaluation.token_kinds",
    "wmtp_jax.evaluation.windows",
    "wmtp_jax.checkpoint.mirror",
    "wmtp_jax.parallel.peaks",
    "wmtp_jax.planning.flops",
    "wmtp_jax.pretrained",
    "wmtp_jax.update",
    "wmtp_jax.backends",
    "wmtp_jax.report.__main__",
    "wmtp_jax.report.content",
    "wmtp_jax.report.curves",
    "wmtp_jax.report.figures",
    "wmtp_jax.report.page",
    "wmtp_jax.run.compatible",
    "wmtp_jax.run.experiment",
    "wmtp_jax.run.inputs",
    "wmtp_jax.run.loop",
    "wmtp_jax.run.progress",
    "wmtp_jax.run.scoring",
    "wmtp_jax.run.stage",
    "wmtp_jax.run.stage_ends",
    "wmtp_jax.run.summary",
    "wmtp_jax.run.unpacking",
    "wmtp_jax.sandbox.judging",
    "wmtp_jax.sandbox.sandbox",
    "wmtp_jax.score",
    "wmtp_jax.settings",
    "wmtp_jax.storage.hub",
    "wmtp_jax.stored.reference_losses",
    "wmtp_jax.stored.rewards",
    "wmtp_jax.tokenizer.tokenizer",
    "wmtp_jax.tracking.__main__",
    "wmtp_jax.tracking.metrics_file",
    "wmtp_jax.tracking.tracker",
    "wmtp_jax.trainable",
    "wmtp_torch.checkpoint",
    "wmtp_torch.losses",
    "wmtp_torch.main",
    "wmtp_torch.model",
    "wmtp_torch.optimizer",
    "wmtp_torch.schedule",
    "wmtp_torch.step_directories",
    "wmtp_torch.train",
    "wmtp_torch.train_step",
    "wmtp_torch.weighting",
]
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
