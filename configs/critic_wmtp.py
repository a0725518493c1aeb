"""A critic's weights: tokens that change the expected reward of a text count more.

Command:   python -m wmtp_jax.main --config=configs/critic_wmtp.py:local --workdir=runs/critic_wmtp
Stages:    reference (scores the rewards), trunk (baseline-mtp), value (the value head on the frozen trunk), train; each in a
           directory of its own below the run's. One of them alone: --config.critic.stop_after=trunk or =value, and then
           --config.reference.path=RUN/reference --config.critic.trunk=RUN/trunk --config.critic.head=RUN/value
Rewards:   the mean log-likelihood of a text under the reference; labels of your own data with --config.reward.source=unit_tests,
           a function of your own with --config.reward.source=reward_model --config.reward.model=MODULE:FUNCTION
Data:      the standard library's source; see README.md for problems with right and wrong solutions
Hardware:  local 2 CPU cores; mps Apple silicon; gpu one 80 GB GPU (1B parameters); vessl 4 x A100/H100 (7B Llama shape);
           gpu and vessl want --config.reference.path=RUN and --config.critic.trunk=RUN with the same tokenizer
Time and expected figure: not measured yet on any target
"""

from ml_collections import ConfigDict

from wmtp_jax.config import recipe_defaults


def get_config(target: str = "local") -> ConfigDict:
    """`exponential(value_change)` weights."""
    c = recipe_defaults(target)
    c.weighting.algorithm = "critic-wmtp"
    if target in ("gpu", "vessl"):
        c.reference.path = "runs/reference"  # trained on clean data by a run of its own
        c.critic.trunk = "runs/trunk"  # configs/baseline_mtp.py with the same target
        c.critic.steps = 2000
    return c
