"""Trains what a recipe describes: python -m wmtp_jax.main --config=configs/quickstart.py --workdir=runs/mine"""

from wmtp_jax import cli


def main() -> None:
    """Flags -> configuration -> `train`."""
    # Imported after the flags have been read, so that --help and a wrong flag answer at once.
    from wmtp_jax.run.train import train

    train(**cli.train_options())


if __name__ == "__main__":
    cli.define_run_flags()
    cli.run(main, description=__doc__, required=("config",))
