"""`python -m wmtp_jax.study` with the stand-in for the trainer, and claims that are given up after a second."""

from wmtp_jax.study import claims, jobs, runner

jobs.TRAINERS = dict.fromkeys(jobs.TRAINERS, "tests.study_trainer")
claims.BEAT_SECONDS, claims.DEAD_SECONDS = 0.2, 1.0
runner.POLL_SECONDS, runner.LOOK_SECONDS = 0.02, 0.1

if __name__ == "__main__":
    import runpy

    runpy.run_module("wmtp_jax.study", run_name="__main__")
