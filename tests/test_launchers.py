"""docker/: run files, launchers and the entrypoint, each against what its reader takes; every command that they start is one that
the trainer takes.

The programs that launch (vessl, vesslctl, srun) are stood in for by scripts that write down what they were given. What they
were given is then run, with a `python` that does the same, and what it gets goes through the trainer's own flags and `validate`.
"""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.vessl_models import VESSL, against_models

ROOT = Path(__file__).resolve().parent.parent
DOCKER, LAUNCH = ROOT / "docker", ROOT / "docker" / "launch"
ALGORITHMS = ("baseline-mtp", "critic-wmtp", "rho1-weighted", "rho1-tokenskip")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vessl_run = load(LAUNCH / "vessl_run.py")


# ---- run files against their readers --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("test", "production"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_run_file_has_no_key_that_vessl_does_not(algorithm, mode):
    run = vessl_run.run_file(algorithm, mode)
    assert against_models(run) == []
    assert (run["env"]["WMTP_ALGO"], run["env"]["ENV_MODE"]) == (algorithm, mode)
    assert yaml.safe_load((DOCKER / "vessl.yaml").read_text()).keys() == run.keys()


def test_the_check_of_run_files_can_fail():
    run = vessl_run.run_file("baseline-mtp", "test")
    for change in (
        {"command": "x"}, {"secrets": {}}, {"env": {"A": 1}}, {"env": {"A": {"secrets": "x"}}}, {"run": [{"script": "x"}]},
        {"resources": {"spot": True}}, {"tags": "a"}, {"termination_protection": "false"}, {"export": {"/x": {"to": "y"}}},
    ):  # fmt: skip
        assert len(against_models(copy.deepcopy(run) | change)) == 1, change


def test_run_file_keeps_secrets_and_runs_out_of_itself():
    """Secrets by name only; what a spot instance leaves behind lies in a volume; results are exported."""
    run = yaml.safe_load((DOCKER / "vessl.yaml").read_text())
    secrets = {name for name, value in run["env"].items() if isinstance(value, dict)}
    assert secrets == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN"}
    assert all(set(run["env"][name]) == {"secret"} for name in secrets)
    named = {name for name, value in run["env"].items() if re.search("TOKEN|KEY|PASSWORD|SECRET", name)}
    assert named == secrets, "a secret by value"
    assert run["resources"]["spot"] == "true" and run["env"]["WMTP_RUNS"].rstrip("/") + "/" in run["mount"]
    assert any(value.startswith("vessl-artifact://") for value in run["export"].values())


def test_another_run_file_refuses_what_it_cannot_do(capsys):
    for arguments, words in (
        (["--algo=ppo"], "invalid choice"),
        (["--algo=baseline-mtp", "--set", "WMTP_REMOTE"], "not NAME=VALUE"),
        (["--algo=baseline-mtp", "--set", "NOWHERE=1"], "--set NOWHERE: not a plain variable"),
        (["--algo=baseline-mtp", "--set", "HF_TOKEN=x"], "--set HF_TOKEN: not a plain variable"),
        (["--algo=baseline-mtp"], "names no owner"),
    ):
        with pytest.raises(SystemExit) as exit_:
            vessl_run.main(arguments)
        assert exit_.value.code == 2 and words in capsys.readouterr().err


def test_compose_file_needs_no_secret_to_be_written_into_it():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {"mlflow", "storage", "trainer"} <= services.keys()
    for name, service in services.items():
        for key, value in service["environment"].items():
            if re.search("KEY|TOKEN|PASSWORD", key):
                assert value.startswith("${") and ":?" in value, f"{name}: {key} has a value, or a default"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to others"


# ---- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    """Runs a command with stand-ins on PATH; gives back what each stand-in was called with, in order."""
    (tmp_path / "bin").mkdir()
    record = tmp_path / "calls"
    note = f'open({str(record)!r}, "a").write(json.dumps([sys.argv, dict(os.environ)]) + "\\n")\n'
    stand_in = f"#!{sys.executable}\nimport json, os, sys\n{note}"
    scripts = {name: stand_in for name in ("python", "vessl", "vesslctl")}
    scripts["scontrol"] = '#!/bin/sh\ncase $1 in show) printf "%s\\n" node7 node8 ;; *) echo "$@" >> "$REQUEUED" ;; esac\n'
    # srun starts the command on every node; options are `--name=value`.
    scripts["srun"] = (
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n'
        'for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" || exit $?; done\nexit ${SRUN_CODE:-0}\n'
    )
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(command, **variables):
        record.write_text("")
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "REQUEUED": str(tmp_path / "requeued"), **variables}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        calls = [json.loads(line) for line in record.read_text().splitlines()]
        return done, [(Path(argv[0]).name, argv[1:], variables) for argv, variables in calls]

    return run


