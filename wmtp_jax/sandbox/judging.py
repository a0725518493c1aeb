"""Solutions of coding problems run against their tests in the sandbox, several at a time."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from wmtp_jax.sandbox.sandbox import run_program, run_tests

Item = TypeVar("Item")
Result = TypeVar("Result")

_SEPARATORS = re.compile(rb"[ \n\t\r\v]+")
_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:inf|infinity|nan)")
_TOLERANCE = 1e-5
OUTPUT_RULE = f"tokens without case, numbers within {_TOLERANCE}"  # What results say of `same_output`.


def same_output(output: str, expected: str) -> bool:
    """Says whether a program's standard output answers a CodeContests input, as the data set's own matcher does.

    Both must have the same number of tokens. Two tokens match if they are equal, the case of ASCII letters apart, or if
    both are decimal numbers and |a - b| < 1e-5. That is an absolute difference, in float64, whatever the size of the
    numbers: 100000.1 is not 100000.2, and integers beyond 2**53 match where float64 can't tell them apart.

    Source: `OutputsMatch` and `ValuesMatch` in execution/tester_sandboxer.cc, github.com/google-deepmind/code_contests.
    """
    printed, wanted = _tokens(output), _tokens(expected)
    if printed == wanted:
        return True
    if len(printed) != len(wanted):
        return False
    return all(_same_token(a, b) for a, b in zip(printed, wanted, strict=True))


def _tokens(text: str) -> list[bytes]:
    # As bytes, whose `lower` leaves all but ASCII letters alone.
    return [token for token in _SEPARATORS.split(text.encode("utf-8", "surrogatepass").lower()) if token]


def _same_token(a: bytes, b: bytes) -> bool:
    x, y = _number(a), _number(b)
    if x is None or y is None:
        return a == b
    return abs(x - y) < _TOLERANCE


def _number(token: bytes) -> float | None:
    """The number that a whole token spells; None where it is none."""
    text = token.strip()  # A form feed is no separator, but may surround a number.
    return float(text) if _NUMBER.fullmatch(text) else None


class Problem(Protocol):
    """What is read of a problem, see `wmtp_jax.data.problems.Problem`."""

    @property
    def before(self) -> str: ...

    @property
    def after(self) -> str: ...

    @property
    def tests(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def public(self) -> int: ...


def failure(problem: Problem, solution: str, *, timeout_seconds: float, public: bool = False) -> str:
    """Runs a completion against the problem's tests in the sandbox.

    A program that reads stdin passes an input if it exits with code 0 and prints what `same_output` accepts.

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
        result = run_program(program, stdin=given, timeout_seconds=timeout_seconds, prove_end=False)
        if result.status != "passed":
            return f"input {number}: {_words(result.status, result.reason, result.stderr)}"
        if not same_output(result.stdout, wanted):
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
