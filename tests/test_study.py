"""Studies, with a stand-in for the trainer: what is refused, what is added, what runs when, and what is left behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import comparable
from wmtp_jax.cli import Stopped, StopSignals
from wmtp_jax.errors import UserError
from wmtp_jax.planning.flops import flops_per_token
from wmtp_jax.study import claims as claims_module
from wmtp_jax.study import conduct, configuration, controls, jobs, output, results, runner
from wmtp_jax.study.claims import Claims
from wmtp_jax.study.costs import Rows, level, own_operations
from wmtp_jax.study.declaration import Study, check_study, load_study
from wmtp_jax.study.directory import LocalDirectory, open_directory
from wmtp_jax.study.schedule import prepare
from wmtp_jax.study.tables import plan_text, replace_marked, tables, verdicts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenised")


@pytest.fixture
def study(python_corpus, tokenised):
    """A function that makes a small study; changes are fields of it."""

    def make(**changes) -> Study:
        common = {
            "data.sources": (f"text:{python_corpus}/*.py",), "data.validation_fraction": 0.2, "data.sequence_length": 32,
            "data.vocabulary_size": 300, "data.cache_dir": str(tokenised), "model.width": 16, "model.layers": 1,
            "model.attention_heads": 2, "model.heads.count": 2, "train.batch_size": 4, "train.steps": 12,
            "tracking.enabled": False,
        }  # fmt: skip
        arms = {
            "baseline": {"weighting.algorithm": "baseline-mtp"},
            "focal": {"weighting.algorithm": "focal"},
            "confidence": {"weighting.algorithm": "confidence"},
        }
        made = Study(
            question="Does it help?", recipe="configs/quickstart.py", common=common, arms=arms, seeds=(0, 1, 2), difference=0.05,
            controls=False,
        )  # fmt: skip
        return dataclasses.replace(made, **changes)

    return make


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Runs of this process by the stand-in; the file that it tells in."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(jobs, "TRAINERS", dict.fromkeys(jobs.TRAINERS, "tests.study_trainer"))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("STUDY_LOG", str(log))
    return log


def run(study: Study, workdir: Path, *, at_once: int = 1, only=()) -> dict:
    schedule = prepare(check_study("small", study))
    return conduct.run_study(schedule, open_directory(str(workdir)), jobs_at_once=at_once, only=only)


def told(log: Path, what: str) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith(what)]


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"baseline": {}, "focal": {"weighting.gama": 1.0}}}, "arms.focal: config.weighting.gama: no such key"),
        ({"arms": {"baseline": {}, "focal": {"weighting.gamma": "much"}}}, "arms.focal: config.weighting.gamma = 'much'"),
        ({"arms": {"baseline": {}, "focal": {"weighting.algorithm": "fokal"}}}, "arms.focal: config.weighting.algorithm"),
        ({"arms": {"baseline": {}, "again": {"train.log_every": 7}}}, "arms.again: the same configuration as arms.baseline"),
        ({"arms": {"baseline": {}}}, "arms = ['baseline']: must be at least 2"),
        ({"arms": {"baseline": {}, "a/b": {"weighting.algorithm": "focal"}}}, "'a/b': must be a name"),
        ({"arms": {"baseline": {}, "seeded": {"train.seed": 3}}}, "arms.seeded: config.train.seed"),
        ({"seeds": (0,)}, "seeds = (0,): must be at least 2"),
        ({"seeds": (0, 1, 0)}, "names a seed twice"),
        ({"seeds": (0, -1)}, "whole numbers"),
        ({"metric": "perplexity"}, "metric = 'perplexity': no run of arms.baseline writes it; one of bits_per_byte"),
        ({"metric": "ce_head_2"}, "metric = 'ce_head_2'"),
        ({"beside": ("ce_head_9",)}, "beside = 'ce_head_9'"),
        ({"difference": 0.0}, "difference = 0.0"),
        ({"baseline": "plain"}, "baseline = 'plain': must be one of the arms"),
        ({"baselines": {"focal": "plain"}}, "baselines = 'plain'"),
        ({"backend": "numpy"}, "backend = 'numpy'"),
        ({"over": "training"}, "over = 'training'"),
        ({"question": " "}, "question: must be a sentence"),
        ({"tries": ({"optimizer.learning_rate": 0.1}, {})}, "a choice needs both"),
        ({"tries": ({"model.width": 32}, {}), "try_seeds": (9,)}, "tries: config.model.width"),
        ({"tries": ({}, {"optimizer.learning_rate": 0.1}), "try_seeds": (2,)}, "try_seeds: 2 is one of seeds"),
        ({"arms": {"baseline": {}, "rho": {"reference.path": "shared:words"}}}, "shared:words: no shared run of that name"),
        ({"scored": ("words",)}, "scored: 'words'"),
        ({"recipe": "configs/none.py"}, "configs/none.py: no such file"),
        ({"recipe": "configs/quickstart.py:mars"}, "mars: no such target"),
    ],
)
def test_what_a_study_may_not_be(study, changes, message):
    with pytest.raises(UserError) as caught:
        check_study("small", study(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_arm_that_starts_from_a_trained_model_needs_a_baseline_that_does(study):
    critic = {"weighting.algorithm": "critic-wmtp", "critic.trunk": "shared:trunk"}
    arms = {**study().arms, "critic": critic}
    shared = {"trunk": {"weighting.algorithm": "baseline-mtp", "train.steps": 4}}
    with pytest.raises(UserError, match="arms.critic: starts from shared:trunk, arms.baseline from random weights"):
        check_study("small", study(arms=arms, shared=shared))
    arms["trunk"] = {"weighting.algorithm": "baseline-mtp", "pretrained.path": "shared:trunk"}
    declared = check_study("small", study(arms=arms, shared=shared, baselines={"critic": "trunk"}))
    assert declared.arms["critic"].baseline == "trunk" and declared.arms["focal"].baseline == "baseline"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no get_study()"),
        ("def get_study():\n    return 3\n", "get_study() returns int"),
        ("from wmtp_jax.study.declaration import Study\ndef get_study():\n    return Study(arm={})\n", "unexpected keyword"),
        ("import nothing_there\n", "No module named 'nothing_there'"),
        ("def get_study(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_study(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_refuses_in_one_line(tmp_path):
    path = tmp_path / "mine.py"
    toy = (ROOT / "configs" / "studies" / "toy.py").read_text()
    path.write_text(toy.replace("seeds=(0, 1, 2)", "seeds=(0,)"))
    base = [sys.executable, "-m", "wmtp_jax.study"]
    for arguments, message in (
        ([f"--config={path}"], "seeds = (0,): must be at least 2"),
        ([f"--config={tmp_path}/none.py"], "no such file"),
        (["--report", f"--config={path}", f"--workdir={tmp_path}/none"], "no study.json there"),
        ([], "--config is needed"),
    ):
        done = subprocess.run([*base, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


# ---- what is added -------------------------------------------------------------------------------------------------------


def test_twins_and_the_baseline_at_every_cost_level(study):
    arms = {
        **study().arms,
        "rho": {"weighting.algorithm": "rho1-tokenskip", "reference.path": "shared:small"},
        "rich": {"weighting.algorithm": "rho1-weighted", "reference.path": "shared:large"},
    }
    shared = {
        "small": {"weighting.algorithm": "baseline-mtp", "model.heads.count": 1, "train.steps": 3},
        "large": {"weighting.algorithm": "baseline-mtp", "model.heads.count": 1, "model.layers": 3, "train.steps": 30},
    }
    declared = check_study("small", study(arms=arms, shared=shared, controls=True))
    rows = dict.fromkeys([*arms, *shared], Rows(300, 40, 50))
    plan = controls.plan(declared, rows)
    # The families cost nothing; the two references cost differently, so there are two levels.
    ratios = {arm: plan.costs[arm].total / plan.costs["baseline"].total for arm in arms}
    assert ratios["focal"] == 1 < ratios["rho"] < ratios["rich"]
    levels = sorted({-(-round(ratios[arm] * 1e9) // 50_000_000) * 5 for arm in ("rho", "rich")})
    added = [f"baseline+compute{percent / 100:.2f}" for percent in levels]
    assert list(plan.arms) == [
        "baseline", "focal", "focal+permuted", "confidence", "confidence+permuted", "rho", "rho+permuted", "rich",
        "rich+permuted", *added,
    ]  # fmt: skip
    assert plan.compute == {"rho": added[0], "rich": added[1]}
    assert plan.arms["rho+permuted"].overrides == {**plan.arms["rho"].overrides, "weighting.permute": True}
    longer = plan.arms[added[0]].overrides
    assert longer["train.steps"] == -(-12 * levels[0] // 100) and longer["optimizer.warmup_steps"] >= 20
    assert plan.costs[added[0]].total >= plan.costs["rho"].total


def test_costs_by_hand(study):
    """6 operations a weight and token, attention 12 S N C a layer; a third of it forward; shared runs shared out."""
    arms = {"baseline": {}, "rho": {"weighting.algorithm": "rho1-tokenskip", "reference.path": "shared:small"}}
    shared = {"small": {"weighting.algorithm": "baseline-mtp", "model.heads.count": 1, "train.steps": 3}}
    quick = {"weighting.algorithm": "baseline-mtp"}
    declared = check_study("small", study(arms={**arms, "baseline": quick}, shared=shared, seeds=(0, 1), controls=True))
    plan = controls.plan(declared, dict.fromkeys([*arms, *shared], Rows(300, 40, 50)))
    width, hidden, length, vocabulary = 16, 64, 32, 300
    layer = 6 * (4 * width * width + 3 * width * hidden) + 12 * length * width
    head = 6 * width * vocabulary
    tokens = 12 * 4 * length
    assert plan.costs["baseline"].own == {"updates": tokens * (layer + 2 * head)}
    assert plan.costs["rho"].own["reference passes"] == pytest.approx(tokens * (layer + head) / 3)
    # Three updates of the reference, for two seeds of the arm and of its twin.
    assert plan.costs["rho"].shared == {"small": pytest.approx(3 * 4 * length * (layer + head) / 4)}
    scored = dataclasses.replace(declared, study=dataclasses.replace(declared.study, scored=("small",)))
    cheaper = controls.plan(scored, dict.fromkeys([*arms, *shared], Rows(300, 40, 50))).costs["rho"]
    assert "reference passes" not in cheaper.own
    assert cheaper.shared["small"] == pytest.approx((3 * 4 + 50 / 3) * length * (layer + head) / 4)
    assert cheaper.full == pytest.approx(sum(cheaper.own.values()) + cheaper.shared["small"] * 4)


def test_costs_of_a_critic_and_of_accumulation(study):
    critic = {"weighting.algorithm": "critic-wmtp", "critic.trunk_steps": 5, "critic.steps": 7, "reference.steps": 3}
    ranked = {"weighting.algorithm": "focal", "weighting.scope": "head", "train.accumulation": 2}
    declared = check_study("small", study(arms={"baseline": critic, "ranked": {**critic, "critic.steps": 9}}))
    own = own_operations(declared.configs["baseline"], Rows(300, 40, 50), declared)
    model = configuration.model_of(declared.configs["baseline"], 300)
    assert own["trunk"] == 5 * 4 * 32 * flops_per_token(model, 32)
    assert set(own) == {"reference", "rewards", "trunk", "value head", "updates"}
    declared = check_study("small", study(arms={"baseline": {"weighting.algorithm": "baseline-mtp"}, "ranked": ranked}))
    own = own_operations(declared.configs["ranked"], Rows(300, 40, 50), declared)
    assert own["statistics passes"] == pytest.approx(own["updates"] / 3)


def test_levels_are_rounded_up_to_5_percent():
    assert [level(cost, 1.0) for cost in (1.0, 1.0000001, 1.05, 1.051, 0.6, 2.0)] == [20, 21, 21, 22, 12, 40]


# ---- what runs ---------------------------------------------------------------------------------------------------------


def test_a_study_from_its_declaration_to_its_verdict(study, stand_in, tmp_path, capsys):
    declared = study(beside=("ce_mean",), controls=True)
    record = run(declared, tmp_path / "it")
    names = ["baseline", "focal", "focal+permuted", "confidence", "confidence+permuted"]
    assert list(record["arms"]) == names
    # Seed by seed: all arms of a seed come before the next seed, and each run is made once.
    assert told(stand_in, "ends") == [f"{arm}-{seed}" for seed in (0, 1, 2) for arm in names]
    lines = comparable(tmp_path / "it" / "results" / "focal-2")
    assert record["arms"]["focal"]["values"][2] == lines[-1]["eval/bits_per_byte"]
    assert record["arms"]["focal"]["beside"]["ce_mean"][2] == lines[-1]["eval/ce_mean"]
    assert record["arms"]["confidence"]["verdict"] == "worse"
    assert set(record["arms"]["confidence"]["against"]) == {"baseline", "permuted"}
    assert record["arms"]["focal+permuted"]["against"] == {} and record["arms"]["focal+permuted"]["control_of"] == "focal"
    assert json.loads((tmp_path / "it" / "study.json").read_text()) == record
    summary = json.loads((tmp_path / "it" / "results" / "focal-2" / "summary.json").read_text())
    assert summary["study"]["machine"]["cores"] == len(os.sched_getaffinity(0)) and summary["study"]["seed"] == 2
    assert "results/focal-2: finished" in capsys.readouterr().err
    # Again: all is found, nothing runs.
    assert run(declared, tmp_path / "it") == record and len(told(stand_in, "ends")) == 15


def test_a_failed_run_is_tried_again_once_and_then_told(study, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUDY_TRAINER", "fails:focal-1,once:confidence-0")
    record = run(study(), tmp_path / "it")
    assert told(stand_in, "begins").count("focal-1") == 2 and told(stand_in, "begins").count("confidence-0") == 2
    assert record["arms"]["focal"]["values"][1] is None and record["arms"]["focal"]["against"]["baseline"]["n"] == 2
    assert record["arms"]["focal"]["failed"] == {"1": "exit code 3: error: the loss is not finite"}
    assert record["arms"]["confidence"]["against"]["baseline"]["n"] == 3
    assert "it counts as missing" in capsys.readouterr().err
    assert "1 of 3 seeds failed" in " ".join(verdicts(record))
    # It is not tried for ever.
    run(study(), tmp_path / "it")
    assert told(stand_in, "begins").count("focal-1") == 2


def test_one_arm_alone_and_then_the_others(study, stand_in, tmp_path):
    record = run(study(), tmp_path / "it", only=["focal"])
    assert told(stand_in, "ends") == ["focal-0", "focal-1", "focal-2"] and record["arms"]["focal"]["verdict"] == "not decided"
    assert record["arms"]["baseline"]["values"] == [None] * 3
    run(study(), tmp_path / "it")
    assert sorted(told(stand_in, "ends")) == sorted(f"{arm}-{seed}" for arm in study().arms for seed in (0, 1, 2))
    with pytest.raises(UserError, match="--only=focol: no such arm; one of baseline, focal"):
        run(study(), tmp_path / "it", only=["focol"])


def test_runs_beside_one_another_share_the_cores(study, stand_in, tmp_path, monkeypatch):
    available = os.sched_getaffinity(0)
    if len(available) < 2:
        with pytest.raises(UserError, match="--jobs=2: must be from 1 to 1"):
            run(study(), tmp_path / "it", at_once=2)
        return
    monkeypatch.setenv("STUDY_TRAINER", "pair:2")
    record = run(study(seeds=(0, 1)), tmp_path / "it", at_once=2)
    assert [machine["cores"] for machine in record["machines"]] == [len(available) // 2]
    begun = [line.split() for line in stand_in.read_text().splitlines()]
    assert begun[0][0] == begun[1][0] == "begins", "two at once"
    assert os.sched_getaffinity(0) == available


def test_every_arm_gets_as_many_tries_and_twins_take_their_arms(study, stand_in, tmp_path):
    tries = ({"optimizer.learning_rate": 0.001}, {"optimizer.learning_rate": 0.002}, {"optimizer.learning_rate": 0.004})
    arms = {"baseline": {"weighting.algorithm": "baseline-mtp"}, "focal": {"weighting.algorithm": "focal"}}
    declared = study(arms=arms, tries=tries, try_seeds=(7, 8), controls=True)
    record = run(declared, tmp_path / "it")
    ends = told(stand_in, "ends")
    assert ends[:12] == [f"{arm}-try{k}-{seed}" for seed in (7, 8) for arm in arms for k in range(3)]
    assert {arm["tries"] for arm in record["arms"].values()} == {3}
    for name in arms:
        means = []
        for k in range(3):
            last = [comparable(tmp_path / "it" / "tries" / f"{name}-try{k}-{seed}")[-1] for seed in (7, 8)]
            means.append(sum(line["eval/bits_per_byte"] for line in last) / 2)
        assert record["arms"][name]["choice"]["chosen"] == means.index(min(means))
    assert record["arms"]["focal+permuted"]["choice"] == record["arms"]["focal"]["choice"]
    [costs] = [table for table in tables(record) if table.name == "costs"]
    assert costs.header[-2:] == ("K", "chosen") and costs.rows[0][-2] == "3"


def test_the_mean_over_evaluations(study, stand_in, tmp_path):
    record = run(study(over="evaluations"), tmp_path / "it")
    lines = comparable(tmp_path / "it" / "results" / "focal-1")
    values = [line["eval/bits_per_byte"] for line in lines if "eval/bits_per_byte" in line]
    assert len(values) == 3 and record["arms"]["focal"]["values"][1] == pytest.approx(sum(values) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"difference": 0.1}, "difference_that_matters 0.05, not 0.1"),
        ({"seeds": (0, 1, 2, 3)}, "seeds [0, 1, 2], not [0, 1, 2, 3]"),
        ({"metric": "ce_mean"}, "results of metric"),
        ({"steps": 13}, "config.train.steps = 12, not 13"),
        ({"gamma": 3.0}, "arms.focal with overrides"),
        ({"arm": True}, "results of the arms"),
        ({"program": "another"}, "another version of the program"),
        ({"corpus": True}, "arms.baseline with corpus"),
        ({"results": True}, "was made with another configuration"),
    ],
)
def test_results_of_another_study_are_told_apart(study, stand_in, tmp_path, monkeypatch, change, message, python_corpus):
    run(study(), tmp_path / "it", only=["focal"])
    fields = {name: value for name, value in change.items() if name in ("difference", "seeds", "metric")}
    changed = study(**fields)
    if "steps" in change:
        changed = dataclasses.replace(changed, common={**changed.common, "train.steps": 13})
    if "gamma" in change:
        changed.arms["focal"]["weighting.gamma"] = 3.0
    if "arm" in change:
        changed.arms["entropy"] = {"weighting.algorithm": "entropy"}
    if "program" in change:
        monkeypatch.setattr("wmtp_jax.study.provenance.program_hash", lambda: "another")
    if "corpus" in change:
        changed = dataclasses.replace(changed, common={**changed.common, "data.sources": (f"text:{python_corpus}/module_1*.py",)})
        record = json.loads((tmp_path / "it" / "study.json").read_text())
        record["configuration"]["data.sources"] = [f"text:{python_corpus}/module_1*.py"]
        (tmp_path / "it" / "study.json").write_text(json.dumps(record))
    if "results" in change:  # as where study.json was removed
        (tmp_path / "it" / "study.json").unlink()
        changed.arms["focal"]["weighting.gamma"] = 3.0
    with pytest.raises(UserError) as caught:
        run(changed, tmp_path / "it")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- several processes, killed -------------------------------------------------------------------------------------------


def start(declaration: Path, workdir: Path, log: Path, wishes: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.study_with_stand_in", f"--config={declaration}", f"--workdir={workdir}"]
    environment = os.environ | {"STUDY_LOG": str(log), "STUDY_TRAINER": wishes}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def declaration(study, tmp_path):
    """The small study as a file."""
    path = tmp_path / "small.py"
    made = study(seeds=(0, 1))
    path.write_text(f"from wmtp_jax.study.declaration import Study\n\n\ndef get_study():\n    return {made!r}\n")
    return path


def test_killed_at_random_and_then_from_two_processes_every_run_is_made_once(declaration, tmp_path):
    generator = random.Random(0)
    whole = start(declaration, tmp_path / "whole", tmp_path / "whole.log")
    assert whole.wait(300) == 0
    log, workdir = tmp_path / "log", tmp_path / "it"
    log.touch()
    for number in range(5):
        process = start(declaration, workdir, log, "slow:0.02")
        deadline, wanted = time.monotonic() + 120, len(told(log, "begins")) + generator.randint(1, 2)
        while len(told(log, "begins")) < wanted and process.poll() is None:
            assert time.monotonic() < deadline, f"kill {number}: nothing began"
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    both = [start(declaration, workdir, log, "slow:0.01") for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    names = sorted(f"{arm}-{seed}" for arm in ("baseline", "focal", "confidence") for seed in (0, 1))
    assert sorted(told(log, "ends")) == names, "every run was ended once"
    undisturbed, disturbed = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("whole", "it"))
    for name in names:
        assert comparable(tmp_path / "it" / "results" / name) == comparable(tmp_path / "whole" / "results" / name)
    for field in ("values", "against", "verdict"):
        for arm, content in undisturbed["arms"].items():
            assert disturbed["arms"][arm][field] == content[field]


def test_a_study_that_is_asked_to_stop_has_its_runs_save_and_goes_on(declaration, tmp_path):
    log, workdir = tmp_path / "log", tmp_path / "it"
    log.touch()
    process = start(declaration, workdir, log, "slow:0.2")
    deadline = time.monotonic() + 120
    while not told(log, "begins"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    [state] = (workdir / "runs").glob("results-baseline-0.*/state.json")
    assert json.loads(state.read_text())["step"] > 0 and not told(log, "ends")
    [claim] = (workdir / "runs" / "claims").glob("seed-0.1.json")
    assert json.loads(claim.read_text())["released"]
    assert start(declaration, workdir, log).wait(120) == 0


# ---- claims ------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["local", "s3"])
def shared_directory(request, tmp_path):
    """A study's directory on a disk and in object storage."""
    address = tmp_path / "it" if request.param == "local" else request.getfixturevalue("s3")
    return open_directory(str(address))


