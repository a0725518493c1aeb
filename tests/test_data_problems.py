"""Coding problems as published to one form, their verdicts in the sandbox, and wrong solutions made from right ones."""

import ast
import difflib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp_jax.data.mutate import mutate, wrong_solutions
from wmtp_jax.data.mutations import mutants
from wmtp_jax.data.problems import Problem, code_contests, documents, humaneval, mbpp
from wmtp_jax.data.records import find_files, read_records, split_of
from wmtp_jax.errors import UserError
from wmtp_jax.sandbox.judging import failure, in_parallel

MBPP = {
    "task_id": 601,
    "text": "Write a function to add up the positive numbers.\r\n",
    "code": "def total(numbers):\r\n\tresult = 0\r\n\tfor number in numbers:\r\n\t\tif number > 0:\r\n"
    "\t\t\tresult += number\r\n\treturn result",
    "test_list": ["assert total([1, -2, 3]) == 4", "assert total([]) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'def half(x: int) -> int:\n    return x // 2\n\n\ndef quarter(x: int) -> int:\n    """ A quarter.\n    """\n',
    "canonical_solution": "    return half(half(x))\n",
    "test": "def check(candidate):\n    assert candidate(8) == half(4)\n    assert candidate(3) == 0\n",
    "entry_point": "quarter",
}
CONTEST = {
    "name": "1_A. Sum",
    "description": "Print the sum of two numbers.",
    "public_tests": {"input": ["1 2\n", "3 4\n"], "output": ["3\n", "7\n"]},
    "private_tests": {"input": ["0 0\n"], "output": ["0\n"]},
    "generated_tests": {"input": [], "output": []},
    "solutions": {
        "language": [3, 2, 3, 1],
        "solution": [
            "print(sum(map(int, input().split())))", "int main() {}",
            "a, b = map(int, input().split())\r\nprint(a + b)", "print 1",
        ],
    },
    "incorrect_solutions": {"language": [3, 4], "solution": ["print(3)", "class Main {}"]},
}  # fmt: skip


def test_mbpp_is_a_docstring_of_task_and_asserts_and_then_the_code():
    problem = mbpp(MBPP | {"incorrect_solutions": ["def total(numbers):\r\n\treturn 0"]}, "F:1")
    assert problem.name == "mbpp/601" and problem.names == ("total",)
    assert problem.prompt == (
        '"""\nWrite a function to add up the positive numbers.\n'
        'assert total([1, -2, 3]) == 4\nassert total([]) == 0\n"""\n'
    )
    assert problem.solutions[0].startswith("def total(numbers):\n\tresult = 0\n") and "\r" not in problem.solutions[0]
    right, wrong = documents(problem, side="train")
    assert [part.target for part in right.parts] == [False, True] and right.text == problem.prompt + problem.solutions[
        0
    ]
    assert (right.label, wrong.label) == (True, False) and right.identity == wrong.identity == "mbpp/601"
    assert wrong.text == problem.prompt + "def total(numbers):\n\treturn 0\n" and wrong.side == "train"


def test_right_and_wrong_take_turns():
    problem = Problem("p", "", solutions=("a", "b"), incorrect_solutions=("1", "2", "3"))
    assert [document.text for document in documents(problem)] == ["a", "1", "b", "2", "3"]
    problem = Problem("p", "", solutions=("a", "b", "c"), incorrect_solutions=("1",))
    assert [document.text for document in documents(problem)] == ["a", "1", "b", "c"]


def test_tests_take_names_that_hide_builtins_only_where_the_solution_defines_them():
    entry = MBPP | {"code": "def sum(a, b): return a - b", "test_list": ["assert sum(3, max(1, 0)) == 2"]}
    problem = mbpp(entry, "F:1")
    assert problem.names == ("sum",)
    assert failure(problem, problem.solutions[0], timeout_seconds=10) == ""
    assert "AssertionError" in failure(problem, "def sum(a, b): return a", timeout_seconds=10)


def test_set_up_code_uses_the_solutions_own_classes():
    entry = MBPP | {
        "code": "class Node:\n  left = None\ndef depth(node):\n  return 0 if node is None else 1 + depth(node.left)",
        "test_setup_code": "root = Node()\r\nroot.left = Node()",
        "test_list": ["assert depth(root) == 2"],
    }
    problem = mbpp(entry, "F:1")
    assert problem.names == ("depth", "root") and failure(problem, problem.solutions[0], timeout_seconds=10) == ""


def test_humaneval_goes_on_from_its_own_prompt_with_its_helpers():
    problem = humaneval(HUMANEVAL, "F:1")
    assert problem.prompt == HUMANEVAL["prompt"] == problem.before and problem.names == ("half", "quarter")
    assert failure(problem, problem.solutions[0], timeout_seconds=10) == ""
    assert failure(problem, "    return x\n", timeout_seconds=10) != ""
    assert failure(problem, "    while True: pass\n", timeout_seconds=1).startswith("timeout")


def test_contests_keep_python_and_compare_what_is_printed():
    problem = code_contests(CONTEST, "F: row 1")
    assert problem.solutions == (
        "print(sum(map(int, input().split())))\n",
        "a, b = map(int, input().split())\nprint(a + b)\n",
    )
    assert problem.incorrect_solutions == ("print(3)\n",) and problem.public == 2 and len(problem.inputs) == 3
    assert [failure(problem, one, timeout_seconds=10) for one in problem.solutions] == ["", ""]
    assert failure(problem, "print(3)\n", timeout_seconds=10) == "input 2: wrong output"
    only_public = "a, b = map(int, input().split())\nprint('  ', a + b or 'none')\nexit(0)"
    assert failure(problem, only_public, timeout_seconds=10, public=True) == ""
    assert failure(problem, only_public, timeout_seconds=10) == "input 3: wrong output"
    assert "ZeroDivisionError" in failure(problem, "1 / 0", timeout_seconds=10)
    bare = code_contests(CONTEST | {"public_tests": {"input": [], "output": []}}, "F: row 1")
    assert failure(bare, "print(3)", timeout_seconds=10, public=True) == "there is nothing to test it with"


@pytest.mark.parametrize(
    ("read", "entry", "message"),
    [
        (mbpp, {"text": "x"}, "the field `task_id` is null, not a number: is this MBPP?"),
        (mbpp, MBPP | {"code": 3}, "the field `code` is a number, not a string"),
        (mbpp, MBPP | {"test_list": "assert x"}, "the field `test_list` is a string, not a list"),
        (mbpp, MBPP | {"test_list": []}, "the field `test_list` is empty"),
        (mbpp, MBPP | {"test_list": ["a", None]}, "the field `test_list[1]` is null, not a string"),
        (mbpp, MBPP | {"incorrect_solutions": 3}, "the field `incorrect_solutions` is a number"),
        (humaneval, MBPP, "the object has no field `prompt`"),
        (code_contests, MBPP, "the field `public_tests` is null, not an object of lists: is this CodeContests?"),
        (
            code_contests,
            CONTEST | {"solutions": {"solution": ["x"]}},
            "`solutions` needs as many entries in `language`",
        ),
    ],
)
def test_an_object_of_another_kind_is_named(read, entry, message):
    with pytest.raises(UserError) as caught:
        read(entry, "F:9")
    assert str(caught.value).startswith("F:9: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_problems_come_back_in_order_and_few_are_taken_ahead():
    taken = []

    def source():
        for number in range(40):
            taken.append(number)
            yield Problem(str(number), "", ())

    results = in_parallel(lambda problem: int(problem.name) * 2, source(), jobs=2)
    for number, (problem, doubled) in enumerate(results):
        assert problem.name == str(number) and doubled == 2 * number and len(taken) <= number + 10
    assert number == 39


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00039-e991a271.parquet", "train"),
        ("valid-00000-of-00001.parquet", "validation"),
        ("mbpp_validation.jsonl.gz", "validation"),
        ("HumanEval.jsonl.gz", ""),
        ("retrained.jsonl", ""),
        ("contest.jsonl", ""),
        ("prompt.jsonl", "prompt"),
    ],
)
def test_names_of_files_say_which_split(name, split):
    assert split_of(Path(name)) == split


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="a.parquet: not a Parquet file that can be read"):
        list(read_records(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="a.jsonl.gz: not a gzip file"):
        list(read_records(tmp_path / "a.jsonl.gz"))
    with pytest.raises(UserError, match=r"--input=.*a.json: its name must end in .jsonl, .jsonl.gz, .parquet"):
        find_files(tmp_path / "a.json", flag="--input")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--input=.*empty: no file there whose name ends in"):
        find_files(tmp_path / "empty", flag="--input")


# ---- mutations -------------------------------------------------------------------------------------------------------

SOURCE = '''import math
def f(first, second, flag=True):
  """A docstring stays."""
  low, high = min(first, second), 10
  while low <  high and not flag:  # comments stay
    low += (2)*first -second
    if low in range(first):
      continue
  é = "naïve" if flag else f"{first + 1}"
  return pow(low, high)
'''


def test_mutants_are_single_edits_that_parse_and_differ():
    found = list(mutants(SOURCE, seed="0"))
    assert len(found) == len(set(found)) > 60
    for mutant in found:
        assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(SOURCE))
        changed = [line for line in difflib.ndiff(SOURCE.splitlines(), mutant.splitlines()) if line[0] in "+-"]
        assert len(changed) <= 2 and "A docstring stays." in mutant
        assert 'f"{first + 1}"' in mutant or changed[0].startswith("-   é =") and len(changed) == 1
    expected = [
        ("low <  high", "low <=  high"), ("low <  high", "low >  high"), (" and ", " or "), ("not flag", "flag"),
        ("low += (", "low -= ("), ("(2)*", "(2)+"), ("first -second", "first +second"), ("(2)", "(3)"), (" in ", " not in "),
        ("range(first)", "range(first - 1)"), ("min(", "max("), ("min(first, second)", "min(second, first)"),
        ("=True", "=False"), ("if flag else", "if not flag else"), ("      continue\n", ""), ("pow(low, high)", "pow(low, flag)"),
        ("  low, high = min(first, second), 10\n", ""), ("10", "11"), ("10", "9"), ("pow(low, high)", "pow(high, low)"),
        ("(2)*first -second", "second -(2)*first"),
    ]  # fmt: skip
    missing = [pair for pair in expected if not any(SOURCE.replace(*pair, 1) == mutant for mutant in found)]
    assert missing == [("      continue\n", "")], "a block keeps its only statement"


