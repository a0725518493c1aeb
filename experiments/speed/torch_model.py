"""Time and memory of an update in torch, beside the same model written plainly: separate layers, full logits, torch's AdamW.

Command:  python experiments/speed/torch_model.py [--pairs 7] [--rows 8] [--length 512] [--width 256] [--layers 4] [--heads 4]

The two run in turn, pair after pair; a ratio is that of the two times of a pair. Temporary memory is what a fresh process's
resident size grows by at its peak during an update, beyond parameters, optimizer state (both there before) and gradients. Its
allocator gives back at once what is freed; glibc's would otherwise keep some tens of megabytes, in either.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.settings import ModelSettings, Weighting, rotary_frequencies
from wmtp_jax.settings import Optimizer as Rule
from wmtp_jax.update import Objective
from wmtp_torch.model import initial_parameters, merge
from wmtp_torch.optimizer import Optimizer
from wmtp_torch.train_step import initial_state, train_step

OPTIMIZER = Rule(
    name="adamw", learning_rate=1e-3, muon_learning_rate=0.02, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
    schedule="constant", warmup_steps=0, decay_fraction=0.2, final_fraction=0.1,
)  # fmt: skip
Batch = dict[str, torch.Tensor]


class PlainLayer(nn.Module):
    """A layer as one writes it with torch's own modules."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        self.heads = s.attention_heads
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(s.width, s.norm_epsilon) for _ in range(2))
        self.query, self.key, self.value, self.output = (nn.Linear(s.width, s.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(s.width, s.mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(s.mlp_width, s.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        def rotate(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], dim=-1) * sin

        normed = self.attention_norm(x)
        query, key, value = (
            f(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, attn_mask=mask)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class PlainModel(nn.Module):
    """The same decoder with linear heads; loss on full logits."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        self.embedding = nn.Embedding(s.vocabulary_size, s.width)
        self.layers = nn.ModuleList(PlainLayer(s) for _ in range(s.layers))
        self.final_norm = nn.RMSNorm(s.width, s.norm_epsilon)
        self.heads = nn.ModuleList(nn.Linear(s.width, s.vocabulary_size, bias=False) for _ in range(s.num_heads))
        self.register_buffer("frequencies", torch.from_numpy(rotary_frequencies(s)))

    def forward(self, batch: Batch) -> torch.Tensor:
        angles = (batch["positions"][..., None].float() * self.frequencies).repeat(1, 1, 2)[:, None]
        cos, sin, ids = angles.cos(), angles.sin(), batch["segment_ids"]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask = (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]
        x = self.embedding(batch["tokens"])
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = self.final_norm(x)
        logits = torch.stack([head(x) for head in self.heads], dim=2)
        targets = torch.where(batch["mask"], batch["targets"], -100).long()
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten())


def plain_step(settings: ModelSettings, batch: Batch, *, compiled: bool = False) -> Callable[[], float]:
    """On the batch's device; float32 parameters, products in the settings' compute type. `compiled`: by `torch.compile`."""
    device = batch["tokens"].device
    model = PlainModel(settings).to(device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=settings.initial_scale)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2))
    forward = torch.compile(model) if compiled else model
    narrow = settings.compute_dtype != "float32"

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            loss = forward(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(settings: ModelSettings, batch: Batch) -> Callable[[], float]:
    model = merge(settings, initial_parameters(settings, 0))
    optimizer = Optimizer(OPTIMIZER, 1000)
    state = initial_state(dict(model.named_parameters()), optimizer)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(
            state, batch, None, model=model, optimizer=optimizer, objective=Objective(Weighting())
        )
        return metrics.loss.item()

    return step


STEPS = {"plain": plain_step, "ours": our_step}


def make_batch(settings: ModelSettings, rows: int) -> Batch:
    """Random tokens, three documents a row."""
    length = settings.max_positions
    tokens = np.random.default_rng(0).integers(0, settings.vocabulary_size, (rows, length), dtype=np.int32)
    segments = np.broadcast_to(1 + np.arange(length, dtype=np.int32) * 3 // length, tokens.shape).copy()
    targets, mask = shift_targets(tokens, segments, num_heads=settings.num_heads)
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions(segments), "targets": targets, "mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def temporary_bytes(name: str, settings: ModelSettings, rows: int) -> int:
    """Runs in a fresh process. The first update makes what stays: optimizer state, the libraries' own buffers."""
    step = STEPS[name](settings, make_batch(settings, rows))
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    step()
    parameters = sum(x.numel() for x in initial_parameters(settings, 0).values())
    return resident("VmHWM") - before - 4 * parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("pairs", 7), ("rows", 8), ("length", 512), ("width", 256), ("layers", 4), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--remat", default="none", help="ours alone: none, layer or dots")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 where other work would preempt one")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    settings = ModelSettings(
        vocabulary_size=a.vocabulary, width=a.width, layers=a.layers, attention_heads=a.width // 32, kv_heads=a.width // 32,
        head_dim=32, mlp_width=a.width * 11 // 4, max_positions=a.length, num_heads=a.heads, head_kind="linear", remat=a.remat,
    )  # fmt: skip
    print(f"{platform.machine()}, torch {torch.__version__}, {vars(a)}, float32")
    memory = {}
    os.environ["MALLOC_TOP_PAD_"] = "0"  # for the processes that are started
    for name in STEPS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(temporary_bytes, (name, settings, a.rows))
    batch = make_batch(settings, a.rows)
    steps = {name: make(settings, batch) for name, make in STEPS.items()}
    seconds = {name: [] for name in steps}
    for pair in range(a.pairs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step()
            if pair:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
            print(f"  {name} {pair}: loss {loss:.4f}, {time.perf_counter() - start:.2f} s", flush=True)
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n\n| | median s | temporary MB |\n|---|---|---|")
    for name in steps:
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {memory[name] / 1e6:,.0f} |")
    print(
        f"\nours beside plain: time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"temporary memory {memory['ours'] / memory['plain']:.2f}"
    )


if __name__ == "__main__":
    main()
