"""Rho-1's excess loss as a continuous weight: tokens still harder for the model than for a reference count more.

Command:   python -m wmtp_jax.main --config=configs/rho1_weighted.py:local --workdir=runs/rho1_weighted
Data:      the standard library's source; your own with --config.data.sources="('jsonl:PATH',)" or "('text:PATH/**/*.py',)"
Reference: local and mps train a small one first; gpu and vessl want --config.reference.path=RUN with the same tokenizer
Hardware:  local 2 CPU cores; mps Apple silicon; gpu one 80 GB GPU (1B parameters); vessl 4 x A100/H100 (7B Llama shape)
Time and expected figure: not measured yet on any target
"""

from ml_collections import ConfigDict

from wmtp_jax.config import recipe_defaults


def get_config(target: str = "local") -> ConfigDict:
    """`exponential(excess_loss)` weights."""
    c = recipe_defaults(target)
    c.weighting.algorithm = "rho1-weighted"
    if target in ("gpu", "vessl"):
        c.reference.path = "runs/reference"  # trained on clean data by a run of its own
    return c