def test_the_seed_decides_and_kinds_take_turns():
    first = list(mutants(SOURCE, seed="0"))
    assert first == list(mutants(SOURCE, seed="0")) and first != list(mutants(SOURCE, seed="1"))
    assert sorted(first) == sorted(mutants(SOURCE, seed="1"))
    program = f"from wmtp_jax.data.mutations import mutants; print(list(mutants({SOURCE!r}, seed='0')))"
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        assert ast.literal_eval(run.stdout) == first
    assert list(mutants("def f(:", seed="0")) == [] == list(mutants("pass", seed="0"))


def test_wrong_solutions_fail_the_tests_and_right_ones_are_not_among_them():
    problem = mbpp(MBPP, "F:1")
    wrong, reason = wrong_solutions(problem, per_problem=6, seed=0, timeout_seconds=3)
    assert reason == "" and len(wrong) == 6
    for source in wrong:
        namespace = {}
        exec(source, namespace)  # ours, and known to end
        with pytest.raises(Exception):  # noqa: B017 whatever it is that they fail with
            exec(problem.tests, namespace)
    # Positive or not negative makes no difference to a sum: among the mutants, not among the wrong ones.
    harmless = problem.solutions[0].replace("number > 0", "number >= 0")
    assert harmless in set(mutants(problem.solutions[0], seed="0 mbpp/601")) - set(wrong)
    assert wrong_solutions(problem, per_problem=6, seed=0, timeout_seconds=3) == (wrong, "")


