"""Tokens a second, MFU, memory and compile time of an update, beside plain ones of the same shapes, in one process.

    python experiments/speed/measure.py                          all of it, on what is there: a CUDA GPU, else the CPU
    python experiments/speed/measure.py --parts peers loss       only these; figures of the others stay as they were
    python experiments/speed/measure.py --suite smoke            a minute, of tiny shapes; writes nothing

Needs jax, flax, optax, numpy, ml_collections and torch. What is compared runs in turn, round after round, every second round
backwards; a ratio is the median over rounds of two times of the same round, so that what else the machine does reaches both.
An algorithm runs between two updates of the baseline, which also runs between two of its own: that row is the noise.
Writes results/SUITE.json and .svg, and the tables in README.md.

Parts: `flops` (the formula beside XLA's cost analysis), `memory` (ours and plain updates, each in a fresh process, with
compile times), `peers` (their speed), `heads` (1, 2, 4, 8 of each kind), `algorithms` (every algorithm beside the baseline),
`loss` (loss and gradients alone; CPU suite).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both libraries share a GPU's memory; the parent's share must leave room for the children.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# glibc keeps some of what is freed; children read their resident size.
os.environ.setdefault("MALLOC_TOP_PAD_", "0")
# What torch.compile kept from an earlier run would be no compile time; children compile, the parent finds what they made.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    kept_by_inductor = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = kept_by_inductor.name

import jax
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]  # siblings, and the packages where they are not installed

import loss as loss_part  # noqa: E402
import tables  # noqa: E402
from torch_model import resident  # noqa: E402
from updates import ALGORITHMS, EAGER, PEERS, Shape, Update, full_logits_loss, jax_update, peer  # noqa: E402

from wmtp_jax.model import abstract_parameters, merge  # noqa: E402
from wmtp_jax.parallel.devices import peak_flops, set_gpu_flags  # noqa: E402
from wmtp_jax.planning.flops import flops_per_token, recomputed_flops_per_token  # noqa: E402

KINDS = ("linear", "block", "sequential")
SUITES = {
    "cpu": [Shape("6 layers of 256", 8192, 256, 6, 4, 704, 8, 256, "float32")],
    "gpu": [
        Shape(f"{name}, {length:,}", 32_000, width, layers, heads, mlp, tokens // length, length, "bfloat16", remat)
        for name, width, layers, heads, mlp, tokens, remat in (
            ("100M", 768, 12, 12, 2048, 32_768, "none"),
            ("350M", 1024, 24, 16, 2816, 16_384, "dots"),
            ("1B", 2048, 16, 16, 5632, 8192, "dots"),
        )
        for length in (2048, 4096)
    ],
    "smoke": [Shape("tiny", 128, 32, 2, 2, 64, 2, 16, "float32")],
}
COUNTS = {"cpu": (1, 2, 4, 8), "gpu": (1, 2, 4, 8), "smoke": (1, 2)}
PARTS = ("flops", "memory", "peers", "heads", "algorithms", "loss")


# ---- time ----------------------------------------------------------------------------------------------------------


def rounds(steps: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every step, round after round; the first round warms up and is left away."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(pairs + 1):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            took, _ = _seconds(steps[name])
            if number:
                seconds[name].append(took)
    return seconds


def beside(times: list[float], base: list[float]) -> dict[str, float]:
    """The ratio of two times of a round: median, lowest and highest."""
    ratios = [own / other for own, other in zip(times, base, strict=True)]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def between(base: Callable[[], Any], own: Callable[[], Any], pairs: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of `own`, `pairs` times, and what they are beside `base` right before and right after each, so that a drift of the
    machine reaches both alike: for differences of a few percent, which whole rounds hide. Also of the processor's time, which
    others' work on the machine reaches less, and of the shortest of each."""
    base(), own()
    around, found = [_seconds(base)], []
    for _ in range(pairs):
        found.append(_seconds(own))
        around.append(_seconds(base))
    (wall, cpu), (base_wall, base_cpu) = zip(*found, strict=True), zip(*around, strict=True)
    mean = lambda times: list(map(statistics.fmean, itertools.pairwise(times)))  # noqa: E731
    facts = beside(wall, mean(base_wall)) | {"cpu_ratio": beside(cpu, mean(base_cpu))["ratio"]}
    return list(wall), facts | {"shortest": min(wall) / min(base_wall)}


