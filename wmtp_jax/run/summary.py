"""What a finished run tells the person who started it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp_jax.storage.redact import redact


def table(before: dict[str, float], after: dict[str, float], *, bigram: dict[str, float] | None) -> str:
    """Cross-entropy of every head and bits per byte, before and after, beside the bigram model, as lines of text."""
    heads = sorted((key for key in after if key.startswith("eval/ce_head_")), key=lambda key: int(key.rpartition("_")[2]))
    rows = [(f"head {k}, nats a token", before[key], after[key], (bigram or {}).get(key)) for k, key in enumerate(heads)]
    key = "eval/bits_per_byte"
    rows.append(("head 0, bits per byte", before[key], after[key], (bigram or {}).get(key)))
    lines = [f"{'held-out':<24}{'before':>10}{'after':>10}{'bigram':>10}"]
    for name, first, last, pair in rows:
        lines.append(f"{name:<24}{first:>10.3f}{last:>10.3f}" + (f"{pair:>10.3f}" if pair is not None else f"{'':>10}"))
    return "\n".join(lines)


def completions(samples: Sequence[dict[str, str]]) -> str:
    """Sampled completions, the prompt's last lines first, each behind a bar."""
    blocks = []
    for number, sample in enumerate(samples, start=1):
        prompt = _bar(sample["prompt"].splitlines()[-6:], "|")
        continued = _bar(sample["completion"].splitlines()[:12], ">")
        blocks.append(f"completion {number} (| prompt from a held-out file, > sampled)\n{prompt}\n{continued}")
    return "\n\n".join(blocks)


def _bar(lines: Sequence[str], mark: str) -> str:
    return "\n".join(f"  {mark} {line}" for line in lines)


def places(directory: Path, tracking_uri: str, tracked: bool) -> list[tuple[str, str]]:
    """Where to look after a run."""
    rows = [
        ("curves", directory / "curves.png"),
        ("metrics", directory / "metrics.jsonl"),
        ("weights of single tokens", f"python -m wmtp_jax.report {directory}"),
        ("checkpoints", directory / "checkpoints"),
    ]
    if tracked:
        store = redact(tracking_uri) or f"sqlite:///{directory.parent / 'mlflow.db'}"
        shown = store if store.startswith("http") else f"python -m mlflow ui --backend-store-uri {store}"
        rows.append(("MLflow", shown))
    rows.append(("another algorithm", "--config.weighting.algorithm=NAME --workdir=ANOTHER"))
    rows.append(("your own data", "--config.data.sources=\"('text:PATH/**/*.py',)\""))
    return [(name, str(value)) for name, value in rows]


def human_bytes(count: float) -> str:
    """`1536 -> "1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def corpus_rows(description: dict[str, Any]) -> list[tuple[str, str]]:
    """`Corpus.summary()` as rows for `facts`."""
    rows = []
    for source in description["sources"]:
        sides = ", ".join(
            f"{side} {source[side]['documents']:,} documents, {source[side]['tokens']:,} tokens, {source[side]['rows']:,} rows"
            for side in ("train", "validation")
        )
        dropped = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items() if count)
        rows.append((source["name"], sides + (f"; left out: {dropped}" if dropped else "")))
    rows.append(("tokenizer", f"{description['vocabulary_size']:,} tokens, {description['bytes_per_token']:.2f} bytes each"))
    rows.append(("corpus hash", description["hash"][:16]))
    return rows


def facts(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    """A titled two-column list."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
