"""Makes wrong solutions for MBPP: python -m wmtp_jax.data.mutate --input=mbpp/train.jsonl --output=OUT.jsonl.

Every problem's reference solution is changed in one small way at a time (an operator, a constant off by one, another variable,
a statement removed and the like), and of what still parses, those are kept that fail the problem's tests in a sandbox. The
records are written as they are, with the field `incorrect_solutions`, for `python -m wmtp_jax.data.build mbpp --input=...`.
The same seed gives the same solutions, short of what fails by time alone. Problems whose own solution fails are named and left
out.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from wmtp_jax import cli
from wmtp_jax.data.build import check_runs, stop_cleanly
from wmtp_jax.data.mutations import mutants
from wmtp_jax.data.problems import Problem, mbpp
from wmtp_jax.data.records import find_files, read_records
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.sandbox.judging import failure, in_parallel
from wmtp_jax.storage import cache

# Of the mutants of a problem, most fail; where so many don't, no more are tried.
_TRIES = 5


def mutate(
    input_path: Path, output: Path, *, per_problem: int, seed: int, timeout_seconds: float, jobs: int,
    say: Callable[[str], None] = print,
) -> Counter[int]:  # fmt: skip
    """Writes the records of a file of MBPP with wrong solutions.

    Args:
      input_path: JSONL or Parquet.
      output: the file to write; whole, or not at all.
      per_problem: how many wrong solutions each problem gets, at most.
      seed: with the problem's name, decides which.
      timeout_seconds: of the tests of one solution; one that takes longer counts as wrong.
      jobs: solutions run at the same time.
      say: takes lines about what is left out and what is made.

    Returns:
      how many problems have got how many.

    Raises:
      UserError: whatever the user can put right.
    """
    begun = time.monotonic()
    entries: dict[str, dict] = {}

    def problems() -> Iterator[Problem]:
        for path in find_files(input_path, flag="--input"):
            for where, entry in read_records(path):
                problem = mbpp(entry, where)
                if problem.name in entries:
                    raise UserError(f"{where}: {problem.name} a second time; leave one of them out of --input")
                entries[problem.name] = entry
                yield problem

    lines: list[str] = []
    made: Counter[int] = Counter()
    find = functools.partial(wrong_solutions, per_problem=per_problem, seed=seed, timeout_seconds=timeout_seconds)
    for problem, (wrong, reason) in in_parallel(find, problems(), jobs=jobs):
        if reason:
            say(f"left out: {problem.name}: its own solution fails: {reason}")
            continue
        made[len(wrong)] += 1
        lines.append(json.dumps(entries[problem.name] | {"incorrect_solutions": wrong}, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"--input={input_path}: no problem of it is left ({len(entries)} left out)")
    with disk_errors(output.parent, setting="--output"):
        cache.write_file(output, "".join(lines).encode())
    shares = ", ".join(f"{count} with {number}" for number, count in sorted(made.items(), reverse=True))
    total = sum(number * count for number, count in made.items())
    say(f"{len(lines)} problems, {len(entries) - len(lines)} left out; {total} wrong solutions: {shares}")
    say(f"written in {time.monotonic() - begun:.0f} s: {output}")
    return made


def wrong_solutions(
    problem: Problem, *, per_problem: int, seed: int, timeout_seconds: float
) -> tuple[list[str], str]:  # fmt: skip
    """Mutants of a problem's first solution that fail its tests, and why that solution itself fails, "" if it doesn't."""
    reason = failure(problem, problem.solutions[0], timeout_seconds=timeout_seconds)
    if reason:
        return [], reason
    wrong: list[str] = []
    for mutant in itertools.islice(mutants(problem.solutions[0], seed=f"{seed} {problem.name}"), _TRIES * per_problem):
        if failure(problem, mutant, timeout_seconds=timeout_seconds):
            wrong.append(mutant)
        if len(wrong) == per_problem:
            break
    return wrong, ""


def _main() -> None:
    values = flags.FLAGS
    check_runs(values.timeout_seconds, values.jobs)
    if values.per_problem < 1:
        raise UserError(f"--per_problem={values.per_problem}: must be at least 1")
    output = Path(values.output).expanduser().absolute()
    if output.is_dir():
        raise UserError(f"--output={output}: is a directory; name a file in it")
    stop_cleanly()
    mutate(
        Path(values.input).expanduser().absolute(), output, per_problem=values.per_problem, seed=values.seed,
        timeout_seconds=values.timeout_seconds, jobs=values.jobs, say=lambda line: print(line, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    flags.DEFINE_string(
        "input", None, "MBPP as published: JSONL (.jsonl, .jsonl.gz) or Parquet, or a directory of such."
    )
    flags.DEFINE_string("output", None, "The JSONL file to write; what is there is replaced.")
    flags.DEFINE_integer("per_problem", 4, "Wrong solutions of a problem, at most.")
    flags.DEFINE_integer("seed", 0, "Decides which mutations are tried.")
    flags.DEFINE_float("timeout_seconds", 3.0, "Wall time of a solution's tests; a mutant that takes longer is wrong.")
    flags.DEFINE_integer("jobs", os.cpu_count() or 1, "Solutions run at the same time; by default as many as cores.")
    cli.run(_main, description=__doc__, required=("input", "output"))