def test_the_command_writes_records_with_wrong_solutions(tmp_path):
    broken = MBPP | {"task_id": 602, "code": "def total(numbers):\n    return 1"}
    few = MBPP | {"task_id": 603, "code": "def total(x): return sum(max(i, 0) for i in x)"}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in (MBPP, broken, few)))
    run = [
        sys.executable,
        "-m",
        "wmtp_jax.data.mutate",
        f"--input={tmp_path}/train.jsonl",
        f"--output={tmp_path}/out/train.jsonl",
    ]
    done = subprocess.run([*run, "--per_problem=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("left out: mbpp/602: its own solution fails: failed: ") and "AssertionError" in lines[0]
    assert lines[1] == "2 problems, 1 left out; 4 wrong solutions: 2 with 2"
    entries = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [entry["task_id"] for entry in entries] == [601, 603]
    assert all(len(entry.pop("incorrect_solutions")) == 2 for entry in entries) and entries == [MBPP, few]
    for flags, message in (
        (["--per_problem=0"], "error: --per_problem=0: must be at least 1\n"),
        (["--timeout_seconds=0"], "error: --timeout_seconds=0.0: must be above 0 and below 3600\n"),
        ([f"--input={tmp_path}/none"], f"error: --input={tmp_path}/none: no such file or directory\n"),
        ([f"--output={tmp_path}"], f"error: --output={tmp_path}: is a directory; name a file in it\n"),
    ):
        done = subprocess.run([*run, *flags], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, message)


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path):
    broken = MBPP | {"code": "def total(numbers):\n    return 1"}
    (tmp_path / "train.jsonl").write_text(json.dumps(broken) + "\n")
    said = []
    with pytest.raises(UserError, match=r"no problem of it is left \(1 left out\)"):
        mutate(
            tmp_path / "train.jsonl",
            tmp_path / "o.jsonl",
            per_problem=1,
            seed=0,
            timeout_seconds=3,
            jobs=1,
            say=said.append,
        )
    assert len(said) == 1 and not (tmp_path / "o.jsonl").exists()
