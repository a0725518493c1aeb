"""Trains what a recipe describes: python -m wmtp_torch.main --config=configs/quickstart.py --workdir=runs/mine"""

from wmtp_jax import cli


def main() -> None:
    """Flags -> configuration -> one experiment."""
    # Imported after the flags have been read, so that --help and a wrong flag answer at once.
    from wmtp_jax.run.experiment import run_experiment
    from wmtp_torch.train import TorchBackend

    config, options = cli.run_options()
    run_experiment(config, options, TorchBackend)


if __name__ == "__main__":
    cli.define_run_flags()
    cli.run(main, description=__doc__, required=("config",))