PARSE = """
import json, os, sys
from absl import flags
from wmtp_jax import cli
from wmtp_jax.settings import flatten
cli.define_run_flags()
for line in sys.stdin.readlines():
    if os.fork():  # flags of one command each
        if os.wait()[1]:
            sys.exit(1)
        continue
    sys.argv = ["main", *json.loads(line)]  # config_flags looks for the changes of a recipe there
    rest = flags.FLAGS(sys.argv)
    assert len(rest) == 1, rest
    config, options = cli.run_options()
    config.check_experiment()
    shown = vars(options) | dict(flatten(config))
    print(json.dumps(shown, default=str), flush=True)
    os._exit(0)
"""


def parse(commands):
    """What the trainer makes of lists of flags: options and configuration of each, validated."""
    lines = "".join(json.dumps(flags) + "\n" for flags in commands)
    done = subprocess.run([sys.executable, "-c", PARSE], cwd=ROOT, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def trainer_flags(call):
    name, arguments, _ = call
    assert (name, arguments[:2]) == ("python", ["-m", "wmtp_jax.main"])
    return arguments[2:]


def test_every_algorithm_in_both_modes_is_a_command_the_trainer_takes(stage):
    calls = {}
    for algorithm in ALGORITHMS:
        for mode in ("test", "production"):
            given = {"WMTP_ALGO": algorithm, "ENV_MODE": mode, "WMTP_RUNS": "/runs", "WMTP_REMOTE": "s3://bucket/runs/"}
            done, [call] = stage(["bash", "docker/entrypoint.sh", "train", "--dry_run"], **given)
            assert done.returncode == 0, done.stderr
            calls[algorithm, mode] = trainer_flags(call)
    for (algorithm, mode), options in zip(calls, parse(calls.values()), strict=True):
        name = f"{algorithm}-{mode}"
        assert options["weighting.algorithm"] == algorithm and options["dry_run"] is True and options["resume"] == "auto"
        assert options["workdir"] == f"/runs/{name}" and options["checkpoint.remote"] == f"s3://bucket/runs/{name}"
        assert (options["train.steps"] == 20) == (mode == "test")
        assert (options["model.width"] == 4096) == (mode == "production")


def test_the_environment_reaches_the_trainer(stage):
    given = {
        "WMTP_ALGO": "critic-wmtp", "ENV_MODE": "production", "WMTP_TARGET": "local", "WMTP_RUN": "mine",
        "WMTP_TRUNK": "/runs/trunk", "WMTP_REFERENCE": "/runs/a reference", "WMTP_TRACKING": "http://mlflow:5000",
    }  # fmt: skip
    done, [call] = stage(["bash", "docker/entrypoint.sh", "train", "--config.train.seed=3"], **given)
    [options] = parse([trainer_flags(call)])
    assert done.returncode == 0 and options["workdir"] == "runs/mine" and options["run_name"] == "mine"
    assert options["reference.path"] == "/runs/a reference" and options["critic.trunk"] == "/runs/trunk"
    assert options["tracking.uri"] == "http://mlflow:5000" and options["train.seed"] == 3 and options["model.width"] == 256


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WMTP_ALGO": "ppo"}, "WMTP_ALGO=ppo: must be baseline-mtp, critic-wmtp, rho1-weighted or rho1-tokenskip"),
        ({"ENV_MODE": "staging"}, "ENV_MODE=staging: must be test or production"),
        ({"WMTP_RUN": "../x"}, "WMTP_RUN=../x: must be a plain name"),
    ],
)
def test_a_wrong_variable_ends_in_one_line(stage, variables, words):
    done, calls = stage(["bash", "docker/entrypoint.sh"], **variables)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("error: " + words) and done.stderr.count("\n") == 1


def test_other_words_are_run_and_results_collected(stage, tmp_path):
    done, [(name, arguments, _)] = stage(["bash", "docker/entrypoint.sh", "python", "-m", "wmtp_jax.evaluate", "--a=b c"])
    assert (name, arguments) == ("python", ["-m", "wmtp_jax.evaluate", "--a=b c"])
    run = tmp_path / "runs" / "baseline-mtp-test"
    (run / "report").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "report" / "index.html").write_text("x")
    (run / "metrics.jsonl").write_text("{}")
    done, _ = stage(["bash", "docker/entrypoint.sh", "collect", str(tmp_path / "out")], WMTP_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"baseline-mtp-test/metrics.jsonl", "baseline-mtp-test/report/index.html"}