def _seconds(step: Callable[[], Any]) -> tuple[float, float]:
    """On the wall, and of the processor in all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(times: list[float], shape: Shape, heads: int, kind: str, peak: float | None) -> dict[str, Any]:
    """Median seconds, tokens a second and MFU of an update."""
    median = statistics.median(times)
    rate = shape.tokens / median
    flops = flops_per_token(shape.settings(heads, kind), shape.length)
    return {"seconds": median, "tokens_per_second": rate, "mfu": rate * flops / peak if peak else None}


# ---- memory --------------------------------------------------------------------------------------------------------


def fresh(name: str, shape: Shape, heads: int) -> tuple[float, int]:
    """Runs in a fresh process: seconds of compilation, and what an update takes at its peak beyond parameters, gradients and
    optimizer state."""
    update = peer(name, shape, heads)
    return update.compile_seconds, temporary_bytes(name, update, shape, heads)


def temporary_bytes(name: str, update: Update, shape: Shape, heads: int) -> int:
    """Of JAX by XLA's buffer assignment, of torch by the growth of the process, on a GPU by its allocator's count.

    The first updates make what stays.
    """
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(shape.settings(heads))[1]))
    if update.temporary_bytes is not None:
        return update.temporary_bytes - gradients
    update.step()
    if jax.default_backend() == "gpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update.step()
        return torch.cuda.max_memory_allocated() - before - gradients
    update.step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    update.step()
    return resident("VmHWM") - before - gradients


def in_child(function: Callable, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# ---- the parts -----------------------------------------------------------------------------------------------------


def _built(make: Callable, *arguments: Any, **options: Any) -> Any:
    """An update; None where the device's memory does not hold it."""
    try:
        update = make(*arguments, **options)
        update.step()
        return update
    except torch.OutOfMemoryError:
        return None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def measure_memory(suite: str, pairs: int, peak: float | None, names: tuple[str, ...]) -> list[dict]:
    rows, heads = [], max(COUNTS[suite][:3])
    for shape in SUITES[suite]:
        for name in names:
            row = {"shape": shape.name, "heads": heads, "name": name}
            found = in_child(_fresh_or_none, name, shape, heads)
            rows.append(row | dict(zip(("compile_seconds", "temporary_bytes"), found or (None, None), strict=True)))
            _tell(rows[-1])
    return rows


def measure_peers(suite: str, pairs: int, peak: float | None, names: tuple[str, ...]) -> list[dict]:
    rows, heads = [], max(COUNTS[suite][:3])
    for shape in SUITES[suite]:
        updates = {name: _built(peer, name, shape, heads) for name in names}
        times = rounds({name: update.step for name, update in updates.items() if update}, pairs)
        for name in names:
            row = {"shape": shape.name, "heads": heads, "name": name}
            if name in times:
                row |= speed(times[name], shape, heads, "linear", peak)
                row |= beside(times[name], times[EAGER]) if EAGER in times else {}
            rows.append(row)
            _tell(row)
    return rows


def _fresh_or_none(name: str, shape: Shape, heads: int) -> tuple[float, int] | None:
    try:
        return fresh(name, shape, heads)
    except (torch.OutOfMemoryError, jax.errors.JaxRuntimeError):
        return None  # the parent's attempt says why


def measure_heads(suite: str, pairs: int, peak: float | None, kinds: tuple[str, ...]) -> list[dict]:
    rows = []
    for shape in SUITES[suite]:
        for kind in kinds:
            updates = {count: _built(jax_update, shape, count, kind) for count in COUNTS[suite]}
            times = rounds({count: update.step for count, update in updates.items() if update}, pairs)
            for count, seconds in times.items():
                row = {"shape": shape.name, "kind": kind, "heads": count} | speed(seconds, shape, count, kind, peak)
                carried = _carried_out(shape, count, kind) / _carried_out(shape, 1, kind)
                found = beside(seconds, times[1])
                row |= {
                    "temporary_bytes": updates[count].temporary_bytes, "compile_seconds": updates[count].compile_seconds,
                    "beside_one_head": found["ratio"], "predicted": carried,  # by operations, recomputed ones included
                    **{key: value / carried for key, value in found.items()},
                }  # fmt: skip
                rows.append(row)
                _tell(row)
    return rows


