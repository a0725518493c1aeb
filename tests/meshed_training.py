"""Run by `test_mesh.py` in a process of its own with 8 simulated devices: whole experiments on meshes and on one device, as
JSON. Arguments: which experiment, the corpus, a directory to work in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

from tests.training import changed, comparable, tiny_config  # noqa: E402
from tests.training import run as train  # noqa: E402
from wmtp_jax.checkpoint.orbax import load_model  # noqa: E402
from wmtp_jax.model import flatten  # noqa: E402


def run(config, workdir: Path, *, mesh: dict[str, int], **changes) -> list[dict]:
    sizes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
    train(changed(config, sizes | changes), workdir)
    return comparable(workdir)


def deviations(lines: list[dict], others: list[dict]) -> dict[str, float]:
    """The largest relative difference of each metric; of an explained share, which is 1 less a quotient, the difference."""
    assert [(line["step"], line["stage"], sorted(line)) for line in lines] == [
        (line["step"], line["stage"], sorted(line)) for line in others
    ]
    found: dict[str, float] = {}
    for line, other in zip(lines, others, strict=True):
        for name, value in line.items():
            if isinstance(value, float):
                scale = 1.0 if "explained" in name else max(abs(value), 1e-6)
                found[name] = max(found.get(name, 0.0), abs(other[name] - value) / scale)
    return found


def parameters_apart(one: Path, other: Path) -> float:
    leaves = [flatten(load_model(path)[1]) for path in (one, other)]
    return max(float(abs(leaves[0][name] - leaves[1][name]).max()) for name in leaves[0])


def split(corpus: Path, directory: Path) -> dict:
    """Updates of `focal` weights, on one device and on 2 x 2 x 2 in two micro-batches."""
    options = {"weighting.algorithm": "focal", "train.steps": 3, "train.batch_size": 8, "eval.every": 0,
               "tracking.enabled": False, "eval.token_rows": 0}  # fmt: skip
    alone = run(tiny_config(corpus, directory / "tokens"), directory / "alone", mesh={}, **options)
    mesh = {"data": -1, "fsdp": 2, "tensor": 2}
    lines = run(tiny_config(corpus, directory / "tokens"), directory / "split", mesh=mesh, **options, **{"train.accumulation": 2})
    apart = parameters_apart(directory / "alone", directory / "split")
    return {"metrics": deviations(alone, lines), "parameters": apart}


def weighted(corpus: Path, directory: Path) -> dict:
    """rho1-tokenskip: 8 updates on one device; the same as 3 on 8 devices, 3 more on 4, and the last 2 on one."""
    config = lambda **changes: tiny_config(  # noqa: E731
        corpus, directory / "tokens", optimizer__schedule="constant", train__batch_size=8, eval__token_rows=3,
        optimizer__warmup_steps=0,
        tracking__enabled=False, **changes,
    )  # fmt: skip
    alone = run(config(), directory / "alone", mesh={})
    given = {"reference.path": str(directory / "alone" / "reference"), "eval.completions": 1, "eval.completion_tokens": 4}
    steps = [({"data": 2, "fsdp": 2, "tensor": 2}, 3, 2), ({"fsdp": 4}, 6, 2), ({}, 8, 2)]
    for mesh, last, accumulation in steps:
        options = {"train.steps": last, "train.accumulation": accumulation, "eval.every": 4, **given}
        lines = run(config(), directory / "moved", mesh=mesh, **options)
    # Evaluations at ends that the run on one device does not have.
    for line, other in zip(lines, alone, strict=True):
        for name in [name for name in line if name.startswith("eval/") and name not in other]:
            del line[name]
    return {
        "metrics": deviations(alone, lines),
        "parameters": parameters_apart(directory / "alone", directory / "moved"),
        "steps": len(alone),
        "tokens": sorted(path.name for path in (directory / "moved" / "tokens").glob("*.npz")),
    }


def critic(corpus: Path, directory: Path) -> dict:
    """critic-wmtp with all its stages, `block` heads and Muon, on one device and on 8."""
    options = {
        "weighting.algorithm": "critic-wmtp", "reward.source": "likelihood", "critic.allow_unexplained": True,
        "model.heads.kind": "block", "model.layers": 2, "optimizer.name": "muon", "train.batch_size": 8,
        "tracking.enabled": False,
    }  # fmt: skip
    runs = {"alone": {}, "split": {"data": -1, "tensor": 2, "sequence": 2}}
    done = {}
    for name, mesh in runs.items():
        lines = run(tiny_config(corpus, directory / "tokens"), directory / name, mesh=mesh, **options)
        done[name] = {"train": lines} | {
            stage: comparable(directory / name / stage) for stage in ("reference", "trunk", "value")
        }
    return {stage: deviations(done["alone"][stage], done["split"][stage]) for stage in done["alone"]}


if __name__ == "__main__":
    found = {"split": split, "weighted": weighted, "critic": critic}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    print("\n" + json.dumps(found))
