"""What GitHub runs: the schema, pinned actions, rights, and that what is called is there; and the checkers of docker/."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wmtp_jax.settings import ALGORITHMS

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent
CHECKS = {
    "workflows": ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS],
    "compose": ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "docker" / "compose.yaml"],
    "run file": ["python", ROOT / "tests" / "vessl_models.py", "check", ROOT / "docker" / "vessl.yaml"],
    "image": ["hadolint", ROOT / "docker" / "Dockerfile"],
    "scripts": ["shellcheck", *(ROOT / "docker").glob("*.sh"), *(ROOT / "docker" / "launch").glob("*.sh"), ROOT / ".ci" / "run"],
}


@pytest.mark.parametrize("what", CHECKS)
def test_passes_its_checker(what):
    program, *arguments = map(str, CHECKS[what])
    done = subprocess.run([BIN / program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checkers_can_fail(tmp_path):
    broken = tmp_path / "broken.yml"
    broken.write_text("on: push\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    step: []\n")
    assert subprocess.run([BIN / "check-jsonschema", *CHECKS["workflows"][1:3], broken], capture_output=True).returncode == 1
    broken.write_text("services:\n  a:\n    imag: x\n")
    assert subprocess.run([BIN / "check-jsonschema", *CHECKS["compose"][1:3], broken], capture_output=True).returncode == 1
    broken.write_text("name: a\nsecrets: {}\n")
    assert subprocess.run([BIN / "python", *CHECKS["run file"][1:3], broken], capture_output=True).returncode == 1
    broken.write_text("FROM python:latest\nRUN cd /x\n")
    assert subprocess.run([BIN / "hadolint", broken], capture_output=True).returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_takes_no_more_rights_than_it_needs(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        rights = {right for right, level in job.get("permissions", {}).items() if level == "write"}
        assert rights == ({"packages", "id-token", "attestations"} if (path.name, name) == ("image.yml", "push") else set())
        assert "pull_request_target" not in workflow[True] and job["timeout-minutes"] <= 90
        if rights:
            assert job["if"] == "github.event_name == 'push'", "a pull request's code must not run with rights to write"
        for step in job["steps"]:
            used = step.get("uses", "")
            assert not used or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", used), f"{name}: {used} is not pinned by its commit"
            if used.startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # Text that someone else chose, put into a script, is run as a part of it.
            assert not re.search(r"\$\{\{(?!\s*matrix\.)", step.get("run", "")), f"{name}: an expression inside a script"
    assert len(re.findall(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", path.read_text(), re.M)) == path.read_text().count("uses:")


def test_one_action_is_pinned_to_one_commit_everywhere():
    pins = set(re.findall(r"uses: (\S+)@(\S+) # (\S+)", "".join(path.read_text() for path in WORKFLOWS)))
    assert len(pins) == len({action for action, *_ in pins})


def test_what_the_workflows_call_is_there():
    text = "".join(path.read_text() for path in WORKFLOWS)
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M))
    targets |= {".venv/.installed", ".venv/.installed-test"}
    assert set(re.findall(r"\bmake ([\w./-]+)", text)) <= targets
    for name in re.findall(r"(?:bash|python|pytest[^\n]*?) ((?:docker|tests)/[\w./-]+)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"--config=(configs/\w+\.py)", text):
        assert (ROOT / name).exists(), name


def test_the_four_algorithms_are_those_of_the_trainer():
    four = ["baseline-mtp", "critic-wmtp", "rho1-weighted", "rho1-tokenskip"]
    assert list(ALGORITHMS)[:4] == four
    ci, vessl = (yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text()) for name in ("ci.yml", "vessl.yml"))
    assert ci["jobs"]["algorithms"]["strategy"]["matrix"]["algorithm"] == four
    assert vessl[True]["workflow_dispatch"]["inputs"]["algorithm"]["options"] == four
    entries = {(row["python"], row["versions"]) for row in ci["jobs"]["tests"]["strategy"]["matrix"]["include"]}
    assert entries == {("3.11", "pinned"), ("3.12", "newest")}
    assert ci["jobs"]["mac"]["runs-on"].startswith("macos-")


def test_every_hook_before_a_commit_runs_here():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert all(repository["repo"] == "local" for repository in config["repos"])
    for hook in hooks:
        program = hook["entry"].split()[0]
        assert program == "bash" or (BIN / program.removeprefix(".venv/bin/")).exists(), hook["id"]


def test_the_hook_against_secrets_finds_them(tmp_path):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    [hook] = [hook for hook in config["repos"][0]["hooks"] if hook["id"] == "secrets"]
    key = "-----BEGIN RSA " + "PRIVATE KEY-----"

    def refused(name, text):
        (tmp_path / name).write_text(text)
        return subprocess.run(["bash", "-c", hook["entry"] + f" {name}"], cwd=tmp_path, capture_output=True).returncode != 0

    assert refused(".env", "A=1") and refused(".env.production", "A=1") and refused("notes.txt", f"a\n{key}\nb")
    assert not refused(".env.example", "A=") and not refused("notes.txt", "PRIVATE KEY")
