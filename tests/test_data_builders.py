"""TFDS sets of coding problems: built from published files, read as sources, and what builds refuse and leave behind."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.test_data_finetuning import segments
from tests.test_data_problems import CONTEST, HUMANEVAL, MBPP
from wmtp_jax.data import tfds_builders
from wmtp_jax.data.build import build
from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.data.problems import Problem, mbpp
from wmtp_jax.data.sources import open_source
from wmtp_jax.errors import UserError

OPTIONS = dict(output="", timeout_seconds=10.0, max_solutions=4, jobs=2)
ROWS = dict(sequence_length=256, vocabulary_size=300)


def mbpp_entries(first, count, wrong=2):
    for number in range(first, first + count):
        yield MBPP | {
            "task_id": number,
            "text": f"Write a function to multiply by {number}.",
            "code": f"def times(x):\r\n\treturn x * {number}",
            "test_list": [f"assert times(2) == {2 * number}"],
            "incorrect_solutions": [f"def times(x):\n\treturn x * {number + n + 1}\n" for n in range(wrong)],
        }


def write_jsonl(path, entries):
    text = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def passing(monkeypatch):
    """Every solution passes, unseen."""
    monkeypatch.setattr("wmtp_jax.data.build.failure", lambda problem, solution, **_: "")


def run_build(name, path, **changes):
    said = []
    build(name, input_path=str(path) if path else "", say=said.append, **OPTIONS | changes)
    return said


def test_a_built_set_keeps_the_splits_and_what_the_problems_are(tmp_path, data_dir):
    entries = {
        "train": list(mbpp_entries(601, 3)),
        "validation": list(mbpp_entries(511, 2)),
        "test": list(mbpp_entries(11, 1)),
    }
    for split, found in entries.items():
        write_jsonl(tmp_path / "in" / f"{split}.jsonl", found)
    said = run_build("mbpp", tmp_path / "in")
    assert said[:3] == [
        "train: 3 problems with 3 right and 6 wrong solutions; 0 problems left out",
        "validation: 2 problems with 2 right and 4 wrong solutions; 0 problems left out",
        "test: 1 problems with 1 right and 2 wrong solutions; 0 problems left out",
    ]
    sides = tfds_builders.built_files("mbpp")
    assert sorted(sides.values()) == ["train", "validation"]
    for path, side in sides.items():
        read = sorted(tfds_builders.read_problems(path), key=lambda problem: problem.name)
        assert read == [mbpp(entry, "F") for entry in entries[side]]
    corpus = load_corpus(["tfds:mbpp"], cache_dir=str(tmp_path / "c"), **ROWS)
    for side in ("train", "validation"):
        known = {}
        for entry in entries[side]:
            problem = mbpp(entry, "F")
            right, wrong = problem.solutions[0], problem.incorrect_solutions
            known |= {problem.prompt + code: (code, code == right) for code in (right, *wrong)}
        found = []
        for tokens, allowed, labels in segments(corpus, side):
            code, right = known.pop(corpus.tokenizer.decode(tokens[:-1]))
            assert corpus.tokenizer.decode(tokens[allowed]) == (code + "<|endoftext|>" if right else "")
            np.testing.assert_array_equal(labels, float(right))
            found.append(right)
        assert not known and found == [True, False, False] * len(entries[side])
    assert corpus.sources[0].counts["validation"]["documents"] == 6
    one = open_source("tfds:mbpp/test")
    assert [file.name for file in one.files] == ["mbpp-test.array_record-00000-of-00001"]
    with pytest.raises(UserError, match="tfds:mbpp/dev: it has no split 'dev', but test, train, validation"):
        open_source("tfds:mbpp/dev")


def test_problems_whose_own_solution_fails_are_named_and_left_out(tmp_path, data_dir):
    entries = list(mbpp_entries(601, 3))
    entries[1]["test_list"] = ["assert times(2) == 5"]
    write_jsonl(tmp_path / "in" / "train.jsonl", entries)
    said = run_build("mbpp", tmp_path / "in")
    assert said[0].startswith("left out: mbpp/602: its own solution fails: failed: ") and "AssertionError" in said[0]
    assert said[1] == "train: 2 problems with 2 right and 4 wrong solutions; 1 problems left out"
    [path] = tfds_builders.built_files("mbpp")
    assert tfds_builders.built_files("mbpp")[path] == "", "train alone is divided by a hash of the problems"
    assert sorted(problem.name for problem in tfds_builders.read_problems(path)) == ["mbpp/601", "mbpp/603"]


def test_the_one_file_that_mbpp_comes_as_is_divided_as_published(tmp_path, data_dir, passing):
    numbers = (2, 10, 11, 510, 511, 600, 601, 974)
    write_jsonl(tmp_path / "in" / "mbpp.jsonl", [entry for n in numbers for entry in mbpp_entries(n, 1)])
    said = run_build("mbpp", tmp_path / "in" / "mbpp.jsonl")
    assert [line.partition(" problems")[0] for line in said[:4]] == [
        "train: 2",
        "validation: 2",
        "test: 2",
        "prompt: 2",
    ]
    train = next(path for path, side in tfds_builders.built_files("mbpp").items() if side == "train")
    assert {problem.name for problem in tfds_builders.read_problems(train)} == {"mbpp/601", "mbpp/974"}


def test_humaneval_from_its_package_and_from_a_file(tmp_path, data_dir, passing):
    said = run_build("humaneval", "")
    assert said[0] == "test: 164 problems with 164 right and 0 wrong solutions; 0 problems left out"
    corpus = load_corpus(["tfds:humaneval"], cache_dir=str(tmp_path / "c"), **ROWS | {"sequence_length": 1024})
    counts = corpus.sources[0].counts
    # 3% of 164 expected; by the hash of the problems' names, and so the same everywhere.
    assert 1 <= counts["validation"]["documents"] <= 12
    write_jsonl(tmp_path / "in" / "HumanEval.jsonl.gz", [HUMANEVAL])
    run_build("humaneval", tmp_path / "in", output=str(tmp_path / "other"))
    with pytest.raises(UserError, match="humaneval/1.0.0: is there already; remove it to build it again"):
        run_build("humaneval", "")


@pytest.mark.slow
def test_humaneval_passes_its_own_tests(data_dir):
    assert (
        run_build("humaneval", "")[0] == "test: 164 problems with 164 right and 0 wrong solutions; 0 problems left out"
    )


def test_contests_in_the_published_parquet_layout(tmp_path, data_dir):
    failing = CONTEST | {"name": "2_B. Other", "solutions": {"language": [3, 3], "solution": ["print(1)", "print(2)"]}}
    other = CONTEST | {"name": "3_C. C++ only", "solutions": {"language": [2], "solution": ["int main() {}"]}}
    (tmp_path / "in").mkdir()
    for name, entries in (
        ("train-00000-of-00002-a.parquet", [CONTEST, failing]),
        ("train-00001-of-00002-b.parquet", [other]),
        ("valid-00000-of-00001-c.parquet", [CONTEST | {"name": "4_D. Held out", "description": "The same again."}]),
    ):
        parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "in" / name)
    said = run_build("code_contests", tmp_path / "in", max_solutions=1)
    assert said[:4] == [
        "left out: code_contests/2_B. Other: its own solution fails: input 1: wrong output",
        "left out: code_contests/3_C. C++ only: it has no solution in Python 3",
        "train: 1 problems with 1 right and 1 wrong solutions; 2 problems left out",
        "validation: 1 problems with 1 right and 1 wrong solutions; 0 problems left out",
    ]
    train = next(path for path, side in tfds_builders.built_files("code_contests").items() if side == "train")
    [problem] = tfds_builders.read_problems(train)
    assert problem.inputs == ("1 2\n", "3 4\n", "0 0\n") and problem.public == 2 and len(problem.solutions) == 1
    corpus = load_corpus(["tfds:code_contests"], cache_dir=str(tmp_path / "c"), **ROWS)
    texts = [corpus.tokenizer.decode(tokens[:-1]) for tokens, _, _ in segments(corpus, "train")]
    prompt = '"""\nPrint the sum of two numbers.\n"""\n'
    assert texts == [prompt + "print(sum(map(int, input().split())))\n", prompt + "print(3)\n"]


def test_every_field_survives_storing(tmp_path):
    problem = Problem(
        "set/ü", 'p"\n', ("a\n", ""), ("é",), "before", "after", "tests", ("x", "y"), ("1\n", "\0"), ("", "2"), 1
    )  # fmt: skip
    bare = Problem("set/bare", "", ())
    many = [replace(bare, name=f"set/{number}") for number in range(50)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tfds_builders.build("mbpp", {"test": lambda: iter([problem, bare, *many])}, tmp_path / "data", scratch)
    [path] = (tmp_path / "data").glob("mbpp/*/*.array_record*")
    read = {found.name: found for found in tfds_builders.read_problems(path)}
    assert len(read) == 52 and read["set/ü"] == problem and read["set/bare"] == bare


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_sets_that_are_not_there(tmp_path, data_dir):
    for name, message in (
        (
            "tfds:mbpp",
            rf"tfds:mbpp is not built \(nothing in {data_dir}/mbpp/1.0.0\); python -m wmtp_jax.data.build mbpp --input=PATH",
        ),
        ("tfds:imdb", "tfds:imdb: unknown set 'imdb'; known are mbpp, humaneval, code_contests"),
        ("tfds:", "unknown source 'tfds:'"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(name)


def test_without_the_extra_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wmtp_jax.data.tfds_builders", None)
    monkeypatch.delattr("wmtp_jax.data.tfds_builders")
    with pytest.raises(UserError, match=r"tfds:mbpp needs tensorflow-datasets: pip install 'wmtp\[tfds\]'"):
        open_source("tfds:mbpp")
    with pytest.raises(UserError, match=r"building mbpp needs tensorflow-datasets: pip install"):
        run_build("mbpp", "x")


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "wmtp_jax.data.build", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no problem of it is left for the split train (0 left out)"),
        ([MBPP | {"code": None}], "train.jsonl:1: the field `code` is null, not a string"),
        ([MBPP, MBPP], "train.jsonl:2: mbpp/601 a second time; leave one of them out of --input"),
        ([MBPP | {"code": "def total(x): return 1"}], "no problem of it is left for the split train (1 left out)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, data_dir, lines, message):
    write_jsonl(tmp_path / "in" / "train.jsonl", lines)
    run = command("mbpp", f"--input={tmp_path}/in")
    _, error = run.communicate()
    assert run.returncode == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert not [path for path in data_dir.rglob("*") if path.is_file()]


def test_bad_flags_are_one_line(tmp_path, data_dir):
    (tmp_path / "test.jsonl").write_text("{}\n")
    for arguments, message in (
        (
            [],
            "error: the first argument must be the set to build, mbpp | humaneval | code_contests; it is ''; see --help\n",
        ),
        (["mbpp"], "error: --input is needed for mbpp: a file or a directory of JSONL or Parquet\n"),
        (["mbpp", "--jobs=0", "--input=x"], "error: --jobs=0: must be at least 1\n"),
        (
            ["code_contests", f"--input={tmp_path}/test.jsonl", "--max_solutions=0"],
            "error: --max_solutions=0: must be at least 1\n",
        ),
    ):
        run = command(*arguments)
        assert (run.communicate()[1], run.returncode) == (message, 2)


def test_a_stopped_build_leaves_nothing_half_written(tmp_path, data_dir):
    slow = [entry | {"code": entry["code"] + "\nimport time; time.sleep(1)"} for entry in mbpp_entries(601, 60)]
    write_jsonl(tmp_path / "in" / "train.jsonl", slow)
    run = command("mbpp", f"--input={tmp_path}/in")
    begun = time.monotonic()
    while not list(data_dir.glob("mbpp/incomplete*")):
        assert run.poll() is None and time.monotonic() - begun < 60
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate()
    assert run.returncode == 143 and error == ""
    assert not list(data_dir.glob("mbpp/*"))


# The kernel refuses to let any file grow past the limit.
FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
from wmtp_jax.data import build
from wmtp_jax.errors import UserError
build.failure = lambda *_, **__: ""
try:
    build.build("mbpp", input_path=sys.argv[1], output=sys.argv[2], timeout_seconds=9.0, max_solutions=1, jobs=1)
except UserError as error:
    print(error)
"""


