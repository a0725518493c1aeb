"""Scores a data set once, for every later run: of a reference for the rho1 algorithms, loss and entropy; rewards for critic-wmtp.

python -m wmtp_jax.score --config=configs/rho1_tokenskip.py --config.reference.path=runs/reference

The scores are kept beside the tokens, keyed by model, tokenizer and data; a run with the same recipe picks them up and makes
no forward pass of the reference. The same command goes on where it was interrupted.

--self_reference trains the reference on the very data first, for when there is no clean data. Rho-1's appendix (arXiv 2404.07965)
then chooses tokens by the reference alone, its loss, its entropy, or both, and so does a run with

--config.weighting.score=reference_loss | reference_entropy | reference_both --config.reference.path=WORKDIR/reference

where settings.py says how this is read. Without it, tokens are ranked by the excess loss over a model that has seen them.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from wmtp_jax import cli
from wmtp_jax.settings import Configuration


def score(config: Configuration, *, workdir: Path, self_reference: bool = False, device: str | None = None) -> None:
    """Scores what the configuration describes, and prints where the scores lie.

    Args:
      config: of the runs to come; read are the data, the reference, and rewards where it weighs by a critic.
      workdir: where the reference is trained, for `self_reference`.
      self_reference: train the reference first, on this very data, without clean data to train it on.
      device: as in training.

    Raises:
      UserError: something that the user can put right.
    """
    # Imported after the flags have been read, so that --help and a wrong flag answer at once.
    from wmtp_jax.run.scoring import score_data
    from wmtp_jax.run.train import JaxBackend

    score_data(config, JaxBackend, workdir=workdir, self_reference=self_reference, device=device)


def main() -> None:
    values, config = flags.FLAGS, cli.config_from_flags()
    name = cli.recipe_name(values["config"].config_filename)  # pyrefly: ignore[missing-attribute]  # of its flag
    workdir = Path(values.workdir or f"runs/{name}-scores")
    score(config, workdir=workdir, self_reference=values.self_reference, device=values.device)


if __name__ == "__main__":
    cli.define_config_flag()
    flags.DEFINE_string("workdir", None, "With --self_reference: where the reference is trained. By default runs/RECIPE-scores.")
    flags.DEFINE_bool(
        "self_reference",
        False,
        "Train the reference on this very data first (config.reference.model, config.reference.steps), for when there is no "
        "clean data to train one on (arXiv 2404.07965, appendix; config.weighting.score has its choices of tokens).",
    )
    cli.define_device_flag()
    cli.run(main, description=__doc__, required=("config",))
