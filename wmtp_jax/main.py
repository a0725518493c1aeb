"""Trains what a recipe describes: python -m wmtp_jax.main --config=configs/quickstart.py --workdir=runs/mine"""

from pathlib import Path

from absl import flags

from wmtp_jax import cli


def main() -> None:
    """Flags -> configuration -> `train`."""
    # Imported after the flags have been read, so that --help and a wrong flag answer at once.
    from wmtp_jax.train import train

    values = flags.FLAGS
    config = cli.config_from_flags()
    run_name = values.run_name or f"{cli.recipe_name(values['config'].config_filename)}-{config.weighting.algorithm}"
    train(
        config,
        workdir=Path(values.workdir or f"runs/{run_name}"),
        run_name=run_name,
        tags=cli.parse_tags(values.tags),
        resume=values.resume,
        dry_run=values.dry_run,
        verbose=values.verbose,
        device=values.device,
    )


if __name__ == "__main__":
    cli.define_run_flags()
    cli.run(main, description=__doc__, required=("config",))