def test_no_room_leaves_nothing_half_written(tmp_path):
    write_jsonl(tmp_path / "in" / "train.jsonl", mbpp_entries(601, 100))
    output = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "in"), str(output)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert run.stdout == f"{output}: no room left on its disk; make some, or name another directory in --output\n", run
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_a_damaged_file_is_named(tmp_path, data_dir, passing):
    write_jsonl(tmp_path / "in" / "train.jsonl", mbpp_entries(601, 20))
    run_build("mbpp", tmp_path / "in")
    [path] = tfds_builders.built_files("mbpp")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * len(content)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}: damaged .*; remove its directory and build it again"):
            list(tfds_builders.read_problems(path))


WITHOUT_JAX = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "torch"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
from wmtp_jax.data.corpus import load_corpus
print(load_corpus(["tfds:mbpp"], cache_dir=sys.argv[1], sequence_length=256, vocabulary_size=300).hash)
assert not {"jax", "flax", "torch", "tensorflow", "transformers"} & set(sys.modules)
"""


def test_reading_does_without_jax_and_tensorflow(tmp_path, data_dir, passing):
    for split, first in (("train", 601), ("validation", 511)):
        write_jsonl(tmp_path / "in" / f"{split}.jsonl", mbpp_entries(first, 3))
    run_build("mbpp", tmp_path / "in")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, str(tmp_path / "c")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == load_corpus(["tfds:mbpp"], cache_dir=str(tmp_path / "d"), **ROWS).hash