def test_files_of_a_directory(shared_directory, tmp_path):
    assert shared_directory.read("a/b.json") is None and shared_directory.names("a") == []
    shared_directory.write("a/b.json", b"1")
    shared_directory.write("a/b.json", b"2")
    assert shared_directory.create("a/c.json", b"3") and not shared_directory.create("a/c.json", b"4")
    (tmp_path / "file").write_bytes(b"5")
    shared_directory.put({"a/d/e": tmp_path / "file"})
    assert shared_directory.names("a") == ["a/b.json", "a/c.json", "a/d/e"]
    assert [shared_directory.read(name) for name in shared_directory.names("a")] == [b"2", b"3", b"5"]


def test_one_process_makes_a_file_also_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    directory = LocalDirectory(tmp_path)
    assert directory.create("a/b", b"1") and not directory.create("a/b", b"2")
    assert directory.read("a/b") == b"1" and directory.names("a") == ["a/b"]


def test_one_process_holds_a_part_and_a_dead_ones_is_taken_over(shared_directory, monkeypatch):
    # As on another machine, whose processes can't be seen from here.
    monkeypatch.setattr(claims_module, "_is_gone", lambda claim: False)
    clock = Clock()
    first, second, third = (Claims(shared_directory, beat_seconds=1, dead_seconds=10, clock=clock) for _ in range(3))
    assert first.take("seed-0") and not second.take("seed-0") and second.take("seed-1")
    for _ in range(30):  # it beats, so it lives
        clock.now += 1
        assert first.beat() == [] and not second.take("seed-0")
    for _ in range(10):  # it stands still
        clock.now += 1
        second.beat()
        assert not second.take("seed-0")
    clock.now += 1
    third.take("seed-0")  # has looked at it once, and can't know yet
    assert second.take("seed-0") and not third.take("seed-0") and second.held == ["seed-1", "seed-0"]
    # It was only asleep, and sees that others went on.
    assert first.beat() == ["seed-0"] and first.held == []
    second.release("seed-0")
    assert first.take("seed-0") and not second.take("seed-0")


