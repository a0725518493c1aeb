"""Baseline: H heads, every (position, head) weighted alike. The other recipes change only the weights.

Command:   python -m wmtp_jax.main --config=configs/baseline_mtp.py:local --workdir=runs/baseline_mtp
Data:      the standard library's source; your own with --config.data.sources="('jsonl:PATH',)" or "('text:PATH/**/*.py',)"
Hardware:  local 2 CPU cores; mps Apple silicon; gpu one 80 GB GPU (1B parameters); vessl 4 x A100/H100 (7B Llama shape)
Time and expected figure: not measured yet on any target
"""

from ml_collections import ConfigDict

from wmtp_jax.config import recipe_defaults


def get_config(target: str = "local") -> ConfigDict:
    """Uniform weights."""
    c = recipe_defaults(target)
    c.weighting.algorithm = "baseline-mtp"
    return c
