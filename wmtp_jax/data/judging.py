"""Solutions of coding problems run against their tests in the sandbox, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from wmtp_jax.data.problems import Problem
from wmtp_jax.evaluation.sandbox import run_program, run_tests

Item = TypeVar("Item")
Result = TypeVar("Result")


def failure(problem: Problem, solution: str, *, timeout_seconds: float, public: bool = False) -> str:
    """Runs a completion against the problem's tests in the sandbox.

    Args:
      timeout_seconds: wall time of the tests, or of a run on one input.
      public: of inputs, only those shown with the task.

    Returns:
      "" where it passes, else why not, in a few words.

    Raises:
      UserError: this machine can't run the sandbox.
    """
    program = problem.before + solution + ("\n" + problem.after if problem.after else "")
    if problem.tests:
        result = run_tests(program, problem.tests, names=problem.names, timeout_seconds=timeout_seconds)
        return "" if result.status == "passed" else _words(result.status, result.reason, result.stderr)
    count = problem.public if public else len(problem.inputs)
    if not count:
        return "there is nothing to test it with"
    for number, (given, wanted) in enumerate(
        zip(problem.inputs[:count], problem.outputs[:count], strict=True), start=1
    ):
        result = run_program(program, stdin=given, timeout_seconds=timeout_seconds)
        if result.exit_code != 0 or result.status == "timeout":
            return f"input {number}: {_words(result.status, result.reason, result.stderr)}"
        if result.stdout.split() != wanted.split():
            return f"input {number}: wrong output"
    return ""


def _words(status: str, reason: str, stderr: str) -> str:
    last = stderr.strip().rpartition("\n")[2]
    return " ".join(f"{status}: {reason}{f' ({last})' if last and last not in reason else ''}".split())[:200]


def in_parallel(
    function: Callable[[Item], Result], problems: Iterable[Item], *, jobs: int
) -> Iterator[tuple[Item, Result]]:
    """Each problem and what `function` gives for it, in order; so many at a time, and only a few ahead of the caller."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="problems")
    try:
        for problem in problems:
            waiting.append((problem, pool.submit(function, problem)))
            if len(waiting) > 4 * jobs:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
