"""Rho-1's selection (arXiv 2404.07965): the 30% of tokens with the lowest excess loss over a reference are dropped.

Command:   python -m wmtp_jax.main --config=configs/rho1_tokenskip.py:local --workdir=runs/rho1_tokenskip
Data:      the standard library's source; your own with --config.data.sources="('jsonl:PATH',)" or "('text:PATH/**/*.py',)"
Reference: local and mps train a small one first; gpu and vessl want --config.reference.path=RUN with the same tokenizer
Without clean data for one: python -m wmtp_jax.score --self_reference, then --config.weighting.score=reference_both
Hardware:  local 2 CPU cores; mps Apple silicon; gpu one 80 GB GPU (1B parameters); vessl 4 x A100/H100 (7B Llama shape)
Time and expected figure: not measured yet on any target
"""

from ml_collections import ConfigDict

from wmtp_jax.config import recipe_defaults


def get_config(target: str = "local") -> ConfigDict:
    """`top_fraction(excess_loss, fraction=0.7)` weights."""
    c = recipe_defaults(target)
    c.weighting.algorithm = "rho1-tokenskip"
    if target in ("gpu", "vessl"):
        c.reference.path = "runs/reference"  # trained on clean data by a run of its own
    return c
