"""The measuring script's parts at tiny shapes: what it counts, and that it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "experiments" / "speed"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    import tables
    import updates

    return updates, tables


def test_all_updates_begin_with_the_same_loss(scripts):
    updates, _ = scripts
    shape = updates.Shape("tiny", 128, 32, 2, 2, 64, 2, 16, "float32")
    losses = {name: updates.peer(name, shape, 2).step() for name in (updates.OURS, updates.LEAN, updates.NAIVE)}
    # One model and batch; full logits against tiles: float32 rounding of a mean of 64.
    assert losses[updates.LEAN] == pytest.approx(losses[updates.OURS], rel=1e-6)
    assert losses[updates.NAIVE] == pytest.approx(losses[updates.OURS], rel=1e-6)
    # torch draws its own parameters, and has made one update: close to the uniform distribution's loss.
    assert updates.peer(updates.EAGER, shape, 2).step() == pytest.approx(losses[updates.OURS], rel=0.05)


def test_tables_say_what_did_not_fit_and_plots_leave_it_away(scripts, tmp_path):
    _, tables = scripts
    facts = {"hardware": "H", "threads": 2, "jax": "1", "torch": "2", "pairs": 7, "peak_flops": 1e11, "load": 0.1, "date": "D"}
    measured = {"shape": "s", "heads": 4, "name": "ours", "seconds": 0.5, "tokens_per_second": 4096.0, "mfu": 0.5, "ratio": 0.8,
                "lowest": 0.7, "highest": 0.9}  # fmt: skip
    missing = {"shape": "s", "heads": 4, "name": "torch eager"}
    found = {"peers": {**facts, "rows": [measured, missing]}}
    text = tables.render(found)
    assert "| s | ours | 500 | 4,096 | 0.50 | 0.80 (0.70 to 0.90) |" in text and "out of memory" in text
    assert tables.plot(found).count("<rect") == 2  # the ground and one bar
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- measured: cpu -->\nold\n<!-- end: cpu -->\nafter\n")
    tables.insert(document, "cpu", "new")
    assert document.read_text() == "before\n<!-- measured: cpu -->\nnew\n<!-- end: cpu -->\nafter\n"


@pytest.mark.slow
def test_the_script_runs_through():
    command = [sys.executable, str(SPEED / "measure.py"), "--suite", "smoke", "--pairs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for heading in ("### An update beside plain ones", "### Heads", "### Algorithms", "### The loss alone", "### The formula"):
        assert heading in done.stdout
    for kind in ("linear", "block", "sequential"):
        assert f"| tiny | {kind} | 2 |" in done.stdout
