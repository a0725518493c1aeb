"""What a run's figures depend on: program, configuration and corpus, as hashes; and the machine that they were made on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What trains nothing may change between two runs of a study.
_NOT_TRAINING = ("study", "report", "export", "planning")
_LIBRARIES = {"jax": ("jax", "jaxlib", "flax", "optax", "numpy"), "torch": ("torch", "numpy")}


def program_hash() -> str:
    """Of all source files that a training may run: neither a commit of results nor an edit of a page makes another program."""
    digest = hashlib.sha256()
    for package in ("wmtp_jax", "wmtp_torch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT)
            if name.parts[1] not in _NOT_TRAINING:
                digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit of the program, with `+` behind it where files differ from it; "" outside a git checkout."""
    described = _git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    return described if _git("ls-files", "--error-unmatch", "wmtp_jax/__init__.py") else ""


def hash_of(value: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def machine(cores: int, backend: str) -> dict[str, Any]:
    """What decides a run's bits besides the program: the processor, how many of its cores, and the libraries that compute."""
    return {
        "processor": processor(),
        "instructions": instructions(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES[backend]},
        },
    }


def instructions() -> list[str]:
    """The processor's instructions that compilers make other products of; processors of one name differ in them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return []
    return sorted(word for word in words if word.startswith(("avx", "fma", "amx", "f16c")))


def processor() -> str:
    """The model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if models:
        return models[0]
    if platform.system() == "Darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
        ).stdout.strip()
    return platform.processor() or platform.machine()


def cores() -> list[int]:
    """Those that this process may run on; where the system doesn't say, all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first key whose values differ, "" where none does."""
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            return key
    return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
