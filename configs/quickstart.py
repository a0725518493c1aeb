"""A weighted multi-token-prediction model on the standard library's own source, in minutes on a laptop's CPU.

Command:   make quickstart            (or: python -m wmtp_jax.main --config=configs/quickstart.py --workdir=runs/quickstart)
Another:   make quickstart ALGO=baseline-mtp
Hardware:  2 CPU cores, 2 GiB of memory
Time:      about 4.5 minutes on 2 shared cores, the reference included
Expected:  2.18 bits per byte on held-out files (bigram model 2.29)
"""

from ml_collections import ConfigDict

from wmtp_jax.config import check_target, defaults


def get_config(target: str = "local") -> ConfigDict:
    """The same small run on every target."""
    check_target(target)
    c = defaults()
    c.weighting.algorithm = "rho1-tokenskip"
    c.data.sequence_length = 256
    c.data.vocabulary_size = 1024
    c.data.validation_fraction = 0.1  # a smaller share of so few files would be a matter of luck
    c.model.width = 128
    c.model.layers = 2
    c.model.attention_heads = 4
    c.reference.model.width = 128
    c.reference.model.layers = 1
    c.reference.model.attention_heads = 4
    c.reference.steps = 600
    c.critic.trunk_steps = 800
    c.critic.steps = 400
    c.train.batch_size = 2
    c.train.steps = 2400
    c.train.log_every = 20
    c.optimizer.name = "muon"
    c.optimizer.muon_learning_rate = 0.02
    c.optimizer.learning_rate = 0.003
    c.optimizer.schedule = "wsd"
    c.optimizer.decay_fraction = 0.4
    c.optimizer.final_fraction = 0.0
    c.optimizer.warmup_steps = 20
    c.eval.every = 600
    c.eval.batches = 32
    c.checkpoint.every = 600
    return c