def _carried_out(shape: Shape, heads: int, kind: str) -> float:
    settings = shape.settings(heads, kind)
    return flops_per_token(settings, shape.length) + recomputed_flops_per_token(settings, shape.length)


def measure_algorithms(suite: str, pairs: int, peak: float | None) -> list[dict]:
    rows, heads = [], max(COUNTS[suite][:3])
    for shape in SUITES[suite][:1]:
        names = list(ALGORITHMS)[: 3 if suite == "smoke" else None]
        updates = {name: jax_update(shape, heads, algorithm=name) for name in names}
        for name, update in updates.items():  # the baseline beside itself tells how far the machine can be trusted
            times, found = between(updates["baseline-mtp"].step, update.step, pairs)
            row = {"shape": shape.name, "heads": heads, "name": name} | speed(times, shape, heads, "linear", peak)
            row |= {"temporary_bytes": update.temporary_bytes, "compile_seconds": update.compile_seconds}
            rows.append(row | found)
            _tell(rows[-1])
    return rows


def measure_loss(suite: str, pairs: int, peak: float | None) -> list[dict]:
    if suite == "gpu":
        return []
    name = "large" if suite == "cpu" else "small"
    return [{"shape": name, **row} for row in loss_part.measure(loss_part.SHAPES[name], pairs)]


def measure_flops(suite: str, pairs: int, peak: float | None) -> list[dict]:
    """Loss on full logits and its gradients of one layer, since XLA counts the body of a loop once."""
    rows = []
    for shape in SUITES[suite]:
        for heads in COUNTS[suite][::2]:
            settings = dataclasses.replace(shape.settings(heads), layers=1, remat="none")
            definition, parameters = abstract_parameters(settings)
            batch = shape.batch(heads)

            def loss(parameters, batch, definition=definition):
                return full_logits_loss(merge(definition, parameters), batch)

            counted = jax.jit(jax.grad(loss)).lower(parameters, batch).cost_analysis()["flops"]
            formula = flops_per_token(settings, shape.length) * shape.tokens
            rows.append({"shape": shape.name, "heads": heads, "formula": formula, "xla": counted, "ratio": counted / formula})
            _tell(rows[-1])
    return rows


def _tell(row: dict) -> None:
    shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
    print("  " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


# ---- the command ---------------------------------------------------------------------------------------------------


def hardware() -> str:
    device = jax.devices()[0]
    if device.platform == "gpu":
        return f"{torch.cuda.get_device_name(0)}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return f"{cpu} ({platform.machine()}), {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    set_gpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="gpu" if jax.default_backend() == "gpu" else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of heads")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="of memory and peers")
    parser.add_argument("--pairs", type=int, default=7, help="rounds")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables and the plot again")
    arguments = parser.parse_args()
    suite = arguments.suite
    path = HERE / "results" / f"{suite}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if arguments.tables:
        _write(path, suite, kept)
        return
    peak = peak_flops(jax.devices()[0])
    facts = {
        "hardware": hardware(), "date": datetime.date.today().isoformat(), "pairs": arguments.pairs,
        "threads": torch.get_num_threads(), "jax": jax.__version__, "torch": torch.__version__, "peak_flops": peak,
    }  # fmt: skip
    print(facts, flush=True)
    names, kinds = tuple(arguments.peers), tuple(arguments.kinds)
    measures = {
        "flops": measure_flops, "algorithms": measure_algorithms, "loss": measure_loss,
        "memory": functools.partial(measure_memory, names=names), "peers": functools.partial(measure_peers, names=names),
        "heads": functools.partial(measure_heads, kinds=kinds),
    }  # fmt: skip
    chosen = {"heads": ("kind", kinds), "memory": ("name", names)}
    for part in arguments.parts:
        print(part, flush=True)
        rows = measures[part](suite, arguments.pairs, peak)
        if part in chosen:  # what was left away stays as it was
            key, wanted = chosen[part]
            rows = [row for row in kept.get(part, {}).get("rows", []) if row[key] not in wanted] + rows
        kept[part] = {**facts, "load": round(os.getloadavg()[0], 1), "rows": rows}
        if suite != "smoke":
            _write(path, suite, kept)
    if suite == "smoke":
        print(tables.render(kept))


def _write(path: Path, suite: str, found: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".svg").write_text(tables.plot(found))
    tables.insert(HERE / "README.md", suite, tables.render(found))


if __name__ == "__main__":
    main()
