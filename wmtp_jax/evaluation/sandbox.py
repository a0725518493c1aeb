"""The sandbox by the name that evaluations know it by; it is a package of its own, since data are judged in it, too."""

from wmtp_jax.sandbox.sandbox import ProgramResult, run_program, run_tests

__all__ = ["ProgramResult", "run_program", "run_tests"]