def test_a_process_of_this_machine_that_is_gone_need_not_be_waited_for(tmp_path):
    directory = LocalDirectory(tmp_path)
    code = "import sys; from pathlib import Path; from wmtp_jax.study.claims import Claims; "
    code += "from wmtp_jax.study.directory import LocalDirectory; print(Claims(LocalDirectory(Path(sys.argv[1]))).take('seed-0'))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr
    assert Claims(directory).take("seed-0")


def test_a_part_that_was_taken_over_is_given_up(study, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_TRAINER", "slow:0.3")
    directory = open_directory(str(tmp_path / "it"))
    schedule = prepare(check_study("small", study(seeds=(0, 1))))
    held = Claims(directory, beat_seconds=0.05)
    [part, _] = schedule.seed_parts(["focal"], {})
    notes = []

    class Board:
        def note(self, text):
            notes.append(text)

        def finished(self, job, summary, seconds): ...

        def show(self, running, outcomes):
            if notes[-1].endswith("started"):
                directory.create("runs/claims/seed-0.2.json", b'{"released": false, "machine": "", "process": 0, "started": 0}')
            if "another process" in notes[-1]:
                os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as signals, pytest.raises(Stopped):
        command = lambda job: jobs.command(  # noqa: E731
            job, recipe="configs/quickstart.py", backend="jax", study="it", address=str(tmp_path / "it"), scratch=tmp_path / "it"
        )
        runner.Runner(
            directory, tmp_path / "it", command=command, backend="jax", slots=[[0]], claims=held, signals=signals, board=Board(),
            after=lambda part: None,
        ).run([part])
    assert "results/focal-0: another process has taken it over" in notes


# ---- what is written ---------------------------------------------------------------------------------------------------


def test_the_output_is_made_again_from_what_is_committed(study, stand_in, tmp_path):
    record = run(study(controls=True, beside=("ce_mean",), seeds=(0, 1)), tmp_path / "it")
    directory = open_directory(str(tmp_path / "it"))
    marks = "# It\n<!-- study small: verdicts -->\nold\n<!-- end -->\n<!-- study other: verdicts -->\nkept\n<!-- end -->\n"
    (tmp_path / "it" / "README.md").write_text(marks)
    written = output.write_output(record, directory)
    committed = tmp_path / "committed"
    for name in ("study.json", "README.md", *(f"results/{path.name}" for path in (tmp_path / "it" / "results").iterdir())):
        source, target = tmp_path / "it" / name, committed / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", source, target], check=True)
    again = open_directory(str(committed))
    study_again = results.fill(results.read_study(again), again)
    assert study_again == record and output.write_output(study_again, again) == written
    for name in written:
        assert (committed / name).read_bytes() == (tmp_path / "it" / name).read_bytes(), name
    readme = (committed / "README.md").read_text()
    assert "| confidence |" in readme and "old" not in readme and "kept" in readme
    for kind in ("effects", "curves", "costs"):
        assert (committed / f"{kind}.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (committed / f"{kind}.svg").read_bytes()
    page = (committed / "index.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    table = (committed / "table.csv").read_text().splitlines()
    assert table[0].startswith("arm,control_of,against") and len(table) == 1 + 2 * 2 + 3
    assert "\\toprule" in (committed / "table.tex").read_text()


def test_a_page_escapes_what_a_study_says(study, tmp_path):
    made = prepare(check_study("small", study(question="Is <b>a & b</b> better?"))).record
    record = results.fill(made, open_directory(str(tmp_path)))
    assert "<h1>Is &lt;b&gt;a &amp; b&lt;/b&gt; better?</h1>" in output.page(record, tables(record), {})


def test_marks_that_name_no_table(study, tmp_path):
    record = results.fill(prepare(check_study("small", study())).record, open_directory(str(tmp_path)))
    with pytest.raises(UserError, match="no such table; one of verdicts"):
        replace_marked("<!-- study small: costings -->\n<!-- end -->", record, "README.md")
    with pytest.raises(UserError, match="no <!-- end --> after it"):
        replace_marked("<!-- study small: costs -->\n", record, "README.md")


def test_the_plan_tells_costs_and_runs(study):
    text = plan_text(prepare(check_study("small", study(controls=True))).record)
    assert "15 runs: 5 arms x 3 seeds" in text and "focal+permuted" in text and "weighting.permute=True" in text


def test_thinned_metrics_keep_every_evaluation_and_the_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "stage": "train", "time": float(n), **({"eval/x": 1.0} if n % 40 == 0 else {})} for n in range(1, 1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [json.loads(line) for line in jobs.thinned(path.read_bytes(), path).splitlines()]
    assert {row["step"] for row in kept if "eval/x" in row} == set(range(40, 1000, 40))
    steps = [row["step"] for row in kept]
    assert steps[-1] == 999 and 100 <= len(kept) <= 130 and steps == sorted(steps)


def test_the_strength_check_compares_every_loss():
    rows = [{"step": 1, "train/loss": 2.0, "train/ce_head_0": 1.0}, {"step": 2, "train/loss": 1.5, "train/ce_head_0": 1.0}]
    other = [dict(rows[0]), {**rows[1], "train/ce_head_0": 1.0 + 1e-5}]
    assert controls.largest_difference(rows, rows) == 0.0
    assert controls.largest_difference(rows, other) == pytest.approx(1e-5, rel=1e-3)
    assert controls.largest_difference(rows, rows[:1]) == float("inf")