def run_inner(stage, command, **variables):
    """Runs a launcher's inner command where it would run, /app being the repository here; the trainer's flags."""
    done, [call] = stage(["bash", "-c", command.replace("cd /app", f"cd {ROOT}")], **variables)
    assert done.returncode == 0, done.stderr
    return trainer_flags(call), call[2]


def test_every_launcher_starts_a_command_the_trainer_takes(stage, tmp_path):
    commands = []

    run = vessl_run.run_file("rho1-weighted", "production", variables={"WMTP_REFERENCE": "/runs/reference"})
    plain = {name: value for name, value in run["env"].items() if isinstance(value, str)}
    assert all(item["workdir"] == "/app" for item in run["run"])
    train, collect = [item["command"] for item in run["run"]]
    commands.append(run_inner(stage, train, **plain)[0])
    assert collect == "bash docker/entrypoint.sh collect /output" and "/output/" in run["export"]

    flags = ["--dry_run", "--config.data.sources=('jsonl:/data/a b.jsonl',)"]
    given = {"WMTP_ALGO": "rho1-tokenskip", "ENV_MODE": "production", "IMAGE": "image", "WMTP_REMOTE": "s3://bucket/runs"}
    given |= {"WMTP_REFERENCE": "s3://bucket/reference"}
    secrets = {"AWS_SECRET_ACCESS_KEY": "hidden"}
    cluster = {"VESSL_CLUSTER": "c", "VESSL_RESOURCE": "r", "WORKERS": "4"}
    done, [(name, arguments, _)] = stage(
        ["bash", "docker/launch/vessl_multinode.sh", *flags], **cluster, **given, **secrets
    )
    assert done.returncode == 0 and name == "vessl" and arguments[:2] == ["experiment", "create"]
    assert {word for word in arguments if word.startswith("--")} <= set(VESSL["options"]["experiment create"])
    values = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert values["--worker-count"] == "4" and values["--secret"] == "AWS_SECRET_ACCESS_KEY=hidden"
    assert "hidden" not in values["--command"]
    commands.append(run_inner(stage, values["--command"])[0])

    done, [(name, arguments, _)] = stage(
        ["bash", "docker/launch/vesslctl.sh", *flags], RESOURCE_SPEC="s", OBJECT_VOLUME="v", SECRETS="HF_TOKEN", **given
    )
    assert done.returncode == 0 and name == "vesslctl" and arguments[:2] == ["job", "create"]
    pairs = list(zip(arguments[2::2], arguments[3::2], strict=True))
    assert ("--object-volume", "v:/runs") in pairs and ("--secret", "HF_TOKEN=HF_TOKEN") in pairs
    environment = dict(value.split("=", 1) for option, value in pairs if option == "--env")
    commands.append(run_inner(stage, dict(pairs)["--cmd"], **environment)[0])

    [job] = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    done, [call] = stage(container["command"], **environment)
    commands.append(trainer_flags(call))

    # In a container, so that no .venv of the repository comes before the stand-in; one process a node, each with its rank.
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123", "WMTP_IMAGE": "image"}
    done, calls = stage(["bash", "docker/launch/slurm.sh", *flags], WMTP_RUNS="/runs", **slurm)
    assert done.returncode == 0, done.stderr
    assert [(call[2]["RANK"], call[2]["NUM_NODES"], call[2]["MASTER_ADDR"]) for call in calls] == [
        ("0", "2", "node7"),
        ("1", "2", "node7"),
    ]
    commands += [trainer_flags(call) for call in calls]

    options = parse(commands)
    found = [row["weighting.algorithm"] for row in options]
    assert found == ["rho1-weighted", "rho1-tokenskip", "rho1-tokenskip", "baseline-mtp", "baseline-mtp", "baseline-mtp"]
    assert options[0]["reference.path"] == "/runs/reference" and options[3]["workdir"] == "/runs/baseline-mtp-test"
    for row in (*options[1:3], *options[4:]):
        assert row["dry_run"] is True and row["data.sources"] == ["jsonl:/data/a b.jsonl"]
    for row in options[1:3]:
        assert row["checkpoint.remote"] == "s3://bucket/runs/rho1-tokenskip-production"


def test_a_job_of_slurm_that_is_told_to_leave_is_queued_again(stage, tmp_path):
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "123", "WMTP_IMAGE": "image"}
    for code, queued in ((1, False), (143, True)):
        done, _ = stage(["bash", "docker/launch/slurm.sh"], WMTP_RUNS="/runs", SRUN_CODE=str(code), **slurm)
        assert done.returncode == code and (tmp_path / "requeued").exists() == queued
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"


STUDY = ["--config=configs/studies/toy.py", "--workdir=s3://bucket/studies/a toy", "--dry_run"]


def test_launchers_of_studies_start_the_command(stage, tmp_path):
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "123", "WMTP_IMAGE": "image", "WMTP_STUDIES": str(tmp_path / "studies")}
    done, [(name, arguments, _)] = stage(["bash", "docker/launch/study_slurm.sh", *STUDY], **slurm)
    assert done.returncode == 0 and (name, arguments) == ("python", ["-m", "wmtp_jax.study", *STUDY]), done.stderr
    array = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"}
    for variables, queued in (({}, "requeue 123\n"), (array, "requeue 123\nrequeue 120_3\n")):
        done, _ = stage(["bash", "docker/launch/study_slurm.sh", *STUDY], SRUN_CODE="143", **slurm, **variables)
        assert done.returncode == 143 and (tmp_path / "requeued").read_text() == queued

    vessl = {"VESSL_CLUSTER": "c", "VESSL_RESOURCE": "r", "IMAGE": "image", "MACHINES": "3", "AWS_SECRET_ACCESS_KEY": "hidden"}
    done, calls = stage(["bash", "docker/launch/study_vessl.sh", *STUDY], AWS_ENDPOINT_URL="http://store", **vessl)
    assert done.returncode == 0 and len(calls) == 3, done.stderr
    for name, arguments, _ in calls:
        assert name == "vessl" and arguments[:2] == ["experiment", "create"]
        assert {word for word in arguments if word.startswith("--")} <= set(VESSL["options"]["experiment create"])
        values = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert values["--secret"] == "AWS_SECRET_ACCESS_KEY=hidden" and "hidden" not in values["--command"]
        done, [(program, inner, variables)] = stage(["bash", "-c", values["--command"]])
        assert (program, inner) == ("python", ["-m", "wmtp_jax.study", *STUDY]) and variables["AWS_ENDPOINT_URL"] == "http://store"
    done, calls = stage(["bash", "docker/launch/study_vessl.sh", STUDY[0], "--workdir=studies/toy"], **vessl)
    assert (done.returncode, calls) == (2, []) and done.stderr.count("\n") == 1
    # What they start is a study that can be run.
    command = [sys.executable, "-m", "wmtp_jax.study", *STUDY]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "9 runs: 3 arms x 3 seeds" in done.stdout, done.stderr


def test_jobset_gives_every_pod_its_place():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    variables = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in pod["containers"][0]["env"]}
    assert int(variables["NUM_NODES"]) == spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    assert "job-completion-index" in variables["RANK"]["fieldRef"]["fieldPath"]
    name = jobset["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    assert pod["containers"][0]["ports"][0]["containerPort"] == int(variables["MASTER_PORT"])
    assert pod["securityContext"]["runAsNonRoot"] and pod["terminationGracePeriodSeconds"] > 30
    assert spec["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0, "pods start anew together"


# ---- the image ---------------------------------------------------------------------------------------------------------


def test_the_dockerfile_and_the_script_take_the_same_steps():
    """docker/build_without_docker.sh does what the Dockerfile does: the same steps in the same order, the same files copied."""

    def steps(text):
        return re.findall(r"docker/steps\.sh (\w+)", text)

    def copied(text, pattern):
        return sorted(word for line in re.findall(pattern, text, re.M) for word in line.split() if not word.startswith("--"))

    dockerfile, script = (DOCKER / "Dockerfile").read_text(), (DOCKER / "build_without_docker.sh").read_text()
    assert steps(dockerfile) == steps(script) == ["environment", "dependencies", "program"]
    from_context = copied(dockerfile, r"^COPY (?!--from)(.+) \S+$")
    assert from_context == copied(re.sub(r'"\$root/([^"]+)"', r"\1", script), r"^cp (?:-r )?(.+) \S+$")
    # Layers: what seldom changes is copied first, and nothing of the code before the dependencies are there.
    assert dockerfile.index("COPY pyproject.toml constraints.txt") < dockerfile.index("steps.sh dependencies")
    assert dockerfile.index("steps.sh dependencies") < dockerfile.index("COPY wmtp_jax")
    assert re.search(r"^ARG BASE=python:\S+@sha256:[0-9a-f]{64}$", dockerfile, re.M), "the base is pinned"
    assert re.search(r"^USER (?!root|0)\S+$", dockerfile, re.M) and "HEALTHCHECK" in dockerfile


def test_the_build_context_has_what_the_image_copies_and_no_secret():
    """.dockerignore lets in what the Dockerfile copies, file by file, and nothing with a secret, data or history in it."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def matches(pattern, path):
        parts, wanted = path.split("/"), pattern.split("/")
        if wanted[0] == "**":
            return any(Path(part).match(wanted[1]) for part in parts)
        return parts[: len(wanted)] == wanted or pattern == "*"

    def sent(path):
        kept = True
        for rule in rules:  # the last rule that matches decides
            if matches(rule.removeprefix("!"), path):
                kept = rule.startswith("!")
        return kept

    dockerfile = (DOCKER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M):
        for word in line.split():
            assert sent(word), f"{word} is copied but not sent"
            for file in (ROOT / word).rglob("*.py"):
                assert sent(str(file.relative_to(ROOT)))
    secret = (".env", ".env.production", "configs/.env", "wmtp_jax/.env", "wmtp_jax/key.pem", "configs/id.key")
    private = (".git/config", "runs/a/x", "mlflow.db", ".venv/bin/python")
    for path in (*secret, *private, "tests/conftest.py", "docker/compose.yaml", "wmtp_jax/__pycache__/a.pyc"):
        assert not sent(path), f"{path} would be sent to the engine"
    ignored = subprocess.run(["git", "check-ignore", ".env", ".env.production"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == [".env", ".env.production"]


def test_health_is_that_something_is_written(tmp_path, monkeypatch, capsys):
    health = load(DOCKER / "health.py")
    process = tmp_path / "process"
    process.mkdir()
    started = os.stat(process).st_mtime
    (process / "cmdline").write_bytes(b"mlflow\0server\0")
    monkeypatch.setenv("WMTP_RUNS", str(tmp_path / "runs"))
    assert health.main(process) == 0, "not a training"
    (process / "cmdline").write_bytes(b"python\0-m\0wmtp_jax.main\0--config=x\0")
    assert health.main(process) == 0, "it has just started"
    os.utime(process, (started - 9000, started - 9000))
    assert health.main(process) == 1 and "WMTP_HEALTH_SECONDS=3600" in capsys.readouterr().out
    stage = tmp_path / "runs" / "critic" / "value"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").touch()
    assert health.main(process) == 0
    os.utime(stage / "metrics.jsonl", (started - 4000, started - 4000))
    assert health.main(process) == 1
    monkeypatch.setenv("WMTP_HEALTH_SECONDS", "5000")
    assert health.main(process) == 0


def small(corpus):
    """Flags behind `train` that make a run as small as a test wants it."""
    settings = {
        "data.sources": f"('text:{corpus}/*.py',)", "data.sequence_length": 32, "data.vocabulary_size": 300,
        "data.validation_fraction": 0.2, "model.width": 16, "model.layers": 1, "model.attention_heads": 2,
        "reference.model.width": 16, "reference.model.attention_heads": 2,
    }  # fmt: skip
    return ["--device=cpu", *(f"--config.{key}={value}" for key, value in settings.items())]


def test_the_entrypoint_really_starts_the_trainer(python_corpus, tmp_path):
    """A dry run through the entrypoint, with the real python."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WMTP_RUNS": str(tmp_path)}
    done = subprocess.run(
        ["bash", "docker/entrypoint.sh", "train", "--dry_run", *small(python_corpus)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "baseline-mtp" in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_steps_of_the_image_make_a_trainer(python_corpus, tmp_path):
    """The Dockerfile's steps without an engine, then a run of a few steps of what they made, away from the repository."""
    built = subprocess.run(
        ["bash", str(DOCKER / "build_without_docker.sh"), str(tmp_path), "cpu", ""],
        cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WMTP"))}
    environment |= {"PATH": f"{tmp_path}/opt/wmtp/bin:/usr/bin:/bin", "WMTP_RUNS": f"{tmp_path}/runs"}
    environment["XDG_CACHE_HOME"] = f"{tmp_path}/cache"
    done = subprocess.run(
        ["bash", "docker/entrypoint.sh", "train", *small(python_corpus), "--config.train.steps=4"],
        cwd=tmp_path / "app", env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "baseline-mtp-test" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    frozen = subprocess.run(
        [tmp_path / "opt/wmtp/bin/python", "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    installed = dict(line.lower().replace("_", "-").split("==") for line in frozen.splitlines())
    wrong = {name: (version, pinned[name]) for name, version in installed.items() if pinned.get(name, version) != version}
    assert not {name: pair for name, pair in wrong.items() if name not in ("pip", "setuptools")}
    assert "wmtp" in installed and "pytest" not in installed and "torch" not in installed
